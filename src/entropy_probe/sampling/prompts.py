"""Prompts to sample from: a file of them, and whether they fit the model."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_probe.data.rollouts import PromptId, read_rows
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, its text, and the row that it came from."""

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any]


def read_prompts(path: Path, tokenizer: Any = None) -> list[Prompt]:
    """Read JSON Lines (or Parquet) with ``prompt`` (text), ``messages`` or ``prompt_ids``, and optionally ``prompt_id``.

    A text is tokenised with the tokenizer's own special tokens and no chat template; messages, a list of role and content, by
    the template of the tokenizer, with ``tools`` and ``chat_template_kwargs`` of the row where it has them. Where there are ids
    they are taken. Without ``prompt_id`` the row's number serves.

    Raises:
        InputError: no rows, a row with none of these columns or with text and messages, an empty prompt, text or messages
            without a tokenizer, or messages that its template does not take.
    """
    prompts = []
    for number, (where, row) in enumerate(read_rows(path)):
        text = row.get("prompt")
        if text is not None and not isinstance(text, str):
            raise InputError(
                f"{where}: prompt is a {type(text).__name__}; expected text (a conversation is called messages)"
            )
        ids = _ids(row, where, tokenizer)
        prompt_id = row.get("prompt_id", number)
        if isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int):
            raise InputError(f"{where}: prompt_id is a {type(prompt_id).__name__}; expected a string or an integer")
        if not ids:
            raise InputError(f"{where} is an empty prompt; the first response token needs a prefix")
        shown = (
            text if text is not None else "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        )
        prompts.append(Prompt(prompt_id, tuple(ids), shown, row))
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise InputError(f"{path} uses a prompt_id twice; give each prompt its own, or none")
    return prompts


def _ids(row: Mapping[str, Any], where: str, tokenizer: Any) -> list[int]:
    """The ids of a prompt, as they are or made by the tokenizer."""
    ids, text, messages = row.get("prompt_ids"), row.get("prompt"), row.get("messages")
    if ids is None:
        if text is None and messages is None:
            raise InputError(f"{where} has neither prompt nor messages nor prompt_ids")
        if text is not None and messages is not None:
            raise InputError(f"{where} has prompt and messages; give one of them")
        if tokenizer is None:
            given = "text" if messages is None else "messages"
            raise InputError(f"{where} gives {given}, but the checkpoint has no tokenizer; give prompt_ids instead")
        ids = _of_text(text, where, tokenizer) if messages is None else _of_messages(messages, row, where, tokenizer)
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(f"{where}: prompt_ids is {ids!r}; expected a list of token ids")
    return ids


def _of_text(text: Any, where: str, tokenizer: Any) -> Any:
    ids = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise InputError(
            f"{where}: the text begins with the tokenizer's BOS, which the tokenizer adds again; give the text without "
            "it, or prompt_ids"
        )
    return ids


def _of_messages(messages: Any, row: Mapping[str, Any], where: str, tokenizer: Any) -> Any:
    """By the tokenizer's template, up to where the next turn begins; a last turn of the assistant's is gone on with."""
    if not isinstance(messages, list) or not messages or not all(_is_message(one) for one in messages):
        raise InputError(
            f"{where}: messages is {reprlib.repr(messages)}; expected a list of mappings with role and content"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where} gives messages, but the checkpoint's tokenizer has no chat template; give prompt_ids"
        )
    more = row.get("chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise InputError(f"{where}: chat_template_kwargs is a {type(more).__name__}; expected a mapping")
    unfinished = messages[-1]["role"] == "assistant"
    turn = {"add_generation_prompt": not unfinished, "continue_final_message": unfinished}
    try:
        text = tokenizer.apply_chat_template(messages, **{"tools": row.get("tools"), **more, **turn, "tokenize": False})
    except Exception as error:  # a template is a program of the checkpoint's, which raises anything
        if out_of_memory(error):
            raise
        raise InputError(
            f"{where}: the chat template does not take these messages: {type(error).__name__}: {one_line(error)}"
        ) from error
    # The template has written the special tokens itself.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return value.get("content") is not None or bool(value.get("tool_calls"))


def check_prompts(
    prompts: Sequence[Prompt], settings: SamplingSettings, vocabulary: int | None, context_length: int | None
) -> None:
    """Refuse what the model could not sample; a limit of None is not checked.

    Raises:
        InputError: a token id outside the vocabulary, or a prompt whose longest response would pass the context length.
    """
    if vocabulary is not None:
        for token in settings.eos_ids:
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"end token {token} (given, or the model's own) is outside the model's vocabulary of {vocabulary}"
                )
    for prompt in prompts:
        if vocabulary is not None and max(prompt.prompt_ids) >= vocabulary:
            raise InputError(
                f"prompt_id {prompt.prompt_id!r} holds token id {max(prompt.prompt_ids)}, but the model's vocabulary has "
                f"{vocabulary}; was it made with another tokenizer?"
            )
        longest = len(prompt.prompt_ids) + settings.max_new_tokens
        if context_length is not None and longest > context_length:
            room = context_length - len(prompt.prompt_ids)
            advice = f"give max_new_tokens of at most {room}" if room > 0 else "shorten the prompt"
            raise InputError(
                f"prompt_id {prompt.prompt_id!r} has {len(prompt.prompt_ids)} tokens, with max_new_tokens "
                f"{settings.max_new_tokens} up to {longest}; the model's context holds {context_length}: {advice}"
            )
