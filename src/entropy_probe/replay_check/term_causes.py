"""Causes in the loss's terms beside the reward's: a KL term or an entropy bonus that is not there, or of another coefficient.

The gradient is linear in a term's coefficient, so that one pass over the batch gives the term's own, and the coefficient that
fits the real update follows from steps alone, of which only the clip and Adam's v are not linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from entropy_probe.losses.kl import KLTerm
from entropy_probe.losses.objective import BonusAverage, EntropyBonus
from entropy_probe.optimizers.clipping import gradient_norm
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check.case import Cause, Replayed
from entropy_probe.replay_check.update_comparison import fitted_factor
from entropy_probe.replay_check.variants import Passes, with_objective

ROUNDS = 10
"""Of Newton's iteration for a coefficient, at most."""
CONVERGED = 1e-7
"""Relative change of a coefficient at which the iteration ends."""
NONE_LEFT = 1e-3
"""Share of its coefficient up to which a fitted term counts as none."""
QUOTIENT = 1e-3
"""Step of the difference quotient, as a share of the gradient's norm."""


@dataclass(frozen=True)
class _Term:
    """A term of the loss, as it is here or might be in the trainer's.

    Attributes:
        code: of the suspicion.
        words: what it is.
        column: of its coefficient.
        part: its name among the update's terms.
        rule: the loss with it.
        coefficient: of it in ``rule``.
        present: whether it is in the loss that was replayed.
        kind: how it is taken, in words.
        kinds: the columns that say so, in words.
    """

    code: str
    words: str
    column: str
    part: str
    rule: UpdateRule
    coefficient: float
    present: bool
    kind: str = ""
    kinds: str = ""


def term_causes(case: Replayed, passes: Passes) -> Iterator[Cause]:
    """The KL term, where rows hold the reference's log-probs, and the entropy bonus."""
    for term in (*_kl(case), *_bonus(case)):
        yield from _otherwise(term, case, passes)


def _kl(case: Replayed) -> Iterator[_Term]:
    objective = case.rule.loss.objective
    if any(row.ref_logprobs is None for row in case.batch.responses):
        return
    if objective.kl is not None:
        yield _Term("beta", "KL term", "beta", "kl", case.rule, objective.kl.beta, present=True)
        return
    for corrected in (True, False):
        kl = KLTerm(1.0, bias_correction=corrected, level=case.rule.loss.constants.level)
        kind = f", by {kl.estimator}, {'' if corrected else 'not '}times the importance ratio"
        kinds = f", kl_estimator to {kl.estimator}, use_bias_correction_kl to {str(corrected).lower()}"
        rule = with_objective(case.rule, replace(objective, kl=kl))
        yield _Term("beta", "KL term", "beta", "kl", rule, kl.beta, False, kind, kinds)


def _bonus(case: Replayed) -> Iterator[_Term]:
    objective = case.rule.loss.objective
    code, words = "entropy_coef", "entropy bonus"
    if objective.bonus is not None:
        yield _Term(code, words, code, "bonus", case.rule, objective.bonus.coefficient, present=True)
        return
    for average in BonusAverage:
        bonus = EntropyBonus(1.0, average)
        kind = ", averaged over " + ("micro-batches" if average is BonusAverage.MICRO_BATCH else "tokens as the loss")
        rule = with_objective(case.rule, replace(objective, bonus=bonus))
        yield _Term(code, words, code, "bonus", rule, 1.0, False, kind)


def _otherwise(term: _Term, case: Replayed, passes: Passes) -> Iterator[Cause]:
    """The loss without the term, and with the coefficient that fits."""
    part = passes.term(term.rule, term.part)
    if part is None:
        return
    direction = case.along(part, passes.progress)
    start = 0.0
    if term.present:
        yield Cause(
            term.code,
            f"the trainer's loss had no {term.words}; here {term.column} is {term.coefficient:g}",
            f"Set {term.column} to 0",
            case.stepped(_plus(case.ascent, -1.0, direction)),
        )
        start = term.coefficient
    amount = fitted_amount(case, direction)
    meant = start + (0.0 if amount is None else amount * term.coefficient)
    # Near 0 it is the loss without the term, which was tried; below 0 no trainer's is.
    if amount is None or meant <= NONE_LEFT * start:
        return
    here = f"{start:g}" if term.present else "0"
    yield Cause(
        term.code,
        f"the trainer's loss had {'an' if term.part == 'bonus' else 'a'} {term.words} of {term.column} {meant:.4g}{term.kind}; "
        f"here it is {here}",
        f"Set {term.column} to {meant:.4g}{term.kinds}",
        case.stepped(_plus(case.ascent, amount, direction)),
        fitted=True,
    )


def fitted_amount(case: Replayed, direction: Mapping[str, Tensor]) -> float | None:
    """x that brings the step along Ȳ + x d nearest to the real update, by Gauss-Newton; None where d moves nothing."""
    size = gradient_norm(direction)
    if size == 0.0:
        return None
    width = QUOTIENT * max(gradient_norm(case.ascent), size) / size
    amount, moved = 0.0, case.moved
    for _ in range(ROUNDS):
        deltas = case.stepped(_plus(case.ascent, amount, direction)).deltas
        more = case.stepped(_plus(case.ascent, amount + width, direction)).deltas
        slope = {name: (more[name] - delta) / width for name, delta in deltas.items()}
        change = fitted_factor(slope, {name: moved[name] - delta for name, delta in deltas.items()})
        if change is None:
            return None
        amount += change
        if abs(change) <= CONVERGED * abs(amount):
            break
    return amount


def _plus(ascent: Mapping[str, Tensor], factor: float, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ȳ + factor d; a parameter that d does not reach keeps its own."""
    return {name: y + factor * direction[name] if name in direction else y for name, y in ascent.items()}
