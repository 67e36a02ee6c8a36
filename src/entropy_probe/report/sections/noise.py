"""Where the noise of δH₁ comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from entropy_probe.report.numbers import none
from entropy_probe.report.rows import Block, Chapter, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.statistics.noise import LEAST_UNITS, NoiseParts
from entropy_probe.statistics.u_statistics import CrossStatistics

NOISE = Chapter(30, "Where the noise of δH₁ comes from, in shares of its variance")


@dataclass(frozen=True)
class NoiseSection(Section):
    """Where δH₁'s noise comes from: shares of its variance, of which the first five add up to 1.

    ``entropy_gradient`` and ``update`` are the sampling noise of X and of Y through the responses within prompts, ``shared``
    what the two share (negative where they cancel), ``prompts`` real differences between prompts, ``product`` the one's noise
    times the other's, which falls as 1/U²; ``product_with_entropy_gradient`` and ``product_with_update`` are what of the
    product would go with X's sampling noise and with Y's. See :mod:`entropy_probe.statistics.noise`.
    """

    entropy_gradient: float | None
    update: float | None
    shared: float | None
    prompts: float | None
    product: float | None
    product_with_entropy_gradient: float | None
    product_with_update: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: NoiseParts | None, step: CrossStatistics, *, asked: bool) -> NoiseSection:
        """Shares of V, or why there are none.

        Args:
            parts: of the variance, nats²; None where they were not taken.
            step: the η-weighted statistics, whose variance it is.
            asked: whether noise was to be split.
        """
        names = [field.name for field in fields(NoiseParts)]
        if parts is None or not step.variance:
            if not asked:
                why = "not asked for (noise is switched off)"
            elif step.parts is None:
                why = step.null_reasons.get("ci95", "needs the matrix of dots of equal units")
            elif not step.variance:
                why = "δH₁ has no noise to split"
            else:
                why = f"{len(step.row_means)} units; three thirds need at least {LEAST_UNITS}"
            return cls(**dict.fromkeys(names), null_reasons=dict.fromkeys(names, why))
        return cls(**{name: value / step.variance for name, value in asdict(parts).items()})

    def shown(self, context: Context) -> Sequence[Block]:
        """A row a share; one row where there is none."""
        if self.product is None:
            return (Rows(NOISE, (Row("all of it", self._share("product")),)),)
        of_x, of_y = self._share("product_with_entropy_gradient"), self._share("product_with_update")
        rows = (
            Row(
                "entropy gradient, X",
                self._share("entropy_gradient"),
                "sampling of responses: more of them, or a better estimator",
            ),
            Row("update, Y", self._share("update"), "sampling of responses: more of them"),
            Row("both together", self._share("shared"), "through the responses that both are made of"),
            Row("prompts", self._share("prompts"), "real differences: more prompts, nothing else"),
            Row(
                "X's times Y's",
                self._share("product"),
                f"falls as 1/prompts²; sampling of X is in {of_x} (of the whole), of Y in {of_y}",
            ),
        )
        return (Rows(NOISE, rows),)

    def _share(self, name: str) -> str:
        value: float | None = getattr(self, name)
        return none(self.null_reasons, name) if value is None else f"{100.0 * value:.0f} %".replace("-", "−")
