"""Ids that nobody sampled: runs of the pad id at a prompt's or a response's edge, and ids after an end token.

What is certain is refused: two or more pad ids at an edge; one at a prompt's start, unless every prompt begins with that id as
its first token; one at a prompt's end, unless every prompt ends with it (a template) or it begins or ends texts; pads after an
end token by anyone's word, and anything after one of the model's. A pad that also ends a response stands once at its end. One
pad id at the end of a response that no end token closed may have been sampled, however unlikely, and is only warned of; so may
two in a rare row (:data:`RARE`), unless the sampler's log-probs say that they were not (:data:`IMPROBABLE`). Other ids after an
end token that the tokenizer alone knows are warned of: the sampler may not have stopped there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from entropy_probe.data.rollouts.masks import vouched
from entropy_probe.data.rollouts.records import PromptGroup, Rollout, RolloutBatch
from entropy_probe.errors import InputError


class _Edge(StrEnum):
    """A prompt's edge, as the verb that says that it is there."""

    START = "begins"
    END = "ends"

    def inwards(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids from this edge on."""
        return ids if self is _Edge.START else ids[::-1]


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


@dataclass(frozen=True)
class DoubtfulRows:
    """How many rows hold ids that may or may not have been sampled.

    Attributes:
        starts: whose prompt begins with one pad id, the unknown token too.
        ends: whose prompt ends with one.
        responses: whose response ends with a pad id or two.
        going_on: whose response goes on after an end token that the tokenizer alone knows.
    """

    starts: int
    ends: int
    responses: int
    going_on: int


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


def doubtful_rows(batch: RolloutBatch, special: SpecialIds) -> DoubtfulRows:
    """Rows of a batch that was not refused, which hold ids that may or may not have been sampled."""
    unknown = set(special.pad) & set(special.unknown) - {*special.begin, *special.stop}
    seen = [group for group in batch.groups if not _vouched(group)]
    last = {group.prompt_ids[-1] for group in batch.groups}
    by_tokenizer = frozenset(special.stop) - frozenset(special.end)
    return DoubtfulRows(
        starts=sum(len(group.responses) for group in seen if group.prompt_ids[0] in unknown),
        ends=sum(len(group.responses) for group in seen if group.prompt_ids[-1] in unknown and len(last) > 1),
        responses=sum(_may_be_padded(row, special) for row in batch.responses),
        going_on=sum(
            row.eos_ids is None and row.sampled is None and not by_tokenizer.isdisjoint(row.response_ids[:-1])
            for row in batch.responses
        ),
    )


def _may_be_padded(row: Rollout, special: SpecialIds) -> bool:
    count = _pads_at_the_end(row, special)
    return count > 0 and row.response_ids[-1] not in _stops(row, special) and not _sampler_says(row, count)


def _refuse_padded_prompts(batch: RolloutBatch, special: SpecialIds, what: str) -> None:
    if not special.pad:
        return
    firsts, lasts = ({group.prompt_ids[place] for group in batch.groups} for place in (0, -1))
    for edge in _Edge:
        others = firsts if edge is _Edge.START else lasts
        found = [g for g in batch.groups if not _vouched(g) and _is_padded_at(edge, g.prompt_ids, special, others)]
        if found:
            raise _padded_prompts(found, edge, len(batch.responses), what)


def _padded_prompts(found: Sequence[PromptGroup], edge: _Edge, of: int, what: str) -> InputError:
    ids = edge.inwards(found[0].prompt_ids)
    rows = sum(len(group.responses) for group in found)
    if edge is _Edge.START:
        advice = "or give prompt_attention_mask (0 at padding, 1 where the model saw the id)"
    else:
        advice = "or give prompt_attention_mask with 1 throughout where the model saw it"
    return InputError(
        f"{what} hold prompts with the pad id {ids[0]} at an edge, in {rows} of {of} rows (that of prompt_id "
        f"{found[0].prompt_id!r} {edge} with {_run(ids, ids[0])}, of {len(ids)} ids); leave padding out of prompt_ids, {advice}"
    )


def _is_padded_at(edge: _Edge, prompt: Sequence[int], special: SpecialIds, others: set[int]) -> bool:
    """Whether a prompt has padding for certain at an edge; ``others`` are the ids that the batch's prompts have there."""
    ids = edge.inwards(prompt)
    if ids[0] not in special.pad:
        return False
    if _run(ids, ids[0]) > 1:
        return True
    marks = ids[0] in (*special.begin, *special.stop)
    if edge is _Edge.START:
        # What begins a prompt begins all.
        return len(others) > 1 if marks else ids[0] not in special.unknown
    # A turn of a chat may end with an end token in some prompts, and all may end as their template does.
    return not marks and ids[0] not in special.unknown and len(others) > 1


def _refuse_padded_responses(batch: RolloutBatch, special: SpecialIds, what: str) -> None:
    if not special.pad:
        return
    longest = max(len(row.response_ids) for row in batch.responses)
    found = [(row, count) for row in batch.responses if (count := _padding_of_response(row, special, longest))]
    if found and not _may_all_be_sampled([row for row, _ in found], len(batch.responses), special):
        row, count = found[0]
        pad = row.response_ids[-1]
        both = " (an end token, which stands once)" if pad in _stops(row, special) else ""
        raise InputError(
            f"{what} hold responses that end with padding, pad id {pad}{both}, in {len(found)} of {len(batch.responses)} "
            f"rows ({count} of {len(row.response_ids)} ids at prompt_id {row.prompt_id!r}); cut response_ids and logprobs "
            "after what was sampled, or give an attention_mask (0 at padding)"
        )
    masked = [row for row in batch.responses if _mask_took_the_end(row, special)]
    if masked:
        raise InputError(
            f"{what} have an attention mask that is 0 at every id {masked[0].padding_id} at a response's end, in {len(masked)} "
            f"of {len(batch.responses)} rows (first: prompt_id {masked[0].prompt_id!r}), an end token too; give 1 at the "
            "first, which was sampled, or response_ids without it and no mask"
        )


def _padding_of_response(row: Rollout, special: SpecialIds, longest: int) -> int:
    """How many ids at a response's end are padding for certain."""
    ids = row.response_ids
    length = _pads_at_the_end(row, special)
    if length and ids[-1] in _stops(row, special):
        return length - 1
    if _pads_follow_an_end(row, special):
        return length
    if _sampler_says(row, length):
        return 0
    unsampled = row.cut is False or (row.logprobs is not None and row.logprobs[-1] == 0.0)
    return length if length > 1 or (length and (unsampled or (len(ids) == 1 and longest > 1))) else 0


def _pads_follow_an_end(row: Rollout, special: SpecialIds) -> bool:
    length = _pads_at_the_end(row, special)
    return 0 < length < len(row.response_ids) and row.response_ids[-length - 1] in _stops(row, special)


def _may_all_be_sampled(rows: Sequence[Rollout], of: int, special: SpecialIds) -> bool:
    """Rare rows with two pad ids at the end, which nothing says were not sampled; one row with log-probs is always rare."""
    told = all(row.logprobs is not None for row in rows)
    rare = len(rows) <= max(RARE * of, 1.0 if told else 0.0)
    return rare and all(_may_be_sampled(row, special) for row in rows)


def _may_be_sampled(row: Rollout, special: SpecialIds) -> bool:
    ids = row.response_ids
    if _pads_at_the_end(row, special) != 2 or len(ids) == 2 or ids[-1] in _stops(row, special) or row.cut is False:
        return False
    if _pads_follow_an_end(row, special):
        return False
    return row.logprobs is None or (0.0 not in row.logprobs[-2:] and sum(row.logprobs[-2:]) > IMPROBABLE)


def _pads_at_the_end(row: Rollout, special: SpecialIds) -> int:
    ids = row.response_ids
    if row.sampled is not None and not row.sampled[-1]:
        return 0  # nobody says that it was sampled
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
        # What follows a turn's end token may be another's words.
        return next(
            (
                place
                for place, token in enumerate(row.response_ids[:-1])
                if token in ends and (row.sampled is None or (row.sampled[place] and row.sampled[place + 1]))
            ),
            None,
        )

    found = [(row, place) for row in batch.responses if (place := end_of(row)) is not None]
    if not found:
        return
    row, place = found[0]
    whose = "the model" if row.eos_ids is None else "eos_ids"
    raise InputError(
        f"{what} hold responses that go on after an end token of {whose}, in {len(found)} of {len(batch.responses)} rows "
        f"(first: prompt_id {row.prompt_id!r}, id {row.response_ids[place]} at place {place} of {len(row.response_ids)}); cut "
        "response_ids and logprobs after it, or, if the sampler went on, give eos_ids: what ends a response ([]: nothing)"
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
