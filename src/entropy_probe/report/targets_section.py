"""What the step moves beside the entropy: the expected reward and the response length, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from entropy_probe.statistics.u_statistics import CrossStatistics

NUMBERS = ("delta", "se", "ci95")


@dataclass(frozen=True)
class TargetSection:
    """δ of one target under the preconditioned step Δθ = η P Ȳ, own pairs left out, in the target's unit, per response.

    ``se`` is over fresh batches and ``ci95`` by the method of δH₁'s interval. Positive: the step raises it.
    """

    name: str
    delta: float | None
    se: float | None
    ci95: list[float] | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


def target_section(name: str, found: CrossStatistics | str) -> TargetSection:
    """From the η-weighted statistics of its vectors against Y, in which δ = +U_cross; or from why there are none."""
    if isinstance(found, str):
        return TargetSection(name, None, None, None, dict.fromkeys(NUMBERS, found))
    delta = found.negated.scaled(-1.0)
    return TargetSection(
        name,
        delta.value,
        delta.se,
        None if delta.ci95 is None else list(delta.ci95),
        delta.null_reasons(se="se", ci95="ci95"),
    )
