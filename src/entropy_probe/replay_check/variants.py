"""Other losses over the same rows, tried as causes: each takes a forward and a backward, and none is taken twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.losses.named import LossConstants, LossName
from entropy_probe.losses.objective import Objective
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check.case import Cause, Replayed
from entropy_probe.targets.base import TokenPair

ALIKE = 1e-6
"""Relative difference of coefficients up to which two losses count as one."""


@dataclass(frozen=True)
class Variant:
    """Another loss, and what it would mean.

    Attributes:
        code: of the suspicion.
        seen: in words, what the trainer's loss may have been beside what it is here.
        advice: what to do if it was.
        rule: that loss over these rows.
        only: what multiplies every token's coefficients in the end, [tokens]; None for ones.
    """

    code: str
    seen: str
    advice: str
    rule: UpdateRule
    only: Tensor | None = None


@dataclass
class Passes:
    """Which coefficients were tried on the real update; those that give what others gave take no second pass."""

    case: Replayed
    progress: Progress
    tried: list[TokenPair]
    terms: list[TokenPair] = field(default_factory=list)

    @staticmethod
    def of(case: Replayed, progress: Progress) -> Passes:
        """None but the one that was replayed."""
        return Passes(case, progress, [TokenPair.of(case.whole).at_tokens(case.batch.lengths)])

    def causes(self, variants: Iterable[Variant]) -> Iterator[Cause]:
        """Those that make another update, each with its step."""
        for variant in variants:
            coefficients = self.coefficients(variant.rule, variant.only)
            if coefficients is None or any(alike(coefficients, other) for other in self.tried):
                continue
            self.tried.append(coefficients)
            ascent = self.case.along(coefficients, self.progress)
            yield Cause(variant.code, variant.seen, variant.advice, self.case.stepped(ascent))

    def coefficients(self, rule: UpdateRule, only: Tensor | None = None) -> TokenPair | None:
        """ω and β of every token; None where the rows lack what the loss needs."""
        try:
            found = TokenPair.of(rule.update(self.case.measured).whole).at_tokens(self.case.batch.lengths)
        except InputError:
            return None
        if only is None:
            return found
        return TokenPair(found.log_probs * only, None if found.entropies is None else found.entropies * only)

    def term(self, rule: UpdateRule, name: str) -> TokenPair | None:
        """ω and β of one term of a loss; None where it weighs nothing, or has the same as one that was looked at."""
        try:
            found = rule.update(self.case.measured).terms[name]
        except InputError:
            return None
        found = found.at_tokens(self.case.batch.lengths)
        zero = TokenPair(torch.zeros_like(found.log_probs))
        if any(alike(found, other) for other in (zero, *self.terms)):
            return None
        self.terms.append(found)
        return found


def alike(one: TokenPair, other: TokenPair) -> bool:
    """Whether two pairs of coefficients make one update."""
    pairs = ((one.log_probs, other.log_probs), (_or_zeros(one), _or_zeros(other)))
    return all(float((a - b).norm()) <= ALIKE * float(torch.maximum(a.norm(), b.norm())) for a, b in pairs)


def _or_zeros(pair: TokenPair) -> Tensor:
    return torch.zeros_like(pair.log_probs) if pair.entropies is None else pair.entropies


def with_rows(rule: UpdateRule, change: Callable[[Rollout], Rollout]) -> UpdateRule:
    """The same loss over rows that say something else."""
    batch = rule.batch
    groups = tuple(replace(group, responses=tuple(map(change, group.responses))) for group in batch.groups)
    return replace(rule, batch=RolloutBatch(groups, batch.temperature, batch.importance))


def with_objective(rule: UpdateRule, objective: Objective) -> UpdateRule:
    """The same rows under another objective."""
    return replace(rule, loss=replace(rule.loss, objective=objective))


def of_constants(rule: UpdateRule, constants: LossConstants, name: LossName | None = None) -> UpdateRule:
    """The same rows under other constants of the formula, or under the formula of another name."""
    return replace(rule, loss=rule.loss.made_of(constants, rule.loss.name if name is None else name))
