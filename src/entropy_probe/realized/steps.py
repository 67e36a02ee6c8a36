"""The record of a step that is realised, and which responses it is realised on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entropy_probe.optimizers.rounding import Kept

SAME, HELD_OUT = "same", "held-out"
"""Whether the responses are those that the step was made from."""


@dataclass(frozen=True)
class Step:
    """Δθ by parameter name, what it is called, and how it was made (``virtual``, or a real one on a ``clone``).

    ``kept`` is None unless it is rounded as the weights are stored.
    """

    name: str
    method: str
    deltas: Mapping[str, Tensor]
    kept: Kept | None = None

    @property
    def title(self) -> str:
        """Its name, with its rounding."""
        return step_title(self.name, self.kept)


def step_title(name: str, kept: Kept | None) -> str:
    """A step's name, with its rounding where it is rounded as the weights are stored."""
    return name if kept is None else f"{name} rounded {kept.how.adverb}"
