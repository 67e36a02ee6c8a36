"""The Hugging Face Trainer's rules for which parameters decay: they set the order of the optimizer's indices.

The Trainer gives its optimizer two groups, decay then no-decay, of trainable parameters in ``named_parameters`` order (tied
weights once); indices run through the first group, then the second. What counts as no-decay changed between versions, and
the state file does not say which version wrote it, so each rule is tried and accepted on group sizes and every shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

NamedGroups = list[list[str]]


@dataclass(frozen=True)
class DecayRule:
    """``groups(model)`` lists the trainable parameters' names, group by group, in the optimizer's order."""

    name: str
    groups: Callable[[nn.Module], NamedGroups]


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _decay_then_rest(
    excluded_types: tuple[type[nn.Module], ...], patterns: tuple[str, ...], rms_norms: bool
) -> Callable[[nn.Module], NamedGroups]:
    compiled = [re.compile(pattern) for pattern in patterns]

    def excluded_module(module: nn.Module) -> bool:
        return isinstance(module, excluded_types) or (rms_norms and "RMSNorm" in type(module).__name__)

    def groups(model: nn.Module) -> NamedGroups:
        # The Trainer asks for the first name of a tied parameter; the other names in this set are never looked up.
        decaying = set()
        for prefix, module in model.named_modules():
            if excluded_module(module):
                continue
            for name, _ in module.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False):
                if not any(pattern.search(name.lower()) for pattern in compiled):
                    decaying.add(name)
        names = _trainable(model)
        return [[n for n in names if n in decaying], [n for n in names if n not in decaying]]

    return groups


RULES: tuple[DecayRule, ...] = (
    DecayRule(
        "transformers 4.56 and later (LayerNorm, bias, *norm names do not decay)",
        _decay_then_rest(
            (nn.LayerNorm,), (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"), False
        ),
    ),
    DecayRule(
        "transformers 4.51 (LayerNorm, bias, layernorm, rmsnorm do not decay)",
        _decay_then_rest((nn.LayerNorm,), (r"bias", r"layernorm", r"rmsnorm"), False),
    ),
    DecayRule(
        "transformers 4.46 with registered RMSNorm classes (LayerNorm, RMSNorm, bias do not decay)",
        _decay_then_rest((nn.LayerNorm,), (r"bias",), True),
    ),
    DecayRule(
        "transformers 4.46 (LayerNorm, bias do not decay)",
        _decay_then_rest((nn.LayerNorm,), (r"bias",), False),
    ),
    DecayRule("one group in the order of named_parameters", lambda model: [_trainable(model)]),
)
