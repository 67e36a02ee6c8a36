"""Unit gradients X̃_u, Ỹ_u under Adam's geometry, and the dots between them.

One interface (:mod:`~entropy_probe.gradients.interface`), a slow obvious backend (:mod:`~entropy_probe.gradients.reference`)
and a planner that fits the vectors into memory (:mod:`~entropy_probe.gradients.plan`).
"""

from entropy_probe.gradients.engine import unit_gradients
from entropy_probe.gradients.interface import Storage, UnitGradients
from entropy_probe.gradients.plan import Plan, make_plan
from entropy_probe.gradients.reference import loss_gradient

__all__ = ["Plan", "Storage", "UnitGradients", "loss_gradient", "make_plan", "unit_gradients"]
