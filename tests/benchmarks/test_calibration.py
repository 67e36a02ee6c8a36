"""What benchmarks/calibration.py rests on: outcomes by look-up against the engine, exact moments, and its short formulas."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from calibration import QUICK, Baseline, BiasCell, Cost, Found, delta_h, read_found
from enumerated_prompts import TOKENS, make_subject, narrowed, prompt_law, true_u_cross
from rollout_kernels import (
    Range,
    leave_one_out_by_fraction,
    leave_one_out_line,
    same_se_prompts,
    symmetric,
    u_of,
    weighted_parts,
)

import enumerable
from entropy_probe.data.rollouts import group_rollouts
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.statistics.importance_sampling import Weighting, entropy_change
from entropy_probe.statistics.variance import decompose, variance_at
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget

SUBJECT = make_subject("policy", seed=3, contexts=2)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_outcomes_by_look_up_have_the_engines_kernel(estimator: Estimator) -> None:
    law = narrowed(prompt_law(SUBJECT, 3, estimator))
    chosen = law.draw((5,), np.random.default_rng(4))
    responses = enumerable.all_responses(TOKENS, 3)
    rows = [
        enumerable.row(
            SUBJECT.policy, int(law.context[o]), responses[k], float(SUBJECT.rewards[law.context[o], k]), prompt_id=n
        )
        for n, o in enumerate(chosen)
        for k in law.responses[o]
    ]
    batch = group_rollouts(rows)
    rewards = torch.tensor([r.reward for r in batch.responses], dtype=torch.float64)
    lengths = [len(r.response_ids) for r in batch.responses]
    a = advantages_from_rewards(rewards, batch.group_sizes, AdvantageRule.RLOO)
    a = a * length_weights(lengths, batch.group_sizes, LengthWeight.GRPO)
    p = {name: torch.ones_like(q) for name, q in SUBJECT.policy.named_parameters()}
    found = unit_gradients(
        Policy(SUBJECT.policy), batch, exact_units(5), Sides(EntropyTarget(estimator), a), Geometry.fixed(p)
    ).total.kernel
    assert found is not None
    kernel = law.x[chosen] @ law.y[chosen].T
    assert abs(found - kernel).max() < 1e-12 * abs(kernel).max()


@pytest.mark.parametrize("estimator", list(Estimator))
def test_exact_mean_and_variance(estimator: Estimator) -> None:
    law = narrowed(prompt_law(SUBJECT, 2, estimator))
    assert law.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    truth = true_u_cross(SUBJECT)
    assert float(law.mean_x @ law.mean_y) == pytest.approx(truth, rel=1e-11)
    rng = np.random.default_rng(1)
    kernels = [law.x[o] @ law.y[o].T for o in law.draw((4000, 6), rng)]
    assert np.std([u_of(k) for k in kernels]) == pytest.approx(law.exact_se(6), rel=0.06)


def test_short_formulas() -> None:
    parts = (0.3, 2.0)
    assert same_se_prompts(variance_at(23, *parts), *parts) == pytest.approx(23.0)
    rng = np.random.default_rng(2)
    kernel = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 300)) + 0.3 * rng.normal(size=(300, 1))
    zeta1, tau_squared = weighted_parts(symmetric(kernel), np.ones((1, 300)))
    expected = decompose(kernel).parts
    assert tau_squared[0] == pytest.approx(expected[1], rel=0.01)
    assert zeta1[0] == pytest.approx(expected[0], abs=0.02 * (expected[0] + expected[1]))
    values = torch.tensor([4.0, 2.0, 0.0, 6.0, 0.0], dtype=torch.float64)
    found = leave_one_out_by_fraction(values, [3, 2], [2])
    # Token midpoints of the first lie at 1/6, 1/2 and 5/6, of the second at 1/4 and 3/4.
    assert found.tolist() == pytest.approx([6.0, 3.0, 0.0, 3.5, 0.5])
    # The other's tokens lie on 6 − 6 t and 4 − 2 t; below 0 it is 0.
    assert leave_one_out_line(values, [3, 2], [2]).tolist() == pytest.approx([6.0, 0.0, 0.0, 4.0, 2.0], abs=1e-12)


@pytest.mark.parametrize("weighting", list(Weighting))
def test_importance_weights_of_many_batches_at_once(weighting: Weighting) -> None:
    rng = np.random.default_rng(3)
    s, s_after, v, v_after = rng.normal(size=(4, 2, 5, 3))
    found = delta_h(np.exp(s_after - s), v, v_after, weighting)
    for k in range(2):
        one = entropy_change(
            s[k].ravel(), s_after[k].ravel(), [3] * 5, entropies=(v[k].ravel(), v_after[k].ravel()), weighting=weighting
        )
        assert found[k] == pytest.approx(one.delta_h, abs=1e-12)


def test_an_earlier_runs_figures_are_read_back_as_they_were(tmp_path: Path) -> None:
    cell = BiasCell("policy", "score", 8, 0.1, 0.2, 0.01, 2.5, None, {"t": 0.95}, 100)
    baseline = Baseline("none", Range(1.0, 0.9, 1.1), Range(1.2, 1.1, 1.3), 0.5, 3.0, 0.1)
    found = Found(
        QUICK, 3, {"enumerable": 1.5}, bias=[cell], baselines={"c": [baseline]}, cost=Cost({"score": [1.0]}, 2.0)
    )
    path = tmp_path / "found.json"
    path.write_text(json.dumps(asdict(found)))
    assert read_found(path) == found
