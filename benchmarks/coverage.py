"""Measured coverage of every interval of U_cross, by family of kernels and number of units.

    python benchmarks/coverage.py --json FILE --markdown docs/coverage.md --pool FILE      all of it, about ten minutes
    python benchmarks/coverage.py --quick                                                  a look

Families: policies whose every response is enumerated (``tests/enumerable.py``), synthetic vectors with light and heavy tails,
and kernels drawn from a large one of the bundled checkpoint. The truth is known in each. The bootstraps run on a quarter of
the replicates. ``--pool`` names a file that the large kernel is kept in; without it the kernel is made anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import enumerable
from entropy_probe import Settings, group_rollouts, probe
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.demo import demo_files, demo_folder
from entropy_probe.intervals import DEFAULT_METHOD, IntervalMethod, interval, known_shortfall, variance_parts
from entropy_probe.policy import Policy
from entropy_probe.sampling import Prompt, SamplingSettings, end_tokens, load_tokenizer, sample_rollouts
from entropy_probe.scores import LengthWeight
from entropy_probe.units import Mode
from enumerable import EnumerablePolicy

FloatArray = NDArray[np.float64]
UNITS = (4, 8, 16, 32, 64, 128)
LIMIT = 3
POOL_PROMPTS, POOL_RESPONSES = 256, 8
BOOTSTRAPS = (IntervalMethod.BOOTSTRAP, IntervalMethod.BOOTSTRAP_T)
RESAMPLES = 299
CHUNK = 50
READING = """\
Why `skewed_t`: it and `jackknife_t` are the t intervals that keep 90 % on the skewed policies at U of 16 and more. Of
the two `skewed_t` loses far less on lognormal units, where the other stays below 90 % up to U = 128, and does not
count the degenerate part twice, which makes `t` and `jackknife_t` up to 1.6 times as wide as a normal interval at U
of 16 and more. The price is up to 30 % of width where row means are skewed, and up to 13 % on the linear policies.
`unbiased_t` is narrower and falls short where U_cross is skewed. The bootstraps miss both ways: percentiles too short
where the linear part dominates and too wide where the degenerate one does, the studentised one erratic at U = 4 and 8
and short on the real pool.

Where it falls short: lognormal units up to U = 16; the skewed policies at U = 4 and 8; one linear policy (7, G = 4)
at U = 16; the real pool at U = 64 and 128, whose row means are heavy-tailed, and where `t` and `jackknife_t` cover
better. Where it is too long: kernels whose degenerate part dominates at U = 4 and 8, as all t intervals are. Skewness
cannot tell the skewed policies at U = 8 from light-tailed kernels: there the number of units has to be the warning."""


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
    """One family at one U. ``degenerate_share`` is the mean of 2 τ̂²/(U(U−1)) over the variance of U_cross."""

    family: str
    group: str
    units: int
    truth: float
    standard_deviation: float
    degenerate_share: float
    shortfall_told: float
    methods: dict[str, MethodCell]


def policy_family(
    name: str, group: str, sentence: str, *, seed: int, samples: int, contexts: int = 6, stationary: bool = False
) -> Family:
    """RLOO advantages and weights 1/(G T) on an enumerable policy of 3 tokens and at most 3 tokens a response.

    With ``stationary`` every context has rewards of its own that the policy cannot improve on: E[Y_n] = 0. Truth: the exact
    E[X] · E[Y], E[X] = E[S ∇S] (= −∇H) and E[Y_n] = E[(r − E r) ∇S / T].
    """
    policy = EnumerablePolicy(contexts=contexts, tokens=3, seed=seed)
    responses = enumerable.all_responses(3, LIMIT)
    lengths = np.array([float(len(r)) for r in responses])
    tables = [enumerable.score_gradients(policy, n, LIMIT) for n in range(contexts)]
    scores = np.stack([s.numpy() for s, _ in tables])
    gradients = np.stack([g.numpy() for _, g in tables])
    p = np.exp(scores)
    rewards = policy_rewards(p, gradients, lengths, stationary, seed)
    mean_x = np.einsum("nk,nk,nkp->p", p, scores, gradients) / contexts
    centred = rewards - (p * rewards).sum(axis=1, keepdims=True)
    mean_y = np.einsum("nk,nkp->p", p * centred / lengths, gradients) / contexts
    flat = gradients.reshape(-1, gradients.shape[-1])
    gram = flat @ flat.T
    cumulated = np.cumsum(p, axis=1)
    cumulated[:, -1] = 1.0

    def draw(draws: int, units: int, rng: np.random.Generator) -> FloatArray:
        context = rng.integers(contexts, size=(draws, units, 1))
        chosen = (rng.random((draws, units, samples))[..., None] > cumulated[context]).sum(axis=-1)
        place = context * len(responses) + chosen
        c = leave_one_out(scores[context, chosen]) / samples
        a = leave_one_out(rewards[context, chosen]) / (samples * lengths[chosen])
        x, y = np.zeros((2, draws, units, len(flat)))
        i, j = np.ogrid[:draws, :units]
        for g in range(samples):
            x[i, j, place[..., g]] += c[..., g]
            y[i, j, place[..., g]] += a[..., g]
        kernel: FloatArray = (x @ gram) @ y.transpose(0, 2, 1)
        return kernel

    return Family(name, group, sentence, float(mean_x @ mean_y), draw)


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


def pool_kernel(path: Path | None) -> FloatArray:
    """The kernel of 256 sums of two numbers × 8 responses from the bundled checkpoint, read from ``path`` if it is there."""
    if path is not None and path.is_file():
        kept: FloatArray = np.load(path)
        return kept
    files = demo_files()
    loaded = load_checkpoint(files.checkpoint, learning_rate=1.0)
    tokenizer = load_tokenizer([files.checkpoint, demo_folder() / "base"])
    prompts = []
    for number, (a, b) in enumerate(np.random.default_rng(1).integers(10, 100, size=(POOL_PROMPTS, 2))):
        text = f"{a}+{b}="
        prompts.append(Prompt(number, tuple(tokenizer(text)["input_ids"]), text, {"answer": str(a + b)}))
    settings = SamplingSettings(
        responses=POOL_RESPONSES,
        max_new_tokens=files.max_completion_length,
        eos_ids=end_tokens(loaded.model, tokenizer),
    )
    rows = sample_rollouts(
        Policy(loaded.model), prompts, settings, lambda _, text, row: float(text == row["answer"]), tokenizer
    )
    result = probe(
        loaded.model,
        loaded.adam,
        group_rollouts(rows, settings.temperature),
        Settings(
            mode=Mode.EXACT,
            length_weight=LengthWeight.DR_GRPO,
            max_completion_length=files.max_completion_length,
        ),
    )
    assert result.kernel is not None
    if path is not None:
        np.save(path, result.kernel)
    return result.kernel


def pool_family(kernel: FloatArray) -> Family:
    """I.i.d. draws of units from a kernel, with replacement: the truth is the mean over all pairs, the diagonal included."""

    def draw(draws: int, units: int, rng: np.random.Generator) -> FloatArray:
        chosen = rng.integers(len(kernel), size=(draws, units))
        return kernel[chosen[:, :, None], chosen[:, None, :]]

    sentence = (
        f"Units drawn with replacement from {POOL_PROMPTS} prompts × {POOL_RESPONSES} responses of the bundled checkpoint; "
        "a prompt drawn twice brings its X̃_u · Ỹ_u, as the discrete pool has it, and the truth is the mean over all pairs, "
        "diagonal included."
    )
    return Family("real pool", "real", sentence, float(kernel.mean()), draw)


def families(pool: FloatArray) -> list[Family]:
    """All families, the required ones first."""
    found = []
    for seed, samples in ((1, 4), (3, 4), (7, 4), (1, 8), (3, 8), (7, 8)):
        text = f"Enumerable policy {seed}, 6 contexts, G = {samples}: prompts differ; the linear part dominates from U = 8 on."
        found.append(policy_family(f"policy {seed}, G = {samples}", "policy, linear", text, seed=seed, samples=samples))
    for seed in (2, 4, 6):
        text = f"Enumerable policy {seed}, 6 contexts, G = 4: both parts matter at U = 8 and 16, and U_cross is skewed."
        found.append(policy_family(f"policy {seed}, G = 4", "policy, skewed", text, seed=seed, samples=4))
    for seed, contexts, samples in ((0, 24, 4), (1, 40, 8)):
        text = (
            f"Enumerable policy {seed}, {contexts} contexts, G = {samples}, each context with rewards that the policy cannot "
            "improve on (E[Y] = 0): the degenerate part dominates at small U, and the truth is 0."
        )
        found.append(
            policy_family(
                f"stationary policy {seed}, G = {samples}", "policy, degenerate", text,
                seed=seed, samples=samples, contexts=contexts, stationary=True,
            )
        )  # fmt: skip
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
    return [*found, pool_family(pool)]


def measure(family: Family, units: int, replicates: int, seed: int, tick: Callable[[int], None]) -> Cell:
    """Coverage of every method at one U."""
    rng = np.random.default_rng([seed, units])
    values, degenerate, told = [], [], []
    ends: dict[IntervalMethod, list[tuple[float, float]]] = {method: [] for method in IntervalMethod}
    for start in range(0, replicates, CHUNK):
        for offset, kernel in enumerate(family.draw(min(CHUNK, replicates - start), units, rng)):
            u_cross = float((kernel.sum() - np.trace(kernel)) / (units * (units - 1)))
            values.append(u_cross)
            degenerate.append(2.0 * variance_parts(kernel, u_cross)[1] / (units * (units - 1)))
            told.append(known_shortfall(kernel) is not None)
            for method in IntervalMethod:
                if method not in BOOTSTRAPS or start + offset < replicates // 4:
                    ends[method].append(interval(kernel, method, replicates=RESAMPLES, seed=start + offset))
        tick(min(CHUNK, replicates - start))
    deviation = float(np.std(values))
    methods = {}
    for method, pairs in ends.items():
        low, high = np.array(pairs).T
        # A half-width of rounding alone must not decide where all responses of a batch agree.
        slack = 1e-12 * deviation
        below, above = float((family.truth < low - slack).mean()), float((family.truth > high + slack).mean())
        covered = 1.0 - below - above
        methods[str(method)] = MethodCell(
            coverage=covered,
            standard_error=math.sqrt(max(covered * (1.0 - covered), 0.0) / len(pairs)),
            truth_below=below,
            truth_above=above,
            width_ratio=float((high - low).mean()) / 2.0 / (1.96 * deviation),
            replicates=len(pairs),
        )
    return Cell(
        family.name, family.group, units, family.truth, deviation,
        float(np.mean(degenerate)) / deviation**2, float(np.mean(told)), methods,
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


def markdown(found: Sequence[Family], cells: Sequence[Cell], seconds: float, command: str) -> str:
    """The page: conclusion, ranges by group, a table a family."""
    groups = list(dict.fromkeys(family.group for family in found))
    replicates = max(m.replicates for cell in cells for m in cell.methods.values())
    resampled = min(m.replicates for cell in cells for m in cell.methods.values())
    lines = [
        "# Coverage of the intervals",
        "",
        f"`{command}`, one run of {seconds / 60:.0f} min: {replicates} batches a cell, {resampled} for the bootstraps "
        f"({RESAMPLES} resamples each). Nominal level 95 %.",
        "",
        "A cell is *coverage in % ± its Monte Carlo standard error (mean half width over 1.96 standard deviations of "
        "U_cross)*. The degenerate share is that of the variance of U_cross; *told* is how often `known_shortfall` speaks up.",
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
    lines += ["", "All methods, lowest to highest coverage in % at U of 16 and more:", ""]
    lines += ["| group | " + " | ".join(IntervalMethod) + " |", "|---" * (1 + len(IntervalMethod)) + "|"]
    for group in groups:
        row = []
        for method in IntervalMethod:
            values = [c.methods[str(method)].coverage for c in cells if c.group == group and c.units >= 16]
            row.append(f"{100 * min(values):.1f} to {100 * max(values):.1f}")
        lines.append(f"| {group} | " + " | ".join(row) + " |")
    default = str(DEFAULT_METHOD)
    low = [c for c in cells if c.units >= 16 and c.methods[default].coverage < 0.9]
    lines += [
        "",
        "Cells at U of 16 and more where the default covers less than 90 %, and how often the report says so:",
        "",
    ]
    lines += [
        f"- {c.family}, U = {c.units}: {100 * c.methods[default].coverage:.1f} %, told in {100 * c.shortfall_told:.0f} %"
        for c in low
    ] or ["- none"]
    for family in found:
        lines += [
            "",
            f"## {family.name[0].upper()}{family.name[1:]}",
            "",
            f"{family.sentence} Truth {family.truth:.4g}.",
            "",
        ]
        lines += ["| U | degenerate share | told | " + " | ".join(IntervalMethod) + " |"]
        lines += ["|---" * (3 + len(IntervalMethod)) + "|"]
        for c in cells:
            if c.family == family.name:
                row = [shown(c.methods[str(method)]) for method in IntervalMethod]
                lines.append(
                    f"| {c.units} | {c.degenerate_share:.2f} | {100 * c.shortfall_told:.0f} % | "
                    + " | ".join(row)
                    + " |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the cells here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--replicates", type=int, default=2000, help="batches a cell")
    parser.add_argument("--pool", type=Path, help="file (.npy) that keeps the large kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 batches a cell, U up to 32")
    arguments = parser.parse_args()
    if arguments.replicates < 4:
        parser.error("--replicates: at least 4, of which a quarter is for the bootstraps")
    replicates, sizes = (100, UNITS[:4]) if arguments.quick else (arguments.replicates, UNITS)
    torch.set_num_threads(1)
    start = time.monotonic()
    found = families(pool_kernel(arguments.pool))
    cells = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("coverage", total=len(found) * len(sizes) * replicates)
        for number, family in enumerate(found):
            for units in sizes:
                progress.update(task, description=f"{family.name}, U = {units}")
                seed = arguments.seed + 1000 * number
                cells.append(measure(family, units, replicates, seed, lambda n: progress.advance(task, n)))
    seconds = time.monotonic() - start
    table = Table("family", "U", "share", "told", *IntervalMethod)
    for c in cells:
        row = [shown(c.methods[str(method)]) for method in IntervalMethod]
        table.add_row(c.family, str(c.units), f"{c.degenerate_share:.2f}", f"{100 * c.shortfall_told:.0f} %", *row)
    Console(width=None if sys.stdout.isatty() else 220).print(table)
    if arguments.json:
        record = {"replicates": replicates, "seconds": seconds, "cells": [asdict(cell) for cell in cells]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        command = "python benchmarks/coverage.py " + ("--quick" if arguments.quick else f"--replicates {replicates}")
        arguments.markdown.write_text(markdown(found, cells, seconds, command), encoding="utf-8")


if __name__ == "__main__":
    main()
