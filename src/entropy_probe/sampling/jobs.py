"""Who draws what: responses in jobs, dealt to ranks and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.dealing import deal
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.settings import SamplingSettings

Sample = tuple[tuple[int, ...], tuple[float, ...]]
"""A response's ids and their log-probs."""


TOKENS_TOGETHER = 1 << 19
"""Response tokens in one sum over ranks: 8 MiB."""


@dataclass(frozen=True)
class Job:
    """One call of generate: ``copies`` responses, from the ``first`` on, to each of some prompts of one length.

    ``number`` counts the jobs of all ranks, ``prompts`` are indices.
    """

    number: int
    prompts: tuple[int, ...]
    first: int
    copies: int

    def rows(self, responses: int) -> list[int]:
        """The places of what it draws, in the order of its sequences, among ``responses`` to every prompt."""
        return [index * responses + self.first + copy for index in self.prompts for copy in range(self.copies)]

    def seed(self, seed: int) -> int:
        """Its own, of the settings' one: as :class:`SamplingSettings` says."""
        return int(np.random.SeedSequence(seed, spawn_key=(self.number,)).generate_state(1, np.uint64)[0])


def make_jobs(prompts: Sequence[Prompt], settings: SamplingSettings) -> list[Job]:
    """Batches of prompts of one length with a number of responses each, ``batch_size`` sequences at most."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.prompt_ids), []).append(index)
    together = max(1, settings.batch_size // settings.responses)
    found: list[Job] = []
    for indices in by_length.values():
        for start in range(0, len(indices), together):
            for first in range(0, settings.responses, settings.batch_size):
                copies = min(settings.responses - first, settings.batch_size)
                found.append(Job(len(found), tuple(indices[start : start + together]), first, copies))
    return found


def deal_jobs(
    jobs: Sequence[Job], prompts: Sequence[Prompt], settings: SamplingSettings, sharding: Sharding
) -> list[range]:
    """Consecutive jobs for every rank, level in tokens: sequences times the longest that one can get.

    Where weights are sharded, level in number: all ranks then wait for each other at every call, and one that has fewer runs as
    many.
    """
    tokens = [
        len(job.prompts) * job.copies * (len(prompts[job.prompts[0]].prompt_ids) + settings.max_new_tokens)
        for job in jobs
    ]
    return deal([1] * len(jobs) if sharding.sharded else tokens, sharding.ranks.count)


def put_together(own: Mapping[int, Sample], count: int, ranks: Ranks) -> list[Sample]:
    """All ``count`` samples, of which each rank has drawn ``own``, by row; no row is two ranks'.

    What others drew a rank adds as zeros: log-probs and ids come through bit for bit, ids below 2^53.
    """
    lengths = np.zeros(count)
    for row, (ids, _) in own.items():
        lengths[row] = len(ids)
    lengths = ranks.sum_numbers(lengths)
    found: list[Sample] = []
    for rows in _pieces([int(length) for length in lengths]):
        ends = np.cumsum(lengths[rows.start : rows.stop]).astype(int)
        values = np.zeros((2, ends[-1]))
        for row, end in zip(rows, ends, strict=True):
            if row in own:
                values[:, end - len(own[row][0]) : end] = own[row]
        values = ranks.sum_numbers(values)
        for start, end in itertools.pairwise([0, *ends]):
            found.append((tuple(int(token) for token in values[0, start:end]), tuple(values[1, start:end].tolist())))
    return found


def _pieces(lengths: Sequence[int]) -> list[range]:
    """Consecutive rows of at most ``TOKENS_TOGETHER`` tokens, or one row."""
    found: list[range] = []
    held = 0
    for row, length in enumerate(lengths):
        if not found or held + length > TOKENS_TOGETHER:
            found.append(range(row, row))
            held = 0
        found[-1] = range(found[-1].start, row + 1)
        held += length
    return found
