"""Unit gradients X̃_u, Ỹ_u under Adam's geometry, and the dots between them.

One interface (:mod:`~entropy_probe.gradients.interface`), the engine (:mod:`~entropy_probe.gradients.engine`, of
:mod:`~entropy_probe.gradients.passes` over a batch) and a slow obvious backend (:mod:`~entropy_probe.gradients.reference`), a
planner that fits the vectors into memory (:mod:`~entropy_probe.gradients.plan`), and what a model is asked before its first
probe (:mod:`~entropy_probe.gradients.preparation`).
"""

from entropy_probe.gradients.capture.checkpointing import marked
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.engine import unit_gradients
from entropy_probe.gradients.interface import Coverage, Directions, Looked, Storage, UnitGradients, Wanted
from entropy_probe.gradients.of_responses import response_dots, response_parts, weighted_gradient
from entropy_probe.gradients.plan import VECTOR_SHARE, Plan, make_plan
from entropy_probe.gradients.preparation import Preparation, prepare
from entropy_probe.gradients.reference import loss_gradient
from entropy_probe.gradients.treatments import Rules
from entropy_probe.gradients.two_batches import cross_gradients
from entropy_probe.gradients.unreached import refuse_cut, trained_before, unexplained, watched

__all__ = [
    "VECTOR_SHARE",
    "Coverage",
    "Directions",
    "Looked",
    "Plan",
    "Preparation",
    "Rules",
    "Sides",
    "Storage",
    "UnitGradients",
    "Wanted",
    "cross_gradients",
    "loss_gradient",
    "make_plan",
    "marked",
    "prepare",
    "refuse_cut",
    "response_dots",
    "response_parts",
    "trained_before",
    "unexplained",
    "unit_gradients",
    "watched",
    "weighted_gradient",
]
