"""Where the noise of δH₁ comes from, against vectors whose every part is known."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

import support
from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.rollouts import group_rollouts
from entropy_probe.data.units import Mode, block_units
from entropy_probe.gradients import Wanted, response_parts, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.pipeline.run import probe
from entropy_probe.pipeline.settings import Settings
from entropy_probe.statistics.noise import LEAST_UNITS, THIRDS, NoiseParts, noise_parts, within_covariance
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget

PROMPTS, RESPONSES, DIM = 24, 6, 5
REPLICATES = 3000


def spread(scale: float, seed: int) -> FloatArray:
    """A matrix A [DIM, DIM]: z A has covariance Aᵀ A."""
    return scale * np.random.default_rng(seed).normal(size=(DIM, DIM))


MEAN_X = 3.0 * np.random.default_rng(0).normal(size=DIM)
MEAN_Y = MEAN_X + 0.5 * np.random.default_rng(9).normal(size=DIM)
SAMPLED_X = spread(0.5, 1)
SAMPLED_Y = SAMPLED_X + spread(0.3, 2)
PROMPTS_X, PROMPTS_Y = spread(0.2, 3), spread(0.3, 4)
SHARED = 0.6
"""Correlation of a response's parts of X and Y."""


def draw(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Responses' parts of X_n and Y_n, [PROMPTS, RESPONSES, DIM] each: a prompt's mean, and what its responses scatter by."""
    of_prompt = rng.normal(size=(PROMPTS, 1, DIM))
    common, own = rng.normal(size=(2, PROMPTS, RESPONSES, DIM))
    x = MEAN_X + of_prompt @ PROMPTS_X + np.sqrt(RESPONSES) * common @ SAMPLED_X
    y = (
        MEAN_Y
        + of_prompt @ PROMPTS_Y
        + np.sqrt(RESPONSES) * (SHARED * common + np.sqrt(1 - SHARED**2) * own) @ SAMPLED_Y
    )
    return x / RESPONSES, y / RESPONSES


def true_parts() -> dict[str, float]:
    """The parts of Var U_cross, from the covariances themselves."""
    of_x, of_y = SAMPLED_X.T @ SAMPLED_X, SAMPLED_Y.T @ SAMPLED_Y
    both = SHARED * SAMPLED_X.T @ SAMPLED_Y
    differ_x, differ_y, differ = PROMPTS_X.T @ PROMPTS_X, PROMPTS_Y.T @ PROMPTS_Y, PROMPTS_X.T @ PROMPTS_Y
    all_x, all_y, all_both = of_x + differ_x, of_y + differ_y, both + differ
    pairs = PROMPTS * (PROMPTS - 1)
    return {
        "entropy_gradient": MEAN_Y @ of_x @ MEAN_Y / PROMPTS,
        "update": MEAN_X @ of_y @ MEAN_X / PROMPTS,
        "shared": 2.0 * MEAN_Y @ both @ MEAN_X / PROMPTS,
        "prompts": (MEAN_Y @ differ_x @ MEAN_Y + MEAN_X @ differ_y @ MEAN_X + 2.0 * MEAN_Y @ differ @ MEAN_X) / PROMPTS,
        "product": (np.trace(all_x @ all_y) + np.trace(all_both @ all_both)) / pairs,
        "product_with_entropy_gradient": (np.trace(of_x @ all_y) + np.trace(both @ all_both)) / pairs,
        "product_with_update": (np.trace(all_x @ of_y) + np.trace(both @ all_both)) / pairs,
    }


def contracted(parts: FloatArray, others: FloatArray, *, own: bool = False) -> FloatArray:
    """Every response's part · the mean of the others' sums over each third of the prompts, [N, 3]; or over all of them."""
    sums = others.sum(axis=1)
    means = np.stack([sums.mean(axis=0) if own else sums[third::3].mean(axis=0) for third in range(3)])
    found: FloatArray = (parts @ means.T).reshape(-1, 3)
    return found


def estimated(*, own: bool = False) -> tuple[dict[str, float], dict[str, float]]:
    """Means over replicates of every part, with their Monte Carlo errors, given the true linear part and product."""
    truth = true_parts()
    product = truth["product"]
    linear = sum(truth[name] for name in ("entropy_gradient", "update", "shared", "prompts"))
    rng = np.random.default_rng(5)
    found = []
    for _ in range(REPLICATES):
        x, y = draw(rng)
        # Far above the truth, so that nothing is scaled to it.
        parts = noise_parts(
            contracted(x, y, own=own), contracted(y, x, own=own), [RESPONSES] * PROMPTS, range(PROMPTS),
            10.0 * linear, 10.0 * product,
        )  # fmt: skip
        assert sum(list(asdict(parts).values())[:5]) == pytest.approx(10.0 * (linear + product), rel=1e-12)
        found.append([*asdict(parts).values()])
    values = np.array(found)
    names = [*asdict(parts)]
    return (
        dict(zip(names, values.mean(axis=0), strict=True)),
        dict(zip(names, values.std(axis=0) / np.sqrt(REPLICATES), strict=True)),
    )


FIVE = ("entropy_gradient", "update", "shared", "prompts", "product")
SAMPLED = ("entropy_gradient", "update", "shared", "product_with_entropy_gradient", "product_with_update")


@pytest.mark.long
def test_every_sampled_part_is_unbiased() -> None:
    truth = true_parts()
    mean, error = estimated()
    for name in SAMPLED:
        assert abs(mean[name] - truth[name]) < 4.0 * error[name], name
        assert error[name] < 0.05 * abs(truth[name]), name


def test_directions_that_hold_the_own_prompt_do_not_pass() -> None:
    """Planted bug: Ȳ over all prompts, the responses' own among them, as in a first version."""
    truth = true_parts()
    mean, error = estimated(own=True)
    assert abs(mean["entropy_gradient"] - truth["entropy_gradient"]) > 6.0 * error["entropy_gradient"]


def test_the_true_parts_are_those_of_the_variance() -> None:
    """Var U_cross by simulation."""
    rng = np.random.default_rng(6)
    found = []
    for _ in range(20_000):
        x, y = (parts.sum(axis=1) for parts in draw(rng))
        kernel = x @ y.T
        found.append((kernel.sum() - np.trace(kernel)) / (PROMPTS * (PROMPTS - 1)))
    truth = true_parts()
    assert np.var(found) == pytest.approx(sum(list(truth.values())[:5]), rel=0.05)


def test_sampling_beyond_the_linear_part_is_scaled_to_it() -> None:
    x, y = draw(np.random.default_rng(7))
    against = (contracted(x, y), contracted(y, x), [RESPONSES] * PROMPTS, range(PROMPTS))
    free = noise_parts(*against, 1e9, 1.0)
    held = noise_parts(*against, 0.5 * (free.entropy_gradient + free.update + free.shared), 1e-9)
    assert held.prompts == 0.0
    assert held.entropy_gradient == pytest.approx(0.5 * free.entropy_gradient)
    assert held.product_with_update == held.product == 1e-9
    assert noise_parts(*against, 0.0, 1.0) == NoiseParts(0.0, 0.0, 0.0, 0.0, 1.0, *against_product(free))


def against_product(free: NoiseParts) -> tuple[float, float]:
    return min(1.0, free.product_with_entropy_gradient), min(1.0, free.product_with_update)


def test_within_covariance_of_unequal_groups() -> None:
    left, right = np.random.default_rng(8).normal(size=(2, 7))
    slow = []
    for part in (slice(0, 2), slice(2, 7)):
        count = part.stop - part.start
        slow.append(count * np.cov(left[part], right[part])[0, 1])
    np.testing.assert_allclose(within_covariance(left, right, [2, 5]), slow, rtol=1e-12)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_parts_of_responses_add_up_to_the_kernel(estimator: Estimator) -> None:
    """Σ_{i∈u} ξ_i against Ȳᵈ is the mean over the third's prompts of K_uw, and so for ψ; the kernel is the reference's."""
    batch = support.random_batch(14, [3, 2, 4, 3, 3, 2, 2] * 2)
    policy = Policy(support.tiny_model("llama-tied", dtype=torch.float64), 0.8, microbatch_size=4)
    generator = torch.Generator().manual_seed(1)
    p = {n: torch.rand(q.shape, generator=generator, dtype=torch.float64) + 0.1 for n, q in policy.trainable().items()}
    geometry = Geometry.fixed(p, {name: 0.5 if "norm" in name else 1.0 for name in p})
    a = torch.randn(len(batch.responses), generator=generator, dtype=torch.float64)
    units, target = block_units(14, 7), EntropyTarget(estimator)
    found = unit_gradients(policy, batch, units, Sides(target, a), geometry, wanted=Wanted(thirds=True))
    assert found.third_directions is not None
    measured = Measured(found.scores, found.token_entropies)
    x_parts, y_parts = response_parts(policy, batch, target, measured, a, found.third_directions)
    kernel = found.step_weighted.kernel
    assert kernel is not None
    of_unit = np.array(units.of_rows(batch.group_sizes))
    for third in range(THIRDS):
        in_third = np.arange(7) % THIRDS == third
        prompts = 2 * in_third.sum()
        for unit in range(7):
            x = float(x_parts[of_unit == unit, third].sum())
            y = float(y_parts[of_unit == unit, third].sum())
            scale = np.abs(kernel).max()
            assert abs(x - kernel[unit, in_third].sum() / prompts) < 1e-11 * scale
            assert abs(y - kernel[in_third, unit].sum() / prompts) < 1e-11 * scale


def test_the_report_has_shares_that_add_up_or_the_reason_why_not() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    shares = probe(model, adam, support.random_batch(8, 4)).report.noise
    assert not shares.null_reasons
    assert sum(getattr(shares, name) for name in FIVE) == pytest.approx(1.0, abs=1e-9)
    for batch, settings, why in (
        (support.random_batch(LEAST_UNITS - 1, 4), Settings(), "5 units; three thirds need at least 6"),
        (support.random_batch(3, 4), Settings(), "3 units"),
        (support.random_batch(8, 4), Settings(mode=Mode.EXACT, memory_bytes=5e5), "matrix"),
    ):
        none = probe(model, adam, batch, settings).report.noise
        assert none.product is None
        assert why in none.null_reasons["product"]
    silent = support.random_rollouts(8, 4, advantage=0.0)
    still = probe(model, adam, group_rollouts(silent)).report.noise
    assert still.null_reasons["product"] == "δH₁ has no noise to split"


def test_what_x_and_y_share_is_no_more_than_their_own_noise_allows() -> None:
    """Few prompts, whose estimates of the three are noisy: shares of more than all would come of it."""
    rng = np.random.default_rng(11)
    for _ in range(200):
        x, y = rng.normal(size=(2, 8 * 3, 3))
        found = noise_parts(x, y, [3] * 8, range(8), 1e9, 1.0)
        assert abs(found.shared) <= 2.0 * np.sqrt(found.entropy_gradient * found.update) + 1e-12
        assert found.prompts <= 1e9
