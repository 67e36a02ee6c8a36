"""What a column may hold: each check takes a value and the column's name, and gives the value in Python's own types.

NumPy's and torch's scalars count as Python's, their arrays and tensors as lists. Messages begin with the column; who calls
says which row it is.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from entropy_probe.data.rollouts.masks import zeros_and_ones
from entropy_probe.errors import InputError

LOGPROB_ROUNDING = 1e-3
"""Nats above 0 that a log-prob may have by rounding in a sampler's arithmetic."""

PLAIN = {int, float, str, bool, type(None)}
"""Types whose values hold no others."""


def plain(value: object) -> object:
    """A scalar, array or tensor of NumPy or torch in Python's own types, in mappings and lists too; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    # Most lists pass by their items' types alone: a loop over every token of a large file is slow.
    if type(value) in (list, tuple) and set(map(type, value)) - PLAIN:  # type: ignore[call-overload]
        return type(value)(map(plain, value))  # type: ignore[call-overload, call-arg]
    return value


def prompt_id(value: object, name: str) -> str | int:
    """Text or an integer.

    Raises:
        InputError: it is neither.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{name} is a {type(value).__name__}; expected a string or an integer")
    return value


def number(value: object, name: str) -> float:
    """A finite number.

    Raises:
        InputError: it is something else.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is a {type(value).__name__}; expected a number")
    try:
        found = float(value)
    except OverflowError as error:
        raise InputError(f"{name} is too large; expected a number in the range of float64") from error
    if not math.isfinite(found):
        raise InputError(f"{name} is {found}; expected a finite number")
    return found


def reward(value: object, name: str) -> float:
    """A finite number; true counts as 1 and false as 0, as a verifier that says right or wrong writes them.

    Raises:
        InputError: it is something else.
    """
    value = plain(value)
    return float(value) if isinstance(value, bool) else number(value, name)


def positive(value: object, name: str) -> float:
    """A finite number above 0.

    Raises:
        InputError: it is something else.
    """
    return _above_0(value, name, "expected a number above 0")


def temperature(value: object, name: str) -> float:
    """The same, of a sampler that has an entropy.

    Raises:
        InputError: it is something else.
    """
    return _above_0(value, name, "a greedy sampler has no entropy to predict, sample above 0")


def integer(value: object, name: str) -> int:
    """An integer, or a float that is one: a table with holes holds its integers as floats.

    Raises:
        InputError: it is something else.
    """
    value = plain(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {reprlib.repr(value)}; expected an integer")
    return int(value)


def positive_integer(value: object, name: str) -> int:
    """An integer above 0.

    Raises:
        InputError: it is something else.
    """
    found = integer(value, name)
    if found < 1:
        raise InputError(f"{name} is {found}; expected a whole number above 0")
    return found


def boolean(value: object, name: str) -> bool:
    """True or false.

    Raises:
        InputError: it is something else.
    """
    value = plain(value)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {reprlib.repr(value)}; expected true or false")
    return value


def text(value: object, name: str) -> str:
    """Text.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}; expected text")
    return value


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """At least one id, from 0.

    Raises:
        InputError: it is no list of them, or empty.
    """
    found = ids_or_none(value, name)
    if not found:
        raise InputError(f"{name} is empty; every prompt and response needs at least one token")
    return found


def ids_or_none(value: object, name: str) -> tuple[int, ...]:
    """Ids from 0; () too.

    Raises:
        InputError: it is no list of them.
    """
    found = _items(value, name, "token ids")
    # Most rows pass by their types alone: a loop over every token of a large file is slow.
    if set(map(type, found)) - {int}:
        found = tuple(map(plain, found))
        for token in found:
            if isinstance(token, bool) or not isinstance(token, int):
                raise InputError(f"{name} holds {reprlib.repr(token)}; expected token ids, integers from 0")
        found = tuple(map(int, found))
    if found and min(found) < 0:
        raise InputError(f"{name} holds {min(found)}; expected token ids, integers from 0")
    return found


def log_probs(value: object, name: str) -> tuple[float, ...]:
    """Finite numbers, none above 0 by more than rounding.

    Raises:
        InputError: it is no list of them.
    """
    found = _items(value, name, "numbers")
    if set(map(type, found)) - {float} or not all(map(math.isfinite, found)):
        found = tuple(number(item, name) for item in found)
    if found and max(found) > LOGPROB_ROUNDING:
        raise InputError(
            f"{name} holds {max(found):g}; expected natural logarithms of probabilities, none above 0 (some trainers fill "
            "places after a response's end with such a value: cut them)"
        )
    return found


def numbers(value: object, name: str) -> tuple[float, ...]:
    """Finite numbers.

    Raises:
        InputError: it is no list of them.
    """
    return tuple(number(item, name) for item in _items(value, name, "numbers"))


def advantage(value: object, name: str) -> float | tuple[float, ...]:
    """A finite number for the response, or one for each of its tokens.

    Raises:
        InputError: it is something else.
    """
    value = plain(value)
    return numbers(value, name) if isinstance(value, list | tuple) else number(value, name)


def mask(value: object, name: str) -> tuple[int, ...]:
    """Zeros and ones.

    Raises:
        InputError: it is no list of them.
    """
    return tuple(zeros_and_ones(plain(value), name))


def flags(value: object, name: str) -> tuple[bool, ...]:
    """The same as false and true.

    Raises:
        InputError: it is no list of them.
    """
    return tuple(map(bool, mask(value, name)))


def missing(value: object, name: str) -> bool:
    """Whether an optional column has no value: None, or a NaN, which a table has in its holes.

    A NaN among the numbers that the estimators use (reward, advantage, log-probs) is a fault and no hole.
    """
    value = plain(value)
    return value is None or (
        isinstance(value, float) and math.isnan(value) and name not in (*OF_TOKENS, "reward", "advantage")
    )


def columns(value: object, name: str) -> dict[str, Any]:
    """Other columns by name, NumPy's and torch's values as Python's.

    Raises:
        InputError: it is no mapping.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is a {type(value).__name__}; expected a mapping of further columns")
    return {key: plain(item) for key, item in value.items()}


REQUIRED: dict[str, Callable[[object, str], Any]] = {
    "prompt_id": prompt_id,
    "prompt_ids": token_ids,
    "response_ids": token_ids,
}
"""Columns that every row has, with what they may hold."""

OF_TOKENS: dict[str, Callable[[object, str], Any]] = {
    "logprobs": log_probs,
    "old_logprobs": log_probs,
    "ref_logprobs": log_probs,
    "loss_mask": mask,
    "sampled": flags,
    "token_weight": numbers,
}
"""Optional columns with a value for each of response_ids, with what they may hold."""

OPTIONAL: dict[str, Callable[[object, str], Any]] = {
    **OF_TOKENS,
    "reward": reward,
    "advantage": advantage,
    "temperature": temperature,
    "top_k": integer,
    "top_p": number,
    "cut": boolean,
    "prompt": text,
    "response": text,
    "micro_batch": integer,
    "mini_batch": integer,
    "window_tokens": positive,
    "max_completion_length": positive_integer,
    "loss_type": text,
    "step": integer,
    "on_policy": boolean,
    "eos_ids": ids_or_none,
    "padding_id": integer,
}
"""Columns that a row may have, with what they may hold."""


def _above_0(value: object, name: str, advice: str) -> float:
    found = number(value, name)
    if found <= 0:
        raise InputError(f"{name} is {found}; {advice}")
    return found


def _items(value: object, name: str, what: str) -> tuple[Any, ...]:
    value = plain(value)
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is a {type(value).__name__}; expected a list of {what}")
    return tuple(value)
