"""Dropout, and noise of that kind, that a model applies while it is in training mode."""

from __future__ import annotations

from typing import Any

from torch import nn

CALLED_WITHOUT_A_MODULE = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "activation_dropout",
    "dropout",
    "hidden_dropout",
    # Layers skipped at random, and hidden states of a mixture's router multiplied by random numbers near 1.
    "input_jitter_noise",
    "layerdrop",
    "router_jitter_noise",
)
"""Names in a model's config of dropout, or of noise that counts as dropout, that may be called without a module."""


def active_dropout(model: nn.Module) -> float:
    """The largest dropout probability, or size of noise, of ``model``, of transformers or PEFT; 0 where there is none."""
    configured: Any = model.config
    values = configured.to_dict()
    found = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    found += [values[name] for name in CALLED_WITHOUT_A_MODULE if isinstance(values.get(name), float)]
    return max(found, default=0.0)
