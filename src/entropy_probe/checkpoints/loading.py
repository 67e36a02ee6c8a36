"""A checkpoint for one process, which holds all of it: the model from its sources, and Adam's state matched to it by name.

What transformers or PEFT can read itself it does, since it converts what older versions stored otherwise
(:mod:`~entropy_probe.checkpoints.pretrained`). From any other format the model is built without weights and filled tensor by
tensor, as ranks under FSDP2 do with their rows (:mod:`~entropy_probe.checkpoints.sharded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entropy_probe.checkpoints.adam_state import map_adam_state
from entropy_probe.checkpoints.beside import Beside
from entropy_probe.checkpoints.filling import fill, refuse_damaged
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.checkpoints.pretrained import in_type, pretrained_adapter, pretrained_model
from entropy_probe.checkpoints.records import Checkpoint, ModelFolder
from entropy_probe.checkpoints.run_time_quantisation import quantise_base
from entropy_probe.checkpoints.skeleton import Skeleton, adapter_skeleton, full_skeleton
from entropy_probe.checkpoints.sources import Sources, folder_of, open_optimizer, open_sources, trainer_state_of
from entropy_probe.common.choices import path_of
from entropy_probe.common.evidence import Evidence
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.validation import validate_preconditioner
from entropy_probe.ranks.sharding import WHOLE, Sharding


@dataclass(frozen=True)
class Matched:
    """A model and its Adam state, matched by name; whether the state will do is not asked yet."""

    folder: ModelFolder
    adam: AdamState
    mapping: OptimizerMapping


def load_checkpoint(
    path: str | Path,
    *,
    base: str | Path | Beside | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    zero_v: ZeroV = ZeroV.LEAVE_OUT,
    freeze: Sequence[str] = (),
) -> Checkpoint:
    """Read weights and Adam state from a folder of any format.

    ``zero_v`` is P where Adam's v is 0: left out, a state that has nothing else is refused.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    Raises:
        InputError: anything missing, damaged or of another kind, in one line.
    """
    matched = load_matched(path, base=base, dtype=dtype, device=device, freeze=freeze)
    return validated(matched, seed=seed, zero_v=zero_v)


def load_matched(
    path: str | Path,
    *,
    base: str | Path | Beside | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    freeze: Sequence[str] = (),
) -> Matched:
    """Read weights and Adam state without asking whether every parameter has a usable one.

    Raises:
        InputError: either cannot be read at all, or no rule maps the state to the parameters.
    """
    path = path_of("the checkpoint", path)
    # The small file first: a missing optimizer should not cost the loading of a large model.
    optimizer = open_optimizer(path, Beside.of(base))
    folder = load_model(path, base=base, dtype=dtype, device=device)
    asked = freeze_matching(folder.model, freeze)
    adam, mapping = map_adam_state(optimizer, folder.model)
    freeze_names(folder.model, mapping.frozen)
    return Matched(folder.with_notes(optimizer.notes), adam, mapping.said_of(asked))


def validated(matched: Matched, *, seed: int, zero_v: ZeroV, sharding: Sharding = WHOLE) -> Checkpoint:
    """The checkpoint of a model and its Adam state, which fit each other.

    Raises:
        InputError: a trainable parameter has no usable state.
    """
    folder = matched.folder
    shapes = {name: p.shape for name, p in folder.model.named_parameters() if p.requires_grad}
    test = validate_preconditioner(matched.adam, shapes, seed=seed, zero_v=zero_v, sharding=sharding)
    return Checkpoint(folder, matched.adam, matched.mapping, test, trainer_state_of(folder.path).global_step)


def load_model(
    path: str | Path,
    *,
    base: str | Path | Beside | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trainable: bool = True,
) -> ModelFolder:
    """Read the weights of a folder of any format, full or adapter over base, in ``dtype``.

    Raises:
        InputError: no such folder, no weights that are read, damaged or incomplete ones, an adapter without its base, or no
            configuration.
    """
    path = path_of("the checkpoint", path)
    sources = open_sources(path, Beside.of(base))
    model, notes = _built(sources, dtype, trainable)
    for name, p in model.named_parameters():
        refuse_damaged(path, name, p)
    return folder_of(sources, model.to(device)).with_notes(notes)


def _built(sources: Sources, dtype: torch.dtype, trainable: bool) -> tuple[Any, tuple[Evidence, ...]]:
    """The model, and what building it gave cause to warn of."""
    weights, adapter = sources.weights, sources.adapter
    if weights.pretrained is not None:
        whole = Skeleton(pretrained_model(sources, weights.pretrained, dtype), {})
    else:
        whole = full_skeleton(sources, dtype)
        fill(sources.path, whole)
    notes: tuple[Evidence, ...] = ()
    if sources.quantization is not None:
        notes = (quantise_base(sources.path, whole.model, sources.quantization, weights.tensors),)
    if adapter is None:
        return whole.model, notes
    if adapter.pretrained is not None:
        return in_type(pretrained_adapter(adapter.pretrained, adapter, whole.model, trainable), dtype), notes
    adapted = adapter_skeleton(sources.path, Skeleton(whole.model, {}), adapter, dtype)
    fill(sources.path, adapted)
    return adapted.model if trainable else adapted.model.requires_grad_(False), notes
