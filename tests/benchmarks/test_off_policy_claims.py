"""What benchmarks/off_policy.py measures: coverage with another policy's rows, and what it is where W̄'s tie is forgotten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from off_policy import FORMS, RAO_BLACKWELL, SCORE, simulate

from entropy_probe.targets.entropy import EntropyTarget
from samplers import TwoPolicies


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 4])
@pytest.mark.parametrize(("target", "by_prefix"), FORMS)
def test_intervals_of_another_policys_rows_cover_and_errors_have_the_right_size(
    target: EntropyTarget, by_prefix: bool, seed: int
) -> None:
    found, _ = simulate(TwoPolicies(seed=seed), target, by_prefix=by_prefix, draws=1000)
    # 1000 batches: 0.7 points a standard error.
    assert 0.93 - 0.02 <= found.fresh <= 0.97 + 0.01
    assert 0.93 - 0.02 <= found.this_step <= 0.97 + 0.015
    assert found.fresh_error == pytest.approx(1.0, abs=0.09)
    assert found.this_error == pytest.approx(1.0, abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "by_prefix", "seed"), [(RAO_BLACKWELL, False, 4), (RAO_BLACKWELL, True, 4), (SCORE, False, 4)]
)
def test_rows_that_forget_what_the_mean_weight_ties_have_errors_of_another_size(
    target: EntropyTarget, by_prefix: bool, seed: int
) -> None:
    tied, loose = simulate(TwoPolicies(seed=seed), target, by_prefix=by_prefix, draws=1000)
    assert loose.fresh_error > tied.fresh_error + 0.08
    assert loose.this_error > tied.this_error + 0.12
    assert loose.this_step > 0.97
