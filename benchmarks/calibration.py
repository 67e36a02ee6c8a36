"""Bias, coverage and what each estimator needs, measured.

    python benchmarks/calibration.py --json FILE --markdown docs/calibration.md      all of it
    python benchmarks/calibration.py --quick                                         a look
    python benchmarks/calibration.py --only checkpoints                              one part

FILE is written after every measurement, and the parts that it holds whole are not measured again: a run that was cut off goes
on, and with all parts there only the page is made.

``enumerable``: policies whose every response is enumerated (``enumerated_prompts.py``): bias and coverage of U_cross, the
variance of two batches, and importance weights normalised per prompt. ``checkpoints``: the bundled ones, score against
Rao-Blackwell on a large rollout set. ``high-entropy``: a Llama with random weights, the same, and other baselines.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from coverage import LIMIT
from enumerated_prompts import PromptLaw, Subject, make_subject, narrowed, prompt_law, true_u_cross
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rollout_kernels import (
    GROUP,
    LARGER,
    MEMORY,
    Baseline,
    Case,
    Comparison,
    Range,
    checkpoint_case,
    compare,
    compare_baselines,
    random_case,
)

import enumerable
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.bundled_run import demo_files, demo_folder
from entropy_probe.data.rollouts import read_batch
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import prepare, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import DEFAULT_METHOD, IntervalMethod, interval
from entropy_probe.statistics.two_batches import two_batch_statistics
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget

UNITS = (8, 16, 32, 128)
SAMPLES = 4
METHODS = (DEFAULT_METHOD, IntervalMethod.NORMAL, IntervalMethod.T, IntervalMethod.JACKKNIFE_T)
CHUNK = 50
BATCHES = ((16, 16), (64, 16), (128, 32))
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = ("#3b6fb5", "#c8553d", "#777777", "#4f8f5b")
Tick = Callable[[str], None]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Effort:
    """How much of everything is drawn."""

    replicates: int = 3000
    bias_replicates: int = 20000
    two_batch_replicates: int = 8000
    snis_replicates: int = 20000
    prompts: int = 512
    random_prompts: int = 512
    resamples: int = 1000
    repeats: int = 7


QUICK = Effort(200, 2000, 500, 1000, 64, 64, 200, 3)


@dataclass(frozen=True)
class BiasCell:
    """U_cross on an enumerable policy at one U.

    ``bias`` is (mean − truth) over the exact standard deviation of U_cross, with Monte Carlo error 1/√replicates; ``z`` is over
    the Monte Carlo standard error. Where |z| > 2, ``z_again`` is that of four times as many fresh replicates.
    """

    subject: str
    estimator: str
    units: int
    truth: float
    exact_se: float
    bias: float
    z: float
    z_again: float | None
    coverage: dict[str, float]
    replicates: int


@dataclass(frozen=True)
class TwoBatchCell:
    """Mean variance estimate over the exact variance of X̄_E · P Ȳ_U, its Monte Carlo error, bias z and coverage.

    ``unbiased_ratio`` is that of the variance without its floor; ``z_again`` as in :class:`BiasCell`.
    """

    subject: str
    estimator: str
    responses: int
    prompts: tuple[int, int]
    variance_ratio: float
    variance_ratio_error: float
    unbiased_ratio: float
    z: float
    z_again: float | None
    coverage: float


@dataclass(frozen=True)
class WeightingCell:
    """ΔH by importance sampling at a step with a given true ESS fraction, in nats."""

    ess_fraction: float
    responses: int
    estimator: str
    weighting: str
    truth: float
    bias: float
    bias_error: float
    deviation: float

    @property
    def rmse(self) -> float:
        """Root mean square error."""
        return math.hypot(self.bias, self.deviation)


@dataclass(frozen=True)
class Cost:
    """Seconds of ``unit_gradients`` by estimator, interleaved, and the median ratio of Rao-Blackwell to score."""

    seconds: dict[str, list[float]]
    ratio: float


@dataclass
class Found:
    """All figures of one run; ``parts`` are those that are whole, with the seconds that each took."""

    effort: Effort
    seed: int
    parts: dict[str, float] = field(default_factory=dict)
    bias: list[BiasCell] = field(default_factory=list)
    two_batches: list[TwoBatchCell] = field(default_factory=list)
    weighting: list[WeightingCell] = field(default_factory=list)
    checkpoints: list[Comparison] = field(default_factory=list)
    random: list[Comparison] = field(default_factory=list)
    baselines: dict[str, list[Baseline]] = field(default_factory=dict)
    cost: Cost | None = None


def subjects() -> list[Subject]:
    """Two policies whose linear part dominates, a skewed one, and one that its rewards do not move on average."""
    return [
        make_subject("policy 1", seed=1),
        make_subject("policy 3", seed=3),
        make_subject("policy 2, skewed", seed=2),
        make_subject("policy 0, stationary", seed=0, stationary=True),
    ]


def u_cross_values(law: PromptLaw, units: int, replicates: int, rng: np.random.Generator) -> FloatArray:
    """U_cross of fresh batches by sums alone: (ΣX · ΣY − Σ X_u · Y_u) / (U(U−1))."""
    diagonal = (law.x * law.y).sum(axis=1)
    found = []
    chunk = max(1, 40_000 // units)
    for start in range(0, replicates, chunk):
        chosen = law.draw((min(chunk, replicates - start), units), rng)
        dots = (law.x[chosen].sum(axis=1) * law.y[chosen].sum(axis=1)).sum(axis=1)
        found.append((dots - diagonal[chosen].sum(axis=1)) / (units * (units - 1)))
    return np.concatenate(found)


def kernels(law: PromptLaw, units: int, draws: int, rng: np.random.Generator) -> FloatArray:
    """K of fresh batches, [draws, U, U]."""
    chosen = law.draw((draws, units), rng)
    return np.asarray(law.x[chosen] @ law.y[chosen].transpose(0, 2, 1))


def measure_bias(subject: Subject, estimator: Estimator, effort: Effort, seed: int, tick: Tick) -> list[BiasCell]:
    truth = true_u_cross(subject)
    law = narrowed(prompt_law(subject, SAMPLES, estimator))
    cells = []
    for units in UNITS:
        tick(f"{subject.name}, {estimator}, U = {units}")
        rng = np.random.default_rng([seed, units])
        se = law.exact_se(units)

        def z_of(replicates: int, rng: np.random.Generator, units: int = units, se: float = se) -> float:
            mean = float(u_cross_values(law, units, replicates, rng).mean())
            return (mean - truth) / se * math.sqrt(replicates)

        z = z_of(effort.bias_replicates, rng)
        again = z_of(4 * effort.bias_replicates, rng) if abs(z) > 2.0 else None
        covered = dict.fromkeys(METHODS, 0)
        for start in range(0, effort.replicates, CHUNK):
            for kernel in kernels(law, units, min(CHUNK, effort.replicates - start), rng):
                for method in METHODS:
                    low, high = interval(kernel, method)
                    covered[method] += low - 1e-12 * se <= truth <= high + 1e-12 * se
        cells.append(
            BiasCell(
                subject.name, str(estimator), units, truth, se, z / math.sqrt(effort.bias_replicates), z, again,
                {str(m): n / effort.replicates for m, n in covered.items()}, effort.bias_replicates,
            )
        )  # fmt: skip
    return cells


def measure_two_batches(subject: Subject, effort: Effort, seed: int, tick: Tick) -> list[TwoBatchCell]:
    """X from E, Y from U of ``SAMPLES`` responses a prompt."""
    cells = []
    truth = true_u_cross(subject)
    update = prompt_law(subject, SAMPLES, Estimator.SCORE)
    mean_y, spread_y = update.mean_y, update.covariance(update.y)
    kinds = ((Estimator.RAO_BLACKWELL, 1), (Estimator.RAO_BLACKWELL, SAMPLES), (Estimator.SCORE, SAMPLES))
    for estimator, samples in kinds:
        law = prompt_law(subject, samples, estimator)
        mean_x, spread_x = law.mean_x, law.covariance(law.x)
        x, y = law.x, update.y
        for number, (rows, columns) in enumerate(BATCHES):
            tick(f"two batches, {subject.name}, {estimator}, G = {samples}")
            rng = np.random.default_rng([seed, samples, number, list(Estimator).index(estimator)])
            exact = float(mean_y @ spread_x @ mean_y) / rows + float(mean_x @ spread_y @ mean_x) / columns
            exact += float((spread_x * spread_y).sum()) / (rows * columns)
            values, variances, unbiased, covered = [], [], [], 0
            for _ in range(effort.two_batch_replicates):
                found = two_batch_statistics(x[law.draw((rows,), rng)] @ y[update.draw((columns,), rng)].T)
                values.append(found.mean)
                variances.append(found.variance)
                unbiased.append(found.evaluation + found.update - found.product)
                covered += found.ci95[0] <= truth <= found.ci95[1]
            error = statistics.stdev(variances) / math.sqrt(len(variances)) / exact
            z = (statistics.fmean(values) - truth) / math.sqrt(exact / len(values))
            again = None
            if abs(z) > 2.0:
                count = 4 * effort.two_batch_replicates
                fresh = [
                    float(x[law.draw((rows,), rng)].mean(axis=0) @ y[update.draw((columns,), rng)].mean(axis=0))
                    for _ in range(count)
                ]
                again = (statistics.fmean(fresh) - truth) / math.sqrt(exact / count)
            cells.append(
                TwoBatchCell(
                    subject.name, str(estimator), samples, (rows, columns), statistics.fmean(variances) / exact, error,
                    statistics.fmean(unbiased) / exact, z, again, covered / len(values),
                )
            )  # fmt: skip
    return cells


def measure_weighting(subject: Subject, effort: Effort, seed: int, tick: Tick) -> list[WeightingCell]:
    """A fixed step along E[Y] as long as the true ESS fraction, 1 / E[(π⁺/π)²], says; 32 prompts."""
    policy, prompts = subject.policy, 32
    lengths = [len(r) for r in enumerable.all_responses(policy.tokens, LIMIT)]
    ascent = torch.from_numpy(prompt_law(subject, 2, Estimator.SCORE).mean_y)
    theta = [p.detach().clone() for p in policy.parameters()]

    def tables(scale: float) -> tuple[FloatArray, FloatArray, float]:
        """S and Σ H_t of every response, [contexts, responses], and the mean entropy."""
        start = 0
        with torch.no_grad():
            for p, original in zip(policy.parameters(), theta, strict=True):
                p.copy_(original + scale * ascent[start : start + p.numel()].view_as(p))
                start += p.numel()
        contexts = range(policy.contexts)
        scores = np.stack([enumerable.response_scores(policy, n, LIMIT).detach().numpy() for n in contexts])
        sums = np.stack(
            [[float(t.entropies.sum()) for t in enumerable.token_terms(policy, n, LIMIT)] for n in contexts]
        )
        entropy = float(np.mean([float(enumerable.exact_entropy(policy, n, LIMIT).detach()) for n in contexts]))
        return scores, sums, entropy

    assert len(lengths) == tables(0.0)[0].shape[1]
    scores, sums, before = tables(0.0)
    p = np.exp(scores)

    def ess_fraction(scale: float) -> float:
        return 1.0 / float((p * np.exp(2.0 * (tables(scale)[0] - scores))).sum(axis=1).mean())

    cells = []
    for wanted in (0.95, 0.8):
        low, high = 0.0, 1.0
        while ess_fraction(high) > wanted:
            high *= 2.0
        for _ in range(25):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if ess_fraction(middle) > wanted else (low, middle)
        scores_after, sums_after, after = tables(high)
        truth = after - before
        cumulated = np.cumsum(p, axis=1)
        cumulated[:, -1] = 1.0
        for samples in (4, 16):
            tick(f"importance weights, ESS {wanted}, G = {samples}")
            rng = np.random.default_rng([seed, samples, int(100 * wanted)])
            found: dict[tuple[Estimator, Weighting], list[FloatArray]] = {}
            for _ in range(0, effort.snis_replicates, 500):
                context = rng.integers(policy.contexts, size=(500, prompts, 1))
                chosen = (rng.random((500, prompts, samples))[..., None] > cumulated[context]).sum(axis=-1)
                ratios = np.exp(scores_after[context, chosen] - scores[context, chosen])
                for estimator in Estimator:
                    v, v_after = (-scores, -scores_after) if estimator is Estimator.SCORE else (sums, sums_after)
                    for weighting in Weighting:
                        change = delta_h(ratios, v[context, chosen], v_after[context, chosen], weighting)
                        found.setdefault((estimator, weighting), []).append(change)
            for (estimator, weighting), parts in found.items():
                values = np.concatenate(parts)
                deviation = float(values.std(ddof=1))
                cells.append(
                    WeightingCell(
                        wanted, samples, str(estimator), str(weighting), truth, float(values.mean()) - truth,
                        deviation / math.sqrt(len(values)), deviation,
                    )
                )  # fmt: skip
    tables(0.0)
    return cells


def delta_h(ratios: FloatArray, v: FloatArray, v_after: FloatArray, weighting: Weighting) -> FloatArray:
    """ΔH of batches [replicates, prompts, G]: ``importance_sampling.entropy_change`` for all of them at once."""
    axes = (1, 2) if weighting is Weighting.GLOBAL else (2,)
    after = (ratios * v_after).sum(axis=axes) / ratios.sum(axis=axes)
    return np.asarray((after if after.ndim == 1 else after.mean(axis=1)) - v.mean(axis=(1, 2)))


def measure_cost(repeats: int) -> Cost:
    """The bundled checkpoint and rollouts; one warm-up of each."""
    files = demo_files()
    loaded, batch = load_checkpoint(files.checkpoint), read_batch(files.rollouts)
    preparation = prepare(Policy(loaded.model, batch.temperature), batch, memory_bytes=MEMORY)
    policy = preparation.applied(Policy(loaded.model, batch.temperature))
    parameters = policy.trainable()
    p = {name: torch.ones_like(q, dtype=torch.float64) for name, q in parameters.items()}
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    seconds: dict[str, list[float]] = {str(estimator): [] for estimator in Estimator}
    for repeat in range(repeats + 1):
        for estimator in Estimator:
            start = time.perf_counter()
            unit_gradients(
                policy, batch, exact_units(len(batch.groups)), Sides(EntropyTarget(estimator), a), Geometry.fixed(p),
                rules=preparation.rules,
            )  # fmt: skip
            if repeat:
                seconds[str(estimator)].append(time.perf_counter() - start)
    both = zip(seconds[str(Estimator.RAO_BLACKWELL)], seconds[str(Estimator.SCORE)], strict=True)
    return Cost(seconds, statistics.median(rb / score for rb, score in both))


def both_kernels(case: Case) -> tuple[FloatArray, FloatArray]:
    return case.kernel(EntropyTarget(Estimator.SCORE)), case.kernel(EntropyTarget(Estimator.RAO_BLACKWELL))


def measure_enumerable(found: Found, tick: Tick, save: Callable[[], None]) -> None:
    found.bias, found.two_batches = [], []
    effort, seed, known = found.effort, found.seed, subjects()
    for number, subject in enumerate(known):
        for k, estimator in enumerate(Estimator):
            found.bias += measure_bias(subject, estimator, effort, seed + 100 * number + 10 * k, tick)
            save()
    for number, subject in enumerate((known[0], known[2], known[3])):
        found.two_batches += measure_two_batches(subject, effort, seed + 1000 + number, tick)
        save()
    found.weighting = measure_weighting(known[0], effort, seed + 2000, tick)


def measure_checkpoints(found: Found, tick: Tick, save: Callable[[], None]) -> None:
    found.checkpoints = []
    for folder in checkpoint_folders():
        tick(folder.name)
        case = checkpoint_case(folder, found.effort.prompts, 8, found.seed + 1)
        score, rao_blackwell = both_kernels(case)
        found.checkpoints.append(compare(case, score, rao_blackwell, found.effort.resamples))
        found.baselines[folder.name] = compare_baselines(case, rao_blackwell, found.effort.resamples)
        save()
    tick("cost")
    found.cost = measure_cost(found.effort.repeats)


def measure_high_entropy(found: Found, tick: Tick, save: Callable[[], None]) -> None:
    found.random = []
    for longest, ends in ((32, 0), (96, 0), (96, 6)):
        tick(f"random weights, {longest} tokens")
        case = random_case(longest, found.effort.random_prompts, ends=ends, seed=found.seed)
        score, rao_blackwell = both_kernels(case)
        found.random.append(compare(case, score, rao_blackwell, found.effort.resamples))
        if longest == 32 or ends:
            found.baselines[case.name] = compare_baselines(case, rao_blackwell, found.effort.resamples)
        save()


PARTS = {"enumerable": measure_enumerable, "checkpoints": measure_checkpoints, "high-entropy": measure_high_entropy}


def checkpoint_folders() -> list[Path]:
    """The bundled full checkpoints, early to late."""
    return sorted((demo_folder() / "full").glob("checkpoint-*"), key=lambda f: int(f.name.split("-")[1]))


def read_found(path: Path) -> Found:
    """What an earlier run wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))

    def with_ranges(kind: Callable[..., Kind], values: dict[str, Any]) -> Kind:
        return kind(**{k: Range(**v) if isinstance(v, dict) else v for k, v in values.items()})

    return Found(
        effort=Effort(**record["effort"]),
        seed=record["seed"],
        parts=record["parts"],
        bias=[BiasCell(**c) for c in record["bias"]],
        two_batches=[TwoBatchCell(**c) for c in record["two_batches"]],
        weighting=[WeightingCell(**c) for c in record["weighting"]],
        checkpoints=[with_ranges(Comparison, c) for c in record["checkpoints"]],
        random=[with_ranges(Comparison, c) for c in record["random"]],
        baselines={name: [with_ranges(Baseline, b) for b in found] for name, found in record["baselines"].items()},
        cost=None if record["cost"] is None else Cost(**record["cost"]),
    )


def steps(parts: Sequence[str]) -> int:
    """How often ``run`` will tick."""
    counts = {
        "enumerable": 4 * 2 * len(UNITS) + 3 * 3 * len(BATCHES) + 4,
        "checkpoints": len(checkpoint_folders()) + 1,
        "high-entropy": 3,
    }
    return sum(counts[part] for part in parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """With an empty line around it."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return ["", *lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def bias_lines(cells: Sequence[BiasCell]) -> list[str]:
    z = np.array([c.z for c in cells])
    again = [c for c in cells if c.z_again is not None]
    beyond = sum(abs(c.z) > 2.0 for c in cells)
    repeated = ", ".join(f"{c.subject}, {c.estimator}, U = {c.units}: {c.z_again:+.2f}" for c in again) or "none"
    lines = [
        "## Bias and coverage on enumerable policies",
        "",
        f"Over {len(cells)} cells of {cells[0].replicates} batches the largest |z| is {np.abs(z).max():.2f}; {beyond} "
        f"are beyond 2, where {0.0455 * len(cells):.1f} are expected of an unbiased estimator. The sum of z² is "
        f"{(z**2).sum():.1f} (expected {len(cells)} ± {math.sqrt(2 * len(cells)):.0f}). Cells beyond 2 again, with four times "
        "as many fresh batches: "
        f"{repeated}. The exact mean over every outcome agrees to rounding (`tests/benchmarks/test_calibration.py`).",
        "",
        "Bias is in units of the exact SE of U_cross, with Monte Carlo error "
        f"{1 / math.sqrt(cells[0].replicates):.3f}; coverage in %, nominal 95.",
    ]
    rows = [
        [c.subject, c.estimator, str(c.units), f"{c.exact_se:.5f}", f"{c.bias:+.4f}", f"{c.z:+.2f}"]
        + [f"{100 * c.coverage[str(m)]:.1f}" for m in METHODS]
        for c in cells
    ]
    lines += table(["policy", "estimator", "U", "SE", "bias / SE", "z", *METHODS], rows)
    ratios: dict[tuple[str, int], dict[str, float]] = {}
    for c in cells:
        ratios.setdefault((c.subject, c.units), {})[c.estimator] = c.exact_se
    shown = [r[str(Estimator.SCORE)] / r[str(Estimator.RAO_BLACKWELL)] for r in ratios.values()]
    lines.append(
        f"The exact SE of score over that of Rao-Blackwell is {min(shown):.2f} to {max(shown):.2f} here: with three tokens and "
        "answers of three at most, what is left is mostly Y's noise and the difference between contexts."
    )
    return [*lines, "", "![Coverage of the default interval by number of units](images/calibration_coverage.png)", ""]


def two_batch_lines(cells: Sequence[TwoBatchCell]) -> list[str]:
    ratios = [c.variance_ratio for c in cells]
    covered = [c.coverage for c in cells]
    lines = [
        "## Two batches",
        "",
        f"The mean variance estimate over the exact variance is {min(ratios):.3f} to {max(ratios):.3f} over {len(cells)} "
        f"cells, {min(c.unbiased_ratio for c in cells):.3f} to {max(c.unbiased_ratio for c in cells):.3f} without the floor at "
        f"the product; the largest |z| of the bias is {max(abs(c.z) for c in cells):.2f}; coverage "
        f"{100 * min(covered):.1f} to {100 * max(covered):.1f} %. Cells with |z| beyond 2 again, with four times as many fresh "
        f"batches: {', '.join(f'{c.z:+.2f}, then {c.z_again:+.2f}' for c in cells if c.z_again is not None) or 'none'}.",
    ]
    rows = [
        [
            c.subject, c.estimator, str(c.responses), f"{c.prompts[0]} and {c.prompts[1]}",
            f"{c.variance_ratio:.3f} ± {c.variance_ratio_error:.3f}", f"{c.unbiased_ratio:.3f}", f"{c.z:+.2f}",
            f"{100 * c.coverage:.1f}",
        ]
        for c in cells
    ]  # fmt: skip
    return lines + table(
        ["policy", "X by", "G of E", "prompts of E and U", "variance / truth", "without floor", "z", "coverage, %"],
        rows,
    )


def weighting_lines(cells: Sequence[WeightingCell]) -> list[str]:
    pairs: dict[tuple[float, int, str], dict[str, WeightingCell]] = {}
    for c in cells:
        pairs.setdefault((c.ess_fraction, c.responses, c.estimator), {})[c.weighting] = c
    better = sum(p[str(Weighting.PER_PROMPT)].rmse < p[str(Weighting.GLOBAL)].rmse for p in pairs.values())
    lines = [
        "## Importance weights normalised per prompt",
        "",
        f"32 prompts of policy 1, a fixed step. Per prompt has the smaller root mean square error in {better} of {len(pairs)} "
        "cells; its bias does not fall with the number of prompts, only with G.",
    ]
    rows = [
        [
            f"{c.ess_fraction:.2f}", str(c.responses), c.estimator, c.weighting, f"{c.truth:+.4f}",
            f"{c.bias:+.5f} ± {c.bias_error:.5f}", f"{c.deviation:.4f}", f"{c.rmse:.4f}",
        ]
        for c in cells
    ]  # fmt: skip
    head = ["ESS / N", "G", "estimator", "weights", "true ΔH", "bias", "standard deviation", "RMSE"]
    return lines + table(head, rows)


def comparison_table(found: Sequence[Comparison]) -> list[str]:
    head = [
        "policy", "tokens", "nats a token", "U_cross score", "U_cross RB", "τ² share, score / RB", f"SE ratio, U = {GROUP}",
        f"U = {LARGER}", "U = all", f"disjoint groups of {GROUP}", f"variance ratio, U = {GROUP}",
        f"rollouts for RB's SE at {GROUP}", f"at {LARGER}",
    ]  # fmt: skip
    rows = [
        [
            c.name, f"{c.mean_length:.1f}", f"{c.entropy_per_token:.2f}", f"{c.u_score:.3g}",
            f"{c.u_rao_blackwell:.3g} (differ by {(c.u_score - c.u_rao_blackwell) / c.se_of_difference:+.1f} SE)",
            f"{c.degenerate[0]:.2f} / {c.degenerate[1]:.2f}", str(c.se_ratio), str(c.se_ratio_larger), str(c.se_ratio_all),
            str(c.direct_se_ratio), str(c.variance_ratio), str(c.rollouts_ratio), str(c.rollouts_ratio_larger),
        ]
        for c in found
    ]  # fmt: skip
    return table(head, rows)


READING = (
    "Score over Rao-Blackwell, on the same rollouts, with 95 % bootstrap intervals over prompts. SE ratios are from the "
    "unbiased ζ₁ and τ² of the large set; *disjoint groups* is the spread of U_cross itself over groups of prompts. *Rollouts* "
    "is how many times as many prompts score needs for the SE that Rao-Blackwell has: less than the variance ratio, since the "
    "degenerate part falls as 1/U². The variance ratio is what it would be if all of the variance were linear."
)


BASELINES_READING = (
    f"SE of U_cross at {GROUP} and {LARGER} prompts, and standard deviation of X̃_u · (the others' mean Ỹ), over those "
    "of the leave-one-out mean by position, which is what the package uses, with 95 % bootstrap intervals over prompts. The "
    "shift is that of U_cross, over its jackknife SE. *Line*: a + b t fitted to F_t of the prompt's other responses; *line "
    "past their end*: the mean by position in which a response that has ended counts as that line's value and not as 0. The "
    "baseline by fraction of length looks at the response's own length and so is biased where lengths differ; those fitted out "
    "of fold look at other prompts."
)


def medians(found: Sequence[Comparison]) -> str:
    values = [
        statistics.median(getattr(c, name).value for c in found)
        for name in ("se_ratio", "variance_ratio", "rollouts_ratio", "rollouts_ratio_larger")
    ]
    return (
        f"median SE ratio {values[0]:.2f}, variance ratio {values[1]:.1f}, rollouts {values[2]:.2f} (U = {GROUP}) and "
        f"{values[3]:.2f} (U = {LARGER})"
    )


def aims(found: Found) -> list[str]:
    """What was aimed at beside what was measured."""
    rows = []
    if "enumerable" in found.parts:
        for what, zs in (
            ("U_cross", [(c.z, c.z_again) for c in found.bias]),
            ("two batches", [(c.z, c.z_again) for c in found.two_batches]),
        ):
            values = [z for z, _ in zs]
            beyond = sum(abs(z) > 2.0 for z in values)
            rows.append(
                [
                    f"bias of {what} within 2 Monte Carlo errors",
                    f"{beyond} of {len(values)} cells beyond ({0.0455 * len(values):.1f} by chance alone): "
                    + ", ".join(
                        f"{z:+.2f} and with fresh batches {again:+.2f}" for z, again in zs if again is not None
                    ),
                ]
            )
        ratios = [c.variance_ratio for c in found.two_batches]
        rows.append(
            [
                "two-batch variance over truth 0.95 to 1.05",
                f"{min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} cells, Monte Carlo error at most "
                f"{max(c.variance_ratio_error for c in found.two_batches):.3f}; without the floor at the product "
                f"{min(c.unbiased_ratio for c in found.two_batches):.3f} to "
                f"{max(c.unbiased_ratio for c in found.two_batches):.3f}",
            ]
        )
    if "checkpoints" in found.parts:
        ratios = [c.rollouts_ratio.value for c in found.checkpoints]
        rows.append(
            [
                "bundled checkpoints: score needs 3 times the rollouts (median)",
                f"{statistics.median(ratios):.2f} (U = {GROUP}; by checkpoint {', '.join(f'{r:.2f}' for r in ratios)}), "
                f"{statistics.median(c.rollouts_ratio_larger.value for c in found.checkpoints):.2f} (U = {LARGER})",
            ]
        )
    if "high-entropy" in found.parts:
        rows.append(
            [
                "high entropy, 32 tokens and more: 8 times",
                "; ".join(
                    f"{c.name}: {c.rollouts_ratio.value:.2f} (U = {GROUP}), {c.rollouts_ratio_larger.value:.2f} (U = {LARGER})"
                    for c in found.random
                ),
            ]
        )
    return ["## Aims", *table(["aim", "measured"], rows)]


def markdown(found: Found, command: str) -> str:
    """The page."""
    lines = [
        "# Calibration of the estimators",
        "",
        f"`{command}`, {sum(found.parts.values()) / 60:.0f} min on one thread. Intervals by family of kernels are in "
        "[coverage.md](coverage.md).",
        "",
        *aims(found),
    ]
    if "enumerable" in found.parts:
        lines += [*bias_lines(found.bias), *two_batch_lines(found.two_batches), *weighting_lines(found.weighting)]
    if "checkpoints" in found.parts:
        first = found.checkpoints[0]
        lines += ["## Score against Rao-Blackwell on the bundled checkpoints", ""]
        lines += [
            f"{first.prompts} prompts × {first.responses // first.prompts} responses each: {medians(found.checkpoints)}."
        ]
        lines += ["", READING, *comparison_table(found.checkpoints)]
        lines += ["![SE ratio by checkpoint](images/calibration_se_ratio.png)", ""]
        assert found.cost is not None
        score, rao_blackwell = (statistics.median(found.cost.seconds[str(e)]) for e in Estimator)
        gain = statistics.median(c.variance_ratio.value for c in found.checkpoints) / found.cost.ratio
        rollouts = statistics.median(c.rollouts_ratio.value for c in found.checkpoints) / found.cost.ratio
        lines += [
            f"Cost: `unit_gradients` takes {found.cost.ratio:.2f} times as long by Rao-Blackwell (median of "
            f"{len(next(iter(found.cost.seconds.values())))} interleaved repeats on the demo checkpoint and its rollouts, "
            f"{1000 * score:.0f} and {1000 * rao_blackwell:.0f} ms). Variance × cost of score over that of Rao-Blackwell at "
            f"U = {GROUP}: {gain:.1f}; time for the same SE: {rollouts:.2f} (medians over checkpoints; sampling not counted).",
            "",
        ]
    if "high-entropy" in found.parts:
        first = found.random[0]
        lines += ["## A high-entropy policy", ""]
        worst = min(c.rollouts_ratio.value for c in found.random[:2])
        lines += [
            f"A Llama with random weights, {first.prompts} prompts × {first.responses // first.prompts} responses: with "
            f"answers of 32 and 96 tokens score needs at least {worst:.1f} times the rollouts (U = {GROUP}); where they "
            f"end early, {found.random[2].rollouts_ratio.value:.1f} times.",
            *comparison_table(found.random),
        ]
    if found.baselines:
        lines += ["## Other baselines of Rao-Blackwell", "", BASELINES_READING]
        for name, baselines in found.baselines.items():
            rows = [
                [b.name, str(b.se_ratio), str(b.se_ratio_larger), f"{b.projection:.3f}", f"{b.difference:+.1f}"]
                for b in baselines
            ]
            lines += ["", f"{name[0].upper()}{name[1:]}:"]
            lines += table(["baseline", f"SE, U = {GROUP}", f"SE, U = {LARGER}", "projection", "shift / its SE"], rows)
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def plot_coverage(cells: Sequence[BiasCell], path: Path) -> None:
    """Coverage of the default interval (full) and of ± 1.96 SE (dotted) by U."""
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, estimator in zip(figure.subplots(1, 2, sharey=True), Estimator, strict=True):
        for name, colour in zip(dict.fromkeys(c.subject for c in cells), COLOURS, strict=True):
            of = [c for c in cells if c.subject == name and c.estimator == str(estimator)]
            for method, style in ((DEFAULT_METHOD, "-o"), (IntervalMethod.NORMAL, ":")):
                axes.plot(
                    [c.units for c in of], [100 * c.coverage[str(method)] for c in of], style, color=colour, markersize=4,
                    label=name if style == "-o" else None,
                )  # fmt: skip
        axes.axhline(95.0, color="black", linewidth=0.7)
        axes.set_xscale("log", base=2)
        axes.set_xticks(UNITS, [str(u) for u in UNITS])
        axes.set_title(str(estimator), fontsize=10)
        axes.set_xlabel("units U")
    figure.axes[0].set_ylabel(f"coverage, %\n({DEFAULT_METHOD}; dotted: normal)")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def plot_se_ratio(found: Sequence[Comparison], path: Path) -> None:
    """SE of score over Rao-Blackwell by checkpoint, at three numbers of prompts."""
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = (
        ("se_ratio", f"U = {GROUP}"),
        ("se_ratio_larger", f"U = {LARGER}"),
        ("se_ratio_all", f"U = {found[0].prompts}"),
    )
    for shift, ((name, label), colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        ranges = [getattr(c, name) for c in found]
        values = [r.value for r in ranges]
        axes.errorbar(
            [place + 0.15 * (shift - 1) for place in range(len(found))], values,
            # A percentile interval of a biased resample need not hold the estimate.
            yerr=[[max(0.0, r.value - r.low) for r in ranges], [max(0.0, r.high - r.value) for r in ranges]],
            fmt="o", color=colour, capsize=3, label=label,
        )  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_xticks(range(len(found)), [c.name for c in found])
    axes.set_ylabel("SE of score / SE of rao-blackwell")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here as they come, and go on from what is there")
    parser.add_argument("--markdown", type=Path, help="write the page here, and the plots to docs/images")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a look, with few replicates")
    arguments = parser.parse_args()
    parts = list(dict.fromkeys(arguments.only or PARTS))
    found = Found(QUICK if arguments.quick else Effort(), arguments.seed)
    if arguments.json and arguments.json.exists():
        earlier = read_found(arguments.json)
        if (earlier.effort, earlier.seed) != (found.effort, found.seed):
            parser.error(f"{arguments.json} is of another effort or seed; give another file")
        found = earlier

    def save() -> None:
        if arguments.json:
            written = arguments.json.with_suffix(".part")
            written.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
            written.replace(arguments.json)

    torch.set_num_threads(1)
    wanted = [part for part in parts if part not in found.parts]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("calibration", total=steps(wanted))

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what)

        for part in wanted:
            start = time.monotonic()
            PARTS[part](found, tick, save)
            found.parts[part] = time.monotonic() - start
            save()
    command = " ".join(
        ["python benchmarks/calibration.py", *(f"--only {p}" for p in arguments.only or ())]
        + (["--quick"] if arguments.quick else [])
        + ([f"--seed {arguments.seed}"] if arguments.seed else [])
    )
    page = markdown(found, command)
    if arguments.markdown:
        arguments.markdown.write_text(page, encoding="utf-8")
        if "enumerable" in found.parts:
            plot_coverage(found.bias, IMAGES / "calibration_coverage.png")
        if "checkpoints" in found.parts:
            plot_se_ratio(found.checkpoints, IMAGES / "calibration_se_ratio.png")
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
