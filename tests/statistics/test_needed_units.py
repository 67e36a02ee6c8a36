"""How many units would settle a question, against a loop."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from entropy_probe.statistics.needed_units import MOST_UNITS, needed_units


@pytest.mark.parametrize(
    ("u_cross", "zeta1", "tau_squared"), [(1.0, 2.0, 5.0), (-0.5, 0.3, 9.0), (0.7, 0.0, 40.0), (5.0, 0.1, 0.1)]
)
def test_needed_units_are_those_of_a_loop(u_cross: float, zeta1: float, tau_squared: float) -> None:
    def error(units: int) -> float:
        return math.sqrt(4 * zeta1 / units + 2 * tau_squared / (units * (units - 1)))

    expected = next(u for u in range(4, 10_000) if stats.t.ppf(0.975, u - 1) * error(u) < abs(u_cross))
    assert needed_units(u_cross, zeta1, tau_squared, exclude_zero=True) == expected
    for target in (0.05, 0.2, 100.0):
        expected = next(u for u in range(4, 10_000) if error(u) <= target)
        assert needed_units(u_cross, zeta1, tau_squared, target_se=target) == expected


def test_needed_units_at_the_edges() -> None:
    assert needed_units(0.0, 1.0, 1.0, exclude_zero=True) is None
    assert needed_units(0.0, 0.0, 0.0, exclude_zero=True) is None
    assert needed_units(1e-6, 1.0, 1.0, exclude_zero=True) is None
    assert needed_units(0.0, 1.0, 1.0, target_se=1e-9) is None
    assert needed_units(1.0, MOST_UNITS / 4, 0.0, target_se=1.0) == MOST_UNITS
    assert needed_units(1.0, 0.0, 0.0, exclude_zero=True) == 4
    for wrong in ({}, {"exclude_zero": True, "target_se": 1.0}, {"target_se": 0.0}, {"target_se": math.nan}):
        with pytest.raises(ValueError, match=r"exactly one|above 0"):
            needed_units(1.0, 1.0, 1.0, **wrong)
