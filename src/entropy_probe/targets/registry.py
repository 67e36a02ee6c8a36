"""The list of what the probe differentiates: a new estimator or target is its file and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from entropy_probe.targets.base import EntropyEstimator
from entropy_probe.targets.length import Length
from entropy_probe.targets.of_responses import TargetOfResponses
from entropy_probe.targets.rao_blackwell import RaoBlackwell
from entropy_probe.targets.reward import Reward
from entropy_probe.targets.score import Score

ESTIMATORS: Mapping[str, EntropyEstimator] = {estimator.name: estimator for estimator in (Score(), RaoBlackwell())}
"""By the value of their member of :class:`~entropy_probe.targets.entropy.Estimator`."""

ALSO_MOVED: tuple[TargetOfResponses, ...] = (
    Reward(),
    Length(),
)
"""What a report says beside the entropy, in this order: δ of each under the same step."""
