"""The preconditioned step to first order: δH₁ = −η U_cross, its errors and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.common.source import Source
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.data.units import Mode, Units
from entropy_probe.report.numbers import interval, listed, none, number
from entropy_probe.report.rows import PRECONDITIONED, Block, Lead, Row, Rows
from entropy_probe.report.sections.base import Context, Section, ends
from entropy_probe.report.sections.zero_v import ZeroVSection
from entropy_probe.report.sentences import difference_sentence, preconditioned_sentence
from entropy_probe.statistics.u_statistics import CrossStatistics
from entropy_probe.targets.entropy import EntropyTarget

FEW_UNITS = 10
RESIDUAL_LIMIT = 1e-6

LEARNING_RATE_SOURCES = {
    Source.GIVEN: "as given",
    Source.RECORDED: "as the rows recorded it",
    Source.UNKNOWN: "as stored in the optimizer's state (the end of a schedule leaves 0.0 there)",
}


@dataclass(frozen=True)
class FirstOrder(Section):
    """The prediction δH₁ = −η U_cross and its uncertainty.

    Standard errors are of U_cross; ``delta_h1_se`` and ``delta_h1_ci95`` are of δH₁. ``interval_method`` is how the interval is
    made, from a variance that it names; ``delta_h1_se`` is √V whatever the interval, V unbiased, or without the matrix the
    jackknife's.
    ``delta_h1_se_this_step`` is what this very update does to δH₁, without the noise that another batch's Y would add.
    ``learning_rate`` is a list where parameter groups differ. ``unit_ids`` are prompt ids, lists of them for blocks.
    ``row_means``, ``row_x`` and ``row_y`` are r_u, x_u and y_u, one a unit. ``sentence`` says δH₁ in words, and how it differs
    from what the optimizer's own step does.
    """

    estimator: str
    entropy: str
    u_cross: float
    delta_h1: float
    learning_rate: float | list[float]
    bars_dot: float
    diag_sum: float
    row_means: list[float]
    unit_ids: list[Any]
    row_x: list[float]
    row_y: list[float]
    se_plugin: float | None
    se_jackknife: float | None
    se_this_step: float | None
    se_plugin_guide: float | None
    zeta1_plugin: float | None
    zeta1_jackknife: float | None
    delta_h1_se: float | None
    delta_h1_ci95: list[float] | None
    delta_h1_se_this_step: float | None
    interval_method: str | None
    self_test_residual: float
    zero_v: ZeroVSection
    sentence: str
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        statistics: CrossStatistics,
        step: CrossStatistics,
        rates: Sequence[float],
        ids: list[Any],
        target: EntropyTarget,
        zero_v: ZeroVSection,
    ) -> FirstOrder:
        """The section, still without its sentence (:meth:`told`).

        Args:
            statistics: of the dots.
            step: of the η-weighted dots, in whose inner product δH₁ = −U_cross.
            rates: the distinct learning rates of this step.
            ids: of the units.
            target: what X estimates.
            zero_v: elements with v = 0.
        """
        delta_h1 = step.negated
        reasons = {name: why for name, why in statistics.null_reasons.items() if name not in {"variance", "ci95"}}
        reasons |= delta_h1.null_reasons(se="delta_h1_se", ci95="delta_h1_ci95")
        if step.se_this_step is None:
            reasons["delta_h1_se_this_step"] = reasons["se_this_step"]
        return cls(
            estimator=target.estimator.value,
            entropy=target.unit.value,
            u_cross=statistics.u_cross,
            delta_h1=delta_h1.value,
            learning_rate=rates[0] if len(rates) == 1 else list(rates),
            bars_dot=statistics.bars_dot,
            diag_sum=statistics.diag_sum,
            row_means=statistics.row_means.tolist(),
            unit_ids=ids,
            row_x=statistics.row_x.tolist(),
            row_y=statistics.row_y.tolist(),
            se_plugin=statistics.se_plugin,
            se_jackknife=statistics.se_jackknife,
            se_this_step=statistics.se_this_step,
            se_plugin_guide=statistics.se_plugin_guide,
            zeta1_plugin=statistics.zeta1_plugin,
            zeta1_jackknife=statistics.zeta1_jackknife,
            delta_h1_se=delta_h1.se,
            delta_h1_ci95=None if delta_h1.ci95 is None else list(delta_h1.ci95),
            delta_h1_se_this_step=step.se_this_step,
            interval_method=statistics.interval_method,
            self_test_residual=statistics.self_test_residual,
            zero_v=zero_v,
            sentence="",
            null_reasons=reasons,
        )

    def told(self, entropy: float, unit: str, spread_factor: float | list[float]) -> FirstOrder:
        """The section with its sentence.

        Args:
            entropy: as it is now, nats per ``unit``.
            unit: response or token.
            spread_factor: of the optimizer's own step.
        """
        said = preconditioned_sentence(self.delta_h1, self.delta_h1_se, self.delta_h1_ci95, entropy, unit)
        if self.delta_h1 != 0.0:
            said = f"{said} {difference_sentence(spread_factor)}"
        return replace(self, sentence=said)

    @property
    def nats(self) -> str:
        """The unit of entropy changes, such as ``nats per response``."""
        return f"nats {self.entropy.replace('-', ' ')}"

    def shown(self, context: Context) -> Sequence[Block]:
        """The sentence, δH₁ with its errors, and as detail U_cross with its own."""
        why = self.null_reasons

        def row(label: str, name: str, value: float | None, note: str) -> Row:
            return Row(label, number(value, why, name), note)

        ends_shown = none(why, "delta_h1_ci95") if self.delta_h1_ci95 is None else interval(self.delta_h1_ci95)
        shown = (
            Row("δH₁ = −η U_cross", f"{self.delta_h1:+.4g}", context.nats),
            row("standard error of δH₁", "delta_h1_se", self.delta_h1_se, "over fresh batches"),
            row(
                "the same, this step",
                "delta_h1_se_this_step",
                self.delta_h1_se_this_step,
                "given this update: without the noise that another batch's Y would add",
            ),
            Row("95 % interval of δH₁", ends_shown, self.interval_method or ""),
        )
        detail = (
            Row("U_cross", f"{self.u_cross:.4g}", "nats per unit of learning rate"),
            row("SE of it, plug-in", "se_plugin", self.se_plugin, "from row means"),
            row("SE of it, jackknife", "se_jackknife", self.se_jackknife, "delete-one"),
            row("SE of it, this step", "se_this_step", self.se_this_step, "given this update"),
            row("SE of it, guide's text", "se_plugin_guide", self.se_plugin_guide, "sd of r; kept to compare"),
            Row("learning rate", listed(self.learning_rate)),
            *self.zero_v.rows(context.nats),
            Row("self-test residual", f"{self.self_test_residual:.1e}", "relative"),
        )
        return Lead(self.sentence), Rows(PRECONDITIONED, shown), Rows(PRECONDITIONED, detail, detail=True)

    def metrics(self) -> Mapping[str, float | None]:
        """δH₁, its standard error over fresh batches, and the ends of its 95 % interval, nats."""
        return {"delta_h1": self.delta_h1, "delta_h1_se": self.delta_h1_se, **ends("delta_h1", self.delta_h1_ci95)}


def unit_ids(batch: RolloutBatch, units: Units) -> list[Any]:
    """The prompt id of every unit, or with blocks the list of their prompts' ids."""
    ids = [[batch.groups[n].prompt_id for n in prompts] for prompts in units.ranges]
    return list(ids) if units.mode is Mode.BLOCK else [each[0] for each in ids]


def interval_warnings(statistics: CrossStatistics, delta_h1_ci95: tuple[float, float] | None) -> list[Evidence]:
    """Too few units, an interval that is known to fall short or that includes zero, or a failed self-test."""
    found = []
    units = len(statistics.row_means)
    if units < FEW_UNITS:
        found.append(
            Evidence(
                "few_units",
                f"{units} units; an interval from fewer than {FEW_UNITS} rests on its t quantile more than on data",
                "Give more prompts, or more blocks",
            )
        )
    elif statistics.shortfall is not None:
        found.append(
            Evidence(
                "interval_falls_short",
                statistics.shortfall,
                "Take the interval as a lower bound of the doubt, or give more prompts",
            )
        )
    if (
        delta_h1_ci95 is not None
        and delta_h1_ci95[0] < delta_h1_ci95[1]
        and delta_h1_ci95[0] <= 0.0 <= delta_h1_ci95[1]
    ):
        found.append(
            Evidence(
                "interval_includes_zero",
                f"the 95 % interval of δH₁, [{delta_h1_ci95[0]:.3g}, {delta_h1_ci95[1]:.3g}] nats, includes zero",
                "Give more prompts: the error falls as 1/√U at best, as 1/U while the degenerate part dominates",
            )
        )
    if statistics.self_test_residual > RESIDUAL_LIMIT:
        found.append(
            Evidence(
                "self_test",
                f"two roads to ΣX̃·ΣỸ differ by {statistics.self_test_residual:.1e} of its terms",
                "Set dtype to float64; if it stays, report it",
            )
        )
    return found


def learning_rate_warnings(rates: Sequence[float], source: Source, stored: Sequence[float]) -> list[Evidence]:
    """A recorded rate that is not the stored one; a rate of zero, whose parameters do not move whatever entropy would do.

    Args:
        rates: of this step, one a parameter group.
        source: where they come from.
        stored: the distinct ones that it held before.
    """
    found, distinct = [], list(dict.fromkeys(rates))
    if source is Source.RECORDED and distinct != list(stored):
        used, held = (", ".join(f"{rate:.6g}" for rate in some) for some in (distinct, stored))
        found.append(
            Evidence(
                "learning_rate_recorded",
                f"the rows recorded a learning rate of {used} for this step, the optimizer's state holds {held}; the "
                "recorded one is taken",
                "Look for rows of another step, or a scheduler that was resumed otherwise; set the learning rate to ask about "
                "another",
            )
        )
    zero = sum(rate == 0.0 for rate in rates)
    if not zero:
        return found
    which = "so this step changes nothing" if zero == len(rates) else f"in {zero} of {len(rates)} parameter groups"
    found.append(
        Evidence(
            "learning_rate_zero",
            f"the learning rate is 0.0, {LEARNING_RATE_SOURCES[source]}, {which}",
            "Set the learning rate to the one that you want to know about",
        )
    )
    return found
