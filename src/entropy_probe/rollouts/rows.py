"""The schema: one row of a rollouts file, checked column by column, to a record and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from entropy_probe.errors import InputError
from entropy_probe.rollouts.records import Rollout


def rollout_from_row(row: Mapping[str, Any], where: str) -> Rollout:
    """Check one row against the schema. ``where`` names it in messages.

    Raises:
        InputError: a required column is missing or a value has the wrong type, is not finite, or is empty.
    """
    required = ("prompt_id", "prompt_ids", "response_ids", "reward")
    for name in required:
        if row.get(name) is None:
            raise InputError(f"{where} has no {name}; required are {', '.join(required)}")
    prompt_id = row["prompt_id"]
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int):
        raise InputError(f"{where}: prompt_id is a {type(prompt_id).__name__}; expected a string or an integer")
    response_ids = _token_ids(row["response_ids"], "response_ids", where)
    logprobs = _optional(row, "logprobs", where, _floats)
    if logprobs is not None and len(logprobs) != len(response_ids):
        raise InputError(
            f"{where}: {len(logprobs)} logprobs for {len(response_ids)} response tokens; expected one each"
        )
    temperature = _optional(row, "temperature", where, _number)
    if temperature is not None and temperature <= 0:
        raise InputError(
            f"{where}: temperature is {temperature}; a greedy sampler has no entropy to predict, sample above 0"
        )
    known = {f.name for f in fields(Rollout)} - {"extra"}
    return Rollout(
        prompt_id=prompt_id,
        prompt_ids=_token_ids(row["prompt_ids"], "prompt_ids", where),
        response_ids=response_ids,
        reward=_number(row["reward"], "reward", where),
        advantage=_optional(row, "advantage", where, _number),
        logprobs=logprobs,
        temperature=temperature,
        top_k=_optional(row, "top_k", where, _integer),
        top_p=_optional(row, "top_p", where, _number),
        cut=_optional(row, "cut", where, _boolean),
        prompt=_optional(row, "prompt", where, _text),
        response=_optional(row, "response", where, _text),
        micro_batch=_optional(row, "micro_batch", where, _integer),
        window_tokens=_optional(row, "window_tokens", where, _positive),
        max_completion_length=_optional(row, "max_completion_length", where, _positive_integer),
        loss_type=_optional(row, "loss_type", where, _text),
        step=_optional(row, "step", where, _integer),
        on_policy=_optional(row, "on_policy", where, _boolean),
        extra={name: value for name, value in row.items() if name not in known},
    )


def row_from_rollout(rollout: Rollout) -> dict[str, Any]:
    """The row of the file: declared columns that have a value, then the kept unknown ones.

    Raises:
        InputError: ``extra`` uses the name of a declared column.
    """
    declared = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "extra"}
    clash = sorted(declared.keys() & rollout.extra.keys())
    if clash:
        raise InputError(
            f"prompt_id {rollout.prompt_id!r}: extra holds {', '.join(clash)}, a column of the schema itself"
        )
    row = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in declared.items()
        if value is not None
    }
    return row | dict(rollout.extra)


def _optional(row: Mapping[str, Any], name: str, where: str, parse: Any) -> Any:
    value = row.get(name)
    return None if value is None else parse(value, name, where)


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise InputError(f"{where}: {name} is too large; expected a number in the range of float64") from error
    if not math.isfinite(number):
        raise InputError(f"{where}: {name} is {number}; expected a finite number")
    return number


def _positive(value: object, name: str, where: str) -> float:
    number = _number(value, name, where)
    if number <= 0:
        raise InputError(f"{where}: {name} is {number}; expected a number above 0")
    return number


def _integer(value: object, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {name} is {value!r}; expected an integer")
    return value


def _positive_integer(value: object, name: str, where: str) -> int:
    number = _integer(value, name, where)
    if number < 1:
        raise InputError(f"{where}: {name} is {number}; expected a whole number above 0")
    return number


def _boolean(value: object, name: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} is {value!r}; expected true or false")
    return value


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected text")
    return value


def _token_ids(value: object, name: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected a list of token ids")
    if not value:
        raise InputError(f"{where}: {name} is empty; every prompt and response needs at least one token")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InputError(f"{where}: {name} holds {token!r}; expected token ids, integers from 0")
    return tuple(value)


def _floats(value: object, name: str, where: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected a list of numbers")
    return tuple(_number(item, name, where) for item in value)
