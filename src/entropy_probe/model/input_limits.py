"""What a model takes as input, by its configuration: ids, lengths, special ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from entropy_probe.data.rollouts import RolloutBatch, SpecialIds
from entropy_probe.errors import InputError


def input_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """(vocabulary, context length) of the transformers model in ``model``; None where there is none or it sets no limit."""
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return None, None
    # num_embeddings and not the weight's shape: where weights are sharded, this rank's tensor holds only some rows.
    embedding = inner.get_input_embeddings()
    config = inner.config.get_text_config()
    # An adapter may have put a module of its own in the embedding's place.
    vocabulary = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else config.vocab_size
    return vocabulary, getattr(config, "max_position_embeddings", None)


def end_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that the transformers model in ``model`` ends with, by its config and its generation config; () without any.

    Of a generation config these ids, and those of :func:`special_ids`, alone are read: many chat models name their end of turn
    only there.
    """
    return _configured_ids(model, "eos_token_id")


def special_ids(model: nn.Module, tokenizer: SpecialIds = SpecialIds()) -> SpecialIds:  # noqa: B008 (frozen)
    """The ids that pad, end and begin by the configs of the transformers model in ``model`` and by its tokenizer."""
    end = end_token_ids(model)
    return SpecialIds(
        pad=_each_once(_configured_ids(model, "pad_token_id"), tokenizer.pad),
        end=end,
        stop=_each_once(end, tokenizer.stop),
        begin=_each_once(_configured_ids(model, "bos_token_id"), tokenizer.begin),
        unknown=tokenizer.unknown,
    )


def _configured_ids(model: nn.Module, name: str) -> tuple[int, ...]:
    """What the text model's config and the generation config call by this name; original Llama's pad of -1 is none."""
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return ()
    ids: list[object] = []
    generation = vars(inner).get("generation_config")
    own = getattr(generation, name, None) if isinstance(generation, GenerationConfig) else None
    for configured in (getattr(inner.config.get_text_config(), name, None), own):
        ids.extend(configured if isinstance(configured, list | tuple) else [configured])
    return _each_once(token for token in ids if isinstance(token, int) and token >= 0)


def _each_once(*ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(itertools.chain(*ids)))


def check_fits(batch: RolloutBatch, vocabulary: int | None, context_length: int | None) -> None:
    """Refuse rollouts that the model cannot score; a limit of None is not checked.

    Raises:
        InputError: a token id outside the vocabulary, or a sequence past the context length; the prompt is named.
    """
    for response in batch.responses:
        ids = (*response.prompt_ids, *response.response_ids)
        if vocabulary is not None and max(ids) >= vocabulary:
            raise InputError(
                f"prompt_id {response.prompt_id!r} holds token id {max(ids)}, but the model's vocabulary has {vocabulary}; "
                "were these rollouts made with another tokenizer?"
            )
        if context_length is not None and len(ids) > context_length:
            raise InputError(
                f"prompt_id {response.prompt_id!r} with its response has {len(ids)} tokens; "
                f"the model's context holds {context_length}"
            )
