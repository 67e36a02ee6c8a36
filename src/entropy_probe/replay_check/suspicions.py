"""Why a replayed update is not the trainer's: named causes, each tried on the real update and said only if it explains it.

A cause is another step: with another learning rate, clip or Adam state, with other advantages or length weights. Its net error
against the real update is compared with that of the step as it was replayed; a cause explains the gap if no more than a tenth
of it is left. Where the checkpoint after the step holds Adam's moments, the gradient that the trainer used is known
(:func:`~entropy_probe.replay_check.update_comparison.recovered_gradient`), and factors and single rows are read off it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from entropy_probe.common.progress import Progress
from entropy_probe.replay_check.case import Cause, Replayed
from entropy_probe.replay_check.gradient_causes import one_thing_else, two_things_else
from entropy_probe.replay_check.loss_variants import loss_variants
from entropy_probe.replay_check.mask_variants import mask_variants
from entropy_probe.replay_check.number_causes import number_causes
from entropy_probe.replay_check.optimizer_causes import optimizer_causes
from entropy_probe.replay_check.row_causes import miscounted_rows, one_row, other_policy
from entropy_probe.replay_check.term_causes import term_causes
from entropy_probe.replay_check.variants import Passes
from entropy_probe.report.replay_schema import Suspicion

LEFT_OVER = 0.1
"""A cause explains the gap if this share of it is left, or less."""

AS_GOOD = 10.0
"""Causes are all named whose error is within this factor of the best one's, or within a fiftieth of the tolerance."""

OTHER_ROWS_COSINE = 0.5
"""Below it the trainer's gradient is not of these rows."""


@dataclass(frozen=True)
class Findings:
    """Suspicions, the likeliest first, and how many causes were tried."""

    suspicions: list[Suspicion]
    tried: int


@dataclass(frozen=True)
class _Tried:
    """A cause, and the net error that is left with it."""

    cause: Cause
    error_net: float

    def leaves_nothing(self, case: Replayed) -> bool:
        """The step with it is the trainer's. (The one without it may be within the tolerance, and its gradient not.)"""
        return self.error_net <= min(case.tolerance, LEFT_OVER * case.update.error_net)

    def is_whole(self, case: Replayed) -> bool:
        """Nothing is left, and no factor was chosen for that."""
        return not self.cause.fitted and self.leaves_nothing(case)


def find_suspicions(case: Replayed, progress: Progress) -> Findings:
    """Try causes, the cheap ones first; whole passes over the batch only where the gradient itself may be wrong."""
    tried: list[_Tried] = []
    passes = Passes.of(case, progress)

    def look(causes: Iterator[Cause], *, first: bool = False) -> bool:
        """Whether all of the gap is now explained; with ``first`` no more are tried than it takes to find one that does."""
        for cause in causes:
            tried.append(_Tried(cause, case.compared(cause.step).error_net))
            if first and tried[-1].is_whole(case):
                break
        return any(t.is_whole(case) for t in tried)

    look(optimizer_causes(case))
    gradients = case.gradients
    if gradients is None or gradients.relative_error > min(case.tolerance, case.gradient_tolerance):
        # Tried also where a factor fits: it may stand for one of these.
        found = look(passes.causes(one_thing_else(case)))
        found = found or look(chain(term_causes(case, passes), passes.causes(mask_variants(case))), first=True)
        found = found or look(passes.causes(loss_variants(case)), first=True)
        counted = miscounted_rows(case)
        if counted is not None and all(t.error_net > case.tolerance for t in tried):
            return Findings([counted], len(tried))
        if not found and not _explaining(tried, case):
            found = look(one_row(case, progress)) or look(passes.causes(two_things_else(case)))
        if not found and not any(t.leaves_nothing(case) for t in tried):
            # The longest search comes last.
            look(number_causes(case, passes), first=True)
        if not _explaining(tried, case):
            untried = other_policy(case) or _other_rows(case)
            if untried is not None:
                return Findings([untried], len(tried))
    good = _explaining(tried, case)
    best = min((t.error_net for t in good), default=0.0)
    named = [t for t in good if t.error_net <= max(AS_GOOD * best, _negligible(case))]
    named.sort(key=lambda t: (t.cause.fitted, t.error_net))
    return Findings([_suspicion(t, case) for t in named], len(tried))


def _explaining(tried: Sequence[_Tried], case: Replayed) -> list[_Tried]:
    # What coarse weights do not show they cannot judge a cause by.
    if case.coarse and case.update.error_net <= case.tolerance:
        return []
    return [t for t in tried if t.error_net <= LEFT_OVER * case.update.error_net]


def _suspicion(tried: _Tried, case: Replayed) -> Suspicion:
    part = "" if tried.error_net <= case.tolerance else "; this explains part of it"
    return Suspicion(tried.cause.code, tried.cause.seen + part, tried.cause.advice, tried.error_net)


def _negligible(case: Replayed) -> float:
    return case.tolerance / 50


def _other_rows(case: Replayed) -> Suspicion | None:
    if case.gradients is None or case.gradients.cosine >= OTHER_ROWS_COSINE:
        return None
    return Suspicion(
        "other_rows",
        f"the trainer's gradient has a cosine of {case.gradients.cosine:.2f} with the one recomputed from these rows, and no "
        "single cause explains it",
        "Take the rollouts that this very step consumed, at the temperature of the run",
        None,
    )
