"""Rows made of text, where the user insists: ids that the text gives now, which need not be those that were sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts.formats.base import Converted, Text
from entropy_probe.data.rollouts.formats.parts import Numbers
from entropy_probe.errors import InputError

MARK = "retokenized"
"""The column that such rows have, so that whoever reads them later is told."""


def retokenize(texts: Iterable[Text], tokenizer: Any, *, special_tokens: bool) -> Converted:
    """Ids of every text, with the number of texts that do not come back when the ids are decoded.

    A prompt without its special tokens gets those that the tokenizer itself adds; a response gets none, so that its end token
    is missing where the dump has stripped it.

    Args:
        texts: prompts and responses.
        tokenizer: the policy's, of transformers.
        special_tokens: whether the texts have theirs.

    Raises:
        InputError: a text is none, or gives no ids.
    """

    def ids_of(text: object, what: str, where: str, *, add: bool) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"{where}: {what} is a {type(text).__name__}; expected text")
        ids: list[int] = tokenizer(text, add_special_tokens=add)["input_ids"]
        if not ids:
            raise InputError(f"{where}: {what} is empty text, which gives no token ids; leave the row out")
        return ids

    def differs(ids: list[int], text: str) -> bool:
        return bool(tokenizer.decode(ids, skip_special_tokens=not special_tokens) != text)

    prompts, rows, bad_prompts, bad_responses = Numbers(), [], 0, 0
    for text in texts:
        prompt = ids_of(text.prompt, "the prompt", text.where, add=not special_tokens)
        response = ids_of(text.response, "the response", text.where, add=False)
        bad_prompts += differs(prompt, text.prompt)
        bad_responses += differs(response, text.response)
        own = {"prompt_id": prompts.of(tuple(prompt)), "prompt_ids": prompt, "response_ids": response, MARK: True}
        rows.append((text.where, {**own, **text.columns}))
    stripped = "" if special_tokens else "; special tokens were stripped, of which end tokens are missing"
    return Converted(
        rows,
        [
            Evidence(
                MARK,
                f"the dump holds text: {bad_responses} of {len(rows)} responses and {bad_prompts} of their prompts do not come "
                f"back from the ids that their text gives{stripped}",
                "Take exact rows (`entropy-probe sample`, or entropy_probe.integrations.rows at the step)",
            )
        ],
    )
