"""Dots of unit vectors scale, add and stream."""

from __future__ import annotations

import numpy as np
import pytest

from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots


def test_dots_scale_and_add_field_by_field() -> None:
    rng = np.random.default_rng(19)
    xs, ys = rng.normal(size=(5, 8)), rng.normal(size=(5, 8))
    left, right = (UnitDots.from_kernel(xs[:, part] @ ys[:, part].T, [1] * 5) for part in (slice(3), slice(3, 8)))
    whole = UnitDots.from_kernel(xs @ ys.T, [1] * 5)
    scaled = UnitDots.from_kernel(2.5 * xs @ ys.T, [1] * 5)
    for name in ("x_dot_sum", "y_dot_sum", "diagonal", "sum_dot", "kernel"):
        np.testing.assert_allclose(getattr(left + right, name), getattr(whole, name), rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(getattr(whole.scaled(2.5), name), getattr(scaled, name), rtol=1e-12, err_msg=name)


def test_streamed_dots_give_the_same_numbers_without_the_matrix() -> None:
    rng = np.random.default_rng(12)
    xs, ys = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    stored = UnitDots.from_kernel(xs @ ys.T, [1] * 6)
    streamed = UnitDots.streamed(
        [1] * 6, xs @ ys.sum(0), ys @ xs.sum(0), (xs * ys).sum(1), float(xs.sum(0) @ ys.sum(0))
    )
    a, b = cross_statistics(stored), cross_statistics(streamed)
    assert b.u_cross == pytest.approx(a.u_cross)
    assert b.se_jackknife == pytest.approx(a.se_jackknife)
    assert b.se_this_step is None
    assert b.variance == pytest.approx(b.se_jackknife**2)
