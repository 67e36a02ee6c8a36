"""The record of a realised change: ΔH of one step by one measure, beside its linear prediction and its numerical floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from entropy_probe.optimizers.rounding import Kept, mean_kept
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.realized.steps import step_title
from entropy_probe.statistics.importance_sampling import (
    EntropyChange,
    ImportanceWeights,
)


@dataclass(frozen=True)
class RealizedChange:
    """One realised step: ΔH on common samples, its linear prediction and its numerical floor, in the measure's nats.

    ``noise_floor`` is that of :mod:`~entropy_probe.realized.floor`. ``step_norm`` is ‖Δθ‖; ``note`` says what is particular to
    the row; ``kept`` what rounding leaves of a step that is rounded as it is stored; ``by_decision`` whether tokens are
    weighted by what came before them.
    """

    step: str
    method: str
    batch: str
    measure: EntropyMeasure
    change: EntropyChange
    predicted: float
    noise_floor: float
    step_norm: float
    note: str | None = None
    kept: Kept | None = None
    by_decision: bool = False

    @property
    def title(self) -> str:
        """Which step it is of."""
        return step_title(self.step, self.kept)


def average(rows: Sequence[RealizedChange]) -> RealizedChange:
    """One row for several folds': means, the error of a mean of independent ones, ESS summed, the worst share, k̂ and floor."""
    changes = [row.change for row in rows]
    weights = [change.weights for change in changes]
    known = [found.pareto_k for found in weights if found.pareto_k is not None]
    count = len(rows)
    together = ImportanceWeights(
        weights=np.concatenate([found.weights for found in weights]) / count,
        ess=sum(found.ess for found in weights),
        ess_fraction=min(found.ess_fraction for found in weights),
        pareto_k=max(known) if len(known) == count else None,
        smoothed=None,
        pareto_reason=next((found.pareto_reason for found in weights if found.pareto_reason is not None), None),
        pareto_k_limit=min(found.pareto_k_limit for found in weights),
    )
    smoothed = [change.delta_h_smoothed for change in changes if change.delta_h_smoothed is not None]
    change = EntropyChange(
        entropy_before=sum(c.entropy_before for c in changes) / count,
        entropy_after=sum(c.entropy_after for c in changes) / count,
        delta_h=sum(c.delta_h for c in changes) / count,
        se=math.sqrt(sum(c.se**2 for c in changes)) / count,
        delta_h_smoothed=sum(smoothed) / count if len(smoothed) == count else None,
        weights=together,
    )
    return replace(
        rows[0],
        change=change,
        predicted=sum(row.predicted for row in rows) / count,
        noise_floor=max(row.noise_floor for row in rows),
        step_norm=sum(row.step_norm for row in rows) / count,
        kept=mean_kept([row.kept for row in rows if row.kept is not None]),
    )
