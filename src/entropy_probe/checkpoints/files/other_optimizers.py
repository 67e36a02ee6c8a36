"""Optimizers whose step is not Adam's, told by what they leave in a state_dict, and refused by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.files.stored import StoredOptimizer
from entropy_probe.errors import InputError

ADVICE = (
    "the probe reads torch's Adam and AdamW, bitsandbytes' and torchao's; train some steps with one of them from here (the "
    'Trainer\'s optim="adamw_torch") and probe that checkpoint, or sample from this one, which needs no optimizer'
)
"""What can be done where a state is another optimizer's."""

FOREIGN_CODE = (
    ("torchao.", "another quantised optimizer of torchao"),
    ("bitsandbytes.", "a bitsandbytes optimizer"),
    ("galore_torch.", "GaLore, which projects gradients"),
    ("apollo_torch.", "APOLLO, which projects gradients"),
    ("deepspeed.", "DeepSpeed"),
)
"""Whose classes an optimizer's pickle may name."""

WITHOUT_SECOND_MOMENT = (
    ("exp_avg_res", "CAME, whose second moment is factored"),
    ("exp_avg_sq_row", "Adafactor, whose second moment is factored"),
    ("exp_avg_fast", "AdEMAMix, which has two first moments"),
    ("prodigy_d", "Prodigy"),
    ("exp_inf", "Adamax, whose second moment is a maximum"),
    ("acc_delta", "Adadelta"),
    ("square_avg", "RMSprop"),
    ("sum", "Adagrad"),
    ("hessian", "Sophia"),
)
"""Keys of entries that have no exp_avg_sq."""

BESIDE_MOMENTS = (
    ("mu_product", "NAdam"),
    ("z", "a schedule-free AdamW"),
    ("eps_sq", "StableAdamW"),
    ("exp_avg_diff", "Adan"),
    ("exp_avg_fast", "AdEMAMix"),
    ("exp_avg_slow", "AdEMAMix"),
    ("GG", "SOAP"),
    ("d", "Prodigy"),
    ("compensation", "AnyPrecisionAdamW"),
    ("projector", "GaLore or APOLLO"),
    ("grok_ema", "GrokAdamW"),
)
"""What optimizers keep beside Adam's moments."""

ADAM_ENTRY = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
"""What torch's Adam and AdamW keep for a parameter."""


def refuse_other_optimizer(stored: StoredOptimizer) -> None:
    """Refuse a state that is not Adam's, by the name of its optimizer where that is known.

    Raises:
        InputError: it is another optimizer's, or holds nothing yet.
    """
    state, groups, path = stored.state, stored.groups, stored.path
    # Optimizers may keep Adam's state for some parameters and their own for the others.
    keys = sorted({str(key) for entry in state.values() if "exp_avg_sq" not in entry for key in entry})
    named = _without_second_moment(keys, groups)
    if named is not None:
        key, optimizer = named
        raise InputError(f"{path} holds the state of {optimizer} ({key}); the probe needs Adam's exp_avg_sq: {ADVICE}")
    if any("exp_avg_sq" in entry for entry in state.values()):
        strange = sorted({str(key) for entry in state.values() for key in entry} - ADAM_ENTRY)
        if strange:
            who = next((f", as {optimizer} does" for key, optimizer in BESIDE_MOMENTS if key in strange), "")
            raise InputError(
                f"{path} keeps {', '.join(strange)} beside Adam's moments{who}, so its step is not Adam's; {ADVICE}"
            )
        if any("amsgrad" not in group for group in groups):
            raise InputError(
                f"{path}: a parameter group has no amsgrad, which torch's Adam and AdamW always write (RAdam, LAMB and others "
                f"keep the same moments without it); {ADVICE}"
            )
        return
    if keys:
        raise InputError(f"{path} holds {keys} for its parameters; the probe needs Adam's exp_avg_sq: {ADVICE}")
    _refuse_empty(groups, path)


def _without_second_moment(keys: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The telling key, and the optimizer that keeps it; None where no key without exp_avg_sq beside it tells."""
    settings = {str(key) for group in groups for key in group}
    if "momentum_buffer" in keys:
        if settings & {"ns_steps", "ns_coefficients"}:
            return "momentum_buffer", "Muon, whose step multiplies whole matrices"
        plain = "dampening" in settings
        return "momentum_buffer", f"{'SGD with momentum' if plain else 'SGD or Muon'}, which keeps no second moment"
    if (
        keys
        and set(keys) <= {"step", "exp_avg"}
        and "exp_avg" in keys
        and all(len(g.get("betas", ())) == 2 for g in groups)
    ):
        # Of Adam's own a lost exp_avg_sq is told by the parameter's name.
        return None if "amsgrad" in settings else ("exp_avg alone", "Lion, which keeps no second moment")
    return next(((key, optimizer) for key, optimizer in WITHOUT_SECOND_MOMENT if key in keys), None)


def _refuse_empty(groups: Sequence[Mapping[str, Any]], path: Path) -> None:
    """No parameter has a state: some optimizers keep it elsewhere, or have none."""
    settings = {str(key) for group in groups for key in group}
    if any(isinstance(group.get("state"), Mapping) for group in groups) or "grokking_signal_fns" in settings:
        raise InputError(
            f"{path} keeps its state inside the parameter groups, as GrokAdamW does, so its step is not Adam's; {ADVICE}"
        )
    if {"clip_grad_norm", "clip_grad_value"} <= settings:
        raise InputError(f"{path} holds the settings of LOMO, which keeps no state at all; {ADVICE}")
    if {"clip_threshold", "decay_rate"} <= settings and "clip_grad_norm" in settings:
        raise InputError(f"{path} holds the settings of AdaLomo, whose second moment is factored; {ADVICE}")
    if any("betas" not in group for group in groups):
        raise InputError(
            f"{path} holds no state, and its groups have no betas: it is not Adam's, as of LOMO or of SGD; the probe needs "
            f"exp_avg_sq: {ADVICE}"
        )
    raise InputError(f"{path} holds no state (exp_avg_sq) for any parameter: the optimizer has not taken a step")
