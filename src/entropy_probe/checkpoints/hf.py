"""Hugging Face Trainer and TRL checkpoint folders: ``checkpoint-N`` with full weights or a PEFT adapter.

Weights are read from safetensors only (one file or shards), without network access and without remote code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from entropy_probe.checkpoints.adam_state import load_adam_state
from entropy_probe.checkpoints.adapters import (
    base_folder,
    load_adapter,
    refuse_adapter_inside,
    refuse_adapter_without_config,
)
from entropy_probe.checkpoints.distributed_folders import MODEL_FOLDER, OPTIMIZER_FOLDER, keeps_weights_distributed
from entropy_probe.checkpoints.foreign import refuse_foreign
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.checkpoints.quantisation import quantised_base_note, refuse_quantised
from entropy_probe.checkpoints.trainer_state import read_trainer_state
from entropy_probe.common.choices import path_of
from entropy_probe.common.evidence import Evidence
from entropy_probe.errors import InputError, one_line, out_of_memory, some_of
from entropy_probe.model.input_limits import input_limits
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.validation import PreconditionerTest, validate_preconditioner
from entropy_probe.ranks.sharding import WHOLE, Sharding

BY_ROWS = "accelerate's shards are read by run and sample under torchrun, sharded by FSDP2 (sharding fsdp2)"


@dataclass(frozen=True)
class Sources:
    """Where a model's parts are.

    Attributes:
        path: the checkpoint's folder.
        base: the model under an adapter; the one whose configuration describes full weights that come without; else None.
        adapter: whether the folder holds a PEFT adapter.
    """

    path: Path
    base: Path | None
    adapter: bool

    @property
    def configuration(self) -> Path:
        """Whose config.json describes the whole model."""
        return self.path if self.base is None else self.base

    @property
    def model(self) -> Path:
        """Whose weights are the whole model's: the base's under an adapter, else the checkpoint's."""
        return self.base if self.adapter and self.base is not None else self.path

    @property
    def generation(self) -> Path | None:
        """The generation_config.json that goes with the whole model; None where there is none."""
        files = [folder / "generation_config.json" for folder in (self.model, self.configuration)]
        return next((file for file in files if file.is_file()), None)


@dataclass(frozen=True)
class ModelFolder:
    """A causal language model read from a folder.

    ``kind`` is "full" or "lora" (any PEFT adapter); ``base`` is the base model's folder for an adapter, and for full weights
    without a configuration of their own the folder that has it, else None. ``context_length`` is None where the architecture
    sets no limit. ``notes`` is what loading gave cause to warn of.
    """

    path: Path
    kind: str
    base: Path | None
    model: nn.Module
    architecture: str
    vocabulary: int | None
    context_length: int | None
    notes: tuple[Evidence, ...] = ()

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """Where a tokenizer may be, first choice first."""
        return (self.path,) if self.base is None else (self.path, self.base)


@dataclass(frozen=True)
class Checkpoint:
    """A model with the Adam state that belongs to it, mapped by name and validated."""

    folder: ModelFolder
    adam: AdamState
    mapping: OptimizerMapping
    preconditioner_test: PreconditionerTest
    trainer_step: int | None

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.folder.model


def load_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    zero_v: ZeroV = ZeroV.LEAVE_OUT,
    freeze: Sequence[str] = (),
) -> Checkpoint:
    """Read weights and Adam state.

    ``zero_v`` is P where Adam's v is 0: left out, a state that has nothing else is refused.

    ``freeze`` are regular expressions: parameters in whose names one of them is found were not trained.

    Raises:
        InputError: anything missing, damaged or of another kind, in one line.
    """
    path = path_of("the checkpoint", path)
    # The small file first: a missing optimizer should not cost the loading of a large model.
    optimizer = optimizer_file(path)
    folder = load_model(path, base=base, dtype=dtype, device=device)
    asked = freeze_matching(folder.model, freeze)
    adam, mapping = load_adam_state(optimizer, folder.model)
    freeze_names(folder.model, mapping.frozen)
    return validated(folder, adam, mapping.said_of(asked), seed=seed, zero_v=zero_v)


def optimizer_file(path: Path) -> Path:
    """Where a checkpoint that one process reads whole has Adam's state.

    Raises:
        InputError: the folder has none in a form that is read; its framework is named.
    """
    file = path / "optimizer.pt"
    if path.is_dir() and not file.is_file() and (path / OPTIMIZER_FOLDER).is_dir():
        raise InputError(f"{path} has Adam's state in {OPTIMIZER_FOLDER}/; {BY_ROWS}")
    refuse_without_optimizer(path)
    return file


def validated(
    folder: ModelFolder,
    adam: AdamState,
    mapping: OptimizerMapping,
    *,
    seed: int,
    zero_v: ZeroV,
    sharding: Sharding = WHOLE,
) -> Checkpoint:
    """The checkpoint of a model and its Adam state, which fit each other.

    Raises:
        InputError: a trainable parameter has no usable state.
    """
    shapes = {name: p.shape for name, p in folder.model.named_parameters() if p.requires_grad}
    test = validate_preconditioner(adam, shapes, seed=seed, zero_v=zero_v, sharding=sharding)
    return Checkpoint(folder, adam, mapping, test, read_trainer_state(folder.path).global_step)


def load_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trainable: bool = True,
) -> ModelFolder:
    """Read the weights of a folder, full or adapter over base, in ``dtype``.

    Raises:
        InputError: no such folder, no safetensors, damaged or incomplete weights, an adapter without its base, or no
            configuration.
    """
    path = path_of("the checkpoint", path)
    sources = sources_of(path, None if base is None else path_of("base", base))
    refuse_quantised(sources.configuration, sources.model)
    if keeps_weights_distributed(path):
        raise InputError(f"{path} has its weights in {MODEL_FOLDER}/; {BY_ROWS}")
    model = _load_full(sources, dtype)
    if sources.adapter:
        model = _in_type(load_adapter(path, model, trainable), dtype)
    for name, p in model.named_parameters():
        refuse_damaged(path, name, p)
    return folder_of(sources, model.to(device))


def sources_of(path: Path, base: Path | None) -> Sources:
    """Where a checkpoint's parts are; the base of an adapter is the given one, or that named in its configuration.

    Raises:
        InputError: no such folder, another framework's, an adapter without its base or its configuration, or a base that
            neither lies under an adapter nor describes weights that come without config.json.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder; expected a checkpoint folder such as checkpoint-100")
    if (path / "adapter_config.json").is_file():
        return Sources(path, base_folder(path, base), adapter=True)
    refuse_adapter_without_config(path)
    described = (path / "config.json").is_file()
    if not described and not keeps_weights_distributed(path):
        refuse_adapter_inside(path)
        refuse_foreign(path)
    if described:
        if base is not None:
            raise InputError(
                f"{path} holds no adapter_config.json, so a base has nothing to be the base of; leave it out"
            )
        return Sources(path, None, adapter=False)
    if base is None:
        raise InputError(
            f"{path} has no config.json; expected a Hugging Face checkpoint folder, or beside it as base the folder of the "
            "model that training started from (accelerate's shards come without a configuration)"
        )
    return Sources(path, base_folder(path, base), adapter=False)


def folder_of(sources: Sources, model: Any) -> ModelFolder:
    """What the probe knows of a loaded model."""
    vocabulary, context_length = input_limits(model)
    return ModelFolder(
        path=sources.path,
        kind="lora" if sources.adapter else "full",
        base=sources.base,
        model=model,
        architecture=str(model.config.get_text_config().model_type),
        vocabulary=vocabulary,
        context_length=context_length,
        notes=_notes(sources),
    )


def _notes(sources: Sources) -> tuple[Evidence, ...]:
    if not sources.adapter or sources.base is None:
        return ()
    note = quantised_base_note(sources.path, sources.base)
    return () if note is None else (note,)


def refuse_damaged(path: Path, name: str, weight: Tensor) -> None:
    """Refuse a weight that holds NaN or an infinite value.

    Raises:
        InputError: it does.
    """
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{path}: weight {name} holds NaN or an infinite value; the weights are damaged")


def refuse_without_optimizer(path: Path) -> None:
    """Refuse a folder without Adam's state in a form that is read.

    Raises:
        InputError: it has neither optimizer.pt nor accelerate's shards; a framework that keeps it otherwise is named.
    """
    if not path.is_dir() or (path / "optimizer.pt").is_file() or (path / OPTIMIZER_FOLDER).is_dir():
        return
    refuse_foreign(path)
    raise InputError(
        f"{path} has no optimizer.pt and no {OPTIMIZER_FOLDER}/; the probe needs Adam's state (a Trainer leaves it out with "
        "save_only_model=True)"
    )


def refuse_without_config(path: Path) -> None:
    """Refuse a folder that describes no model.

    Raises:
        InputError: it has no config.json.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json; expected a Hugging Face checkpoint folder")


def refuse_without_weights(path: Path) -> None:
    """Refuse a folder whose weights, if any, are pickles.

    Raises:
        InputError: it has no safetensors; the pickles are named.
    """
    if not any(path.glob("*.safetensors")):
        refuse_foreign(path)
        pickles = sorted(file.name for file in path.glob("*.bin"))
        found = f"only {', '.join(pickles)}, which would have to be unpickled" if pickles else "no weights"
        raise InputError(f"{path} holds {found}; expected model.safetensors or its shards")


def expert_kernels(dtype: torch.dtype) -> dict[str, str]:
    """Keyword arguments for a model in ``dtype``: the fused expert kernels that transformers 5 chooses take no float64."""
    old = int(transformers.__version__.split(".")[0]) < 5
    return {} if old or dtype is not torch.float64 else {"experts_implementation": "eager"}


def _load_full(sources: Sources, dtype: torch.dtype) -> Any:
    path = sources.model
    refuse_without_config(sources.configuration)
    refuse_without_weights(path)
    try:
        config = AutoConfig.from_pretrained(sources.configuration, local_files_only=True, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # A tensor of another shape is then listed by name below instead of raised without it.
            ignore_mismatched_sizes=True,
            **expert_kernels(dtype),
            **_generation(sources, config),
        )
    except Exception as error:  # configuration classes compute with what config.json says and raise anything
        if out_of_memory(error):
            raise
        raise InputError(f"{path} cannot be loaded as a causal language model: {one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if loading.get(problem):
            names = sorted(key if isinstance(key, str) else str(key[0]) for key in loading[problem])
            raise InputError(
                f"{path}: the weights do not fit the model, {problem.replace('_', ' ')}: {some_of(names)}; the file is "
                "truncated or of another model"
            )
    return _in_type(model, dtype)


def _generation(sources: Sources, config: Any) -> dict[str, Any]:
    """Keyword arguments for weights without a configuration, beside which transformers would look for one to generate by."""
    if sources.configuration == sources.model:
        return {}
    if sources.generation is None:
        return {"generation_config": GenerationConfig.from_model_config(config)}
    found = GenerationConfig.from_pretrained(sources.generation.parent, local_files_only=True)
    return {"generation_config": found}


def _in_type(model: Any, dtype: torch.dtype) -> Any:
    """Weights in ``dtype``; buffers are only widened: rotary tables stay in float32, as in training, below float64."""
    if dtype is torch.float64:
        return model.to(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
