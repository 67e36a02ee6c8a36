"""What responses counted that another policy than the probed one drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from entropy_probe.common.evidence import Evidence
from entropy_probe.report.rows import PRECONDITIONED, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.targets.choices import SamplerWeights

NONE = "none"
"""What was taken where no row needs a weight."""

FEW = 0.5
"""ESS / N of the responses' weights below which they are said to be worth few responses."""


@dataclass(frozen=True)
class OffPolicySection(Section):
    """The weights that responses carry in the entropy, its gradient and its change.

    ``weights`` is ``none`` where each counts once because nothing says otherwise, ``off`` where that was asked for, else
    ``response`` or ``prefix``. ``ess`` is the effective sample size of weights of whole responses, which decided, and
    ``ess_fraction`` its share of what equal weights give. ``rows_reweighted`` have weights that are not exactly 1.
    """

    weights: str
    ess: float | None
    ess_fraction: float | None
    rows_reweighted: int
    reason: str
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def unweighted(cls, weights: str, reason: str) -> OffPolicySection:
        """Each response counts once, for this reason."""
        why = "no weights were taken"
        return cls(weights, None, None, 0, reason, {"ess": why, "ess_fraction": why})

    @property
    def sentence(self) -> str:
        """What was taken and why."""
        if self.ess is None or self.ess_fraction is None:
            return f"every response counts once: {self.reason}"
        whole = "whole responses" if self.weights == SamplerWeights.RESPONSE else "the tokens before each position"
        return (
            f"{self.rows_reweighted} responses of another policy count by the ratio of {whole} ({self.weights}): {self.reason}"
            f"; as whole responses they are worth {self.ess:.4g} ({100.0 * self.ess_fraction:.3g} %)"
        )

    def shown(self, context: Context) -> Sequence[Block]:
        """One row, where a response does not count once or was asked to."""
        if self.weights == NONE:
            return ()
        return (Rows(PRECONDITIONED, (Row("another policy's rows", self.weights, self.sentence),)),)


def few_effective_warnings(found: OffPolicySection) -> list[Evidence]:
    """Importance weights that leave few responses."""
    if found.ess is None or found.ess_fraction is None or found.ess_fraction >= FEW:
        return []
    return [
        Evidence(
            "few_effective_rows",
            f"the importance weights of {found.rows_reweighted} responses of another policy leave an effective sample size of "
            f"{found.ess:.4g}, {100.0 * found.ess_fraction:.3g} % of all",
            "Sample fresh responses of this checkpoint (`entropy-probe sample`): errors are large, and their own errors too",
        )
    ]
