"""Ids that nobody sampled: runs of the pad id at a prompt's or a response's edge, and ids after an end token.

What is certain is refused: two or more pad ids at an edge; one at a prompt's start, unless every prompt begins with that id as
its first token; anything after the end token. A pad id that also ends a response stands once at its end. One pad id at the end
of a response that no end token closed may have been sampled, however unlikely, and is only warned of; so may two in a rare row
(:data:`RARE`), unless the sampler's log-probs say that they were not (:data:`IMPROBABLE`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.errors import InputError
from entropy_probe.rollouts.masks import vouched
from entropy_probe.rollouts.records import PromptGroup, Rollout, RolloutBatch

RARE = 0.05
"""Share of the rows up to which responses that end with two pad ids count as sampled: padding is in most rows that it is in."""
IMPROBABLE = -12.0
"""Nats: log-probability of two pad ids, by the sampler's own log-probs, below which they count as padding."""


@dataclass(frozen=True)
class SpecialIds:
    """What a model and its tokenizer say of ids; each () where they say nothing, and then nothing is checked.

    Attributes:
        pad: fill places beside what was sampled.
        end: end a response, by the model's configuration.
        stop: end a response by anyone's word: ``end``, and the tokenizer's.
        begin: begin a prompt.
        unknown: stand for text that the tokenizer does not know.
    """

    pad: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()


def refuse_unsampled(batch: RolloutBatch, special: SpecialIds, what: str) -> None:
    """Refuse a batch of which rows hold ids that nobody sampled.

    Args:
        batch: the rollouts.
        special: of the model that is to score them.
        what: the batch's name in messages, such as "the rollouts".

    Raises:
        InputError: how many rows, the first of them, and what to do.
    """
    _refuse_padded_prompts(batch, special, what)
    _refuse_padded_responses(batch, special, what)
    _refuse_going_on(batch, special, what)


def doubtful_rows(batch: RolloutBatch, special: SpecialIds) -> tuple[int, int]:
    """Rows with one pad id at an edge that may or may not be padding: (at the prompt's start, at the response's end)."""
    prompts = sum(
        len(group.responses)
        for group in batch.groups
        if group.prompt_ids[0] in special.pad
        and group.prompt_ids[0] in special.unknown
        and group.prompt_ids[0] not in (*special.begin, *special.stop)
        and not _vouched(group)
    )
    responses = 0
    for row in batch.responses:
        count = _pads_at_the_end(row, special)
        if count and row.response_ids[-1] not in _stops(row, special) and not _sampler_says(row, count):
            responses += 1
    return prompts, responses


def _refuse_padded_prompts(batch: RolloutBatch, special: SpecialIds, what: str) -> None:
    if not special.pad:
        return
    firsts = {group.prompt_ids[0] for group in batch.groups}
    found = [group for group in batch.groups if not _vouched(group) and _prompt_is_padded(group, special, firsts)]
    if not found:
        return
    first = found[0]
    ids = first.prompt_ids
    pad = ids[0] if ids[0] in special.pad else ids[-1]
    rows = sum(len(group.responses) for group in found)
    ahead, behind = _run(ids, pad), _run(ids[::-1], pad)
    where = f"begins with {ahead}" if ahead else f"ends with {behind}"
    mask = " (at the start prompt_attention_mask may name it: 0 at padding, and 1 throughout where the model really saw it)"
    raise InputError(
        f"{what} hold prompts with the pad id {pad} at an edge, in {rows} of {len(batch.responses)} rows (that of prompt_id "
        f"{first.prompt_id!r} {where}, of {len(ids)} ids), which would be scored as part of the prompt; leave padding out of "
        f"prompt_ids{mask}"
    )


def _prompt_is_padded(group: PromptGroup, special: SpecialIds, firsts: set[int]) -> bool:
    ids = group.prompt_ids
    if ids[-1] in special.pad and _run(ids[::-1], ids[-1]) > 1:
        return True
    if ids[0] not in special.pad:
        return False
    if _run(ids, ids[0]) > 1:
        return True
    if ids[0] in (*special.begin, *special.stop):
        return len(firsts) > 1  # what begins a prompt begins all
    return ids[0] not in special.unknown


def _refuse_padded_responses(batch: RolloutBatch, special: SpecialIds, what: str) -> None:
    if not special.pad:
        return
    longest = max(len(row.response_ids) for row in batch.responses)
    found = [(row, count) for row in batch.responses if (count := _padding_of_response(row, special, longest))]
    if found and not _may_all_be_sampled([row for row, _ in found], len(batch.responses), special):
        row, count = found[0]
        pad = row.response_ids[-1]
        both = " (which is an end token too, and stands once)" if pad in _stops(row, special) else ""
        raise InputError(
            f"{what} hold responses that end with padding, the pad id {pad}{both}, in {len(found)} of {len(batch.responses)} "
            f"rows ({count} of {len(row.response_ids)} ids of a response to prompt_id {row.prompt_id!r}), which nobody sampled "
            "and which would be scored; cut response_ids and logprobs after what was sampled, or give an attention_mask over "
            "prompt_ids and response_ids, 0 at padding"
        )
    masked = [row for row in batch.responses if _mask_took_the_end(row, special)]
    if masked:
        raise InputError(
            f"{what} have an attention mask that is 0 at every id {masked[0].padding_id} at a response's end, in {len(masked)} "
            f"of {len(batch.responses)} rows (first: prompt_id {masked[0].prompt_id!r}); that id is pad and end token at once, "
            "and the first was sampled: give 1 there; where the responses did end without it, give response_ids without it "
            "and no mask"
        )


def _padding_of_response(row: Rollout, special: SpecialIds, longest: int) -> int:
    """How many ids at a response's end are padding for certain."""
    ids = row.response_ids
    length = _pads_at_the_end(row, special)
    if length and ids[-1] in _stops(row, special):
        return length - 1
    if _sampler_says(row, length):
        return 0
    unsampled = row.cut is False or (row.logprobs is not None and row.logprobs[-1] == 0.0)
    return length if length > 1 or (length and (unsampled or (len(ids) == 1 and longest > 1))) else 0


def _may_all_be_sampled(rows: Sequence[Rollout], of: int, special: SpecialIds) -> bool:
    """Rare rows with two pad ids at the end, which nothing says were not sampled; one row with log-probs is always rare."""
    told = all(row.logprobs is not None for row in rows)
    rare = len(rows) <= max(RARE * of, 1.0 if told else 0.0)
    return rare and all(_may_be_sampled(row, special) for row in rows)


def _may_be_sampled(row: Rollout, special: SpecialIds) -> bool:
    ids = row.response_ids
    if _pads_at_the_end(row, special) != 2 or len(ids) == 2 or ids[-1] in _stops(row, special) or row.cut is False:
        return False
    return row.logprobs is None or (0.0 not in row.logprobs[-2:] and sum(row.logprobs[-2:]) > IMPROBABLE)


def _pads_at_the_end(row: Rollout, special: SpecialIds) -> int:
    ids = row.response_ids
    return _run(ids[::-1], ids[-1]) if ids[-1] in special.pad else 0


def _mask_took_the_end(row: Rollout, special: SpecialIds) -> bool:
    stops = _stops(row, special)
    return row.padding_id in stops and row.response_ids[-1] not in stops and row.cut is not True


def _refuse_going_on(batch: RolloutBatch, special: SpecialIds, what: str) -> None:
    configured = frozenset(special.end)

    def end_of(row: Rollout) -> int | None:
        """The place of an end token that is not last."""
        ends = configured if row.eos_ids is None else frozenset(row.eos_ids)
        if ends.isdisjoint(row.response_ids[:-1]):
            return None
        return next(place for place, token in enumerate(row.response_ids) if token in ends)

    found = [(row, place) for row in batch.responses if (place := end_of(row)) is not None]
    if not found:
        return
    row, place = found[0]
    whose = "the model" if row.eos_ids is None else "the rows' own eos_ids"
    raise InputError(
        f"{what} hold responses that go on after an end token of {whose}, in {len(found)} of {len(batch.responses)} rows "
        f"(first: prompt_id {row.prompt_id!r}, id {row.response_ids[place]} at place {place} of {len(row.response_ids)}), and "
        "nobody sampled what follows; cut response_ids and logprobs after the first end token (text of a tool or environment "
        "cannot be scored), or, where the policy itself was sampled past it, say at which ids the sampler stops in a column "
        "eos_ids ([] for none)"
    )


def _stops(row: Rollout, special: SpecialIds) -> tuple[int, ...]:
    return special.stop if row.eos_ids is None else row.eos_ids


def _sampler_says(row: Rollout, count: int) -> bool:
    """Whether the row says that its last ``count`` ids were sampled: what ends a response is known, and the limit ended it."""
    sampled = row.logprobs is None or 0.0 not in row.logprobs[-count:]
    return row.eos_ids is not None and row.cut is True and sampled


def _vouched(group: PromptGroup) -> bool:
    return all(vouched(row.extra) for row in group.responses)


def _run(ids: Sequence[int], token: int) -> int:
    """How often ``ids`` begins with ``token``."""
    return sum(1 for _ in itertools.takewhile(lambda found: found == token, ids))
