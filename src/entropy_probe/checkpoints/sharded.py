"""A checkpoint for FSDP2: every rank reads its own rows of weights and Adam state, and none ever holds the whole.

The model is built with parameters on the meta device, cut by ``fully_shard`` (each decoder layer, then the rest), and the
shards are filled from slices of the files. FSDP2 gives rank r of N the rows [r ⌈rows / N⌉, (r + 1) ⌈rows / N⌉) of every
parameter, as :func:`entropy_probe.ranks.sharding.row_spans` counts them; Adam's moments are cut alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entropy_probe.checkpoints.adam_state import OptimizerFile, map_adam_state
from entropy_probe.checkpoints.distributed_folders import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    DistributedOptimizer,
    DistributedWeights,
    keeps_weights_distributed,
)
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names
from entropy_probe.checkpoints.hf import (
    Checkpoint,
    ModelFolder,
    Sources,
    folder_of,
    refuse_damaged,
    refuse_without_config,
    refuse_without_optimizer,
    refuse_without_weights,
    sources_of,
    validated,
)
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.checkpoints.quantisation import refuse_quantised
from entropy_probe.checkpoints.skeleton import (
    ADVICE,
    Origin,
    Skeleton,
    adapter_skeleton,
    full_skeleton,
    non_persistent_on_meta,
    places,
)
from entropy_probe.checkpoints.trainer_state import read_trainer_state
from entropy_probe.checkpoints.weight_files import SafetensorsWeights, StoredWeights, own_rows
from entropy_probe.compat.wrappers import held_part, named_parameters, reshard
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.state import AdamState
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.same_inputs import check_same_inputs, digest_of_settings, digest_of_tensors
from entropy_probe.ranks.sharding import Sharding, even_spans, row_spans


@dataclass(frozen=True)
class Stored:
    """A checkpoint's files, opened; of their tensors nothing is read yet.

    ``adapter`` is None for full weights, ``optimizer`` where only the model is wanted.
    """

    model: StoredWeights
    adapter: StoredWeights | None
    optimizer: OptimizerFile | DistributedOptimizer | None


def load_sharded_checkpoint(
    path: Path,
    ranks: Ranks,
    *,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    zero_v: ZeroV = ZeroV.LEAVE_OUT,
    freeze: Sequence[str] = (),
) -> Checkpoint:
    """Read this rank's shards of weights and Adam state.

    ``zero_v`` is P where Adam's v is 0, as of one process.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    Weights are safetensors, or accelerate's ``pytorch_model_fsdp_0/``; Adam's state is optimizer.pt, or ``optimizer_0/``.
    The model's parameters are DTensors; every tensor of ``Checkpoint.adam`` is this rank's rows alone, possibly none. One
    process will do as a group of one.

    Raises:
        InputError: anything missing, damaged or of another kind, in one line; also what only some ranks see. All ranks are
            told, and before anything is loaded, which of them was given another checkpoint.
        ValueError: the process group is not that of ``ranks``.
    """
    folder, optimizer, asked = _loaded(path, base, ranks, dtype, device, freeze, with_optimizer=True)
    assert optimizer is not None
    # Adam's state stays on the CPU, as in one process, wherever the model is.
    mesh = DeviceMesh.from_group(_group_of(ranks), "cpu")
    adam, mapping = ranks.alike(partial(_adam_state, optimizer, folder.model, mesh))
    freeze_names(folder.model, mapping.frozen)
    sharding = sharding_of(folder.model, ranks)
    return validated(folder, adam, mapping.said_of(asked), seed=seed, zero_v=zero_v, sharding=sharding)


def load_sharded_model(
    path: Path,
    ranks: Ranks,
    *,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ModelFolder:
    """The same of the weights alone, to sample from.

    Raises:
        InputError: anything missing, damaged or of another kind, in one line, on all ranks.
        ValueError: the process group is not that of ``ranks``.
    """
    return _loaded(path, base, ranks, dtype, device, with_optimizer=False)[0]


def _group_of(ranks: Ranks) -> dist.ProcessGroup:
    group = ranks.group if ranks.group is not None else dist.group.WORLD
    if group is None:
        raise InputError("FSDP2's sharding needs a process group; start with torchrun, or use replicated sharding")
    if dist.get_world_size(group) != ranks.count:
        raise ValueError(f"{ranks.count} ranks over a process group of {dist.get_world_size(group)}")
    return group


def _loaded(
    path: Path,
    base: Path | None,
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device | str,
    freeze: Sequence[str] = (),
    *,
    with_optimizer: bool,
) -> tuple[ModelFolder, OptimizerFile | DistributedOptimizer | None, tuple[str, ...]]:
    """The model with this rank's rows, the optimizer's files if wanted, and what ``freeze`` froze.

    Which rank was given other files is told before.
    """
    group = _group_of(ranks)
    # What one rank's disk lacks would leave the others waiting.
    sources = ranks.alike(partial(_sources, path, base, with_optimizer))
    stored = ranks.alike(partial(_opened, sources, with_optimizer))
    # Ranks that hold models of two shapes would wait for each other in FSDP2's collectives.
    _refuse_other_checkpoints(ranks, sources, stored)
    skeleton = _skeleton(sources, stored, dtype)
    # Before FSDP2 takes note of which parameters require gradients.
    asked = freeze_matching(skeleton.model, freeze)
    shard_model(path, skeleton.model, DeviceMesh.from_group(group, torch.device(device).type))
    # Damaged rows are seen by the rank that holds them.
    ranks.alike(partial(_materialise, path, skeleton, device))
    return folder_of(sources, skeleton.model), stored.optimizer, asked


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
        name
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for name in getattr(module, "_no_split_modules", None) or ()
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


def _sources(path: Path, base: Path | None, with_optimizer: bool) -> Sources:
    # The small file first: a missing optimizer should not cost the loading of a large model.
    if with_optimizer:
        refuse_without_optimizer(path)
    sources = sources_of(path, base)
    refuse_without_config(sources.configuration)
    refuse_quantised(sources.configuration, sources.model)
    return sources


def _opened(sources: Sources, with_optimizer: bool) -> Stored:
    path = sources.path
    file, optimizer = path / "optimizer.pt", None
    with _readable(path):
        if with_optimizer:
            optimizer = (
                OptimizerFile.of_file(file)
                if file.is_file()
                else DistributedOptimizer.of_folder(path / OPTIMIZER_FOLDER)
            )
        return Stored(_weights(sources.model), _adapter_weights(path) if sources.adapter else None, optimizer)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path}: the weights cannot be read: {one_line(error)}") from error


def _refuse_other_checkpoints(ranks: Ranks, sources: Sources, stored: Stored) -> None:
    """Every rank looks at the same few elements of every tensor: its own rows would be others than rank 0's."""
    if ranks.count > 1:
        check_same_inputs(ranks, ranks.alike(partial(_digests, sources, stored)))


def _digests(sources: Sources, stored: Stored) -> dict[str, bytes]:
    weights, base = (stored.model, None) if stored.adapter is None else (stored.adapter, stored.model)
    files = [sources.configuration / "config.json", sources.generation]
    files += [sources.path / "adapter_config.json"] if sources.adapter else []
    with _readable(sources.path):
        found = {
            "configuration": digest_of_settings([None if file is None else file.read_bytes() for file in files]),
            "weights": digest_of_tensors(weights.sample()),
            "base weights": digest_of_tensors({} if base is None else base.sample()),
        }
        if stored.optimizer is not None:
            found |= {
                "optimizer state": digest_of_tensors(stored.optimizer.sample()),
                "optimizer settings": digest_of_settings(stored.optimizer.settings),
                "trainer step": digest_of_settings(read_trainer_state(sources.path).global_step),
            }
    return found


def _skeleton(sources: Sources, stored: Stored, dtype: torch.dtype) -> Skeleton:
    skeleton = full_skeleton(sources, stored.model, dtype)
    if stored.adapter is not None:
        skeleton = adapter_skeleton(sources.path, skeleton, stored.adapter, dtype)
    lost = non_persistent_on_meta(skeleton.model)
    if lost:
        raise InputError(f"{sources.path}: buffer {lost[0]} has values only where weights have; {ADVICE}")
    return skeleton


def _weights(path: Path) -> StoredWeights:
    if keeps_weights_distributed(path):
        return DistributedWeights.of_folder(path / MODEL_FOLDER)
    refuse_without_weights(path)
    return SafetensorsWeights.of_folder(path)


def _adapter_weights(path: Path) -> StoredWeights:
    weights = path / "adapter_model.safetensors"
    if weights.is_file():
        return SafetensorsWeights.of_files([weights])
    if (path / MODEL_FOLDER).is_dir():
        return DistributedWeights.of_folder(path / MODEL_FOLDER)
    raise InputError(f"{path} has no adapter_model.safetensors; pickled adapters are not loaded")


@torch.no_grad()
def _materialise(path: Path, skeleton: Skeleton, device: torch.device | str) -> None:
    """Memory for the shards, and what is stored in them."""
    tensors: dict[str, Tensor] = dict(skeleton.model.named_buffers())
    for place in places(skeleton.model):
        shard = nn.Parameter(torch.empty_like(place.parameter, device=device), place.parameter.requires_grad)
        place.put(shard)
        tensors[place.name] = shard.detach()
    with _readable(path):
        _fill(path, {name: (tensors[name], origin) for name, origin in skeleton.origins.items()})
    for name, p in skeleton.model.named_parameters():
        refuse_damaged(path, name, p.to_local())


def _fill(path: Path, targets: Mapping[str, tuple[Tensor, Origin]]) -> None:
    for weights in {id(origin.weights): origin.weights for _, origin in targets.values()}.values():
        mine = {name: target for name, target in targets.items() if target[1].weights is weights}
        weights.fill({origin.keys[0]: tensor for tensor, origin in mine.values()})
        for name, (tensor, origin) in mine.items():
            for key in origin.keys[1:]:
                again = torch.empty_like(tensor)
                weights.fill({key: again})
                if not torch.equal(held_part(again), held_part(tensor)):
                    raise InputError(
                        f"{path}: {name} is tied, but the file holds other values under {key} than under {origin.keys[0]}"
                    )


def _adam_state(
    stored: OptimizerFile | DistributedOptimizer, model: nn.Module, mesh: DeviceMesh
) -> tuple[AdamState, OptimizerMapping]:
    if isinstance(stored, DistributedOptimizer):
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        saved = stored.read(trainable, mesh)
        return map_adam_state(saved, model, stored.folder.path, lambda name, moment: held_part(moment))
    rows = {name: own_rows(p) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    return map_adam_state(
        stored.saved,
        model,
        stored.path,
        # A copy: a view would keep the mapped file.
        lambda name, moment: moment[rows[name]].clone(memory_format=torch.contiguous_format),
    )
