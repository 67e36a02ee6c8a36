"""The record of a value with its error and interval, or the reason why there is none."""

from __future__ import annotations

import pytest

from entropy_probe.statistics.estimate import Estimate, NoEstimate


def test_a_negative_factor_turns_the_interval_round_and_keeps_the_error_positive() -> None:
    found = Estimate(2.0, 0.5, (1.0, 4.0)).scaled(-3.0)
    assert found == Estimate(-6.0, 1.5, (-12.0, -3.0))
    assert Estimate(1.0, None, None, "few units").scaled(2.0) == Estimate(2.0, None, None, "few units")


def test_no_zero_has_a_sign() -> None:
    found = Estimate(0.0, 0.0, (0.0, 0.0)).scaled(-1.0)
    assert found.ci95 is not None
    assert [str(x) for x in (found.value, found.se, *found.ci95)] == ["0.0"] * 4


def test_an_interval_from_a_variance_is_so_many_errors_wide_and_a_negative_variance_counts_as_none() -> None:
    assert Estimate.from_variance(1.0, 4.0, 3.0) == Estimate(1.0, 2.0, (-5.0, 7.0))
    assert Estimate.from_variance(1.0, -4.0, 3.0) == Estimate(1.0, 0.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("ci95", "excluded"),
    [((0.1, 1.0), True), ((-1.0, -0.1), True), ((0.0, 1.0), False), ((-1.0, 0.0), False), (None, False)],
)
def test_zero_is_excluded_only_by_an_interval_that_does_not_touch_it(
    ci95: tuple[float, float] | None, excluded: bool
) -> None:
    assert Estimate(0.5, 0.1, ci95).excludes_zero is excluded


def test_the_reason_stands_under_the_keys_of_what_is_missing_alone() -> None:
    keys = {"value": "delta_h1", "se": "delta_h1_se", "ci95": "delta_h1_ci95"}
    assert Estimate(1.0, 0.1, (0.8, 1.2)).null_reasons(**keys) == {}
    assert Estimate(1.0, 0.1, None, "why").null_reasons(**keys) == {"delta_h1_ci95": "why"}
    assert Estimate(1.0, None, None, "why").null_reasons(se="se") == {"se": "why"}
    missing = NoEstimate("why")
    assert (missing.value, missing.se, missing.ci95) == (None, None, None)
    assert missing.null_reasons(**keys) == dict.fromkeys(keys.values(), "why")
