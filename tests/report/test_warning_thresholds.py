"""Each warning appears on its side of its threshold and not on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

import support
from entropy_probe import Settings
from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.gradients import Coverage
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.optimizers.preconditioner import Preconditioners
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState
from entropy_probe.optimizers.step_parts import StepPrediction
from entropy_probe.optimizers.without_v import elements_without_v
from entropy_probe.pipeline.recorded import trainers_step
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.report import ZeroVSection
from entropy_probe.report.rollout_warnings import advantage_warnings, on_policy_warnings
from entropy_probe.report.sections.adamw import own_step_warnings
from entropy_probe.report.sections.checkpoint import parameter_warnings
from entropy_probe.report.sections.engine import coverage_warnings
from entropy_probe.report.sections.first_order import interval_warnings, learning_rate_warnings
from entropy_probe.report.sections.realized import realized_warnings
from entropy_probe.report.sections.zero_v import zero_v_warnings
from entropy_probe.statistics.importance_sampling import EntropyChange, ImportanceWeights, pareto_k_limit
from entropy_probe.statistics.u_statistics import CrossStatistics, cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.entropy import EntropyTarget


def codes(found: Iterable[Evidence]) -> set[str]:
    return {evidence.code for evidence in found}


def statistics(units: int = 10, **changed: Any) -> CrossStatistics:
    found = cross_statistics(UnitDots.from_kernel(np.eye(units) + 1.0, [1] * units))
    return dataclasses.replace(found, **({"self_test_residual": 0.0, "shortfall": None} | changed))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, set()),
        ({"units": 9}, {"few_units"}),
        ({"shortfall": "few prompts"}, {"interval_falls_short"}),
        ({"ci95": (-1.0, 1.0)}, {"interval_includes_zero"}),
        ({"ci95": (0.0, 1.0)}, {"interval_includes_zero"}),
        ({"ci95": (-1.0, 0.0)}, {"interval_includes_zero"}),
        ({"ci95": (-1.0, -0.1)}, set()),
        ({"ci95": (0.0, 0.0)}, set()),
        ({"ci95": None}, set()),
        ({"self_test_residual": 0.9e-6}, set()),
        ({"self_test_residual": 1.1e-6}, {"self_test"}),
    ],
)
def test_warnings_about_the_interval(changed: dict[str, Any], expected: set[str]) -> None:
    changed = dict(changed)
    interval = changed.pop("ci95", (0.1, 2.0))
    assert codes(interval_warnings(statistics(**changed), interval)) == expected


def parts_of_a_step(gradient: float, gradient_v_at_t: float, deviation: float = 0.0) -> StepPrediction:
    deviations = np.zeros((4, 3))
    deviations[:, 1] = (deviation, -deviation, 0.0, 0.0)
    return StepPrediction(np.array([0.0, gradient, 0.0]), np.array([0.0, gradient_v_at_t, 0.0]), deviations, 0.0, "")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (parts_of_a_step(-0.1, -0.31), set()),  # √10 = 3.16: nine tenths of v are fresh
        (parts_of_a_step(-0.1, -0.33), {"own_step_interval_falls_short"}),
        (parts_of_a_step(0.1, 0.33), {"own_step_interval_falls_short"}),
        (parts_of_a_step(-0.1, -0.33, deviation=0.05), set()),  # the part's own error makes up for the difference
    ],
)
def test_the_own_steps_interval_falls_short_where_v_is_mostly_this_gradients_square(
    step: StepPrediction, expected: set[str]
) -> None:
    assert codes(own_step_warnings(step)) == expected


def group(names: tuple[str, ...], learning_rate: float) -> AdamGroup:
    return AdamGroup(names, learning_rate, 0.9, 0.999, 1e-8, 0.0, False, False, True)


def test_a_learning_rate_of_zero_counts_where_it_trains_something_and_its_source_is_named() -> None:
    def warned(state: AdamState, **rate: Any) -> list[Evidence]:
        batch = support.random_batch(2, 2, extra=rate.pop("rows", {}))
        trainer = trainers_step(batch, Settings(**rate), assumed=LengthWeight.GUIDE)
        return learning_rate_warnings(trainer.of(state).group_rates, trainer.learning_rate_source, state.learning_rates)

    assert warned(AdamState((group((), 0.0), group(("a",), 1e-3)), {})) == []
    still = AdamState((group(("a",), 0.0),), {})
    (stored,), (given,) = warned(still), warned(still, learning_rate=0)
    assert "stored in the optimizer's state" in stored.seen
    assert "as given" in given.seen
    other, recorded = warned(AdamState((group(("a",), 1e-3),), {}), rows={"learning_rate": 0.0})
    assert (other.code, recorded.code) == ("learning_rate_recorded", "learning_rate_zero")
    assert "as the rows recorded it" in recorded.seen


def test_a_prompt_counts_as_without_advantage_only_if_every_response_is() -> None:
    half = torch.tensor([1.0, 0.0, -1.0] * 2 + [0.0] * 6)
    assert advantage_warnings(half, [3] * 4) == []
    assert codes(advantage_warnings(torch.cat([half, torch.zeros(3)]), [3] * 5)) == {"zero_advantage_groups"}


def off_policy(gaps: list[float], tokens: int = 2) -> set[str]:
    """Codes for responses whose sampler was off by these gaps a token, S being −tokens."""
    rows = [
        Rollout(f"p{n // 2}", (3,), (4,) * tokens, 0.0, logprobs=(-1.0 + gap,) * tokens) for n, gap in enumerate(gaps)
    ]
    return codes(on_policy_warnings(group_rollouts(rows), torch.full((len(gaps),), -float(tokens))))


def test_off_policy_is_the_mean_distance_a_token_or_a_response() -> None:
    assert off_policy([0.019] * 4) == set()
    assert off_policy([0.021] * 4) == {"off_policy"}
    assert off_policy([0.021, -0.021] * 2) == {"off_policy"}  # differences do not cancel
    assert off_policy([0.0009] * 4, tokens=110) == set()
    assert off_policy([0.0011] * 4, tokens=110) == {"off_policy"}  # 0.12 nats a response


def test_a_second_moment_of_zero_counts_where_there_is_a_gradient() -> None:
    v, y = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0])
    state = AdamState((group(("a",), 1e-3),), {"a": AdamMoments(1, torch.zeros(3), v)})
    assert elements_without_v({"a": torch.tensor([0.0, 1.0, 0.0])}, Preconditioners(state)) == {}
    assert zero_v_warnings(ZeroVSection("leave-out", 0, 0.0), {}) == []
    assert elements_without_v({"a": y}, Preconditioners(state)) == {"a": 1}
    (found,) = zero_v_warnings(ZeroVSection("leave-out", 1, 0.5), {"a": 1})
    assert found.seen.startswith("1 elements (a)")
    (rival,) = parameter_warnings((), (), ("another rule",))
    assert (rival.code, "another rule" in rival.seen) == ("ambiguous_mapping", True)
    (untouched,) = parameter_warnings(list("abcde"), (), ())
    assert untouched.seen.endswith("a, b, c and 2 more")
    told = parameter_warnings(list("abc"), ("b",), ())
    assert [(w.seen.split()[0], w.seen[-4:], "Adam's moments" in w.seen) for w in told] == [
        ("1", "m: b", True),
        ("2", "a, c", False),
    ]


def realized(
    *,
    delta_h: float = 1e-3,
    predicted: float = 1e-3,
    floor: float = 1e-6,
    ess: float = 9.0,
    k: float | None = None,
    count: int = 10_000,
    smoothed: float | None = None,
) -> set[str]:
    limit = pareto_k_limit(count)
    weights = ImportanceWeights(np.full(10, 0.1), ess, ess / 10, k, None, "" if k is None else None, limit)
    change = EntropyChange(1.0, 1.0 + delta_h, delta_h, 0.1, smoothed, weights)
    return codes(
        realized_warnings(
            [RealizedChange("adamw", "clone", "same", EntropyMeasure(EntropyTarget()), change, predicted, floor, 1.0)]
        )
    )


def test_warnings_about_a_realised_step() -> None:
    assert realized() == set()
    assert realized(ess=2.9) == {"low_ess"}
    assert realized(ess=3.1) == set()
    assert realized(k=0.69) == set()
    assert realized(k=0.71) == {"heavy_weights"}
    assert realized(k=0.49, count=100) == set()
    assert realized(k=0.51, count=100) == {"heavy_weights"}
    assert realized(k=0.71, ess=9.6) == set()
    assert realized(k=0.71, ess=9.6, smoothed=0.12) == {"heavy_weights"}
    assert realized(k=0.71, ess=9.6, smoothed=0.09) == set()
    assert realized(delta_h=-1e-6) == {"below_noise_floor"}
    assert realized(delta_h=-1.1e-6) == set()
    assert realized(delta_h=0.0, predicted=0.0) == set()


def test_parameters_without_a_rule_are_named_with_their_share() -> None:
    assert coverage_warnings(Coverage()) == []
    (found,) = coverage_warnings(Coverage(fallback=("gain",), fallback_share=0.25))
    assert "gain" in found.seen
    assert "25 %" in found.seen
