"""What the step moves beside the entropy: the expected reward and the response length, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from entropy_probe.report.numbers import interval, none, signed
from entropy_probe.report.rows import Block, Chapter, Row, Rows
from entropy_probe.report.sections.base import Context, Entry, ends
from entropy_probe.statistics.u_statistics import CrossStatistics
from entropy_probe.targets.registry import ALSO_MOVED

NUMBERS = ("delta", "se", "ci95")
CHAPTER = Chapter(25, "Also moved by the preconditioned step, to first order")


@dataclass(frozen=True)
class TargetSection(Entry):
    """δ of one target under the preconditioned step Δθ = η P Ȳ, own pairs left out, in the target's unit, per response.

    ``se`` is over fresh batches and ``ci95`` by the method of δH₁'s interval. Positive: the step raises it.
    """

    name: str
    delta: float | None
    se: float | None
    ci95: list[float] | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, found: CrossStatistics | str) -> TargetSection:
        """The record of one target.

        Args:
            name: of the target.
            found: the η-weighted statistics of its vectors against Y, in which δ = +U_cross; or why there are none.
        """
        if isinstance(found, str):
            return cls(name, None, None, None, dict.fromkeys(NUMBERS, found))
        delta = found.negated.scaled(-1.0)
        return cls(
            name,
            delta.value,
            delta.se,
            None if delta.ci95 is None else list(delta.ci95),
            delta.null_reasons(se="se", ci95="ci95"),
        )

    @classmethod
    def shown_of(cls, entries: Sequence[Self], context: Context) -> Sequence[Block]:
        """A row a target."""
        said = {target.name: target.description for target in ALSO_MOVED}
        return (Rows(CHAPTER, [entry.row(said.get(entry.name, "")) for entry in entries]),)

    @classmethod
    def metrics_of(cls, entries: Sequence[Self]) -> Mapping[str, float | None]:
        """δ of every target with its error and the ends of its 95 % interval, such as ``delta_reward``."""
        found: dict[str, float | None] = {}
        for entry in entries:
            name = f"delta_{entry.name}"
            found |= {name: entry.delta, f"{name}_se": entry.se, **ends(name, entry.ci95)}
        return found

    def row(self, what: str) -> Row:
        """δ with its interval, and what it is of; or why there is none."""
        if self.delta is None:
            return Row(self.name, none(self.null_reasons, "delta"))
        shown = "" if self.ci95 is None else f"; 95 % {interval(self.ci95)}"
        return Row(self.name, signed(self.delta, self.se), what + shown)
