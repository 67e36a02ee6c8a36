"""Y of a loss that weighs tokens: ω on ∇log π and β on ∇H, against autograd one token at a time, in float64 to 1e-9."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracle
import support
from entropy_probe.checkpoints import sharding_of
from entropy_probe.data.rollouts import RolloutBatch, group_rollouts
from entropy_probe.data.units import block_units, exact_units
from entropy_probe.gradients import (
    Sides,
    Storage,
    UnitGradients,
    Wanted,
    cross_gradients,
    engine,
    loss_gradient,
    reference,
    response_parts,
    treatments,
    weighted_gradient,
)
from entropy_probe.gradients.capture.modules import Treatment, first_treatment
from entropy_probe.gradients.coefficients import Combinations
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.targets.base import Sample, TokenPair, at_tokens
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.registry import ALSO_MOVED
from rank_processes import on_ranks

TOLERANCE = 1e-9
SCORE, RAO_BLACKWELL = EntropyTarget(Estimator.SCORE), EntropyTarget(Estimator.RAO_BLACKWELL)


def batch_with_tools() -> RolloutBatch:
    """Rows in some of which the policy did not draw the second token."""
    rows = support.random_rollouts(5, [3, 2, 4, 3, 3])
    return group_rollouts(
        [
            replace(row, sampled=tuple(place != 1 for place in range(len(row.response_ids))))
            if n % 3 == 0 and len(row.response_ids) > 2
            else row
            for n, row in enumerate(rows)
        ]
    )


BATCH = batch_with_tools()
UNITS = exact_units(5)


def token_weights(batch: RolloutBatch = BATCH, *, entropies: bool = True) -> TokenPair:
    """Random ω and β; a third of ω is 0, and all of it at the second response."""
    generator = torch.Generator().manual_seed(7)
    omega, beta = torch.randn((2, batch.tokens), generator=generator, dtype=torch.float64)
    omega = omega * (torch.rand(batch.tokens, generator=generator) > 1 / 3)
    omega[batch.first_token[1] : batch.first_token[2]] = 0.0
    return TokenPair(omega, beta if entropies else None)


@functools.cache
def model_of(name: str) -> Any:
    if name == "lora":
        return support.lora_model(support.tiny_model("llama-untied", dtype=torch.float64)).double()
    return support.tiny_model(name, dtype=torch.float64)


@dataclass(frozen=True)
class Truth:
    """X_n, Y_n and every Z_n, [B, parameters] each, without P."""

    x: np.ndarray
    y: np.ndarray
    z: tuple[np.ndarray, ...]


@functools.cache
def alone(name: str) -> tuple[oracle.Alone, oracle.TokensAlone]:
    model = model_of(name)
    batch = replace(BATCH, temperature=0.8)
    tokens = oracle.one_token_at_a_time(model, batch)
    rows = [slice(a, b) for a, b in itertools.pairwise(batch.first_token)]
    gradients = np.array([tokens.of_log_probs[row].sum(0) for row in rows])
    with torch.no_grad():
        scores = Policy(model, 0.8).scores(batch.responses).numpy()
    return oracle.Alone(scores, gradients), tokens


def of_prompts(values: np.ndarray, batch: RolloutBatch = BATCH) -> np.ndarray:
    """Σ over each prompt's tokens of [tokens, parameters]."""
    starts = [batch.first_token[row] for row in batch.first_row]
    return np.array([values[a:b].sum(0) for a, b in itertools.pairwise(starts)])


def truth_of(name: str, target: EntropyTarget, update: TokenPair) -> Truth:
    responses, tokens = alone(name)

    def vectors(pair: TokenPair) -> np.ndarray:
        flat = pair.at_tokens(BATCH.lengths)
        found = flat.log_probs.numpy()[:, None] * tokens.of_log_probs
        if flat.entropies is not None:
            found = found + flat.entropies.numpy()[:, None] * tokens.of_entropies
        return of_prompts(found)

    sample = Sample.of(BATCH, Measured(torch.from_numpy(responses.scores), torch.from_numpy(tokens.entropies)))
    z = tuple(vectors(TokenPair(also.weights(sample))) for also in ALSO_MOVED)
    return Truth(vectors(target.coefficients(sample)), vectors(update), z)


def metric(policy: Policy) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.rand(q.shape, generator=generator, dtype=torch.float64) + 0.1 for n, q in policy.trainable().items()
    }


def gradients(
    model: nn.Module, sides: Sides, storage: Storage = Storage.STORED, backend: Any = engine, size: int = 6
) -> UnitGradients:
    policy = Policy(model, 0.8, microbatch_size=size)
    found: UnitGradients = backend.unit_gradients(
        policy, BATCH, UNITS, sides, Geometry.fixed(metric(policy)), wanted=Wanted(storage)
    )
    return found


def largest_gap(found: UnitGradients, truth: Truth, model: nn.Module) -> float:
    """Of kernels (or row dots) and Ȳ, relative to the largest of each."""
    p = torch.cat([q.flatten() for q in metric(Policy(model)).values()]).numpy()
    gaps = []
    for dots, left in ((found.dots, truth.x), *zip(found.also.values(), truth.z, strict=True)):
        total = replace(found, dots=dots).total
        kernel = (left * p) @ truth.y.T
        scale = np.abs(kernel).max()
        assert scale > 0
        if total.kernel is not None:
            gaps.append(np.abs(total.kernel - kernel).max() / scale)
        gaps.append(np.abs(total.x_dot_sum - kernel.sum(1)).max() / scale)
        gaps.append(np.abs(total.y_dot_sum - kernel.sum(0)).max() / scale)
        gaps.append(np.abs(total.diagonal - kernel.diagonal()).max() / scale)
    ascent = torch.cat([found.ascent[name].flatten() for name in Policy(model).trainable()]).numpy()
    gaps.append(np.abs(ascent - truth.y.mean(0)).max() / np.abs(truth.y.mean(0)).max())
    return float(max(gaps))


@pytest.mark.parametrize("name", [*support.CONFIGS, "lora"])
def test_every_family_equals_one_token_at_a_time_autograd(name: str) -> None:
    update = token_weights()
    for target, storage in ((SCORE, Storage.STORED), (RAO_BLACKWELL, Storage.STREAMED)):
        found = gradients(model_of(name), Sides(target, update, ALSO_MOVED), storage)
        assert largest_gap(found, truth_of(name, target, update), model_of(name)) < TOLERANCE
        assert found.coverage.fallback == ()


MORE: dict[str, Callable[[], TokenPair]] = {
    "weights of tokens alone": lambda: token_weights(entropies=False),
    "weights of responses beside entropies of tokens": lambda: TokenPair(
        torch.linspace(-1, 2, len(BATCH.responses), dtype=torch.float64), token_weights().entropies
    ),
    "entropies alone": lambda: TokenPair(
        torch.zeros(BATCH.tokens, dtype=torch.float64), torch.full((len(BATCH.responses),), 0.3, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
@pytest.mark.parametrize("update", MORE)
def test_every_form_of_weights(update: str, target: EntropyTarget, storage: Storage) -> None:
    pair, model = MORE[update](), model_of("llama-tied")
    truth = truth_of("llama-tied", target, pair)
    assert largest_gap(gradients(model, Sides(target, pair, ALSO_MOVED), storage, size=2), truth, model) < TOLERANCE
    without = gradients(model, Sides(target, pair), storage)
    assert largest_gap(without, replace(truth, z=()), model) < TOLERANCE


@pytest.mark.parametrize("storage", list(Storage))
def test_the_reference_takes_them_too(storage: Storage) -> None:
    update, model = token_weights(), model_of("qwen2")
    found = gradients(model, Sides(SCORE, update, ALSO_MOVED), storage, reference)
    assert largest_gap(found, truth_of("qwen2", SCORE, update), model) < TOLERANCE


@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
@pytest.mark.parametrize("storage", list(Storage))
def test_parameters_without_a_rule(target: EntropyTarget, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def norms_fall_back(module: nn.Module, parameter: nn.Parameter) -> Treatment:
        return Treatment.FALLBACK if parameter.dim() == 1 else first_treatment(module, parameter)

    monkeypatch.setattr(treatments, "first_treatment", norms_fall_back)
    update, model = token_weights(), model_of("llama-untied")
    found = gradients(model, Sides(target, update, ALSO_MOVED), storage)
    assert found.coverage.fallback
    assert largest_gap(found, truth_of("llama-untied", target, update), model) < TOLERANCE


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
def test_two_ranks_find_what_one_does(target: EntropyTarget, storage: Storage) -> None:
    update, model = token_weights(), model_of("gpt2")

    def work(ranks: Ranks) -> float:
        policy = Policy(model, 0.8, microbatch_size=4, sharding=sharding_of(model, ranks))
        found = engine.unit_gradients(
            policy,
            BATCH,
            UNITS,
            Sides(target, update, ALSO_MOVED),
            Geometry.fixed(metric(policy)),
            wanted=Wanted(storage),
        )
        return largest_gap(found, truth, model)

    truth = truth_of("gpt2", target, update)
    assert max(on_ranks(2, work)) < TOLERANCE


def test_one_weight_a_response_is_the_same_bit_for_bit_however_it_is_given() -> None:
    a = torch.linspace(-1, 2, len(BATCH.responses), dtype=torch.float64)
    model = model_of("llama-tied")
    for target in (SCORE, RAO_BLACKWELL):
        one, other = (gradients(model, Sides(target, update, ALSO_MOVED)) for update in (a, TokenPair(a)))
        assert np.array_equal(one.total.kernel, other.total.kernel)
        assert all(torch.equal(y, other.ascent[name]) for name, y in one.ascent.items())


@pytest.mark.parametrize(
    ("target", "update", "also", "backwards"),
    [
        (SCORE, None, True, 1),
        (RAO_BLACKWELL, None, True, 2),
        (SCORE, token_weights(), True, 2),
        (RAO_BLACKWELL, token_weights(), False, 2),
        (RAO_BLACKWELL, token_weights(), True, 3),
    ],
)
def test_what_it_costs(target: EntropyTarget, update: TokenPair | None, also: bool, backwards: int) -> None:
    """Backwards of a microbatch that holds all rows."""
    a = torch.ones(len(BATCH.responses), dtype=torch.float64)
    sides = Sides(target, a if update is None else update, ALSO_MOVED if also else ())
    policy = Policy(model_of("llama-tied"), 0.8, microbatch_size=100)
    rules = treatments.prove_rules(policy, BATCH)
    geometry = Geometry.fixed(metric(policy))
    with mock.patch.object(UnitVectors, "begin_backward") as counted:
        engine.unit_gradients(policy, BATCH, UNITS, sides, geometry, rules=rules)
    assert counted.call_count == backwards
    assert sides.backward_for_targets(BATCH) is (target is RAO_BLACKWELL and update is not None)


def test_one_gradient_by_the_engine_and_by_autograd() -> None:
    update, model = token_weights(), model_of("gemma2")
    truth = truth_of("gemma2", SCORE, update).y.sum(0)
    policy = Policy(model, 0.8, microbatch_size=4)
    for found in (weighted_gradient(policy, BATCH, update), loss_gradient(policy, BATCH.responses, update)):
        flat = torch.cat([found[name].flatten() for name in policy.trainable()]).numpy()
        assert np.abs(flat - truth).max() < TOLERANCE * np.abs(truth).max()


@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
def test_x_of_one_batch_against_a_token_update_of_another(target: EntropyTarget) -> None:
    update, model = token_weights(), model_of("llama-tied")
    truth = truth_of("llama-tied", target, update)
    policy = Policy(model, 0.8, microbatch_size=4)
    p = metric(policy)
    found = cross_gradients(policy, BATCH, BATCH, target, update, Geometry.fixed(p)).numpy()
    expected = truth.x * torch.cat([q.flatten() for q in p.values()]).numpy() @ truth.y.T
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("target", [SCORE, RAO_BLACKWELL], ids=["score", "rao-blackwell"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_of_responses_add_up_to_dots_with_the_thirds(target: EntropyTarget, ranks: int) -> None:
    update, model = token_weights(), model_of("llama-tied")
    truth = truth_of("llama-tied", target, update)
    geometry = Geometry.fixed(metric(Policy(model)))

    def work(of: Ranks | None) -> float:
        policy = Policy(model, 0.8, microbatch_size=4)
        if of is not None:
            policy = replace(policy, sharding=sharding_of(model, of))
        sides = Sides(target, update, ALSO_MOVED)
        found = engine.unit_gradients(policy, BATCH, UNITS, sides, geometry, wanted=Wanted(thirds=True))
        assert found.third_directions is not None
        measured = Measured(found.scores, found.token_entropies)
        parts = response_parts(policy, BATCH, target, measured, update, found.third_directions)
        weights = torch.cat([q.flatten() for q in metric(policy).values()]).numpy()
        kernel = truth.x * weights @ truth.y.T
        gaps = []
        for third in range(3):
            members = np.arange(5) % 3 == third
            expected = (kernel[:, members].mean(1), kernel[members].mean(0))
            for mine, theirs in zip(parts, expected, strict=True):
                rows = np.split(mine[:, third].numpy(), np.cumsum(BATCH.group_sizes)[:-1])
                gaps.append(np.abs(np.array([row.sum() for row in rows]) - theirs).max() / np.abs(kernel).max())
        return float(max(gaps))

    assert max([work(None)] if ranks == 1 else on_ranks(ranks, work)) < TOLERANCE


def planted(kind: str) -> Callable[..., TokenPair]:
    """A bug in how a pair is laid at its tokens."""
    right = TokenPair.at_tokens

    def wrong(self: TokenPair, lengths: Any) -> TokenPair:
        found = right(self, lengths)
        match kind:
            case "β dropped":
                return TokenPair(found.log_probs)
            case "ω shifted by one token":
                return TokenPair(found.log_probs.roll(1), found.entropies)
            case _:
                means = [part.mean() for part in torch.split(found.log_probs, list(lengths))]
                return TokenPair(at_tokens(torch.stack(means), lengths), found.entropies)

    return wrong


@pytest.mark.parametrize("kind", ["β dropped", "ω shifted by one token", "ω averaged over the response"])
@pytest.mark.parametrize("storage", list(Storage))
def test_planted_bugs_are_seen(kind: str, storage: Storage) -> None:
    update, model = token_weights(), model_of("llama-tied")
    truth = truth_of("llama-tied", SCORE, update)
    right = Combinations.backwards

    def wrong(self: Combinations, *arguments: Any, **named: Any) -> Any:
        with mock.patch.object(TokenPair, "at_tokens", planted(kind)):
            return right(self, *arguments, **named)

    with mock.patch.object(Combinations, "backwards", wrong):
        found = gradients(model, Sides(SCORE, update), storage)
    assert largest_gap(found, replace(truth, z=()), model) > 1e-3
    assert largest_gap(gradients(model, Sides(SCORE, update), storage), replace(truth, z=()), model) < TOLERANCE


def test_blocks_of_prompts_are_sums() -> None:
    update, model = token_weights(), model_of("llama-tied")
    policy = Policy(model, 0.8, microbatch_size=4)
    geometry = Geometry.fixed(metric(policy))
    units = block_units(5, 2)
    for storage in Storage:
        found = engine.unit_gradients(
            policy, BATCH, units, Sides(RAO_BLACKWELL, update), geometry, wanted=Wanted(storage)
        )
        expected = reference.unit_gradients(policy, BATCH, units, Sides(RAO_BLACKWELL, update), geometry)
        scale = np.abs(expected.total.kernel).max()
        assert np.abs(found.total.x_dot_sum - expected.total.x_dot_sum).max() < TOLERANCE * scale
