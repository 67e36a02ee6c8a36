"""A checkpoint for FSDP2: every rank reads its own rows of weights and Adam state, and none ever holds the whole.

The model is built with parameters on the meta device, cut by ``fully_shard`` (each decoder layer, then the rest), and the
shards are filled from slices of the files. FSDP2 gives rank r of N the rows [r ⌈rows / N⌉, (r + 1) ⌈rows / N⌉) of every
parameter, as :func:`entropy_probe.ranks.sharding.row_spans` counts them; Adam's moments are cut alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_probe.checkpoints.adam_state import map_adam_state
from entropy_probe.checkpoints.beside import Beside
from entropy_probe.checkpoints.files.stored import StoredOptimizer, sample_of
from entropy_probe.checkpoints.filling import fill, own_rows, refuse_damaged
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names
from entropy_probe.checkpoints.loading import Matched, validated
from entropy_probe.checkpoints.records import Checkpoint, ModelFolder
from entropy_probe.checkpoints.skeleton import ADVICE, Skeleton, adapter_skeleton, full_skeleton, places
from entropy_probe.checkpoints.sources import Sources, folder_of, open_optimizer, open_sources, trainer_state_of
from entropy_probe.common.choices import path_of
from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.compat.fsdp import held_part, reshard
from entropy_probe.compat.transformers_models import unsplit_classes
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.same_inputs import check_same_inputs, digest_of_settings, digest_of_tensors
from entropy_probe.ranks.sharding import Sharding, even_spans, row_spans


def load_sharded_checkpoint(
    path: str | Path,
    ranks: Ranks,
    *,
    base: str | Path | Beside | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    zero_v: ZeroV = ZeroV.LEAVE_OUT,
    freeze: Sequence[str] = (),
) -> Checkpoint:
    """Read this rank's shards of weights and Adam state.

    ``zero_v`` is P where Adam's v is 0, as of one process.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    The folder may be of any format. The model's parameters are DTensors; every tensor of ``Checkpoint.adam`` is this rank's
    rows alone, possibly none. One process will do as a group of one.

    Raises:
        InputError: anything missing, damaged or of another kind, in one line; also what only some ranks see. All ranks are
            told, and before anything is loaded, which of them was given another checkpoint.
        ValueError: the process group is not that of ``ranks``.
    """
    parts, folder, asked = _loaded(path, base, ranks, dtype, device, freeze, with_optimizer=True)
    assert parts.optimizer is not None
    # Adam's state stays on the CPU, as in one process, wherever the model is.
    rows = {name: own_rows(p) for name, p in folder.model.named_parameters() if isinstance(p, DTensor)}
    adam, mapping = ranks.alike(partial(map_adam_state, parts.optimizer, folder.model, rows))
    freeze_names(folder.model, mapping.frozen)
    matched = Matched(folder.with_notes(parts.optimizer.notes), adam, mapping.said_of(asked))
    return validated(matched, seed=seed, zero_v=zero_v, sharding=sharding_of(folder.model, ranks))


def load_sharded_model(
    path: str | Path,
    ranks: Ranks,
    *,
    base: str | Path | Beside | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelFolder:
    """The same of the weights alone, to sample from.

    Raises:
        InputError: anything missing, damaged or of another kind, in one line, on all ranks.
        ValueError: the process group is not that of ``ranks``.
    """
    return _loaded(path, base, ranks, dtype, device, with_optimizer=False)[1]


def _group_of(ranks: Ranks) -> dist.ProcessGroup:
    group = ranks.group if ranks.group is not None else dist.group.WORLD
    if group is None:
        raise InputError("FSDP2's sharding needs a process group; start with torchrun, or use replicated sharding")
    if dist.get_world_size(group) != ranks.count:
        raise ValueError(f"{ranks.count} ranks over a process group of {dist.get_world_size(group)}")
    return group


@dataclass(frozen=True)
class _Parts:
    """A checkpoint's files, opened; ``optimizer`` is None where only the model is wanted."""

    sources: Sources
    optimizer: StoredOptimizer | None


def _opened(path: str | Path, base: str | Path | Beside | None, *, with_optimizer: bool) -> _Parts:
    path = path_of("the checkpoint", path)
    beside = Beside.of(base)
    if beside.quantization is not None:
        raise InputError(
            f"base_quantization is {beside.quantization}, which one process alone does; use replicated sharding, or give as "
            "base the folder of the quantised base"
        )
    optimizer = open_optimizer(path, beside) if with_optimizer else None
    return _Parts(open_sources(path, beside), optimizer)


def _loaded(
    path: str | Path,
    base: str | Path | Beside | None,
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device | str,
    freeze: Sequence[str] = (),
    *,
    with_optimizer: bool,
) -> tuple[_Parts, ModelFolder, tuple[str, ...]]:
    """The opened files, the model with this rank's rows, and what ``freeze`` froze.

    Which rank was given other files is told before.
    """
    group = _group_of(ranks)
    # What one rank's disk lacks would leave the others waiting.
    parts = ranks.alike(partial(_opened, path, base, with_optimizer=with_optimizer))
    # Ranks that hold models of two shapes would wait for each other in FSDP2's collectives.
    _refuse_other_checkpoints(ranks, parts)
    skeleton = _skeleton(parts.sources, dtype)
    # Before FSDP2 takes note of which parameters require gradients.
    asked = freeze_matching(skeleton.model, freeze)
    shard_model(parts.sources.path, skeleton.model, DeviceMesh.from_group(group, torch.device(device).type))
    # Damaged rows are seen by the rank that holds them.
    ranks.alike(partial(_fill_rows, parts.sources.path, skeleton, device))
    return parts, folder_of(parts.sources, skeleton.model), asked


def sharding_of(model: nn.Module, ranks: Ranks) -> Sharding:
    """Whose elements of every trainable parameter are whose: FSDP2's rows, or even parts of what every rank holds whole.

    Raises:
        InputError: a live model is cut otherwise than by rows over just these ranks.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are parts of flat ones; expected FSDP2 "
            "(fully_shard) or DDP, or a checkpoint of it with entropy-probe run"
        )
    reshard(model)
    parameters = {name: p for name, p in named_parameters(model) if p.requires_grad}
    shapes = {name: p.shape for name, p in parameters.items()}
    cut = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    if not cut:
        return Sharding(ranks, even_spans(shapes, ranks.count))
    for name in parameters:
        mesh = cut[name].device_mesh if name in cut else None
        if mesh is None or mesh.ndim != 1 or cut[name].placements != (Shard(0),):
            how = (
                "not cut, and others are"
                if mesh is None
                else f"cut as {cut[name].placements} over a mesh of {mesh.shape}"
            )
            raise InputError(f"parameter {name} is {how}; the probe knows FSDP2's rows over all ranks alone")
        if mesh.size() != ranks.count:
            raise InputError(
                f"parameter {name} is cut over {mesh.size()} ranks and {ranks.count} were given; call the probe on all of "
                "them, with ranks=Ranks.of_group()"
            )
    return Sharding(ranks, row_spans(shapes, ranks.count), sharded=True)


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that transformers checkpoints or never splits, save those that share a weight with others."""
    unsplit = {
        name for module in model.modules() if isinstance(module, PreTrainedModel) for name in unsplit_classes(module)
    }
    shared = {id(place.parameter) for place in places(model) if len(place.holders) > 1}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not (isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit):
            continue
        inside.update(module.modules())
        # FSDP2 gathers a tied weight with one group only, which must be the root's.
        if not any(id(p) in shared for p in module.parameters()):
            yield module


def shard_model(path: Path, model: Any, mesh: DeviceMesh) -> None:
    """Cut every decoder layer's parameters, then the rest's, by rows over ``mesh``, which has one dimension.

    Raises:
        InputError: a parameter without dimensions, or otherwise nothing for FSDP2.
    """
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise InputError(f"{path}: parameter {name} is a single number, which FSDP2 cannot cut; {ADVICE}")
    try:
        for layer in list(decoder_layers(model)):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path}: FSDP2 cannot shard this model: {one_line(error)}; {ADVICE}") from error


def _refuse_other_checkpoints(ranks: Ranks, parts: _Parts) -> None:
    """Every rank looks at the same few elements of every tensor: its own rows would be others than rank 0's."""
    if ranks.count > 1:
        check_same_inputs(ranks, ranks.alike(partial(_digests, parts)))


def _digests(parts: _Parts) -> dict[str, bytes]:
    sources, adapter = parts.sources, parts.sources.adapter
    files = [sources.configuration / "config.json", sources.generation]
    settings = None if adapter is None else adapter.settings
    weights, base = (sources.weights.tensors, {}) if adapter is None else (adapter.tensors, sources.weights.tensors)
    found = {
        "configuration": digest_of_settings([None if file is None else file.read_bytes() for file in files], settings),
        "weights": digest_of_tensors(sample_of(weights)),
        "base weights": digest_of_tensors(sample_of(base)),
    }
    if parts.optimizer is not None:
        found |= {
            "optimizer state": digest_of_tensors(parts.optimizer.sample()),
            "optimizer settings": digest_of_settings(parts.optimizer.groups),
            "trainer step": digest_of_settings(trainer_state_of(sources.path).global_step),
        }
    return found


def _skeleton(sources: Sources, dtype: torch.dtype) -> Skeleton:
    whole = full_skeleton(sources, dtype)
    return whole if sources.adapter is None else adapter_skeleton(sources.path, whole, sources.adapter, dtype)


def _fill_rows(path: Path, skeleton: Skeleton, device: torch.device | str) -> None:
    fill(path, skeleton, device)
    for name, p in skeleton.model.named_parameters():
        refuse_damaged(path, name, held_part(p))
