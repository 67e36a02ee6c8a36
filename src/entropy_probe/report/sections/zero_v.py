"""Elements with v = 0, which Adam has no scale for: what P is there, and what they would add to δH₁."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entropy_probe.common.evidence import Evidence
from entropy_probe.errors import some_of
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.report.rows import Row


@dataclass(frozen=True)
class ZeroVSection:
    """Elements with v = 0 and a gradient in this batch: ``treatment`` is P there (``leave-out``: 0, ``guide``: 1/ε).

    ``delta_h1_added`` is what they add to δH₁ under 1/ε: it is in ``delta_h1`` by the guide, and not where they are left out.
    """

    treatment: str
    elements: int
    delta_h1_added: float

    @classmethod
    def of(cls, treatment: ZeroV, by_name: Mapping[str, int], added: float) -> ZeroVSection:
        """The record.

        Args:
            treatment: P there.
            by_name: how many have a gradient, by parameter.
            added: what they add to δH₁ under 1/ε, nats.
        """
        return cls(treatment.value, sum(by_name.values()), added)

    def rows(self, nats: str) -> Sequence[Row]:
        """Nothing where no element has v = 0."""
        if not self.elements:
            return ()
        added = f"{self.delta_h1_added:+.4g} {nats}"
        treated = (
            f"left out of P; what they would add with 1/ε: {added}"
            if self.treatment == ZeroV.LEAVE_OUT
            else f"P is 1/ε there; what they add: {added}"
        )
        return (Row("elements with v = 0", f"{self.elements:,}", treated),)


def zero_v_warnings(found: ZeroVSection, by_name: Mapping[str, int]) -> list[Evidence]:
    """Elements with v = 0 and a gradient, and what P makes of them."""
    if not found.elements:
        return []
    which = f"{found.elements:,} elements ({some_of(list(by_name))}) have v = 0 but a gradient in this batch"
    added = f"{found.delta_h1_added:+.3g} nats"
    if found.treatment == ZeroV.LEAVE_OUT:
        return [
            Evidence(
                "zero_second_moment",
                f"{which}, and are left out of P and of δH₁; with P = 1/ε they would add {added} to it, mostly noise",
                "The adamw rows hold them, since that step renews v first; to have 1/ε, set zero_v to guide",
            )
        ]
    return [
        Evidence(
            "zero_second_moment",
            f"{which}, so P is 1/ε there and they can outweigh all others: they add {added} to δH₁",
            "Trust the adamw row, whose step renews v first; a few more training steps fill v",
        )
    ]
