"""Measured coverage of every interval of U_cross, by family of kernels and number of units.

    python benchmarks/coverage.py --json FILE --markdown docs/coverage.md --pool FILE      all of it, about an hour
    python benchmarks/coverage.py --quick                                                  a look

Families: policies whose every response is enumerated (``tests/oracles/enumerable.py``), synthetic vectors with light and
heavy tails, and kernels drawn from large ones of the bundled checkpoint, by either estimator; and two batches of the
policies. The truth is known in each. ``--json`` is written after every cell, and a run that was cut off goes on from it.
``--pool`` names a file that the large kernels are kept in; without it they are made again, in five to ten minutes and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "oracles"))

from bootstraps import Bootstrap, bootstrap_interval
from rollout_kernels import checkpoint_case

import enumerable
from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.statistics.intervals import DEFAULT_METHOD, IntervalMethod, interval
from entropy_probe.statistics.shortfall import known_shortfall
from entropy_probe.statistics.two_batches import two_batch_statistics
from entropy_probe.statistics.variance import decompose, variance_at
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy

UNITS = (4, 8, 16, 32, 64, 128)
TWO_BATCHES = ((4, 4), (4, 16), (16, 4), (8, 8), (8, 32), (32, 8), (16, 16), (16, 64), (64, 16), (32, 32), (64, 64))
LIMIT = 3
POOL_PROMPTS, POOL_RESPONSES = 4096, 8
METHODS: tuple[IntervalMethod | Bootstrap, ...] = (
    IntervalMethod.NORMAL, IntervalMethod.T, IntervalMethod.JACKKNIFE_T, *Bootstrap, IntervalMethod.UNBIASED_T,
    IntervalMethod.SKEWED_T,
)  # fmt: skip
RESAMPLES = 299
BOOTSTRAP_REPLICATES = 500
FEWEST_UNTOLD = 200
CHUNK = 50
READING = """\
The aim on linear policies was 94 to 96 % at U of 16 and more. 20 of 24 cells have it, and the others have 93.8, 96.0, 96.1 and
96.3, each ± 0.3 to 0.4. At U = 8 it was 92 to 97 %, and they have 94.2 to 97.0. Where the degenerate part dominates the aim was
93 to 99 %. Two of eight cells at U of 16 and more are above it (99.4 and 99.0), and all cells at U = 4 and 8. No cell at U of
16 and more was to be below 90 % without a warning.

`skewed_t` is the default because `unbiased_t` falls short wherever U_cross is skewed: it covers 86.5 % on the skewed policies
and 92.5 % on the real pool. `skewed_t` adds at most a quarter to its width there and covers 90.4 and 97.1 %. `jackknife_t`
does as much by counting the degenerate part twice, at up to 1.56 times the width of a normal interval where that is all there
is, and stays at 76.6 % on lognormal units, where `skewed_t` has 83.8 %. The bootstraps miss both ways. Percentiles are too
short where the linear part dominates and too wide where the degenerate one does. The studentised one is erratic at U = 4 and
8 and short on the real pool.

It falls short on lognormal units up to U = 64 and on the skewed policies up to U = 16. It is too long on kernels whose
degenerate part dominates, at small U above all. There ± 1.96 plug-in errors cover 97 to 99.6 % too, since U_cross and its
error are large together. At fewer than 32 units a warning is always given: on the skewed policies the kernels that miss are
those without the rare prompts, and nothing in them shows it.

`--interval` takes any of these but the bootstraps, which are kept in `benchmarks/bootstraps.py`."""


@dataclass(frozen=True)
class Family:
    """Kernels [draws, U, U] by ``draw(draws, units, rng)``, whose U_cross has mean ``truth``."""

    name: str
    group: str
    sentence: str
    truth: float
    draw: Callable[[int, int, np.random.Generator], FloatArray]


@dataclass(frozen=True)
class MethodCell:
    """Coverage with its Monte Carlo standard error, the rates of misses below and above, and width.

    ``width_ratio`` is the mean half width over 1.96 standard deviations of U_cross.
    """

    coverage: float
    standard_error: float
    truth_below: float
    truth_above: float
    width_ratio: float
    replicates: int


@dataclass(frozen=True)
class Cell:
    """One family at one U. ``degenerate_share`` is the mean of 2 τ̂²/(U(U−1)) over the variance of U_cross.

    ``told`` is the share of kernels of which ``known_shortfall`` speaks, ``untold_coverage`` the default's coverage of the
    others.
    """

    family: str
    group: str
    units: int
    truth: float
    standard_deviation: float
    degenerate_share: float
    told: float
    untold_coverage: float | None
    methods: dict[str, MethodCell]


class PolicySampler:
    """X and Y of prompts of an enumerable policy of 3 tokens and at most 3 tokens a response, by their coordinates.

    RLOO advantages and weights 1/(G T). With ``stationary`` every context has rewards of its own that the policy cannot improve
    on: E[Y_n] = 0. ``truth`` is the exact E[X] · E[Y], E[X] = E[S ∇S] (= −∇H) and E[Y_n] = E[(r − E r) ∇S / T].
    """

    def __init__(self, *, seed: int, samples: int, contexts: int = 6, stationary: bool = False) -> None:
        """The policy of that seed, and G."""
        policy = EnumerablePolicy(contexts=contexts, tokens=3, seed=seed)
        self._lengths = np.array([float(len(r)) for r in enumerable.all_responses(3, LIMIT)])
        tables = [enumerable.score_gradients(policy, n, LIMIT) for n in range(contexts)]
        self._scores = np.stack([s.numpy() for s, _ in tables])
        gradients = np.stack([g.numpy() for _, g in tables])
        self._p = np.exp(self._scores)
        self._rewards = policy_rewards(self._p, gradients, self._lengths, stationary, seed)
        mean_x = np.einsum("nk,nk,nkp->p", self._p, self._scores, gradients) / contexts
        centred = self._rewards - (self._p * self._rewards).sum(axis=1, keepdims=True)
        mean_y = np.einsum("nk,nkp->p", self._p * centred / self._lengths, gradients) / contexts
        self.truth = float(mean_x @ mean_y)
        flat = gradients.reshape(-1, gradients.shape[-1])
        self._gram = flat @ flat.T
        self._cumulated = np.cumsum(self._p, axis=1)
        self._cumulated[:, -1] = 1.0
        self._samples = samples

    def draw(self, draws: int, units: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """X and Y as weights of every response's ∇S, [draws, U, contexts × responses] each."""
        context = rng.integers(len(self._p), size=(draws, units, 1))
        chosen = (rng.random((draws, units, self._samples))[..., None] > self._cumulated[context]).sum(axis=-1)
        place = context * len(self._lengths) + chosen
        c = leave_one_out(self._scores[context, chosen]) / self._samples
        a = leave_one_out(self._rewards[context, chosen]) / (self._samples * self._lengths[chosen])
        x, y = np.zeros((2, draws, units, len(self._gram)))
        i, j = np.ogrid[:draws, :units]
        for g in range(self._samples):
            x[i, j, place[..., g]] += c[..., g]
            y[i, j, place[..., g]] += a[..., g]
        return x, y

    def dots(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """X_n · Y_m, [draws, X's units, Y's units]."""
        kernel: FloatArray = (x @ self._gram) @ y.transpose(0, 2, 1)
        return kernel


def policy_family(name: str, group: str, sentence: str, sampler: PolicySampler) -> Family:
    """Kernels of batches of prompts."""

    def draw(draws: int, units: int, rng: np.random.Generator) -> FloatArray:
        return sampler.dots(*sampler.draw(draws, units, rng))

    return Family(name, group, sentence, sampler.truth, draw)


def policy_rewards(
    p: FloatArray, gradients: FloatArray, lengths: FloatArray, stationary: bool, seed: int
) -> FloatArray:
    """Rewards of every response, [contexts, responses]: of its form, or such that no context's E[Y_n] is other than 0.

    Args:
        p: probabilities, [contexts, responses].
        gradients: ∇S, [contexts, responses, parameters].
        lengths: T, [responses].
        stationary: draw them at random from what the policy cannot improve on.
        seed: of that draw.
    """
    if not stationary:
        responses = enumerable.all_responses(3, LIMIT)
        return np.tile([float(len(r) == 2) + 0.5 * float(r[-1] == 1) for r in responses], (len(p), 1))
    rewards = np.random.default_rng(seed).normal(size=p.shape)
    for n in range(len(p)):
        # E[Y_n] is linear in the rewards; what its left null space holds does not move the policy.
        effect = (np.diag(p[n]) - np.outer(p[n], p[n])) @ (gradients[n] / lengths[:, None])
        left, sizes, _ = np.linalg.svd(effect)
        null = left[:, np.count_nonzero(sizes > 1e-10 * sizes[0]) :]
        rewards[n] = null @ (null.T @ rewards[n])
    return rewards


def leave_one_out(values: FloatArray) -> FloatArray:
    """Values minus the mean of the others, along the last axis."""
    count = values.shape[-1]
    centred: FloatArray = values - (values.sum(axis=-1, keepdims=True) - values) / (count - 1)
    return centred


def synthetic_family(
    name: str, group: str, sentence: str, *, signal: float, noise: float, dim: int, tails: str
) -> Family:
    """X = s (signal e₁ + noise z), Y likewise, a quarter of the noise's variance shared: truth signal².

    ``tails``: normal z; z of Student's t with 3 degrees of freedom and unit variance; or normal z and s lognormal with σ = 1,
    mean 1.
    """

    def draw(draws: int, units: int, rng: np.random.Generator) -> FloatArray:
        def z() -> FloatArray:
            shape = (draws, units, dim)
            return rng.standard_t(3, size=shape) / math.sqrt(3.0) if tails == "t3" else rng.normal(size=shape)

        shared, own_x, own_y = z(), z(), z()
        x, y = (noise * (0.5 * shared + math.sqrt(0.75) * own) for own in (own_x, own_y))
        x[..., 0] += signal
        y[..., 0] += signal
        if tails == "lognormal":
            size = np.exp(rng.normal(size=(draws, units, 1)) - 0.5)
            x, y = x * size, y * size
        kernel: FloatArray = x @ y.transpose(0, 2, 1)
        return kernel

    return Family(name, group, sentence, signal**2, draw)


def pool_kernels(path: Path | None) -> dict[str, FloatArray]:
    """By estimator the kernel of the pool, sums of two numbers by the bundled checkpoint; read from ``path`` if it is there."""
    if path is not None and path.is_file():
        with np.load(path) as kept:
            return {str(estimator): kept[str(estimator)] for estimator in Estimator}
    case = checkpoint_case(demo_files().checkpoint, POOL_PROMPTS, POOL_RESPONSES, seed=1)
    kernels = {str(estimator): case.kernel(EntropyTarget(estimator)) for estimator in Estimator}
    if path is not None:
        np.savez(path, **kernels)
    return kernels


def pool_family(name: str, kernel: FloatArray) -> Family:
    """Units drawn without replacement from a kernel: the truth is the mean over its pairs off the diagonal."""
    prompts = len(kernel)

    def draw(draws: int, units: int, rng: np.random.Generator) -> FloatArray:
        chosen = np.stack([rng.choice(prompts, size=units, replace=False) for _ in range(draws)])
        return kernel[chosen[:, :, None], chosen[:, None, :]]

    sentence = (
        f"Prompts drawn without replacement from {prompts} × {POOL_RESPONSES} responses of the bundled checkpoint; the truth "
        "is the mean over all pairs of different prompts. About it U_cross varies a little less than about the mean over all "
        f"prompts that there are, by U/{2 * prompts} of its standard deviation at most, which adds 0.4 points to the coverage "
        "at U = 128 at most."
    )
    truth = float((kernel.sum() - np.trace(kernel)) / (prompts * (prompts - 1)))
    return Family(name, "real", sentence, truth, draw)


@dataclass(frozen=True)
class TwoBatchFamily:
    """Kernels [draws, B_E, B_U] of two independent batches, ``draw(draws, rows, columns, rng)``, with mean ``truth``."""

    name: str
    truth: float
    draw: Callable[[int, int, int, np.random.Generator], FloatArray]


@dataclass(frozen=True)
class TwoBatchCell:
    """One family at one pair of sizes; ``variance_ratio`` is the mean V over the variance of the mean."""

    family: str
    rows: int
    columns: int
    standard_deviation: float
    variance_ratio: float
    told: float
    untold_coverage: float | None
    interval: MethodCell


def two_batch_family(name: str, sampler: PolicySampler) -> TwoBatchFamily:
    """E and U of one policy, drawn apart."""

    def draw(draws: int, rows: int, columns: int, rng: np.random.Generator) -> FloatArray:
        return sampler.dots(sampler.draw(draws, rows, rng)[0], sampler.draw(draws, columns, rng)[1])

    return TwoBatchFamily(name, sampler.truth, draw)


def policies() -> list[tuple[str, str, str, PolicySampler]]:
    """(name, group, sentence, sampler) of every enumerable policy."""
    found = []
    for seed, samples in ((1, 4), (3, 4), (7, 4), (1, 8), (3, 8), (7, 8)):
        text = f"Enumerable policy {seed}, 6 contexts, G = {samples}: prompts differ; the linear part dominates from U = 8 on."
        sampler = PolicySampler(seed=seed, samples=samples)
        found.append((f"policy {seed}, G = {samples}", "policy, linear", text, sampler))
    for seed in (2, 4, 6):
        text = f"Enumerable policy {seed}, 6 contexts, G = 4: both parts matter at U = 8 and 16, and U_cross is skewed."
        found.append((f"policy {seed}, G = 4", "policy, skewed", text, PolicySampler(seed=seed, samples=4)))
    for seed, contexts, samples in ((0, 24, 4), (1, 40, 8)):
        text = (
            f"Enumerable policy {seed}, {contexts} contexts, G = {samples}, each context with rewards that the policy cannot "
            "improve on (E[Y] = 0): the degenerate part dominates at small U, and the truth is 0."
        )
        sampler = PolicySampler(seed=seed, samples=samples, contexts=contexts, stationary=True)
        found.append((f"stationary policy {seed}, G = {samples}", "policy, degenerate", text, sampler))
    return found


def families(pool: Mapping[str, FloatArray], known: Sequence[tuple[str, str, str, PolicySampler]]) -> list[Family]:
    """All families, the required ones first."""
    found = [policy_family(*one) for one in known]
    for tails, group in (("normal", "light"), ("t3", "heavy"), ("lognormal", "heavy")):
        what = {
            "normal": "normal noise",
            "t3": "noise of Student's t with 3 degrees of freedom",
            "lognormal": "normal noise, every unit's X and Y times one lognormal size with σ = 1",
        }[tails]
        found.append(
            synthetic_family(
                f"{tails}, linear", f"{group}, linear", f"Vectors in 6 dimensions, mean 1 and {what} of 0.5.",
                signal=1.0, noise=0.5, dim=6, tails=tails,
            )
        )  # fmt: skip
        found.append(
            synthetic_family(
                f"{tails}, degenerate", f"{group}, degenerate", f"Vectors in 20 dimensions, mean 0.1 and {what} of 1.",
                signal=0.1, noise=1.0, dim=20, tails=tails,
            )
        )  # fmt: skip
    return [*found, *(pool_family(f"real pool, {name}", kernel) for name, kernel in pool.items())]


def measure(family: Family, units: int, replicates: int, seed: int, tick: Callable[[int], None]) -> Cell:
    """Coverage of every method at one U; the bootstraps see the first ``BOOTSTRAP_REPLICATES`` batches."""
    rng = np.random.default_rng([seed, units])
    values, degenerate, told = [], [], []
    ends: dict[IntervalMethod | Bootstrap, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for start in range(0, replicates, CHUNK):
        for offset, kernel in enumerate(family.draw(min(CHUNK, replicates - start), units, rng)):
            found = decompose(kernel)
            values.append(found.u_cross)
            degenerate.append(variance_at(units, 0.0, found.tau_squared))
            told.append(known_shortfall(found.row_means) is not None)
            for method in METHODS:
                if isinstance(method, IntervalMethod):
                    ends[method].append(interval(kernel, method))
                elif start + offset < BOOTSTRAP_REPLICATES:
                    resampled = bootstrap_interval(kernel, method, replicates=RESAMPLES, seed=start + offset)
                    ends[method].append(resampled)
        tick(min(CHUNK, replicates - start))
    deviation = float(np.std(values))
    return Cell(
        family.name, family.group, units, family.truth, deviation, float(np.mean(degenerate)) / deviation**2,
        float(np.mean(told)), untold_coverage(ends[DEFAULT_METHOD], told, family.truth, deviation),
        {str(method): method_cell(pairs, family.truth, deviation) for method, pairs in ends.items()},
    )  # fmt: skip


def method_cell(ends: Sequence[tuple[float, float]], truth: float, deviation: float) -> MethodCell:
    """Coverage of (low, high) pairs."""
    low, high = np.array(ends).T
    # A half-width of rounding alone must not decide where all responses of a batch agree.
    slack = 1e-12 * deviation
    below, above = float((truth < low - slack).mean()), float((truth > high + slack).mean())
    covered = 1.0 - below - above
    return MethodCell(
        coverage=covered,
        standard_error=math.sqrt(max(covered * (1.0 - covered), 0.0) / len(ends)),
        truth_below=below,
        truth_above=above,
        width_ratio=float((high - low).mean()) / 2.0 / (1.96 * deviation),
        replicates=len(ends),
    )


def untold_coverage(
    ends: Sequence[tuple[float, float]], told: Sequence[bool], truth: float, deviation: float
) -> float | None:
    """Coverage of the intervals that no warning stands beside; None where they are fewer than ``FEWEST_UNTOLD``."""
    untold = [pair for pair, warned in zip(ends, told, strict=True) if not warned]
    return method_cell(untold, truth, deviation).coverage if len(untold) >= FEWEST_UNTOLD else None


def measure_two_batches(
    family: TwoBatchFamily, rows: int, columns: int, replicates: int, seed: int, tick: Callable[[int], None]
) -> TwoBatchCell:
    """Coverage of the two-batch interval at one pair of sizes."""
    rng = np.random.default_rng([seed, rows, columns])
    found = []
    for start in range(0, replicates, CHUNK):
        kernels = family.draw(min(CHUNK, replicates - start), rows, columns, rng)
        found += [two_batch_statistics(kernel) for kernel in kernels]
        tick(len(kernels))
    deviation = float(np.std([f.mean for f in found]))
    ends = [f.ci95 for f in found]
    told = [f.shortfall is not None for f in found]
    return TwoBatchCell(
        family.name, rows, columns, deviation, float(np.mean([f.variance for f in found])) / deviation**2,
        float(np.mean(told)), untold_coverage(ends, told, family.truth, deviation),
        method_cell(ends, family.truth, deviation),
    )  # fmt: skip


def shown(cell: MethodCell) -> str:
    return f"{100 * cell.coverage:.1f} ± {100 * cell.standard_error:.1f} ({cell.width_ratio:.2f})"


def in_words(cells: Sequence[Cell]) -> str:
    """Lowest and highest coverage, with the cell of the lowest."""
    default = str(DEFAULT_METHOD)
    ordered = sorted(cells, key=lambda cell: cell.methods[default].coverage)
    low, high = ordered[0], ordered[-1]
    return (
        f"{100 * low.methods[default].coverage:.1f} ({low.family}, U = {low.units}) to "
        f"{100 * high.methods[default].coverage:.1f} % ({high.family}, U = {high.units})"
    )


def place(cell: Cell | TwoBatchCell) -> str:
    """Family and sizes."""
    sizes = f"U = {cell.units}" if isinstance(cell, Cell) else f"{cell.rows} and {cell.columns} prompts"
    return f"{cell.family}, {sizes}"


def untold(cell: Cell | TwoBatchCell) -> str:
    """Coverage of the kernels that nothing is said of."""
    return "–" if cell.untold_coverage is None else f"{100 * cell.untold_coverage:.1f}"


def markdown(
    found: Sequence[Family], cells: Sequence[Cell], pairs: Sequence[TwoBatchCell], seconds: float, command: str
) -> str:
    """The page: conclusion, ranges by group, two batches, a table a family."""
    groups = list(dict.fromkeys(family.group for family in found))
    replicates = max(m.replicates for cell in cells for m in cell.methods.values())
    lines = [
        "# Coverage of the intervals",
        "",
        f"`{command}`, one run of {seconds / 60:.0f} min on one thread: {replicates} batches a cell, "
        f"{min(replicates, BOOTSTRAP_REPLICATES)} for the bootstraps ({RESAMPLES} resamples each). Nominal level 95 %.",
        "",
        "A cell is *coverage in % ± its Monte Carlo standard error (mean half width over 1.96 standard deviations of "
        "U_cross)*. The degenerate share is that of the variance of U_cross; *told* is how often `known_shortfall` speaks up, "
        "*untold* the default's coverage of the kernels of which it says nothing.",
        "",
        "## Conclusion",
        "",
        f"The default is `{DEFAULT_METHOD}`. Its coverage, lowest to highest cell:",
        "",
        "| group | U = 4 | U = 8 | U of 16 and more |",
        "|---|---|---|---|",
    ]
    for group in groups:
        row = [
            in_words([c for c in cells if c.group == group and inside(c.units)])
            for inside in (lambda u: u == 4, lambda u: u == 8, lambda u: u >= 16)
        ]
        lines.append(f"| {group} | " + " | ".join(row) + " |")
    lines += ["", READING, "", "All methods, lowest to highest coverage in % at U of 16 and more:", ""]
    lines += ["| group | " + " | ".join(METHODS) + " |", "|---" * (1 + len(METHODS)) + "|"]
    for group in groups:
        row = []
        for method in METHODS:
            values = [c.methods[str(method)].coverage for c in cells if c.group == group and c.units >= 16]
            row.append(f"{100 * min(values):.1f} to {100 * max(values):.1f}")
        lines.append(f"| {group} | " + " | ".join(row) + " |")
    default = str(DEFAULT_METHOD)
    low = [c for c in cells if c.methods[default].coverage < 0.9]
    lines += ["", "Cells where the default covers less than 90 %, and how often the report says so:", ""]
    lines += [
        f"- {c.family}, U = {c.units}: {100 * c.methods[default].coverage:.1f} %, told in {100 * c.told:.0f} %"
        for c in low
    ] or ["- none"]
    quiet = [c for c in [*cells, *pairs] if c.untold_coverage is not None]
    short = [c for c in quiet if c.untold_coverage is not None and c.untold_coverage < 0.9]
    lines += [
        "",
        f"No warning, at least 90 %: of {len(quiet)} cells with {FEWEST_UNTOLD} kernels or more of which nothing is said "
        "these are covered less: "
        + (
            "; ".join(f"{place(c)}, told in {100 * c.told:.0f} %, the rest covered {untold(c)} %" for c in short)
            or "none"
        )
        + ".",
        "",
        *two_batch_lines(pairs),
    ]
    for family in found:
        lines += ["", f"## {family.name[0].upper()}{family.name[1:]}", ""]
        lines += [f"{family.sentence} Truth {family.truth:.4g}.", ""]
        lines += ["| U | degenerate share | told | untold | " + " | ".join(METHODS) + " |"]
        lines += ["|---" * (4 + len(METHODS)) + "|"]
        for c in cells:
            if c.family == family.name:
                row = [f"{c.units}", f"{c.degenerate_share:.2f}", f"{100 * c.told:.0f} %", untold(c)]
                row += [shown(c.methods[str(method)]) for method in METHODS]
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def two_batch_lines(pairs: Sequence[TwoBatchCell]) -> list[str]:
    """The section on two batches."""
    sizes = list(dict.fromkeys((c.rows, c.columns) for c in pairs))
    lines = [
        "## Two batches",
        "",
        "X of B_E prompts against Y of B_U others of the same policy (`two_batch_statistics`); score, G responses in both. "
        "The figure after / is mean V over the variance of the mean, above 1 where the floor at the product counts. A "
        "warning is given where the smaller batch has fewer than 16 prompts.",
        "",
        "| policy | " + " | ".join(f"{rows} and {columns}" for rows, columns in sizes) + " |",
        "|---" * (1 + len(sizes)) + "|",
    ]
    for name in dict.fromkeys(c.family for c in pairs):
        row = [f"{shown(c.interval)} / {c.variance_ratio:.2f}" for c in pairs if c.family == name]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the cells here as they come, and go on from what is there")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--replicates", type=int, default=4000, help="batches a cell")
    parser.add_argument("--pool", type=Path, help="file (.npz) that keeps the large kernels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 batches a cell, U up to 32")
    arguments = parser.parse_args()
    replicates, sizes = (100, UNITS[:4]) if arguments.quick else (arguments.replicates, UNITS)
    torch.set_num_threads(1)
    start = time.monotonic()
    known = policies()
    found = families(pool_kernels(arguments.pool), known)
    two = [two_batch_family(name, sampler) for name, _, _, sampler in known]
    setting = [replicates, arguments.seed]
    cells: list[Cell] = []
    pairs: list[TwoBatchCell] = []
    earlier = 0.0
    if arguments.json and arguments.json.exists():
        record = json.loads(arguments.json.read_text(encoding="utf-8"))
        if record["setting"] != setting:
            parser.error(f"{arguments.json} is of another number of replicates or seed; give another file")
        cells, pairs, earlier = cells_of(record["cells"]), pairs_of(record["pairs"]), record["seconds"]

    def save() -> None:
        seconds = earlier + time.monotonic() - start
        if arguments.json:
            record = {"setting": setting, "seconds": seconds, "cells": [asdict(c) for c in cells]}
            record["pairs"] = [asdict(c) for c in pairs]
            written = arguments.json.with_suffix(".part")
            written.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            written.replace(arguments.json)

    with Progress(console=Console(stderr=True)) as progress:
        total = replicates * (len(found) * len(sizes) + len(two) * len(TWO_BATCHES) - len(cells) - len(pairs))
        task = progress.add_task("coverage", total=total)

        def tick(count: int) -> None:
            progress.advance(task, count)

        there = {(c.family, c.units) for c in cells}
        for number, family in enumerate(found):
            for units in sizes:
                if (family.name, units) not in there:
                    progress.update(task, description=f"{family.name}, U = {units}")
                    cells.append(measure(family, units, replicates, arguments.seed + 1000 * number, tick))
                    save()
        there_too = {(c.family, c.rows, c.columns) for c in pairs}
        for number, subject in enumerate(two):
            for rows, columns in TWO_BATCHES:
                if (subject.name, rows, columns) not in there_too:
                    progress.update(task, description=f"two batches, {subject.name}, {rows} and {columns}")
                    seed = arguments.seed + 1000 * number + 500
                    pairs.append(measure_two_batches(subject, rows, columns, replicates, seed, tick))
                    save()
    seconds = earlier if total == 0 else earlier + time.monotonic() - start
    table = Table("family", "U", "share", "told", "untold", *METHODS)
    for c in cells:
        row = [shown(c.methods[str(method)]) for method in METHODS]
        table.add_row(c.family, str(c.units), f"{c.degenerate_share:.2f}", f"{100 * c.told:.0f} %", untold(c), *row)
    Console(width=None if sys.stdout.isatty() else 220).print(table)
    if arguments.markdown:
        command = "python benchmarks/coverage.py " + ("--quick" if arguments.quick else f"--replicates {replicates}")
        arguments.markdown.write_text(markdown(found, cells, pairs, seconds, command), encoding="utf-8")


def cells_of(records: Sequence[dict[str, Any]]) -> list[Cell]:
    """As they were written."""
    return [
        Cell(**(record | {"methods": {name: MethodCell(**m) for name, m in record["methods"].items()}}))
        for record in records
    ]


def pairs_of(records: Sequence[dict[str, Any]]) -> list[TwoBatchCell]:
    """As they were written."""
    return [TwoBatchCell(**(record | {"interval": MethodCell(**record["interval"])})) for record in records]


if __name__ == "__main__":
    main()
