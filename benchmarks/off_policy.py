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
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "oracles"))

from entropy_probe import Rollout
from entropy_probe.model.policy import Policy
from entropy_probe.pipeline.sampler_weights import counts_once
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


@dataclass(frozen=True)
class Rounding:
    """How far log-probs of one policy in two arithmetics lie apart, nats.

    Attributes:
        token: standard deviation a token.
        response: the largest difference of a response's sum.
        outside: share of responses that do not count as this policy's own.
    """

    token: float
    response: float
    outside: float


def rounding(tokens: int) -> Iterator[tuple[str, Rounding]]:
    """A random Llama of six layers against itself in float64, over responses of so many tokens that it sampled."""

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
        found = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=2048))
        with torch.no_grad():
            found.lm_head.weight.mul_(6)
        return found

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 2000, (8, 4), generator=generator)
    drawn = model().generate(
        prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0
    )
    rows = [Rollout(n, tuple(ids[:4].tolist()), tuple(ids[4:].tolist()), 0.0) for n, ids in enumerate(drawn)]

    def log_probs(dtype: torch.dtype, autocast: torch.dtype | None = None) -> torch.Tensor:
        found = Policy(model().to(dtype), autocast=autocast).measure(rows, entropies=False, log_probs=True).log_probs
        assert found is not None
        return found

    exact = log_probs(torch.float64)
    ways = {
        "float32": log_probs(torch.float32),
        "float32, autocast to bfloat16": log_probs(torch.float32, torch.bfloat16),
        "bfloat16": log_probs(torch.bfloat16),
    }
    for name, found in ways.items():
        gaps = (found - exact).view(len(rows), -1)
        own = [counts_once(gap) for gap in gaps]
        yield name, Rounding(float(gaps.std()), float(gaps.sum(1).abs().max()), 1.0 - float(np.mean(own)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    draws = 200 if parser.parse_args().quick else 2000
    console = Console(width=150)
    table = Table("arithmetic", "tokens", "nats a token", "largest of a response", "% outside", title="rounding")
    for tokens in (32, 256, 1024):
        for name, of in rounding(tokens):
            table.add_row(name, str(tokens), f"{of.token:.1e}", f"{of.response:.1e}", f"{100 * of.outside:.0f}")
    console.print(table)
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
