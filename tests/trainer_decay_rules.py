"""Which parameters decay by each version of the Trainer, by its own code or a copy of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names


def _installed(model: nn.Module) -> list[str]:
    return list(Trainer.get_decay_parameter_names(None, model))


def _version_4_51(model: nn.Module) -> list[str]:
    return list(get_parameter_names(model, [nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm"]))


def _old_names(model: nn.Module, forbidden: Callable[[nn.Module], bool]) -> list[str]:
    """transformers.trainer_pt_utils.get_parameter_names as of 4.46: a walk over children, by type alone."""
    result = []
    for name, child in model.named_children():
        if not forbidden(child):
            result += [f"{name}.{inner}" for inner in _old_names(child, forbidden)]
    return result + list(model._parameters)


def _version_4_46(model: nn.Module) -> list[str]:
    return [name for name in _old_names(model, lambda m: isinstance(m, nn.LayerNorm)) if "bias" not in name]


def _version_4_46_registered(model: nn.Module) -> list[str]:
    names = _old_names(model, lambda m: isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm"))
    return [name for name in names if "bias" not in name]


ORACLES = (_installed, _version_4_51, _version_4_46_registered, _version_4_46)
