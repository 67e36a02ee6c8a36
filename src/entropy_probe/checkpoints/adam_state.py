"""``optimizer.pt``: Adam's moments, mapped from the optimizer's indices to parameter names.

The file is a state_dict of torch.optim.Adam or AdamW: ``{"state": {index: {...}}, "param_groups": [...]}``. It is read with
``weights_only=True``; nothing pickled is ever executed.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.index_names import OptimizerMapping, map_names
from entropy_probe.checkpoints.samples import windows
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.optimizers.state import AdamMoments, AdamState, group_from_settings, misshapen, moments_from_entry

FOREIGN_STATES = (
    ("momentum_buffer", "SGD or Muon, which keep no second moment"),
    ("exp_avg_sq_row", "Adafactor, whose second moment is factored"),
    ("state1", "a bitsandbytes 8-bit optimizer"),
    ("__bnb_optimizer_quant_state__", "a bitsandbytes optimizer (8-bit or 32-bit AdamW, Lion, AdEMAMix, RMSprop)"),
    ("prodigy_d", "Prodigy"),
    ("exp_inf", "Adamax, whose second moment is a maximum"),
    ("square_avg", "RMSprop or Adadelta"),
    ("sum", "Adagrad"),
)

BESIDE_MOMENTS = (
    ("mu_product", "NAdam"),
    ("z", "a schedule-free AdamW"),
    ("eps_sq", "StableAdamW"),
    ("exp_avg_diff", "Adan"),
)
"""What optimizers keep beside Adam's moments."""

FOREIGN_CODE = (
    ("torchao.", "a quantised AdamW of torchao"),
    ("bitsandbytes.", "a bitsandbytes optimizer"),
    ("galore_torch.", "GaLore"),
    ("apollo_torch.", "APOLLO"),
    ("deepspeed.", "DeepSpeed"),
)
"""Whose classes an optimizer's pickle may name."""

NAMED_CODE = re.compile(r"GLOBAL ([\w.]+)")
"""In torch's refusal to unpickle with weights alone: what the file would import."""

ADAM_ENTRY = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
"""What torch's Adam and AdamW keep for a parameter."""


@dataclass(frozen=True)
class OptimizerFile:
    """A file's state_dict, its tensors mapped and not yet read."""

    path: Path
    saved: Mapping[str, Any]

    @staticmethod
    def of_file(path: Path) -> OptimizerFile:
        """Read the file's structure.

        Raises:
            InputError: no file, not loadable without executing a pickle, or no optimizer's state_dict.
        """
        saved = _read(path)
        _refuse_malformed(saved["state"], saved["param_groups"], path)
        return OptimizerFile(path, saved)

    @property
    def settings(self) -> object:
        """The groups, as stored."""
        return self.saved["param_groups"]

    def sample(self) -> dict[str, Tensor]:
        """Steps, and elements of the first, the middle and the last row of every moment; the names say index and shape."""
        found: dict[str, Tensor] = {}
        for index, entry in self.saved["state"].items():
            for field, value in entry.items():
                tensor = torch.tensor(value) if isinstance(value, int | float) else value
                # What else there may be is refused when it is mapped to names.
                if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_complex():
                    for number, window in enumerate(windows(tensor.shape)):
                        found[f"{index} {field} {tuple(tensor.shape)} {number}"] = tensor[window]
        return found


Part = Callable[[str, Tensor], Tensor]
"""Takes, of a named parameter's whole moment, the part that this rank holds, in memory of its own."""


def load_adam_state(path: Path, model: nn.Module) -> tuple[AdamState, OptimizerMapping]:
    """Read an optimizer state file and map it onto the model's trainable parameters.

    Those that the file does not train are named in the mapping; the model is left as it is. A parameter without an entry is
    left out of ``AdamState.moments``; ``validate_preconditioner`` names it.

    Raises:
        InputError: no file, not loadable without executing a pickle, another optimizer's state, or no rule fits.
    """
    return map_adam_state(OptimizerFile.of_file(path).saved, model, path)


def map_adam_state(
    saved: Mapping[str, Any], model: nn.Module, path: Path, part: Part | None = None
) -> tuple[AdamState, OptimizerMapping]:
    """The same of an optimizer's state_dict that was read from ``path``: ``state`` by index, ``param_groups``.

    Of a sharded model's parameters the whole shape counts, and ``part`` takes what a rank holds.

    Raises:
        InputError: another optimizer's state, or no rule fits.
    """
    state, saved_groups = saved["state"], saved["param_groups"]
    _refuse_foreign(state, saved_groups, path)
    named, mapping = map_names(state, saved_groups, model, path)
    try:
        groups = tuple(group_from_settings(group, names) for group, names in zip(saved_groups, named, strict=True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    moments = {}
    whole = {name: p.shape for name, p in model.named_parameters()}
    for group, names in zip(saved_groups, named, strict=True):
        for index, name in zip(group["params"], names, strict=True):
            entry = state.get(index, {})
            missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entry]
            if entry and missing:
                raise InputError(f"{path}: parameter {name} has {sorted(entry)} but no {', '.join(missing)}")
            problem = _entry_problem(entry) if entry else None
            if problem is not None:
                raise InputError(f"{path}: parameter {name}: {problem}; the optimizer state is damaged")
            if entry:
                found = moments_from_entry(entry)
                moments[name] = found if part is None else _own(found, name, whole[name], part, path)
    return AdamState(groups, moments), mapping


def _own(moments: AdamMoments, name: str, shape: torch.Size, part: Part, path: Path) -> AdamMoments:
    # Before it is cut: parts of two shapes may have one.
    problem = misshapen(moments, shape)
    if problem is not None:
        raise InputError(f"{path}: parameter {name}: {problem}")
    largest = moments.max_exp_avg_sq
    return replace(
        moments,
        exp_avg=part(name, moments.exp_avg),
        exp_avg_sq=part(name, moments.exp_avg_sq),
        max_exp_avg_sq=None if largest is None else part(name, largest),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; the probe needs Adam's state (a Trainer leaves it out with save_only_model=True)"
        )
    try:
        # Mapped: ranks on one machine share its pages, and one that keeps a part reads no more.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(_unreadable(path, error)) from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        found = sorted(map(str, saved))[:5] if isinstance(saved, dict) else type(saved).__name__
        raise InputError(
            f"{path} holds {found}; expected the keys 'state' and 'param_groups' of an optimizer's state_dict"
        )
    return saved


def _unreadable(path: Path, error: Exception) -> str:
    code = NAMED_CODE.search(str(error))
    if code is not None:
        name = code.group(1)
        owner = next((of for prefix, of in FOREIGN_CODE if name.startswith(prefix)), None)
        told = "is not read" if owner is None else f"holds the state of {owner}, which is not read"
        return (
            f"{path} {told}: it names {name}, and weights_only=True runs no code; the probe needs torch's Adam or AdamW"
        )
    return (
        f"{path} cannot be read with weights_only=True ({one_line(error, 160)}); expected torch.save of an optimizer's "
        "state_dict"
    )


def _refuse_malformed(state: object, groups: object, path: Path) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise InputError(
            f"{path}: 'state' is not a dictionary with a dictionary for each parameter; the file is damaged"
        )
    if not isinstance(groups, list) or not groups:
        raise InputError(f"{path}: 'param_groups' is not a list of groups; the file is damaged")
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        raise InputError(
            f"{path}: a group of 'param_groups' is not a dictionary with a list 'params'; the file is damaged"
        )
    listed = {index for group in groups for index in group["params"] if isinstance(index, int)}
    strays = sorted(index for index in state if isinstance(index, int) and index not in listed)
    if strays:
        raise InputError(
            f"{path}: 'state' holds index {strays[0]}, which no group lists: group sizes do not fit it; the file is damaged"
        )


def _refuse_foreign(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], path: Path) -> None:
    # Optimizers may keep Adam's state for some parameters and their own for the others.
    keys = sorted({str(key) for entry in state.values() if "exp_avg_sq" not in entry for key in entry})
    for key, optimizer in FOREIGN_STATES:
        if key in keys:
            raise InputError(f"{path} holds the state of {optimizer} ({key}); the probe needs Adam's exp_avg_sq")
    if any("exp_avg_sq" in entry for entry in state.values()):
        strange = sorted({str(key) for entry in state.values() for key in entry} - ADAM_ENTRY)
        if strange:
            named = [optimizer for key, optimizer in BESIDE_MOMENTS if key in strange]
            who = f", as {named[0]} does" if named else ""
            raise InputError(
                f"{path} keeps {', '.join(strange)} beside Adam's moments{who}, so its step is not Adam's; the probe needs "
                "torch's Adam or AdamW"
            )
        if any("amsgrad" not in group for group in groups):
            raise InputError(
                f"{path}: a parameter group has no amsgrad, which torch's Adam and AdamW always write (RAdam, LAMB and others "
                "keep the same moments without it); the probe needs torch's Adam or AdamW"
            )
        return
    if keys:
        raise InputError(f"{path} holds {keys} for its parameters; the probe needs Adam's exp_avg_sq")
    if any(isinstance(group.get("state"), Mapping) for group in groups):
        raise InputError(
            f"{path} keeps its state inside the parameter groups, as GrokAdamW does, so its step is not Adam's; the probe "
            "needs torch's Adam or AdamW"
        )
    if any("betas" not in group for group in groups):
        raise InputError(
            f"{path} holds no state, and its groups have no betas: it is not Adam's; the probe needs exp_avg_sq"
        )
    raise InputError(f"{path} holds no state (exp_avg_sq) for any parameter: the optimizer has not taken a step")


def _entry_problem(entry: Mapping[str, Any]) -> str | None:
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        moment = entry.get(key)
        if key == "max_exp_avg_sq" and moment is None:
            continue
        if not isinstance(moment, Tensor):
            return f"{key} is a {type(moment).__name__}, expected a tensor"
        if not moment.is_floating_point() or moment.layout is not torch.strided:
            return f"{key} is a tensor of {moment.dtype} in {moment.layout}, expected dense floating-point numbers"
    step = entry["step"]
    if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
        return f"step is {step!r}, expected a number"
    return None if math.isfinite(float(step)) else f"step is {float(step)}, expected a finite number"
