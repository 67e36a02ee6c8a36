"""What the sampler really did: the settings that generation uses, whatever the trainer's arguments say.

transformers fills fields of the trainer's generation config that are None from the model's own and from its defaults
(top_k: 50), so what is looked at is the config that ``generate`` makes of it; with vLLM, what TRL passes to it. A field that
this module does not know must have its default value.
"""

from __future__ import annotations

import contextlib
import inspect
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
import trl
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, GenerationMixin
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import utils as trl_model_utils

from entropy_probe.compat.transformers_models import GENERATION_CONFIGS_OWN
from entropy_probe.compat.trl import GENERATE, GENERATE_BATCH, OVERRIDE, PREPARE, VLLM_SETTINGS
from entropy_probe.data.rollouts.columns import SAMPLING, among, leaves_whole
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl.loss_columns import is_grpo
from entropy_probe.integrations.trl.own_code import replacement
from entropy_probe.integrations.trl.trainer import end_tokens, refuse

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **SAMPLING,
    # "quantized" rounds the keys and values that the sampler looks at.
    "cache_implementation": (
        *("dynamic", "dynamic_full", "hybrid", "hybrid_chunked", "offloaded", "offloaded_hybrid"),
        *("offloaded_hybrid_chunked", "offloaded_static", "sliding_window", "static"),
    ),
    "is_assistant": (False,),
    "num_return_sequences": (1,),
    "use_mtp": (False,),
}
"""Values of a GenerationConfig, besides None, under which every token keeps its probability and its response."""
HARMLESS = {
    *GENERATION_CONFIGS_OWN,
    *("assistant_confidence_threshold", "assistant_lookbehind"),
    *("bos_token_id", "compile_config", "continuous_batching_config", "decoder_start_token_id", "disable_compile"),
    *("early_stopping", "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states"),
    *("output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "renormalize_logits"),
    *("return_dict_in_generate", "seed", "target_lookbehind", "transformers_version", "use_cache"),
}
"""Fields of a GenerationConfig whose value changes no probability where the others are neutral; it reads no seed."""

SERVERS_OWN = ("min_p", "repetition_penalty", "top_p")
"""Arguments of vLLM's of which None is the server's own default."""
VLLM_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **SAMPLING,
    **{name: tuple(value for value in SAMPLING[name] if value is not None) for name in SERVERS_OWN},
    # What ends a response bends no probability; the rows could not tell it.
    "ignore_eos": (None, False),
    "stop": (None, [], ""),
    "stop_token_ids": (None, []),
}
"""Values of vLLM's SamplingParams under which every token keeps its probability; of what is not named: None."""
VLLM_HARMLESS = {
    *("detokenize", "include_stop_str_in_output", "logprobs", "output_kind", "priority", "prompt_logprobs"),
    *("skip_special_tokens", "spaces_between_special_tokens"),
}

Columns = Mapping[str, str | float | None]


class Bent(NamedTuple):
    """A setting of generation that makes the responses another policy's."""

    field: str
    value: object
    expected: object
    known: bool = True

    def __str__(self) -> str:
        """For an error's one line."""
        doubt = "" if self.known else "not known here; "
        return f"{self.field} = {reprlib.repr(self.value)} ({doubt}expected: {self.expected!r})"


def neutral_sampling(trainer: Any) -> Columns:
    """The columns of the rows that say how generation draws, all of them neutral.

    Of a ``rollout_func`` nothing is known but that it is one: its draws are its author's to answer for. Called when the
    recorder is built and again before each generation: a config may be changed in between.

    Raises:
        InputError: a setting bends the distribution, the model generates in a way of its own, or a private name that
            tells what generation uses is missing.
    """
    if draws_by_function(trainer):
        return {"sampler": "rollout_func"}
    if trainer.use_vllm:
        return _of_vllm(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    batched = bool(trainer.use_transformers_continuous_batching)
    _check_model(model, batched)
    config = trainer.generation_config if batched else _prepared(trainer, model)
    bent = list(_bent_fields(trainer, model, vars(config)))
    if bent:
        unset = trainer.top_k is None and any(one.field == "top_k" for one in bent)
        hint = "; top_k = None there means the model's own or transformers' default" if unset else ""
        raise refuse(
            f"generation uses {', '.join(map(str, bent))}, so the responses may not be the policy's own draws; set "
            f"what is expected in GRPOConfig, in its generation_kwargs or in model.generation_config{hint}"
        )
    return {
        "sampler": "transformers continuous batching" if batched else "transformers",
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
        "suppress_tokens": None,
    }


def draws_by_function(trainer: Any) -> bool:
    """Whether a function of the user's draws the responses."""
    return bool(is_grpo(trainer) and trainer.rollout_func is not None)


def _prepared(trainer: Any, model: Any) -> GenerationConfig:
    """The config that ``generate`` makes of the trainer's: what is None there comes from the model and the defaults."""
    prepare, override = getattr(model, PREPARE), getattr(trl_model_utils, OVERRIDE, None)
    first = next(iter(inspect.signature(prepare).parameters), None)
    if first != "generation_config" or override is None:
        raise InputError(
            f"what generation uses cannot be told with TRL {trl.__version__} and transformers {transformers.__version__}: "
            f"{OVERRIDE} of TRL is missing, or {PREPARE} of the model takes {first!r} first; install known versions"
        )
    with override(model, generation_kwargs=trainer.generation_kwargs):
        config = prepare(trainer.generation_config)[0]
    if not isinstance(config, GenerationConfig):
        raise InputError(
            f"{PREPARE} of transformers {transformers.__version__} returned {type(config).__name__} first; expected a "
            "GenerationConfig: what generation uses cannot be told"
        )
    return config


def _check_model(model: Any, batched: bool) -> None:
    """Refuse a model whose way of generating is not transformers' own; an adapter's wrapper passes it on."""
    if is_peft_model(model):
        if "generate" in vars(model) or not type(model).__module__.startswith("peft."):
            raise refuse(f"{type(model).__name__} generates in a way of its own: its generate is not PEFT's")
        base = model.get_base_model()
        if model.generation_config is not base.generation_config:
            raise refuse(
                "the PEFT model has a generation_config beside its base model's; set the fields in the one that it has"
            )
        model = base
    for name in GENERATE_BATCH if batched else GENERATE:
        source = replacement(model, name, GenerationMixin, (transformers, torch, contextlib))
        if source is not None:
            raise refuse(
                f"{type(model).__name__} generates in a way of its own: {name} is not that of transformers ({source})"
            )


def _bent_fields(trainer: Any, model: Any, fields: Mapping[str, Any]) -> Iterator[Bent]:
    plain = vars(GenerationConfig())
    vocabulary = model.config.get_text_config().vocab_size
    for name, value in sorted(fields.items()):
        if name == "do_sample":
            if value is not True:
                yield Bent(name, value, True)
        elif name == "temperature":
            if (1.0 if value is None else value) != trainer.temperature:
                yield Bent(name, value, trainer.temperature)
        elif name == "top_k":
            if not _keeps_all(value, vocabulary, (None, 0)):
                yield Bent(name, value, 0)
        elif name == "max_new_tokens":
            if value != trainer.max_completion_length:
                yield Bent(name, value, trainer.max_completion_length)
        elif name == "eos_token_id":
            # An end token that the trainer does not know is followed by padding, which it would take for a response.
            ends = end_tokens(trainer)
            if not set(_ids(value)) <= set(ends):
                yield Bent(name, value, ends)
        elif name in NEUTRAL:
            if value is not None and not leaves_whole(name, value, NEUTRAL[name]):
                yield Bent(name, value, _first(NEUTRAL[name]))
        elif name not in HARMLESS and value is not None and not (name in plain and among(value, (plain[name],))):
            yield Bent(name, value, plain.get(name), known=name in plain)


def _of_vllm(trainer: Any) -> Columns:
    """What TRL passes to vLLM's SamplingParams: its own arguments, and ``generation_kwargs`` over them."""
    vllm = trainer.vllm_generation
    missing = [name for name in VLLM_SETTINGS if not hasattr(vllm, name)]
    if missing:
        raise InputError(
            f"vllm_generation of TRL {trl.__version__} has no {', '.join(missing)}: what vLLM is told cannot be read"
        )
    source = replacement(vllm, "generate", VLLMGeneration, (trl, torch))
    if source is not None:
        raise refuse(f"vllm_generation draws in a way of its own: generate is not TRL's ({source})")
    passed = {
        "temperature": vllm.temperature,
        "top_p": vllm.top_p,
        "top_k": vllm.top_k,
        "min_p": 0.0 if vllm.min_p is None else vllm.min_p,
        "repetition_penalty": vllm.repetition_penalty,
        "max_tokens": vllm.max_completion_length,
        **vllm.generation_kwargs,
    }
    if vllm.structured_outputs_regex is not None:
        passed["structured_outputs"] = vllm.structured_outputs_regex
    model = trainer.accelerator.unwrap_model(trainer.model)
    bent = list(_bent_for_vllm(trainer, model, passed))
    if bent:
        raise refuse(
            f"vLLM is told {', '.join(map(str, bent))}, so the responses may not be the policy's own draws, each for "
            "itself; set what is expected in GRPOConfig or in its generation_kwargs"
        )
    return {
        "sampler": "vllm",
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_new_tokens": 0,
    }


def _bent_for_vllm(trainer: Any, model: Any, passed: Mapping[str, Any]) -> Iterator[Bent]:
    vocabulary = model.config.get_text_config().vocab_size
    for name, value in sorted(passed.items()):
        if name == "temperature":
            if value != trainer.temperature:
                yield Bent(name, value, trainer.temperature)
        elif name == "top_k":
            if not _keeps_all(value, vocabulary, (0, -1)):
                yield Bent(name, value, 0)
        elif name == "max_tokens":
            if value != trainer.max_completion_length:
                yield Bent(name, value, trainer.max_completion_length)
        elif name not in VLLM_HARMLESS and not leaves_whole(name, value, VLLM_NEUTRAL.get(name, (None,))):
            # A seed is not harmless here: it draws the same random numbers for every prompt, and again each step.
            yield Bent(name, value, _first(VLLM_NEUTRAL.get(name, (None,))))


def _keeps_all(top_k: Any, vocabulary: int, off: tuple[Any, ...]) -> bool:
    return top_k in off or (isinstance(top_k, int) and top_k >= vocabulary)


def _first(neutral: tuple[Any, ...]) -> object:
    """What to set: None leaves a field to the model's own config, where another value says it."""
    return next((value for value in neutral if value is not None), None)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
