"""What transformers and PEFT load from their own folders, with all that they rename, merge and convert on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from entropy_probe.checkpoints.adapter_fit import does_not_fit, why_not_loaded
from entropy_probe.checkpoints.formats.base import StoredAdapter
from entropy_probe.checkpoints.sources import Sources
from entropy_probe.errors import InputError, one_line, out_of_memory, some_of
from entropy_probe.model.input_limits import input_limits

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def pretrained_model(sources: Sources, path: Path, dtype: torch.dtype) -> Any:
    """The causal language model in ``path`` as transformers loads it, without network access and without remote code.

    Raises:
        InputError: it cannot be loaded, or its weights are not one to one the model's.
    """
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
    return in_type(model, dtype)


def pretrained_adapter(path: Path, stored: StoredAdapter, model: Any, trainable: bool) -> Any:
    """The model with an adapter around it as PEFT loads it from a folder, in the types as stored.

    Raises:
        InputError: no PEFT here, or weights that do not fit the model.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise InputError(f"{path} is a PEFT adapter; install it with: pip install 'entropy-probe[lora]'") from error
    try:
        adapted = PeftModel.from_pretrained(
            model,
            path,
            adapter_name=stored.name,
            is_trainable=trainable,
            autocast_adapter_dtype=False,
            local_files_only=True,
        )
    except (*LOAD_ERRORS, TypeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(why_not_loaded(path, error, input_limits(model)[0])) from error
    expected = {
        key: tuple(value.shape)
        for key, value in get_peft_model_state_dict(
            adapted, adapter_name=stored.name, save_embedding_layers=False
        ).items()
    }
    for key, shape in expected.items():
        if key not in stored.tensors:
            raise InputError(f"{path}: adapter weight {key} is missing; the file is truncated or of another base")
        if stored.tensors[key].shape != shape:
            raise InputError(does_not_fit(path, key, stored.tensors[key].shape, shape, input_limits(model)[0]))
    return adapted


def expert_kernels(dtype: torch.dtype) -> dict[str, str]:
    """Keyword arguments for a model in ``dtype``: the fused expert kernels that transformers 5 chooses take no float64."""
    old = int(transformers.__version__.split(".")[0]) < 5
    return {} if old or dtype is not torch.float64 else {"experts_implementation": "eager"}


def in_type(model: Any, dtype: torch.dtype) -> Any:
    """Weights in ``dtype``; buffers are only widened: rotary tables stay in float32, as in training, below float64."""
    if dtype is torch.float64:
        return model.to(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _generation(sources: Sources, config: Any) -> dict[str, Any]:
    """Keyword arguments for weights without a configuration, beside which transformers would look for one to generate by."""
    if sources.configuration == sources.model:
        return {}
    if sources.generation is None:
        return {"generation_config": GenerationConfig.from_model_config(config)}
    found = GenerationConfig.from_pretrained(sources.generation.parent, local_files_only=True)
    return {"generation_config": found}
