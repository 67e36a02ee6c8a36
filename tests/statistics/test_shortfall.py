"""When the default interval is known to cover less than it says."""

from __future__ import annotations

import numpy as np

from drawn_kernels import coverage, kernels, one
from entropy_probe.statistics.intervals import IntervalMethod, interval
from entropy_probe.statistics.shortfall import known_shortfall
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.statistics.variance import decompose


def told(kernel: np.ndarray) -> str | None:
    return known_shortfall(decompose(kernel).row_means)


def test_a_shortfall_is_told_where_the_interval_falls_short_and_not_where_it_does_not() -> None:
    heavy = kernels(32, 400, 1.0, 0.5, 3, sigma=1.0)
    assert coverage(map(interval, heavy), 1.0) < 0.93
    of_heavy = [told(k) for k in heavy]
    assert np.mean([text is not None for text in of_heavy]) > 0.7
    assert any("skewness" in text for text in of_heavy if text is not None)
    light = kernels(32, 400, 1.0, 0.5, 4)
    assert np.mean([told(k) is not None for k in light]) < 0.1
    assert "31 units" in str(told(light[0][:31, :31]))


def test_a_shortfall_says_of_which_method_it_is_known_where_another_was_asked_for() -> None:
    dots = UnitDots.from_kernel(one(), [1] * 9)
    own, said = (str(cross_statistics(dots, method).shortfall) for method in (None, IntervalMethod.T))
    assert "9 units" in own
    assert "default" not in own
    assert f"default method, {IntervalMethod.SKEWED_T.described}; this is {IntervalMethod.T.described}" in said
