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


def _openrlhf(model: nn.Module) -> NamedGroups:
    """By parts of names, in capitals as they are: ``get_optimizer_grouped_parameters`` of OpenRLHF 0.11."""
    apart = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")
    names = _trainable(model)
    return [
        [n for n in names if not any(part in n for part in apart)],
        [n for n in names if any(part in n for part in apart)],
    ]


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
    DecayRule("OpenRLHF (bias, layer_norm, layernorm, norm and ln_f names do not decay)", _openrlhf),
    DecayRule("one group in the order of named_parameters", lambda model: [_trainable(model)]),
)


def _lora_plus(embeddings_apart: bool) -> Callable[[nn.Module], NamedGroups]:
    """PEFT's create_loraplus_optimizer: A and all else, LoRA's embeddings, B, and B (or vectors) without decay."""

    def groups(model: nn.Module) -> NamedGroups:
        modules = dict(model.named_modules())
        norms = {
            f"{prefix}.{name}"
            for prefix, module in modules.items()
            if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
            for name, _ in module.named_parameters(recurse=False)
        }
        parameters = dict(model.named_parameters())
        found: NamedGroups = [[], [], [], []]
        for name in _trainable(model):
            # A tuner layer keeps its parameters in a dictionary by kind, then by adapter.
            layer = type(modules.get(".".join(name.split(".")[:-2])))
            if embeddings_apart and layer.__name__ == "Embedding" and layer.__module__.startswith("peft."):
                group = 1
            elif "lora_B" in name or parameters[name].dim() == 1:
                group = 3 if name in norms or "bias" in name else 2
            else:
                group = 0
            found[group].append(name)
        return found

    return groups


def _saved_embeddings_apart(model: nn.Module) -> NamedGroups:
    """Unsloth's optimizer with an embedding_learning_rate: whole modules beside the adapter are a second group."""
    names = _trainable(model)
    apart = [name for name in names if name.endswith("modules_to_save.default.weight")]
    return [[name for name in names if name not in set(apart)], apart]


RATE_RULES: tuple[DecayRule, ...] = (
    DecayRule("LoRA+ of PEFT (A, embeddings, B, B without decay)", _lora_plus(embeddings_apart=True)),
    DecayRule("LoRA+ of older PEFT (A with embeddings, none, B, B without decay)", _lora_plus(embeddings_apart=False)),
    DecayRule("Unsloth's embedding_learning_rate (adapter, then modules_to_save)", _saved_embeddings_apart),
    DecayRule("a group a parameter, in the order of named_parameters", lambda model: [[n] for n in _trainable(model)]),
)
"""Groups that were made for learning rates of their own."""
