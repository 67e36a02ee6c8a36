"""A model without its weights: parameters on the meta device, buffers real, and where each tensor's values are stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from entropy_probe.checkpoints.adapter_fit import does_not_fit
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.checkpoints.formats.base import StoredAdapter, StoredWeights
from entropy_probe.checkpoints.pretrained import LOAD_ERRORS, expert_kernels
from entropy_probe.checkpoints.sources import Sources
from entropy_probe.compat.torch_modules import own_buffers
from entropy_probe.compat.transformers_models import unexpected_keys_to_ignore
from entropy_probe.errors import InputError, one_line, out_of_memory, some_of
from entropy_probe.model.input_limits import input_limits

ADVICE = "use replicated sharding, which loads what transformers or PEFT converts on the way"
"""Where a model of transformers' or PEFT's own files cannot be built without its weights."""

NO_OTHER_WAY = (
    "save it with save_pretrained, whose files transformers and PEFT load with all that they convert on the way"
)
"""Where the weights come from another format."""

UNFILLED = frozenset({torch.empty, torch.rand, torch.randn})
"""What modules make parameters with that a file or an initialiser fills later; buffers come from values."""


Origin = Mapping[str, StoredTensor]
"""Where a tensor's values are, by key; more than one key where a file repeats a tied tensor."""


@dataclass(frozen=True)
class Skeleton:
    """``model`` with parameters on meta; ``origins`` by the name of every distinct parameter and persistent buffer.

    What has its values already, as a base that transformers loaded, has no origin.
    """

    model: Any
    origins: Mapping[str, Origin]


@dataclass(frozen=True)
class Place:
    """A distinct parameter and every module that holds it, with its name there; ``name`` is named_parameters' one."""

    name: str
    parameter: nn.Parameter
    holders: tuple[tuple[nn.Module, str], ...]

    def put(self, parameter: nn.Parameter) -> None:
        """Put another parameter in its stead, in all holders alike: what was tied stays tied."""
        for module, attribute in self.holders:
            module.register_parameter(attribute, parameter)


class _UnfilledOnMeta(TorchFunctionMode):
    """Tensors that are made without values have none: they go to meta.

    With the device meta for all, buffers that modules compute in their constructors would be lost too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in UNFILLED and kwargs.get("device") is None:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def places(model: nn.Module) -> list[Place]:
    """All distinct parameters, in the order of ``named_parameters``."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append((module, attribute))
    return [Place(name, p, tuple(holders[id(p)])) for name, p in model.named_parameters()]


def full_skeleton(sources: Sources, dtype: torch.dtype) -> Skeleton:
    """The causal language model that config.json describes, without an adapter.

    Raises:
        InputError: no such model can be built, or the stored keys and shapes are not one to one the model's.
    """
    path = sources.configuration
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        # What is read here is dequantised.
        vars(config).pop("quantization_config", None)
        with _UnfilledOnMeta():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, **expert_kernels(dtype)
            )
        if sources.generation is not None:
            model.generation_config = GenerationConfig.from_pretrained(sources.generation.parent, local_files_only=True)
    except Exception as error:  # configuration classes compute with what config.json says and raise anything
        if out_of_memory(error):
            raise
        raise InputError(f"{path} cannot be built as a causal language model: {one_line(error)}") from error
    _parameters_to_meta(model, dtype)
    _settle_buffers(model, dtype)
    origins = _match(sources.model, model.eval(), sources.weights)
    _refuse_lost_buffers(sources.model, model, sources.weights)
    return Skeleton(model, origins)


def adapter_skeleton(path: Path, base: Skeleton, adapter: StoredAdapter, dtype: torch.dtype) -> Skeleton:
    """A PEFT adapter over a base: the adapter's parameters trainable, the base's frozen.

    Raises:
        InputError: PEFT is missing or cannot build the adapter without weights, or the stored keys do not fit it.
    """
    try:
        from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise InputError(f"{path} is a PEFT adapter; install it with: pip install 'entropy-probe[lora]'") from error
    vocabulary, _ = input_limits(base.model)
    weights = adapter.tensors
    of_base = {id(t): base.origins[name] for name, t in _stored_tensors(base.model).items() if name in base.origins}
    filled = {id(p) for p in base.model.parameters() if not p.is_meta}
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**adapter.settings))
        if config.is_prompt_learning:
            raise ValueError("PEFT cannot train a loaded prompt learning adapter")
        config.inference_mode = False
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        # Without low_cpu_mem_usage PEFT moves what it makes to the base's device by value, and meta has none.
        model = kind(base.model, config, adapter.name, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        # Whatever the constructor leaves real of the adapter's own.
        _parameters_to_meta(model, dtype, filled)
        state = model.state_dict(keep_vars=True)
        expected = get_peft_model_state_dict(
            model, state_dict=state, adapter_name=adapter.name, save_embedding_layers=False
        )
    except (*LOAD_ERRORS, TypeError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path}: the adapter cannot be built without its weights: {one_line(error)}") from error
    _settle_buffers(model, dtype)
    # Of the buffers as they are now, not as they were.
    state = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in reversed(state.items())}
    own: dict[int, Origin] = {}
    for key, tensor in expected.items():
        # A whole state dict holds the adapter under its name, the adapter's own without.
        stored = key if key in weights else names.get(id(tensor), key)
        if stored not in weights:
            raise InputError(f"{path}: adapter weight {key} is missing; the file is truncated or of another base")
        if weights[stored].shape != tuple(tensor.shape):
            raise InputError(does_not_fit(path, key, weights[stored].shape, tuple(tensor.shape), vocabulary))
        own[id(tensor)] = {stored: weights[stored]}
    # A resized or replaced embedding is stored whole beside the adapter, under its own name, and goes over the base's.
    for key in weights.keys() & state.keys() - {key for origin in own.values() for key in origin}:
        if weights[key].shape != tuple(state[key].shape):
            raise InputError(does_not_fit(path, key, weights[key].shape, tuple(state[key].shape), vocabulary))
        own[id(state[key])] = {key: weights[key]}
    origins = {}
    for name, tensor in _stored_tensors(model).items():
        origin = own.get(id(tensor), of_base.get(id(tensor)))
        if origin is not None:
            origins[name] = origin
        elif (isinstance(tensor, nn.Parameter) and id(tensor) not in filled) or tensor.is_meta:
            raise InputError(f"{path}: no stored weight is {name}'s alone; {way_out(adapter)}")
    _refuse_lost_buffers(path, model, adapter)
    return Skeleton(model, origins)


def way_out(stored: StoredWeights | StoredAdapter) -> str:
    """What to do where a model cannot be built without its weights."""
    return NO_OTHER_WAY if stored.pretrained is None else ADVICE


def _match(path: Path, model: PreTrainedModel, weights: StoredWeights) -> dict[str, Origin]:
    tensors = model.state_dict(keep_vars=True)
    renamed = {_name_in(tensors, key, model.base_model_prefix): key for key in sorted(weights.tensors, reverse=True)}
    ignored = [re.compile(pattern) for pattern in unexpected_keys_to_ignore(model)]
    keys: dict[int, list[str]] = {}
    for name in tensors:
        if name in renamed:
            keys.setdefault(id(tensors[name]), []).append(renamed[name])
    problems = {
        "missing keys": [name for name, tensor in _stored_tensors(model).items() if id(tensor) not in keys],
        "mismatched keys": [
            name
            for name, key in renamed.items()
            if name in tensors and weights.tensors[key].shape != tuple(tensors[name].shape)
        ],
        "unexpected keys": [
            key for name, key in renamed.items() if name not in tensors and not any(p.search(key) for p in ignored)
        ],
    }
    strange = sorted(problems["unexpected keys"])
    if strange and problems["missing keys"] and weights.pretrained is None:
        raise InputError(
            f"{path} has names that are not those of the Hugging Face model: {some_of(strange)}; that one misses "
            f"{some_of(sorted(problems['missing keys']))}. Say with names (a JSON object, the checkpoint's names to the "
            "model's) which is which, where the tensors are the same; is it the checkpoint of another model?"
        )
    for problem, names in problems.items():
        if names:
            raise InputError(
                f"{path}: the weights do not fit the model, {problem}: {some_of(sorted(names))}; the file is truncated or of "
                f"another model, or transformers renames or merges this family's keys: then {way_out(weights)}"
            )
    return {
        name: {key: weights.tensors[key] for key in keys[id(tensor)]} for name, tensor in _stored_tensors(model).items()
    }


def _name_in(tensors: Mapping[str, Tensor], key: str, prefix: str) -> str:
    """The model's name for a key: checkpoints of the model without its head leave the prefix out."""
    return key if key in tensors or f"{prefix}.{key}" not in tensors else f"{prefix}.{key}"


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every distinct parameter and persistent buffer by its first name."""
    seen: set[int] = set()
    found = {}
    # Parameters in the order, and under the names, of named_parameters.
    for name, tensor in (*model.named_parameters(), *model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _parameters_to_meta(model: nn.Module, dtype: torch.dtype, filled: Collection[int] = ()) -> None:
    """All but those that have their values, by identity."""
    for place in places(model):
        p = place.parameter
        if id(p) not in filled and (not p.is_meta or p.dtype != dtype):
            place.put(nn.Parameter(torch.empty(p.shape, dtype=dtype, device="meta"), p.requires_grad))


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            yield module, name, buffer


def _settle_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """In float64 as weights are, below it as they are: rotary tables stay in float32, as in training.

    What a file will fill gets memory.
    """
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module, name, buffer in list(_buffers(model)):
        settled = torch.empty_like(buffer, device="cpu") if buffer.is_meta and id(buffer) in stored else buffer
        # By the dictionary: register_buffer would make it persistent.
        own_buffers(module)[name] = (
            settled.to(dtype) if dtype is torch.float64 and buffer.is_floating_point() else settled
        )


def _refuse_lost_buffers(path: Path, model: nn.Module, stored: StoredWeights | StoredAdapter) -> None:
    """Refuse buffers that no file holds and the constructors left without values."""
    kept = model.state_dict(keep_vars=True)
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in kept]
    if lost:
        raise InputError(f"{path}: buffer {lost[0]} has values only where weights have; {way_out(stored)}")
