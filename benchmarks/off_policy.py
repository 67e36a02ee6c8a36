"""Rows of another policy: bias and coverage, with the errors that importance weights take and that they leave (docs/method.md).

    python benchmarks/off_policy.py              the tables of docs/method.md, some minutes
    python benchmarks/off_policy.py --quick      a look

One policy's rows are the entropy's of another (``tests/oracles/samplers.py``), every response enumerated. Biases are exact;
coverage is of batches drawn at random, all to one prompt, so that X's noise and W̄'s are most of the error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "oracles"))

from entropy_probe.statistics.u_statistics import CrossStatistics, cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from samplers import TwoPolicies

SCORE, RAO_BLACKWELL = EntropyTarget(Estimator.SCORE), EntropyTarget(Estimator.RAO_BLACKWELL)
FORMS = ((SCORE, False), (RAO_BLACKWELL, False), (RAO_BLACKWELL, True))
SEEDS = (0, 1, 2, 4)
UNITS, SAMPLES = 32, 8


@dataclass(frozen=True)
class Coverage:
    """Of one way to make errors: shares of 95 % intervals that hold the truth, and mean errors over the true ones.

    Attributes:
        fresh: coverage of ``ci95``, of E[X] · E[Y].
        this_step: coverage of ± t ``se_this_step``, of E[X] · Ȳ.
        fresh_error: root mean V over the standard deviation of U_cross.
        this_error: root mean square of ``se_this_step`` over the standard deviation of U_cross − E[X] · Ȳ.
    """

    fresh: float
    this_step: float
    fresh_error: float
    this_error: float


def simulate(
    both: TwoPolicies, target: EntropyTarget, *, by_prefix: bool, draws: int, seed: int = 0
) -> tuple[Coverage, Coverage]:
    """Coverage where rows lose what W̄ ties, and where they do not."""
    xs, ys, weights = both.batches(target, units=UNITS, samples=SAMPLES, draws=draws, seed=seed, by_prefix=by_prefix)
    entropy_side = np.mean([both.truth(target, n)[0].numpy() for n in range(both.contexts)], axis=0)
    tied: list[CrossStatistics] = []
    loose: list[CrossStatistics] = []
    for x, y, w in zip(xs, ys, weights, strict=True):
        dots = UnitDots.from_kernel(x @ y.T / w.mean(), [1] * UNITS)
        tied.append(cross_statistics(dots, weights=w / w.mean()))
        loose.append(cross_statistics(dots))
    truth, of_steps = float(entropy_side @ both.update), ys.mean(axis=1) @ entropy_side
    found = np.array([one.u_cross for one in tied])
    fresh, this, t = found.std(), (found - of_steps).std(), stats.t.ppf(0.975, UNITS - 1)

    def coverage(of: list[CrossStatistics]) -> Coverage:
        ends = np.array([one.ci95 for one in of])
        errors = np.array([one.se_this_step for one in of])
        variances = np.array([one.variance for one in of])
        return Coverage(
            float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))),
            float(np.mean(np.abs(found - of_steps) <= t * errors)),
            float(np.sqrt(variances.mean()) / fresh),
            float(np.sqrt((errors**2).mean()) / this),
        )

    return coverage(tied), coverage(loose)


def biases(both: TwoPolicies) -> Iterator[tuple[str, list[float]]]:
    """Exact biases over the norm of −∇H, for 1, 2, 4, 8 and 16 prompts."""
    for target, by_prefix in FORMS:
        name = f"{target.estimator}, {'prefix' if by_prefix else 'response'}"
        yield name, [float(b) for b in both.biases(target, 16, by_prefix=by_prefix)]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    draws = 200 if parser.parse_args().quick else 2000
    console = Console(width=150)
    table = Table(
        "estimator, weights", "1, or prompt by prompt", "2", "4", "8", "16 prompts", title="bias of X̄, % of |∇H|"
    )
    for name, found in biases(TwoPolicies(tokens=2, distance=0.3)):
        table.add_row(name, *(f"{100 * bias:.2f}" for bias in found))
    console.print(table)
    table = Table("policy", "estimator, weights", "95 % interval", "this step", "planted: interval", "this step")
    for seed in SEEDS:
        both = TwoPolicies(seed=seed)
        for target, by_prefix in FORMS:
            cells = [
                f"{100 * c:.1f} ({error:.2f})"
                for of in simulate(both, target, by_prefix=by_prefix, draws=draws)
                for c, error in ((of.fresh, of.fresh_error), (of.this_step, of.this_error))
            ]
            table.add_row(str(seed), f"{target.estimator}, {'prefix' if by_prefix else 'response'}", *cells)
    table.title = f"coverage, % (mean error over the true one), {UNITS} prompts, {SAMPLES} responses, {draws} batches"
    console.print(table)


if __name__ == "__main__":
    main()
