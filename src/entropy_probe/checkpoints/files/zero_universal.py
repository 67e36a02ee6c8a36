"""DeepSpeed's universal layout: ``zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt``, every tensor whole, and the settings of
the groups in ``zero/optimizer_state.pt``. Which parameter is in which group is in the model states beside ``zero/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from entropy_probe.checkpoints.files.pieces import FlatTensor
from entropy_probe.checkpoints.files.rank_files import live_name
from entropy_probe.checkpoints.files.saved import dictionary, read_saved
from entropy_probe.checkpoints.files.stored import StoredOptimizer, StoredTensor
from entropy_probe.checkpoints.files.zero_files import ModelStates
from entropy_probe.checkpoints.files.zero_flat import adam_settings
from entropy_probe.errors import InputError, some_of

FOLDER = "zero"
MASTER = "fp32"
OF_PART = "a tensor of DeepSpeed's universal layout"
OF_SETTINGS = "the settings of DeepSpeed's universal layout"


def masters(folder: Path, model: ModelStates | None) -> dict[str, StoredTensor]:
    """The master weights of all parameters.

    What is tied to another is left out: its file holds what the forward was computed with, and it has no moments.

    Raises:
        InputError: a file is damaged, or has other elements than the model states say.
    """
    return {
        name: _tensor(place / f"{MASTER}.pt", name, model)
        for name, place in _parameters(folder).items()
        if (place / "exp_avg_sq.pt").is_file() or (model is not None and name not in model.tied)
    }


def optimizer(folder: Path, model: ModelStates | None) -> StoredOptimizer:
    """Adam's groups and state by names.

    Raises:
        InputError: a file is missing or damaged, or several groups and no model states that say what is in them.
    """
    file = folder / FOLDER / "optimizer_state.pt"
    content = dictionary(read_saved(file, OF_SETTINGS), of=OF_SETTINGS)
    settings = content.get("param_groups")
    if not isinstance(settings, list) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in settings
    ):
        raise InputError(f"{file} has no param_groups; convert the checkpoint again with DeepSpeed 0.10 or later")
    places = {name: place for name, place in _parameters(folder).items() if (place / "exp_avg_sq.pt").is_file()}
    listed = _groups(folder, settings, places, model)
    index = {name: number for number, name in enumerate(name for names in listed for name in names)}
    without = [name for name in index if name not in places]
    if without:
        raise InputError(f"{folder / FOLDER} has no exp_avg_sq.pt of {some_of(without)}, which the model states name")
    state = {index[name]: _entry(places[name], name, model, settings[number]) for number, name in _numbered(listed)}
    groups = [
        {**adam_settings(group), "params": [index[name] for name in names], "param_names": names}
        for group, names in zip(settings, listed, strict=True)
    ]
    return StoredOptimizer(folder / FOLDER, groups, state, exact_names=True)


def _numbered(listed: list[list[str]]) -> list[tuple[int, str]]:
    return [(number, name) for number, names in enumerate(listed) for name in names]


def _parameters(folder: Path) -> dict[str, Path]:
    return {live_name(file.parent.name): file.parent for file in sorted((folder / FOLDER).glob(f"*/{MASTER}.pt"))}


def _groups(
    folder: Path, settings: list[Mapping[str, Any]], places: Mapping[str, Path], model: ModelStates | None
) -> list[list[str]]:
    if model is not None and model.groups is not None:
        vectors = dict(enumerate(model.groups))
        if set(vectors) != {number for group in settings for number in group["params"]}:
            raise InputError(
                f"{model.path} names {len(vectors)} groups of parameters, {folder / FOLDER}/optimizer_state.pt others; are "
                "they of one checkpoint?"
            )
        return [[name for number in group["params"] for name in vectors[number]] for group in settings]
    if len(settings) == 1:
        return [list(places)]
    raise InputError(
        f"{folder} has {len(settings)} groups and no *mp_rank_00_model_states.pt, which says what is in them; copy it from "
        "the checkpoint that was converted"
    )


def _entry(place: Path, name: str, model: ModelStates | None, group: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    step = read_saved(place / "step.pt", OF_PART).content if (place / "step.pt").is_file() else group.get("step")
    if step is not None:
        entry["step"] = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    for file in sorted(place.glob("*.pt")):
        if file.stem not in ("step", MASTER):
            entry[file.stem] = _tensor(file, name, model)
    return entry


def _tensor(file: Path, name: str, model: ModelStates | None) -> StoredTensor:
    saved = read_saved(file, OF_PART)
    found = saved.content.get("param") if isinstance(saved.content, Mapping) else saved.content
    if not isinstance(found, Tensor):
        raise InputError(f"{file} holds a {type(found).__name__}; expected {OF_PART}")
    shapes = {key: shape for group in (() if model is None else model.groups or ()) for key, shape in group.items()}
    try:
        return FlatTensor.of(shapes.get(name, tuple(found.shape)), [found], mapped=saved.mapped)
    except ValueError as error:
        raise InputError(f"{file}: {error}; is it of another checkpoint?") from error
