"""Refuses rows whose columns say that the probe would compute something that they are not; what columns mean is in
:mod:`~entropy_probe.data.rollouts.columns`."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_probe.data.rollouts.columns import (
    CORRECTED,
    ENTROPY,
    IGNORED_LABEL,
    KL,
    LEFT_OUT,
    NESTED,
    OF_A_CONFIG,
    OF_THE_LOSS,
    OTHER_WORDS,
    OVERLONG_WORDS,
    PADDING_WORDS,
    SAMPLED_ALIASES,
    SAMPLING,
    UNIT_ROUNDING,
    VAGUE_WEIGHTS,
    Assumption,
    Kind,
    among,
    assumption_of,
    leaves_whole,
    looks_like_a_mask,
)
from entropy_probe.data.rollouts.masks import zeros_and_ones
from entropy_probe.data.rollouts.records import Rollout
from entropy_probe.errors import InputError

_READ_INSTEAD = {
    KL: "beta, with ref_logprobs, where it is in the loss (in the reward it is in the advantage)",
    ENTROPY: "entropy_coef",
    LEFT_OUT: "loss_mask",
    CORRECTED: "importance_sampling_mode, with logprobs and old_logprobs",
}
"""By what a column means, the columns that say it."""


def refuse_contradictions(row: Rollout, temperature: float) -> None:
    """Refuse a row of which a column says that the probe would compute something else at this temperature.

    Raises:
        InputError: the prompt, the column, its value, and what to do.
    """
    declared: dict[str, object] = {"top_k": row.top_k, "top_p": row.top_p, **row.extra}
    for name, value in declared.items():
        if value is None:
            continue
        settings = _settings(value) if name in NESTED else None
        said = _contradiction(name, value, row) if settings is None else _of_nested(name, settings, temperature)
        if said is not None:
            raise InputError(f"prompt_id {row.prompt_id!r} {said}")


def _contradiction(name: str, value: object, row: Rollout) -> str | None:
    """What a column says against the probe, to stand after the row's prompt; None where it says nothing."""
    found = assumption_of(name)
    if name in OF_THE_LOSS:
        return None
    if name in SAMPLED_ALIASES:
        # With a value a token it is what ``sampled`` says.
        return _of_a_mask(name, value, row) if isinstance(value, bool | int | float) else None
    if found is None:
        return _of_other_columns(name, value, row)
    match found.kind:
        case Kind.SAMPLING:
            return None if leaves_whole(name, value, found.neutral) else _sampled_with(name, value)
        case Kind.LOSS:
            return _of_the_loss(name, value, found, row)
        case Kind.MASK:
            return _of_a_mask(name, value, row)
        case Kind.WEIGHTS:
            return _of_weights(name, value, row)


def _of_other_columns(name: str, value: object, row: Rollout) -> str | None:
    """Of columns whose name alone does not tell what they are."""
    if name == "advantages":
        return _of_advantages(value, row)
    words = set(name.replace(".", "_").split("_"))
    if isinstance(value, Mapping) and words & OF_A_CONFIG:
        said = (_contradiction(f"{name}.{key}", item, row) for key, item in value.items() if _is_of_the_loss(key))
        return next(filter(None, said), None)
    if looks_like_a_mask(name) and among(value, (0,)) and not words & (PADDING_WORDS | OVERLONG_WORDS | OTHER_WORDS):
        return _of_a_mask(name, value, row)
    if not isinstance(value, list | tuple):
        return None
    lengths = (len(row.response_ids), row.length)
    if name == "labels" and len(value) in lengths and IGNORED_LABEL in value:
        return _of_a_mask(name, [int(item != IGNORED_LABEL) for item in value], row)
    if name in VAGUE_WEIGHTS and len(value) == lengths[0]:
        return _of_weights(name, value, row)
    if looks_like_a_mask(name) and len(value) in lengths and all(among(item, (0, 1)) for item in value):
        return _of_an_unknown_mask(name, value, row)
    return None


def _of_an_unknown_mask(name: str, value: Sequence[Any], row: Rollout) -> str | None:
    """Of a mask that only its name tells of; one of the loss, or of who wrote which token, where no word says otherwise."""
    words = set(name.split("_"))
    over_response = value[-len(row.response_ids) :]
    if "loss" in words:
        return _of_a_mask(name, value, row)
    if words & PADDING_WORDS:
        # Whether 1 is padding or what is none: where both stand, some is.
        if len(set(value)) == 1:
            return None
        return (
            f"has {name} with both 0 and 1: some of the ids are padding; leave it out of prompt_ids and response_ids, or give "
            "attention_mask (0 at padding) instead"
        )
    if words & OVERLONG_WORDS:
        if all(over_response):
            return None
        return (
            f"has {name} with 0 at {over_response.count(0)} of {len(over_response)} response tokens: overlong responses are "
            "left out of the trainer's loss; leave such rows out"
        )
    return None if words & OTHER_WORDS else _of_a_mask(name, value, row)


def _sampled_with(name: str, value: object) -> str:
    return (
        f"was sampled with {name} = {reprlib.repr(value)}: its log-probs are not the policy's; "
        "sample from the whole distribution (top_k = 0, top_p = 1, no other processors)"
    )


def _of_the_loss(name: str, value: object, found: Assumption, row: Rollout) -> str | None:
    # verl's kl_penalty names an estimator, which does nothing without a coefficient.
    if among(value, found.neutral) or (name == "kl_penalty" and isinstance(value, str)):
        return None
    if isinstance(value, Mapping):
        inner = {key: item for key, item in value.items() if _is_of_the_loss(key)}
        said = (_contradiction(key, item, row) for key, item in inner.items())
        # A mapping that names no coefficient cannot be read.
        if not value or (inner and not any(said)):
            return None
    if name == "mask_truncated_completions" and (
        row.cut is False or (row.loss_mask is not None and not any(row.loss_mask))
    ):
        return None
    if name == "vllm_importance_sampling_correction" and row.extra.get("importance_sampling_mode") is not None:
        return None
    instead = _READ_INSTEAD.get(found.why)
    advice = "train without it" if instead is None else f"give {instead}"
    return (
        f"says {name} = {reprlib.repr(value)}: {found.why}, and this column is not read; {advice}, or drop the column to probe "
        "the update without it"
    )


def _is_of_the_loss(name: object) -> bool:
    found = assumption_of(name) if isinstance(name, str) else None
    return found is not None and found.kind is Kind.LOSS


def _of_a_mask(name: str, value: object, row: Rollout) -> str | None:
    if isinstance(value, bool | int | float):
        return (
            None
            if value == 1
            else f"has {name} = {value}: the row is not in the trainer's loss; give loss_mask, 0 at each of its tokens"
        )
    try:
        mask = zeros_and_ones(value, name)
    except InputError as error:
        return f"has a mask that cannot be read: {error}"
    tokens = len(row.response_ids)
    if len(mask) not in (tokens, row.length):
        return (
            f"has {name} of {len(mask)} values; expected {tokens}, one for each of response_ids, or {row.length} with those of "
            "prompt_ids before"
        )
    ahead, over_response = mask[:-tokens], mask[-tokens:]
    zeros = over_response.count(0)
    if zeros:
        return (
            f"has {name} with 0 at {zeros} of {tokens} response tokens: they were not sampled by the policy, or are not in the "
            "loss, and would be scored as if they were; give sampled (false where the policy drew nothing) or loss_mask (0 "
            "where the loss alone leaves a token out), or, where the zeros are padding, cut response_ids and logprobs there"
        )
    if any(ahead):
        return (
            f"has {name} with 1 at {sum(ahead)} of {len(ahead)} prompt tokens: the prompt is not in the loss that the probe "
            "computes; give 0 there, or the mask of the response alone"
        )
    return None


def _of_weights(name: str, value: object, row: Rollout) -> str | None:
    why = "the loss weights its tokens; give the weights as token_weight, or drop the column to probe without them"
    if isinstance(value, int | float):
        return None if _is_one(value) else f"has {name} = {value}: {why}"
    tokens = len(row.response_ids)
    if not isinstance(value, list | tuple) or len(value) not in (tokens, row.length):
        shown = f"of {len(value)} values" if isinstance(value, list | tuple) else f"= {reprlib.repr(value)}"
        return f"has {name} {shown}; expected one number, or {tokens}, one for each of response_ids"
    for place, weight in enumerate(value[-tokens:]):
        if not _is_one(weight):
            return f"has {name} = {reprlib.repr(weight)} at response token {place}: {why}"
    return None


def _of_advantages(value: object, row: Rollout) -> str | None:
    given: Sequence[object] = value if isinstance(value, list | tuple) else [value]
    own = row.advantage if isinstance(row.advantage, tuple) else (row.advantage,) * len(given)
    if len(own) == len(given) and all(_are_close(a, b) for a, b in zip(given, own, strict=True)):
        return None
    return (
        f"has a column advantages ({reprlib.repr(value)}), which is not read; give advantage, one number a response or a list "
        "with one a response token, or drop the column to have advantages computed from the rewards"
    )


def _of_nested(name: str, value: Mapping[Any, Any], temperature: float) -> str | None:
    for inner, item in value.items():
        if inner in SAMPLING and not leaves_whole(inner, item, (None, *SAMPLING[inner])):
            return _sampled_with(f"{name}.{inner}", item)
    said = value.get("temperature")
    if said is not None and said != temperature:
        return (
            f"was sampled with {name}.temperature = {reprlib.repr(said)}, and is taken as sampled at {temperature:g}; give a "
            "column temperature with the sampler's own"
        )
    return None


def _settings(value: object) -> Mapping[Any, Any] | None:
    """Settings by name, also of JSON text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def _are_close(value: object, own: float | None) -> bool:
    return own is not None and isinstance(value, int | float) and math.isclose(value, own, rel_tol=1e-6)


def _is_one(value: object) -> bool:
    return isinstance(value, int | float) and abs(value - 1) <= UNIT_ROUNDING
