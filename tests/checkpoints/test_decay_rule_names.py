"""Each decay rule knows norms by every name that its version does."""

from __future__ import annotations

import pytest
from torch import nn

from entropy_probe.checkpoints.decay_rules import RULES
from trainer_decay_rules import ORACLES


class ScaleRMSNorm(nn.Linear):
    """A norm by its type's name alone, for the rule that goes by registered types."""


@pytest.mark.parametrize("number", range(len(ORACLES)))
def test_each_decay_rule_knows_norms_by_every_name_that_its_version_does(number: int) -> None:
    names = ("q_norm", "norm", "normalizer", "LayerNorm", "final_rmsnorm", "bias_gate", "input_layernorm", "proj")
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    model["scale"], model["after"] = ScaleRMSNorm(2, 2), nn.LayerNorm(2)
    decaying = set(ORACLES[number](model))
    trainable = [name for name, _ in model.named_parameters()]
    assert RULES[number].groups(model) == [
        [n for n in trainable if n in decaying], [n for n in trainable if n not in decaying],
    ]  # fmt: skip
