"""Where a model's parts are, by the format of its folder: weights, adapter, base and configuration. Nothing is built yet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropy_probe.checkpoints.beside import Beside, read_names, renamed_optimizer, renamed_tensors
from entropy_probe.checkpoints.files.stored import StoredOptimizer
from entropy_probe.checkpoints.files.trainer_state import TrainerState
from entropy_probe.checkpoints.formats.base import StoredAdapter, StoredWeights
from entropy_probe.checkpoints.formats.registry import format_of, refuse_misplaced
from entropy_probe.checkpoints.formats.trainer import TrainerFolder
from entropy_probe.checkpoints.quantisation import quantisation_of, quantised_base_note, refuse_quantised
from entropy_probe.checkpoints.records import ModelFolder
from entropy_probe.checkpoints.run_time_quantisation import BaseQuantization
from entropy_probe.common.choices import path_of
from entropy_probe.common.evidence import Evidence
from entropy_probe.errors import InputError
from entropy_probe.model.input_limits import input_limits

BASE = TrainerFolder()
"""The format of a base: a Hugging Face model's folder."""


@dataclass(frozen=True)
class Sources:
    """Where a model's parts are.

    Attributes:
        path: the checkpoint's folder.
        base: the folder of the model under an adapter; the one whose configuration describes full weights that come without;
            else None.
        configuration: the folder whose config.json describes the whole model.
        model: the folder that the whole model's weights are in: the base's under an adapter alone, else the checkpoint's.
        weights: of the whole model.
        adapter: over it, or None.
        quantization: of the base as training loaded it, which is done here too.
    """

    path: Path
    base: Path | None
    configuration: Path
    model: Path
    weights: StoredWeights
    adapter: StoredAdapter | None
    quantization: BaseQuantization | None = None

    @property
    def generation(self) -> Path | None:
        """The generation_config.json that goes with the whole model; None where there is none."""
        files = [folder / "generation_config.json" for folder in (self.model, self.configuration)]
        return next((file for file in files if file.is_file()), None)


def open_sources(path: Path, beside: Beside) -> Sources:
    """Look where a checkpoint's parts are; the base of an adapter is the given one, or that named in its configuration.

    Raises:
        InputError: no such folder, another framework's, an adapter without its base or its configuration, a base that
            neither lies under an adapter nor describes weights that come without config.json, quantised weights, or none that
            are read, names of another checkpoint, or a quantisation of a base that is none.
    """
    known, base = format_of(path), beside.folder
    adapter = known.adapter(path)
    own = known.weights(path) if adapter is not None else None
    configuration = known.configuration(path)
    if adapter is not None and own is None:
        base = configuration = model = _base_folder(adapter.pretrained or path, base, adapter.settings)
    else:
        model = path
        if configuration is None:
            if base is None:
                raise InputError(
                    f"{path} has no config.json; expected a Hugging Face checkpoint folder, or beside it as base the folder "
                    "of the model that training started from (shards of accelerate and DeepSpeed come without a configuration)"
                )
            configuration = base = _base_folder(path, base, {})
        elif base is not None and adapter is None:
            raise InputError(
                f"{path} holds no adapter_config.json, so a base has nothing to be the base of; leave it out"
            )
    if not (configuration / "config.json").is_file():
        raise InputError(f"{configuration} has no config.json; expected a Hugging Face checkpoint folder")
    refuse_quantised(configuration, model)
    weights = own or (known if model == path else BASE).weights(model)
    if weights is None:
        raise InputError(_without_weights(model))
    names = read_names(beside)
    if names is not None:
        renamed = renamed_tensors(weights.tensors if adapter is None else adapter.tensors, names, beside)
        if adapter is None:
            weights = replace(weights, tensors=renamed, pretrained=None)
        else:
            adapter = replace(adapter, tensors=renamed, pretrained=None)
    if beside.quantization is not None and (adapter is None or quantisation_of(configuration) is not None):
        what = (
            "is no adapter over a base" if adapter is None else f"has a base that is stored quantised, {configuration}"
        )
        raise InputError(
            f"{path} {what}, so that base_quantization ({beside.quantization}) has nothing to say; leave it out"
        )
    return Sources(path, base, configuration, model, weights, adapter, beside.quantization)


def open_optimizer(path: Path, beside: Beside) -> StoredOptimizer:
    """Adam's state in a checkpoint folder, opened; its parameters by their names in the model.

    Raises:
        InputError: no such folder, or none in a form that is read; a framework that keeps it otherwise is named.
    """
    stored = format_of(path).optimizer(path)
    if stored is None:
        refuse_misplaced(path)
        raise InputError(
            f"{path} has no optimizer.pt, no optimizer_0/ and no ranks' files of an optimizer; the probe needs Adam's state (a "
            "Trainer leaves it out with save_only_model=True)"
        )
    names = read_names(beside)
    return stored if names is None else renamed_optimizer(stored, names)


def trainer_state_of(path: str | Path) -> TrainerState:
    """Which step a checkpoint folder is of, and what the trainer logged; empty where it does not say.

    Raises:
        InputError: no such folder or format, or a damaged file.
    """
    folder = path_of("the checkpoint", path)
    return format_of(folder).trainer_state(folder)


def folder_of(sources: Sources, model: Any) -> ModelFolder:
    """What the probe knows of a loaded model."""
    vocabulary, context_length = input_limits(model)
    notes = [_forward_note(sources)]
    if sources.adapter is not None and sources.base is not None and sources.quantization is None:
        notes.append(quantised_base_note(sources.path, sources.adapter.settings, sources.base))
    return ModelFolder(
        path=sources.path,
        kind="full" if sources.adapter is None else "lora",
        base=sources.base,
        model=model,
        architecture=str(model.config.get_text_config().model_type),
        vocabulary=vocabulary,
        context_length=context_length,
        notes=tuple(note for note in notes if note is not None),
        configuration=sources.configuration if sources.configuration not in (sources.path, sources.base) else None,
    )


def _forward_note(sources: Sources) -> Evidence | None:
    """The warning that the trainer computed with other weights than its optimizer's, which are those read here."""
    stored = sources.weights if sources.adapter is None else sources.adapter
    if stored.forward is None:
        return None
    name = str(stored.forward).removeprefix("torch.")
    return Evidence(
        "cast_forward",
        f"the weights are the optimizer's master weights; the trainer's forward was {name} of them",
        f"Set autocast to {name} over float32 to measure the policy nearly as the trainer's forward did",
    )


def _base_folder(path: Path, base: Path | None, settings: Mapping[str, Any]) -> Path:
    """The given base, or the one that an adapter's settings name."""
    if base is not None:
        if not base.is_dir():
            raise InputError(f"base {base} is not a folder; expected the base model's folder")
        return base
    named = settings.get("base_model_name_or_path")
    if isinstance(named, str) and named:
        for candidate in (Path(os.path.normpath(path / named)), Path(named)):
            if candidate.is_dir():
                return candidate
    raise InputError(
        f"{path} is an adapter over {named!r}, which is not a folder here; give the base model's folder as base"
    )


def _without_weights(path: Path) -> str:
    refuse_misplaced(path)
    pickles = sorted(file.name for file in path.glob("*.bin"))
    found = f"only {', '.join(pickles)}, which would have to be unpickled" if pickles else "no weights"
    return f"{path} holds {found}; expected model.safetensors or its shards"
