"""Kernels of both estimators, and of other baselines, on rollouts sampled from a model; what they say about standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_probe import group_rollouts
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.common.arrays import FloatArray
from entropy_probe.data.bundled_run import demo_files, demo_folder
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import Rules, prepare, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.sampling.drawing import sample_rollouts
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.sampling.tokenizer import end_tokens, load_tokenizer
from entropy_probe.statistics.variance import decompose, variance_at
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.rao_blackwell import entropy_to_come, leave_one_out_by_position

MEMORY = 8e9
GROUP = 16
"""Prompts in the disjoint groups of which U_cross is taken directly, and in the smaller of the two batches compared."""
LARGER = 64
VOCABULARY = 256


@dataclass(frozen=True)
class Case:
    """A policy with rollouts, the trainer's coefficients and geometry."""

    name: str
    policy: Policy
    batch: RolloutBatch
    advantage: Tensor
    geometry: Geometry
    rules: Rules
    longest_allowed: int

    @property
    def lengths(self) -> list[int]:
        """T of every response."""
        return [len(r.response_ids) for r in self.batch.responses]

    def kernel(self, entropy: EntropyTarget | Tensor) -> FloatArray:
        """K_uw = X̃_u · Ỹ_w over prompts, for an estimator or for coefficients of ∇log π."""
        found = unit_gradients(
            self.policy,
            self.batch,
            exact_units(len(self.batch.groups)),
            Sides(entropy, self.advantage),
            self.geometry,
            rules=self.rules,
        ).total.kernel
        assert found is not None
        return found

    def token_entropies(self) -> Tensor:
        """H_t, flat."""
        found = self.policy.measure(self.batch.responses).entropies
        assert found is not None
        return found


def checkpoint_case(folder: Path, prompts: int, responses: int, seed: int) -> Case:
    """Sums of two numbers drawn afresh, rewarded where they are right, as the bundled run was; Dr. GRPO throughout."""
    longest = demo_files().max_completion_length
    loaded = load_checkpoint(folder)
    tokenizer = load_tokenizer([folder, demo_folder() / "base"])
    asked = []
    for number, (a, b) in enumerate(np.random.default_rng(seed).integers(10, 100, size=(prompts, 2))):
        text = f"{a}+{b}="
        asked.append(Prompt(number, tuple(tokenizer(text)["input_ids"]), text, {"answer": str(a + b)}))
    settings = SamplingSettings(
        responses, max_new_tokens=longest, seed=seed, eos_ids=end_tokens(loaded.model, tokenizer), batch_size=1024
    )
    policy = Policy(loaded.model)
    rows = sample_rollouts(policy, asked, settings, lambda _, text, row: float(text == row["answer"]), tokenizer)
    batch = group_rollouts(rows, 1.0)
    lengths = [len(r.response_ids) for r in batch.responses]
    weights = length_weights(lengths, batch.group_sizes, LengthWeight.DR_GRPO, max_completion_length=longest)
    return _case(folder.name, policy, batch, weights, Geometry.of(Adam(loaded.adam)), longest)


def random_case(longest: int, prompts: int, *, ends: int = 0, responses: int = 4, seed: int = 0) -> Case:
    """A Llama with random weights: entropy near log V, answers of ``longest`` tokens, or ended by any of ``ends`` tokens.

    Reward 1 where more than a quarter of the answer's tokens are in the first quarter of the vocabulary, else 0. P is that of
    Adam after three gradients of the rollouts' own log-probs at a learning rate of zero.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    asked = [
        Prompt(n, tuple(torch.randint(0, VOCABULARY, (4,), generator=generator).tolist()), "", {})
        for n in range(prompts)
    ]
    settings = SamplingSettings(
        responses,
        max_new_tokens=longest,
        seed=seed,
        eos_ids=tuple(range(VOCABULARY - ends, VOCABULARY)),
        batch_size=512,
    )
    policy = Policy(model, microbatch_size=64)
    rows = [
        replace(r, reward=float(np.mean(np.array(r.response_ids) < VOCABULARY // 4) > 0.25))
        for r in sample_rollouts(policy, asked, settings, lambda *_: 0.0)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for step in range(3):
        optimizer.zero_grad()
        part = rows[64 * step : 64 * (step + 1)] or rows[:64]
        (-policy.forward_scores(part).mean() / longest).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    batch = group_rollouts(rows, 1.0)
    weights = length_weights([len(r.response_ids) for r in batch.responses], batch.group_sizes, LengthWeight.GUIDE)
    name = f"random, {longest} tokens" if not ends else f"random, at most {longest} tokens, ended early"
    return _case(name, policy, batch, weights, Geometry.of(Adam(state_of_optimizer(optimizer, model))), longest)


def _case(name: str, policy: Policy, batch: RolloutBatch, weights: Tensor, geometry: Geometry, longest: int) -> Case:
    rewards = torch.tensor([r.reward for r in batch.responses], dtype=torch.float64)
    advantages = advantages_from_rewards(rewards, batch.group_sizes, AdvantageRule.DR_GRPO)
    preparation = prepare(policy, batch, memory_bytes=MEMORY)
    return Case(name, preparation.applied(policy), batch, advantages * weights, geometry, preparation.rules, longest)


def u_of(kernel: FloatArray) -> float:
    """U_cross: the mean off the diagonal."""
    return float((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)))


def same_se_prompts(variance: float, zeta1: float, tau_squared: float) -> float:
    """U, as a real number, at which 4 ζ₁/U + 2 τ²/(U(U−1)) is ``variance``: the larger root of its quadratic."""
    b = variance + 4.0 * zeta1
    return (b + math.sqrt(b**2 - 4.0 * variance * (4.0 * zeta1 - 2.0 * tau_squared))) / (2.0 * variance)


def weighted_parts(h: FloatArray, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(ζ₁, τ²) [replicates] of resamples with multiplicities ``counts`` [replicates, U], pairs of one prompt's copies left out.

    With A the mean of h², B that of h_uw h_uv over distinct w, v, and C = U*²: ζ₁ = B − C and τ² = A − 2B + C, 0 at least.
    """
    units = h.shape[0]
    squares = (counts**2).sum(axis=1)
    sums, second = counts @ h, counts @ h**2
    pairs = units**2 - squares
    a = (counts * second).sum(axis=1) / pairs
    others = (units - counts) ** 2 - (squares[:, None] - counts**2)
    b = (counts * (sums**2 - counts**2 @ h**2)).sum(axis=1) / (counts * others).sum(axis=1)
    c = ((counts * sums).sum(axis=1) / pairs) ** 2
    return np.maximum(b - c, 0.0), np.maximum(a - 2.0 * b + c, 0.0)


@dataclass(frozen=True)
class Range:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """With two digits after the point."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Comparison:
    """Score against Rao-Blackwell on the same rollouts.

    Attributes:
        name: of the case.
        prompts: in the large set.
        responses: in the large set.
        mean_length: tokens a response.
        entropy_per_token: nats.
        u_score: U_cross by score, nats per unit of learning rate.
        u_rao_blackwell: by Rao-Blackwell.
        se_of_difference: delete-one jackknife of the difference of the two.
        degenerate: shares of τ² in the variance at 16 prompts, score then Rao-Blackwell.
        se_ratio: at 16 prompts.
        se_ratio_larger: at 64.
        se_ratio_all: at all of them, where the linear part counts most.
        variance_ratio: the square of the first.
        rollouts_ratio: what score needs over what Rao-Blackwell needs, for the SE that the latter has at 16 prompts.
        rollouts_ratio_larger: the same at 64 prompts.
        direct_se_ratio: by the spread of U_cross over disjoint groups of 16 prompts.
    """

    name: str
    prompts: int
    responses: int
    mean_length: float
    entropy_per_token: float
    u_score: float
    u_rao_blackwell: float
    se_of_difference: float
    degenerate: tuple[float, float]
    se_ratio: Range
    se_ratio_larger: Range
    se_ratio_all: Range
    variance_ratio: Range
    rollouts_ratio: Range
    rollouts_ratio_larger: Range
    direct_se_ratio: Range


def compare(case: Case, score: FloatArray, rao_blackwell: FloatArray, replicates: int, seed: int = 0) -> Comparison:
    """Point estimates from the unbiased ζ₁ and τ² of the large kernels, intervals from a bootstrap over prompts."""
    rng = np.random.default_rng(seed)
    units = len(score)
    kernels = (score, rao_blackwell)
    counts = rng.multinomial(units, np.full(units, 1.0 / units), size=replicates).astype(np.float64)
    parts = [decompose(k).parts for k in kernels]
    resampled = [weighted_parts(symmetric(k), counts) for k in kernels]
    Figure = Callable[[FloatArray, FloatArray, FloatArray, FloatArray], FloatArray]

    def ranged(figure: Figure) -> Range:
        value = float(figure(*(np.array(x) for pair in parts for x in pair)))
        low, high = np.nanquantile(figure(*(x for pair in resampled for x in pair)), [0.025, 0.975])
        return Range(value, float(low), float(high))

    def variance_ratio(at: int) -> Figure:
        return lambda z, t, z_rb, t_rb: np.asarray(_variance(at, z, t) / _variance(at, z_rb, t_rb))

    def se_ratio(at: int) -> Figure:
        return lambda *parts: np.sqrt(variance_ratio(at)(*parts))

    def rollouts_ratio(at: int) -> Figure:
        def figure(z: FloatArray, t: FloatArray, z_rb: FloatArray, t_rb: FloatArray) -> FloatArray:
            needed = np.vectorize(same_se_prompts)(_variance(at, z_rb, t_rb), z, t)
            return np.asarray(needed / at)

        return figure

    groups = [range(start, start + GROUP) for start in range(0, units - GROUP + 1, GROUP)]
    values = np.array([[u_of(k[np.ix_(g, g)]) for g in groups] for k in kernels])
    chosen = rng.integers(len(groups), size=(replicates, len(groups)))
    spread = np.maximum(values[:, chosen].std(axis=2, ddof=1), 1e-300)
    low, high = np.nanquantile(spread[0] / spread[1], [0.025, 0.975])
    deviations = values.std(axis=1, ddof=1)
    entropies = case.token_entropies()
    return Comparison(
        name=case.name,
        prompts=units,
        responses=len(case.batch.responses),
        mean_length=float(np.mean(case.lengths)),
        entropy_per_token=float(entropies.mean()),
        u_score=u_of(score),
        u_rao_blackwell=u_of(rao_blackwell),
        se_of_difference=difference_error(score, rao_blackwell),
        degenerate=_shares(parts),
        se_ratio=ranged(se_ratio(GROUP)),
        se_ratio_larger=ranged(se_ratio(LARGER)),
        se_ratio_all=ranged(se_ratio(units)),
        variance_ratio=ranged(variance_ratio(GROUP)),
        rollouts_ratio=ranged(rollouts_ratio(GROUP)),
        rollouts_ratio_larger=ranged(rollouts_ratio(LARGER)),
        direct_se_ratio=Range(float(deviations[0] / deviations[1]), float(low), float(high)),
    )


def _shares(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    score, rao_blackwell = (2.0 * t / (GROUP * (GROUP - 1)) / variance_at(GROUP, z, t) for z, t in parts)
    return score, rao_blackwell


def _variance(at: int, zeta1: FloatArray, tau_squared: FloatArray) -> FloatArray:
    return np.asarray(4.0 * zeta1 / at + 2.0 * tau_squared / (at * (at - 1)))


def symmetric(kernel: FloatArray) -> FloatArray:
    """(K + Kᵀ)/2 with a zero diagonal."""
    h = 0.5 * (kernel + kernel.T)
    np.fill_diagonal(h, 0.0)
    return h


def difference_error(one: FloatArray, other: FloatArray) -> float:
    """Delete-one jackknife standard error of the difference of two U_cross on the same prompts."""
    units = len(one)
    row_means = symmetric(one - other).sum(axis=1) / (units - 1)
    return 2.0 * float(row_means.std(ddof=1)) / math.sqrt(units) * (units - 1) / (units - 2)


def leave_one_out_by_fraction(values: Tensor, lengths: Sequence[int], group_sizes: Sequence[int]) -> Tensor:
    """Mean over the prompt's other responses of ``values`` [tokens] at the same fraction t/T of their length, interpolated."""
    parts = [part.numpy() for part in torch.split(values, list(lengths))]
    found, start = [], 0
    for size in group_sizes:
        group = parts[start : start + size]
        start += size
        for g, own in enumerate(group):
            at = (np.arange(len(own)) + 0.5) / len(own)
            others = [np.interp(at, (np.arange(len(o)) + 0.5) / len(o), o) for k, o in enumerate(group) if k != g]
            found.append(np.mean(others, axis=0))
    return torch.from_numpy(np.concatenate(found))


def leave_one_out_of_running(values: Tensor, lengths: Sequence[int], group_sizes: Sequence[int]) -> Tensor:
    """The position mean over those of the others that have not ended before t; 0 where all have."""
    alive = leave_one_out_by_position(torch.ones_like(values), lengths, group_sizes)
    mean = leave_one_out_by_position(values, lengths, group_sizes)
    return torch.where(alive > 0.0, mean / alive.clamp(min=1e-12), 0.0)


def leave_one_out_line(values: Tensor, lengths: Sequence[int], group_sizes: Sequence[int]) -> Tensor:
    """a + b t at every token, fitted by least squares to ``values`` [tokens] of the prompt's other responses; 0 at least."""
    parts = [part.numpy() for part in torch.split(values, list(lengths))]
    found, start = [], 0
    for size in group_sizes:
        group = parts[start : start + size]
        start += size
        for g, own in enumerate(group):
            at = np.concatenate([np.arange(len(o)) for k, o in enumerate(group) if k != g])
            of = np.concatenate([o for k, o in enumerate(group) if k != g])
            a, b = np.linalg.lstsq(np.stack([np.ones(len(at)), at], axis=1), of, rcond=None)[0]
            found.append(np.maximum(a + b * np.arange(len(own)), 0.0))
    return torch.from_numpy(np.concatenate(found))


@dataclass(frozen=True)
class Baseline:
    """Standard errors of U_cross at 16 and 64 prompts over those of the position baseline, and of X's projections.

    ``projection`` is the standard deviation over prompts of X̃_u · (the others' mean Ỹ), over that of the position baseline;
    ``difference`` that of U_cross from the position baseline's, over its jackknife standard error (0 where they are equal).
    """

    name: str
    se_ratio: Range
    se_ratio_larger: Range
    projection: float
    u_cross: float
    difference: float


def compare_baselines(case: Case, rao_blackwell: FloatArray, replicates: int, seed: int = 0) -> list[Baseline]:
    """Any baseline b_t of the tokens before t and of other responses leaves X unbiased: it adds (1/G) Σ b_t ∇log π(y_t).

    Features, each with a kernel of its own: F̄ of the others at the same position, that over those still running, a line in t
    fitted to the others, that line in place of the others that have ended, F̄ at the same fraction of length (which looks at the
    response's own length, so it is biased where lengths differ), H_t, and H_t times the tokens that may follow.
    The fits are out of fold, two folds of prompts dealt in turn: once of F_t on the first and the last two (least squares over
    tokens), once of the weights that make X̃_u · (the others' mean Ỹ) vary least.
    """
    lengths, sizes = case.lengths, case.batch.group_sizes
    entropies = case.token_entropies()
    to_come = entropy_to_come(entropies, lengths)
    positions = torch.cat([torch.arange(n, dtype=torch.float64) for n in lengths])
    line = leave_one_out_line(to_come, lengths, sizes)
    running_share = leave_one_out_by_position(torch.ones_like(to_come), lengths, sizes)
    position = leave_one_out_by_position(to_come, lengths, sizes)
    features = {
        "position": position,
        "running": leave_one_out_of_running(to_come, lengths, sizes),
        "line": line,
        "filled": position + (1.0 - running_share) * line,
        "fraction": leave_one_out_by_fraction(to_come, lengths, sizes),
        "entropy": entropies,
        "entropy × room": entropies * (case.longest_allowed - 1 - positions),
    }
    tokens = torch.tensor(lengths)
    group = torch.repeat_interleave(torch.repeat_interleave(torch.tensor(sizes), torch.tensor(sizes)), tokens)
    kernels = {name: case.kernel(f / group) for name, f in features.items()}
    none = rao_blackwell - kernels["position"]
    used = ["position", "entropy", "entropy × room"]
    prompts = len(sizes)
    prompt = torch.repeat_interleave(torch.repeat_interleave(torch.arange(prompts), torch.tensor(sizes)), tokens)
    design = torch.stack([features[name] for name in used], dim=1).numpy()
    by_value, by_projection = none.copy(), none.copy()
    rows = np.stack([_projections(kernels[name]) for name in used], axis=1)
    for fold in (0, 1):
        held = np.arange(prompts) % 2 == fold
        train = (prompt.numpy() % 2) != fold
        value_weights = np.linalg.lstsq(design[train], to_come.numpy()[train], rcond=None)[0]
        fit, wanted = rows[~held], _projections(none)[~held]
        projection_weights = np.linalg.lstsq(fit - fit.mean(axis=0), wanted - wanted.mean(), rcond=None)[0]
        for name, of_value, of_projection in zip(used, value_weights, projection_weights, strict=True):
            by_value[held] += of_value * kernels[name][held]
            by_projection[held] -= of_projection * kernels[name][held]
    found = {
        "leave-one-out by position": rao_blackwell,
        "none": none,
        "leave-one-out by position, of those still running": none + kernels["running"],
        "line": none + kernels["line"],
        "leave-one-out by position, line past their end": none + kernels["filled"],
        "leave-one-out by fraction of length": none + kernels["fraction"],
        "fitted to F_t out of fold": by_value,
        "fitted to the projection out of fold": by_projection,
    }
    reference = decompose(rao_blackwell).parts
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1.0 / prompts), size=replicates)
    resampled_reference = weighted_parts(symmetric(rao_blackwell), counts.astype(np.float64))
    spread = float(_projections(rao_blackwell).std(ddof=1))
    result = []
    for name, kernel in found.items():
        parts = decompose(kernel).parts
        resampled = weighted_parts(symmetric(kernel), counts.astype(np.float64))
        ratios = []
        for at in (GROUP, LARGER):
            ends = np.nanquantile(
                np.sqrt(_variance(at, *resampled) / _variance(at, *resampled_reference)), [0.025, 0.975]
            )
            value = math.sqrt(variance_at(at, *parts) / variance_at(at, *reference))
            ratios.append(Range(value, float(ends[0]), float(ends[1])))
        projection = float(_projections(kernel).std(ddof=1)) / spread
        error = difference_error(kernel, rao_blackwell)
        shift = u_of(kernel) - u_of(rao_blackwell)
        difference = 0.0 if error < 1e-9 * abs(u_of(kernel)) else shift / error
        result.append(Baseline(name, ratios[0], ratios[1], projection, u_of(kernel), difference))
    return result


def _projections(kernel: FloatArray) -> FloatArray:
    """X̃_u · mean of the other Ỹ, [U]."""
    return np.asarray((kernel.sum(axis=1) - np.diagonal(kernel)) / (len(kernel) - 1))
