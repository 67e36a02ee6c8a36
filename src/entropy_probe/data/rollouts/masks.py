"""Attention masks beside the ids: which of them are padding.

A mask holds 1 at ids that the model saw and 0 at padding: on the left of a prompt, on the right of a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_probe.errors import InputError

PROMPT_MASKS = ("prompt_attention_mask", "prompt_mask")
"""Over the prompt's ids."""
RESPONSE_MASKS = ("response_attention_mask", "completion_attention_mask")
"""Over the response's ids."""
WHOLE_MASKS = ("attention_mask",)
"""Over prompt and response, or over the prompt alone."""
ATTENTION_MASKS = (*PROMPT_MASKS, *RESPONSE_MASKS, *WHOLE_MASKS)


@dataclass(frozen=True)
class Padding:
    """Ids that masks say are padding: so many at the prompt's start, so many at the response's end."""

    prompt: int = 0
    response: int = 0


def padding_of(extra: Mapping[str, Any], prompt: int, response: int) -> Padding:
    """What the masks among further columns say is padding.

    Args:
        extra: the row's further columns.
        prompt: ids in the prompt.
        response: ids in the response.

    Raises:
        InputError: a mask is of another length, holds something other than 0 and 1, has a zero in the middle, leaves nothing,
            or says something else than another one.
    """
    left: dict[str, int] = {}
    right: dict[str, int] = {}
    for name in ATTENTION_MASKS:
        if extra.get(name) is None:
            continue
        over_prompt, over_response = _parts(name, zeros_and_ones(extra[name], name), prompt, response)
        if over_prompt is not None:
            left[name] = _zeros_ahead(over_prompt, name, "prompt", "start")
        if over_response is not None:
            right[name] = _zeros_ahead(over_response[::-1], name, "response", "end")
    for found in (left, right):
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in found.items())
            raise InputError(f"the masks disagree about how many ids are padding ({said}); give one of them")
    return Padding(next(iter(left.values()), 0), next(iter(right.values()), 0))


def vouched(extra: Mapping[str, Any]) -> bool:
    """Whether a mask says that the model saw every id of the prompt; one that said otherwise is not kept."""
    return any(extra.get(name) is not None for name in (*PROMPT_MASKS, *WHOLE_MASKS))


def zeros_and_ones(value: object, name: str) -> list[int]:
    """A mask as 0s and 1s, given as those, as booleans, or as 0.0 and 1.0.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is a {type(value).__name__}; expected a list of 0 and 1")
    for item in value:
        if not isinstance(item, bool | int | float) or item not in (0, 1):
            raise InputError(f"{name} holds {item!r}; expected 0 and 1 alone")
    return [int(item) for item in value]


def _parts(
    name: str, mask: Sequence[int], prompt: int, response: int
) -> tuple[Sequence[int] | None, Sequence[int] | None]:
    """What a mask says of the prompt, and of the response; None where it says nothing."""
    if name not in RESPONSE_MASKS and len(mask) == prompt:
        return mask, None
    if name in RESPONSE_MASKS and len(mask) == response:
        return None, mask
    if name in WHOLE_MASKS and len(mask) == prompt + response:
        return mask[:prompt], mask[prompt:]
    lengths = {
        PROMPT_MASKS: f"{prompt}, one for each of prompt_ids",
        RESPONSE_MASKS: f"{response}, one for each of response_ids",
        WHOLE_MASKS: f"{prompt + response}, one for each of prompt_ids and response_ids, or {prompt} for prompt_ids alone",
    }
    expected = next(text for names, text in lengths.items() if name in names)
    raise InputError(f"{name} has {len(mask)} values; expected {expected}")


def _zeros_ahead(mask: Sequence[int], name: str, part: str, side: str) -> int:
    """How many zeros it begins with; ones follow."""
    zeros = next((place for place, item in enumerate(mask) if item), len(mask))
    if zeros == len(mask):
        raise InputError(f"{name} is 0 over the whole {part}; expected at least one id that the model saw")
    if 0 in mask[zeros:]:
        raise InputError(
            f"{name} has a 0 between ones of the {part}; expected zeros at its {side} alone, where padding stands"
        )
    return zeros
