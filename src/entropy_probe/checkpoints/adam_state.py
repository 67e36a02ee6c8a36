"""Adam's moments, mapped from a stored optimizer's indices to parameter names: whole, or the rows that a rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.files.optimizer_pt import read_optimizer_file
from entropy_probe.checkpoints.files.other_optimizers import refuse_other_optimizer
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.formats.registry import format_of
from entropy_probe.checkpoints.index_names import OptimizerMapping, map_names
from entropy_probe.common.choices import path_of
from entropy_probe.errors import InputError, some_of
from entropy_probe.optimizers.state import (
    MOMENTS,
    AdamMoments,
    AdamState,
    group_from_settings,
    misshapen,
    moments_from_entry,
)


def load_adam_state(path: str | Path, model: nn.Module) -> tuple[AdamState, OptimizerMapping]:
    """Read an optimizer state file, such as ``optimizer.pt``, and map it onto the model's trainable parameters.

    Those that the file does not train are named in the mapping; the model is left as it is. A parameter without an entry is
    left out of ``AdamState.moments``; ``validate_preconditioner`` names it.

    Raises:
        InputError: no file, not loadable without executing a pickle, another optimizer's state, or no rule fits.
    """
    return map_adam_state(read_optimizer_file(path_of("the optimizer's file", path)), model)


def adam_state_in(path: str | Path, model: nn.Module) -> AdamState | None:
    """The state in a checkpoint folder of any format, mapped onto the model; None where the folder has none that is read.

    Raises:
        InputError: no such folder or format, a damaged state, another optimizer's, or no rule fits.
    """
    folder = path_of("the checkpoint", path)
    stored = format_of(folder).optimizer(folder)
    return None if stored is None else map_adam_state(stored, model)[0]


def map_adam_state(
    stored: StoredOptimizer, model: nn.Module, rows: Mapping[str, slice] | None = None
) -> tuple[AdamState, OptimizerMapping]:
    """Map a stored optimizer onto the model's trainable parameters, then read its moments.

    Args:
        stored: the optimizer.
        model: its parameters count with their whole shapes, of a sharded one too.
        rows: by parameter, the rows that this rank holds, possibly none; everything where None.

    Raises:
        InputError: another optimizer's state, or no rule fits.
    """
    path, state = stored.path, stored.state
    refuse_other_optimizer(stored)
    if stored.exact_names:
        stored = _by_first_names(stored, model)
        _refuse_strangers(stored, model)
    named, mapping = map_names(state, stored.groups, model, path)
    try:
        groups = tuple(group_from_settings(group, names) for group, names in zip(stored.groups, named, strict=True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    moments = {}
    whole = {name: p.shape for name, p in model.named_parameters()}
    for group, names in zip(stored.groups, named, strict=True):
        for index, name in zip(group["params"], names, strict=True):
            entry = dict(state.get(index, {}))
            missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entry]
            if entry and missing:
                raise InputError(f"{path}: parameter {name} has {sorted(entry)} but no {', '.join(missing)}")
            if not entry:
                continue
            if isinstance(entry["step"], StoredTensor):
                entry["step"] = entry["step"].read()
            problem = _entry_problem(entry)
            if problem is not None:
                raise InputError(f"{path}: parameter {name}: {problem}; the optimizer state is damaged")
            if rows is not None:
                # Before it is cut: parts of two shapes may have one.
                problem = misshapen(_without_values(entry), whole[name])
                if problem is not None:
                    raise InputError(f"{path}: parameter {name}: {problem}")
            moments[name] = _read(entry, None if rows is None else rows[name])
    return AdamState(groups, moments), mapping


def _by_first_names(stored: StoredOptimizer, model: nn.Module) -> StoredOptimizer:
    """A tied parameter may be named as either of its holders; here it has the name of ``named_parameters``."""
    listed = {name for group in stored.groups for name in group["param_names"]}
    first = {id(p): name for name, p in model.named_parameters()}
    every = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    other = {name: every[name] for name in listed if every.get(name, name) not in listed}
    if not other:
        return stored
    groups = [{**g, "param_names": [other.get(name, name) for name in g["param_names"]]} for g in stored.groups]
    return replace(stored, groups=groups)


def _refuse_strangers(stored: StoredOptimizer, model: nn.Module) -> None:
    """Names are known here: another order of the same shapes must not be guessed."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    strangers = sorted({name for group in stored.groups for name in group["param_names"]} - trainable)
    if strangers:
        raise InputError(
            f"{stored.path} trains what the model does not: {some_of(strangers)}; is it the optimizer of another model, or "
            "does freeze name too much?"
        )


def _read(entry: Mapping[str, Any], rows: slice | None) -> AdamMoments:
    found = {key: entry[key].read(rows) for key in MOMENTS if entry.get(key) is not None}
    return moments_from_entry({"step": entry["step"], **found})


def _without_values(entry: Mapping[str, Any]) -> AdamMoments:
    shapes = {key: entry[key].shape for key in MOMENTS if entry.get(key) is not None}
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return moments_from_entry({"step": entry["step"], **empty})


def _entry_problem(entry: Mapping[str, Any]) -> str | None:
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        moment = entry.get(key)
        if key == "max_exp_avg_sq" and moment is None:
            continue
        if not isinstance(moment, Tensor | StoredTensor):
            return f"{key} is a {type(moment).__name__}, expected a tensor"
        # What is not dense has been left as torch read it.
        layout = moment.layout if isinstance(moment, Tensor) else torch.strided
        if not moment.dtype.is_floating_point or layout is not torch.strided:
            return f"{key} is a tensor of {moment.dtype} in {layout}, expected dense floating-point numbers"
    step = entry["step"]
    if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
        return f"step is {step!r}, expected a number"
    return None if math.isfinite(float(step)) else f"step is {float(step)}, expected a finite number"
