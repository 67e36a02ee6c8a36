"""What one gradient does over all the steps to come: its weights in AdamW's momentum, summed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from entropy_probe import AdamState
from entropy_probe.optimizers.gradient_weights import spread_factors
from entropy_probe.optimizers.state import AdamGroup, AdamMoments

GROUP_OF_A = AdamGroup(("a",), 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, True)


def moments_at(step: int) -> AdamMoments:
    return AdamMoments(step, torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize(("step", "quoted"), [(0, "3.0"), (5, "1.46"), (10, "1.21"), (37, "1.01")])
def test_the_weights_of_one_gradient_over_all_steps_add_up_to_one_late_in_a_run(step: int, quoted: str) -> None:
    """0.1 · 0.9^k / (1 − 0.9^{t+1+k}) over k, term by term."""
    state = AdamState((GROUP_OF_A,), {"a": moments_at(step)})
    (found,) = spread_factors(state, {"a"}, 1.0)
    assert f"{found:.{len(quoted) - 2}f}" == quoted
    assert found == pytest.approx(math.fsum(0.1 * 0.9**k / (1 - 0.9 ** (step + 1 + k)) for k in range(600)), rel=1e-12)
    assert spread_factors(state, {"a"}, 0.25) == [0.25 * found]


def test_what_a_gradient_does_over_all_steps_is_the_sum_of_what_torch_makes_of_it() -> None:
    """Two runs of torch's Adam, P held still by an ε that drowns v, which differ in one gradient: their weights' difference."""
    moved = []
    for gradient in (1.0, 0.0):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 0.999), eps=1e12, weight_decay=0.0)
        for k in range(400):
            p.grad = torch.tensor([gradient if k == 5 else 0.3], dtype=torch.float64)
            optimizer.step()
        moved.append(float(p.detach()) * 1e12)
    (expected,) = spread_factors(AdamState((GROUP_OF_A,), {"a": moments_at(5)}), {"a"}, 1.0)
    assert moved[1] - moved[0] == pytest.approx(expected, rel=1e-9)


def test_parameters_that_differ_in_age_or_beta1_have_sums_of_their_own() -> None:
    groups = (replace(GROUP_OF_A, names=("a", "b")), replace(GROUP_OF_A, names=("c", "d"), beta1=0.0))
    state = AdamState(groups, {"a": moments_at(3), "b": moments_at(9), "c": moments_at(3), "d": moments_at(3)})
    three, nine, none = spread_factors(state, {"a", "b", "c", "d"}, 1.0)
    assert three > nine > none == 1.0
    assert spread_factors(state, {"c", "d"}, 1.0) == [1.0]
    slow = AdamState((replace(GROUP_OF_A, beta1=0.9999),), {"a": moments_at(0)})
    terms = 0.0001 * 0.9999 ** np.arange(400_000) / (1 - 0.9999 ** (1.0 + np.arange(400_000)))
    assert spread_factors(slow, {"a"}, 1.0) == pytest.approx([float(terms.sum())], rel=1e-9)
