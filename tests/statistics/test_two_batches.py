"""Two batches and folds: against simulation, loops and the engine's own vectors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import oracle
import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.data.rollouts import RolloutBatch, group_rollouts, read_batch, write_rollouts
from entropy_probe.data.units import exact_units
from entropy_probe.errors import InputError
from entropy_probe.gradients import cross_gradients, reference
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.report.sections.two_batches import two_batch_warnings
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.two_batches import fold_statistics, folds_of, two_batch_statistics
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget

RAO_BLACKWELL = EntropyTarget(Estimator.RAO_BLACKWELL)


def test_two_batch_variance_is_that_of_many_pairs_of_batches() -> None:
    """And planted: without the minus term it is 1.2 times too large or more where both sides are noisy."""
    rng = np.random.default_rng(3)
    dimension, rows, columns = 6, 9, 14
    means, variances, planted = [], [], []
    mean_x, mean_y = 0.2 * rng.normal(size=(2, dimension))
    for _ in range(6000):
        x = mean_x + rng.normal(size=(rows, dimension))
        y = mean_y + rng.normal(size=(columns, dimension))
        found = two_batch_statistics(x @ y.T)
        means.append(found.mean)
        variances.append(found.evaluation + found.update - found.product)
        planted.append(found.evaluation + found.update)
    truth = float(np.var(means))
    assert 0.95 < np.mean(variances) / truth < 1.05
    assert np.mean(planted) / truth > 1.2


def test_two_batch_statistics_equal_their_loops() -> None:
    kernel = np.random.default_rng(4).normal(size=(3, 4))
    found = two_batch_statistics(kernel)
    mean = kernel.mean()
    x, y = kernel.mean(1), kernel.mean(0)
    product = sum((kernel[n, m] - x[n] - y[m] + mean) ** 2 for n, m in itertools.product(range(3), range(4))) / (
        2 * 3 * 3 * 4
    )
    assert found.product == pytest.approx(product, rel=1e-12)
    assert found.evaluation == pytest.approx(np.var(x, ddof=1) / 3, rel=1e-12)
    assert found.update == pytest.approx(np.var(y, ddof=1) / 4, rel=1e-12)
    assert found.ci95[0] < found.mean < found.ci95[1]


def interval_by_loop(kernel: np.ndarray, *, product_kept: bool = True) -> tuple[float, float]:
    """The interval written out; without the linear share of V as a planted bug."""
    found = two_batch_statistics(kernel)
    (rows, columns), x, y = kernel.shape, kernel.mean(1), kernel.mean(0)
    linear = 1.0 - found.product / found.variance if product_kept else 1.0

    def freedom(count: int, kurtosis: float) -> float:
        return max(2.0, 2 * (count - 1) / (2 + linear**2 * max(kurtosis, 0.0) * (count - 1) / count))

    share = found.evaluation / (found.evaluation + found.update)
    nu = 1 / (
        share**2 / freedom(rows, stats.kurtosis(x, bias=False))
        + (1 - share) ** 2 / freedom(columns, stats.kurtosis(y, bias=False))
    )
    t = stats.t.ppf(0.975, 1 / (share**2 / (rows - 1) + (1 - share) ** 2 / (columns - 1)))
    third = stats.skew(x, bias=False) * found.evaluation**1.5 / rows**0.5
    third += stats.skew(y, bias=False) * found.update**1.5 / columns**0.5
    skewness = 2 * third / found.variance**1.5
    half, further = stats.t.ppf(0.975, nu) * found.se, min(1.5, abs(skewness) * (2 * t * t + 1) / 6) * found.se
    return found.mean - half - (further if skewness < 0 else 0), found.mean + half + (further if skewness > 0 else 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_two_batch_interval_is_its_formula(sign: float) -> None:
    rng = np.random.default_rng(12)
    kernel = sign * (1.0 + rng.exponential(size=(7, 3)) ** 2) @ (0.5 + rng.exponential(size=(12, 3)) ** 2).T
    found = two_batch_statistics(kernel)
    assert found.evaluation + found.update > 2 * found.product
    assert found.ci95 == pytest.approx(interval_by_loop(kernel), rel=1e-10)
    assert found.ci95 != pytest.approx(interval_by_loop(kernel, product_kept=False), rel=1e-3)
    assert two_batch_statistics(-kernel).ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]), rel=1e-10)
    assert two_batch_statistics(kernel.T).ci95 == pytest.approx(found.ci95, rel=1e-10)


def test_where_the_product_is_all_of_the_variance_the_smaller_batch_gives_the_degrees() -> None:
    signs = np.outer([1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0, 1.0, -1.0])  # row and column means are 0
    found = two_batch_statistics(signs)
    assert found.variance == found.product > 0.0
    half = stats.t.ppf(0.975, 3) * found.se
    assert found.ci95 == pytest.approx((found.mean - half, found.mean + half))
    assert two_batch_statistics(np.ones((2, 3))).ci95 == (1.0, 1.0)


def skewed_batches(rows: int, columns: int, draws: int) -> np.ndarray:
    """X and Y of 1 + exponential noise in one direction and normal noise in five: truth 4."""
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(draws, rows, 6)), rng.normal(size=(draws, columns, 6))
    x[..., 0], y[..., 0] = (1.0 + rng.exponential(size=(draws, n)) for n in (rows, columns))
    return x @ y.transpose(0, 2, 1)


def test_the_two_batch_interval_covers_skewed_batches() -> None:
    """Planted: the symmetric interval without the skew falls short of the same draws."""
    draws = skewed_batches(16, 16, 3000)
    found = [two_batch_statistics(k) for k in draws]
    covered = np.mean([f.ci95[0] <= 4.0 <= f.ci95[1] for f in found])
    symmetric = np.mean([abs(f.mean - 4.0) <= stats.t.ppf(0.975, 30) * f.se for f in found])
    assert 0.93 <= covered <= 0.97
    assert symmetric < covered - 0.005


def test_few_prompts_in_either_batch_are_told() -> None:
    kernel = np.random.default_rng(3).normal(size=(16, 16))
    assert two_batch_statistics(kernel).shortfall is None
    for small in (kernel[:15], kernel[:, :15]):
        assert "15" in str(two_batch_statistics(small).shortfall)
        assert [w.code for w in two_batch_warnings(two_batch_statistics(small))] == ["two_batch_interval_falls_short"]
    assert two_batch_warnings(two_batch_statistics(kernel)) == two_batch_warnings(None) == []


def test_folds_pair_a_fold_with_the_others_alone() -> None:
    kernel = np.random.default_rng(5).normal(size=(6, 6))
    folds = folds_of(6, 2)
    assert folds == [0, 1, 0, 1, 0, 1]
    found = fold_statistics(kernel, folds)
    first = np.mean([kernel[n, m] for n in (0, 2, 4) for m in (1, 3, 5)])
    second = np.mean([kernel[n, m] for n in (1, 3, 5) for m in (0, 2, 4)])
    assert found.by_fold == pytest.approx((first, second))
    assert found.estimate.value == pytest.approx((first + second) / 2)
    spoilt = kernel + 1e6 * np.eye(6)  # the diagonal is never used
    assert fold_statistics(spoilt, folds).estimate.value == pytest.approx(found.estimate.value)
    assert found.estimate.se is not None
    alone = fold_statistics(kernel, folds_of(6, 6)).estimate
    assert alone.null_reasons(se="delta_h1_se") == {"delta_h1_se": "a fold of one prompt cannot be left empty"}


@pytest.mark.parametrize(
    "folds",
    [[0, 1] * 5, [2, 0, 2, 1, 0, 1, 1, 1, 0, 2], [7, 7, -1, 7, -1, 7, 7, 7, 7, 7]],
    ids=["even", "mixed", "uneven"],
)
def test_fold_statistics_equal_those_with_every_prompt_left_out_in_turn(folds: list[int]) -> None:
    """And the size of the diagonal, which no estimate uses, is nothing to them."""
    kernel = np.random.default_rng(6).normal(size=(10, 10)) + 3.0 * np.eye(10)
    mean, by_fold, se = oracle.folds_one_left_out(kernel, folds)
    found = fold_statistics(kernel, folds)
    assert found.estimate.value == pytest.approx(mean, rel=1e-12)
    assert found.by_fold == pytest.approx(by_fold, rel=1e-12)
    assert found.estimate.se == pytest.approx(se, rel=1e-12)


@pytest.mark.parametrize("target", [EntropyTarget(), RAO_BLACKWELL], ids=["score", "rao-blackwell"])
def test_two_batches_of_one_file_give_that_files_kernel(target: EntropyTarget) -> None:
    policy = Policy(support.tiny_model("llama-tied", dtype=torch.float64), microbatch_size=4)
    batch = support.random_batch(4, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: 0.1 + torch.rand_like(q) for name, q in policy.trainable().items()}
    geometry = Geometry.fixed(p, {name: 0.5 if "norm" in name else 1.0 for name in p})
    expected = reference.unit_gradients(policy, batch, exact_units(4), Sides(target, a), geometry).step_weighted.kernel
    found = cross_gradients(policy, batch, batch, target, a, geometry)
    assert expected is not None
    assert np.abs(found.numpy() - expected).max() < 1e-11 * np.abs(expected).max()


def live(batch: RolloutBatch, **more: object) -> object:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    evaluation = more.pop("evaluation", None)
    return probe(model, adam, batch, Settings(**more), evaluation=evaluation)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", list(Estimator))
@pytest.mark.parametrize("unit", list(EntropyUnit))
def test_a_held_out_row_shrinks_onto_its_linear_term(estimator: Estimator, unit: EntropyUnit) -> None:
    batch = support.random_batch(6, [3, 4, 2, 3, 3, 4])
    others = support.random_batch(4, 3, seed=9)
    gaps: list[list[float]] = []
    for rate in (4e-6, 2e-6):
        result = live(batch, estimator=estimator, entropy=unit, learning_rate=rate, evaluation=others)
        rows = [r for r in result.report.realized if r.batch == "held-out"]  # type: ignore[attr-defined]
        assert len(rows) == (2 if estimator is Estimator.SCORE else 4)
        gaps.append([abs(r.delta_h - r.predicted) for r in rows if r.step == "preconditioned"])
    for wide, narrow in zip(*gaps, strict=True):
        assert narrow == pytest.approx(wide / 4, rel=0.15)


def test_folds_hold_out_every_prompt_once() -> None:
    batch = support.random_batch(6, 3)
    report = live(batch, split=3, estimator=Estimator.SCORE).report  # type: ignore[attr-defined]
    assert report.folds.folds == 3
    assert len(report.folds.delta_h1_by_fold) == 3
    held = [row for row in report.realized if row.batch == "held-out"]
    assert [row.step for row in held] == ["preconditioned", "adamw"]
    # The same by hand: the step from the other folds' own gradients, on each fold.
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    by_hand = []
    for fold in range(3):
        inside = batch.of_prompts([n for n in range(6) if n % 3 == fold])
        outside = batch.of_prompts([n for n in range(6) if n % 3 != fold])
        result = probe(model, adam, outside, Settings(estimator=Estimator.SCORE), evaluation=inside)
        by_hand.append(next(r for r in result.report.realized if r.batch == "held-out"))
    assert held[0].delta_h == pytest.approx(np.mean([row.delta_h for row in by_hand]), rel=1e-9)
    assert held[0].predicted == pytest.approx(np.mean([row.predicted for row in by_hand]), rel=1e-9)


def test_one_response_a_prompt_will_do_for_rao_blackwell_alone() -> None:
    batch = support.random_batch(5, 3)
    single = group_rollouts(
        [group.responses[0] for group in support.random_batch(7, 2, seed=4).groups], least_responses=1
    )
    report = live(batch, estimator=Estimator.RAO_BLACKWELL, evaluation=single).report  # type: ignore[attr-defined]
    assert report.two_batches.evaluation_prompts == 7
    with pytest.raises(InputError, match="one response"):
        live(batch, estimator=Estimator.SCORE, evaluation=single)


def test_a_file_given_twice_is_refused() -> None:
    batch = support.random_batch(5, 3)
    with pytest.raises(InputError, match="drawn independently"):
        live(batch, evaluation=batch)


def test_vectors_of_both_batches_must_fit() -> None:
    batch, others = support.random_batch(5, 3), support.random_batch(4, 3, seed=9)
    with pytest.raises(InputError, match="more than half of the"):
        live(batch, evaluation=others, memory_bytes=1e4)


def test_one_response_a_prompt_has_no_weights_of_its_own() -> None:
    single = group_rollouts([g.responses[0] for g in support.random_batch(7, 2, seed=4).groups], least_responses=1)
    with pytest.raises(InputError, match="weight one"):
        live(support.random_batch(5, 3), evaluation=single, weighting=Weighting.PER_PROMPT)


def test_the_variance_of_a_product_of_noises_never_vanishes() -> None:
    found = two_batch_statistics(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert found.variance == found.product == 1.0
    tiny = two_batch_statistics(1e-90 * np.random.default_rng(0).normal(size=(3, 4)))
    assert tiny.ci95[0] <= tiny.mean <= tiny.ci95[1]


@pytest.mark.parametrize("split", [1, 4])
def test_a_split_that_leaves_a_fold_too_small_is_refused(split: int) -> None:
    with pytest.raises(InputError, match="expected 2 to 3"):
        live(support.random_batch(6, 2), split=split)


def test_the_command_takes_both_files(tmp_path: Path) -> None:
    from entropy_probe.data.bundled_run import demo_files

    files = demo_files()
    update, evaluation = tmp_path / "update.jsonl", tmp_path / "evaluation.jsonl"
    groups = read_batch(files.rollouts).groups
    for path, part in ((update, groups[:12]), (evaluation, groups[12:20])):
        write_rollouts([row for group in part for row in group.responses], path)
    out = tmp_path / "report.json"
    found = support.run_command(
        "run", files.checkpoint, "--rollouts", update, "--evaluation-rollouts", evaluation, "--estimator",
        "rao-blackwell", "--entropy", "per-token", "--importance-weights", "per-prompt", "--target-se", "0.001",
        "--json", out,
    )  # fmt: skip
    assert found.code == 0, found.err
    report = json.loads(out.read_text())
    assert {row["estimator"] for row in report["realized"]} == {"score", "rao-blackwell"}
    assert {row["batch"] for row in report["realized"]} == {"same", "held-out"}
    assert report["needed"]["reach_target_se"] > 0
    assert report["first_order"]["entropy"] == "per-token"
    assert "nats per token" in found.out
