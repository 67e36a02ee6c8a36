"""Reward and length under the same step: unbiased by enumeration, the derivative of J, and the engine against the reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import enumerable
import support
from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts, write_rollouts
from entropy_probe.data.units import Mode, Units, block_units, exact_units
from entropy_probe.gradients import Sides, Storage, UnitGradients, Wanted, engine, reference, treatments, unit_gradients
from entropy_probe.gradients.capture.modules import Treatment, first_treatment
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.pipeline.run import probe
from entropy_probe.pipeline.settings import Settings
from entropy_probe.report import Report
from entropy_probe.statistics.u_statistics import UnitDots, cross_statistics
from entropy_probe.targets.base import Sample
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.of_responses import TargetOfResponses
from entropy_probe.targets.registry import ALSO_MOVED, ESTIMATORS
from enumerable import EnumerablePolicy
from gradient_pairs import assert_same, coefficients

LIMIT = 3
PAIRS = 2
"""Responses of a prompt in an enumeration."""


class SquaredLength(TargetOfResponses):
    """What another target takes: a class of this size, and a line in the registry."""

    name = "squared length"
    description = "expected squared length"

    def values(self, sample: Sample) -> Tensor:
        return sample.exact_lengths**2


MORE = (*ALSO_MOVED, SquaredLength())


def reward_of(response: tuple[int, ...]) -> float:
    return float(len(response) == 2) + 0.5 * float(response[-1] == 1)


def sample_of(responses: list[tuple[int, ...]], sizes: list[int]) -> Sample:
    rewards = torch.tensor([reward_of(r) for r in responses], dtype=torch.float64)
    return Sample(sizes, [len(r) for r in responses], rewards=rewards)


def exact_mean(policy: EnumerablePolicy, target: TargetOfResponses, context: int) -> Tensor:
    """E[v] over every response, with the graph."""
    responses = enumerable.all_responses(policy.tokens, LIMIT)
    values = target.values(sample_of(responses, [len(responses)]))
    return (enumerable.response_scores(policy, context, LIMIT).exp() * values).sum()


def every_outcome(
    policy: EnumerablePolicy, target: TargetOfResponses, context: int
) -> list[tuple[float, Tensor, Tensor]]:
    """Probability, Z_n and Y_n of every pair of responses to a prompt, by the package's coefficients."""
    responses = enumerable.all_responses(policy.tokens, LIMIT)
    scores, gradients = enumerable.score_gradients(policy, context, LIMIT)
    found = []
    for chosen in itertools.product(range(len(responses)), repeat=PAIRS):
        index = list(chosen)
        sample = sample_of([responses[i] for i in index], [PAIRS])
        assert sample.rewards is not None
        a = advantages_from_rewards(sample.rewards, [PAIRS], AdvantageRule.DR_GRPO)
        a = a * length_weights(sample.lengths, [PAIRS], LengthWeight.GUIDE)
        vectors = (weights @ gradients[index] for weights in (target.weights(sample), a))
        found.append((float(scores[index].sum().exp()), *vectors))
    return found


@pytest.mark.parametrize("target", MORE, ids=lambda target: target.name)
def test_the_mean_of_the_estimate_is_the_first_order_change(target: TargetOfResponses) -> None:
    """Over every pair of responses to each of two prompts: η ∇f · P E[Y] of the exact f. Own pairs kept, it is another."""
    policy, eta = EnumerablePolicy(contexts=2, tokens=2, seed=3), 0.3
    outcomes = [every_outcome(policy, target, n) for n in range(2)]
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(len(outcomes[0][0][1]), generator=generator, dtype=torch.float64) + 0.5
    gradients = [enumerable.flat_gradient(exact_mean(policy, target, n), policy) for n in range(2)]
    for n in range(2):
        mean_z = torch.stack([weight * z for weight, z, _ in outcomes[n]]).sum(0)
        assert (mean_z - gradients[n]).abs().max() < 1e-14 + 1e-13 * gradients[n].abs().max()
    mean_y = [torch.stack([weight * y for weight, _, y in of_prompt]).sum(0) for of_prompt in outcomes]
    truth = eta * float(gradients[0] @ (p * mean_y[1]) + gradients[1] @ (p * mean_y[0])) / 2

    estimate = planted = 0.0
    for chosen in itertools.product(*outcomes):
        probability = math.prod(weight for weight, _, _ in chosen)
        kernel = (torch.stack([z for _, z, _ in chosen]) * p @ torch.stack([y for _, _, y in chosen]).T).numpy()
        estimate += probability * cross_statistics(UnitDots.from_kernel(eta * kernel, [1, 1])).u_cross
        planted += probability * eta * float(kernel.mean())
    assert estimate == pytest.approx(truth, rel=1e-12)
    assert abs(truth) > 1e-4
    assert abs(planted - truth) > 0.1 * abs(truth)


@pytest.mark.parametrize("target", MORE, ids=lambda target: target.name)
def test_delta_is_the_derivative_of_the_exact_mean_along_the_step(target: TargetOfResponses) -> None:
    """Finite difference of E[v] along η P Ȳ, Ȳ from the engine, against +η E[Z] · P Ȳ."""
    policy, eta = EnumerablePolicy(contexts=2, tokens=3, seed=5), 0.05
    responses = enumerable.all_responses(3, LIMIT)
    rows = [
        enumerable.row(policy, context, responses[k], reward_of(responses[k]))
        for context, picks in enumerate([(0, 3, 7), (1, 2, 9)])
        for k in picks
    ]
    batch = group_rollouts(rows)
    p = {name: 0.5 + torch.rand_like(w) for name, w in policy.named_parameters()}
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    geometry = Geometry.fixed(p, eta)
    gradients = unit_gradients(Policy(policy), batch, exact_units(2), Sides(EntropyTarget(), a), geometry)
    deltas = geometry.step(gradients.ascent)

    def mean_at(scale: float) -> float:
        with virtual_step(policy, deltas, scale):
            return sum(float(exact_mean(policy, target, n).detach()) for n in range(2)) / 2

    finite_difference = (mean_at(1e-4) - mean_at(-1e-4)) / 2e-4
    step = torch.cat([deltas[name].flatten() for name in p])
    mean_z = torch.stack([weight * z for n in range(2) for weight, z, _ in every_outcome(policy, target, n)]).sum(0) / 2
    assert finite_difference == pytest.approx(float(mean_z @ step), rel=1e-6)
    assert abs(finite_difference) > 1e-5


def test_the_change_of_a_reward_is_its_mean_by_importance_weights() -> None:
    lengths, sizes = [2, 1, 3, 1], [2, 2]
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    before = torch.tensor([-1.0, -2.0, -1.5, -0.5], dtype=torch.float64)
    after = before + torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)
    reward = next(target for target in ALSO_MOVED if target.name == "reward")
    found = reward.change(Sample(sizes, lengths, before, None, rewards), Sample(sizes, lengths, after, None, rewards))
    weights = (after - before).exp()
    assert found.delta_h == pytest.approx(float((weights * rewards).sum() / weights.sum() - rewards.mean()), rel=1e-12)


def test_the_registry_has_every_estimator_and_every_name_once() -> None:
    assert set(ESTIMATORS) == set(Estimator)
    names = [target.name for target in ALSO_MOVED]
    assert names[:2] == ["reward", "length"]
    assert len(set(names)) == len(names)


def both(
    model: nn.Module, batch: RolloutBatch, units: Units, size: int, target: EntropyTarget, storage: Storage
) -> tuple[UnitGradients, UnitGradients]:
    policy = Policy(model, 0.8, microbatch_size=size)
    generator = torch.Generator().manual_seed(1)
    p = {n: torch.rand(q.shape, generator=generator, dtype=torch.float64) + 0.1 for n, q in policy.trainable().items()}
    geometry = Geometry.fixed(p, {n: 0.5 + len(n) % 2 for n in p})
    arguments = (policy, batch, units, Sides(target, coefficients(batch), MORE), geometry)
    return engine.unit_gradients(*arguments, wanted=Wanted(storage)), reference.unit_gradients(*arguments)


def assert_all_same(found: UnitGradients, expected: UnitGradients) -> None:
    assert_same(found, expected)
    assert list(found.also) == list(expected.also) == [target.name for target in MORE]
    for name in found.also:
        assert_same(replace(found, dots=found.also[name]), replace(expected, dots=expected.also[name]))


BATCH = support.random_batch(5, [3, 2, 4, 3, 3])
TARGETS = [
    EntropyTarget(Estimator.RAO_BLACKWELL),
    EntropyTarget(Estimator.SCORE),
    EntropyTarget(Estimator.SCORE, EntropyUnit.PER_TOKEN),
]


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.estimator}, {target.unit}")
@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_the_engine_agrees_with_the_reference(family: str, target: EntropyTarget, storage: Storage) -> None:
    model = support.tiny_model(family, dtype=torch.float64)
    for units, size in ((exact_units(5), 7), (block_units(5, 2), 2)):
        assert_all_same(*both(model, BATCH, units, size, target, storage))


@pytest.mark.parametrize("target", TARGETS[:2], ids=lambda target: str(target.estimator))
def test_parameters_without_a_rule_are_served_target_by_target(
    target: EntropyTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        treatments,
        "first_treatment",
        lambda module, parameter: (
            Treatment.FALLBACK if isinstance(module, nn.Embedding) else first_treatment(module, parameter)
        ),
    )
    model = support.tiny_model("llama-untied", dtype=torch.float64)
    found, expected = both(model, BATCH, exact_units(5), 7, target, Storage.STORED)
    assert found.coverage.fallback == ("model.embed_tokens.weight",)
    assert_all_same(found, expected)


def test_the_reference_streamed_is_the_reference_stored() -> None:
    policy = Policy(support.tiny_model("llama-tied", dtype=torch.float64))
    p = {n: torch.full_like(q, 0.5) for n, q in policy.trainable().items()}
    arguments = (policy, BATCH, exact_units(5), Sides(TARGETS[1], coefficients(BATCH), MORE), Geometry.fixed(p))
    streamed = reference.unit_gradients(*arguments, wanted=Wanted(Storage.STREAMED))
    assert_all_same(streamed, reference.unit_gradients(*arguments))


def test_a_further_target_moves_nothing_of_the_entropys() -> None:
    policy = Policy(support.tiny_model("qwen2"), microbatch_size=4)
    p = {n: torch.full_like(q, 0.5) for n, q in policy.trainable().items()}
    sides = Sides(TARGETS[0], coefficients(BATCH))
    alone, beside = (
        unit_gradients(policy, BATCH, exact_units(5), each, Geometry.fixed(p)).total
        for each in (sides, replace(sides, also=MORE))
    )
    assert np.abs(beside.kernel - alone.kernel).max() <= 1e-6 * np.abs(alone.kernel).max()


MODEL = support.tiny_model(dtype=torch.float64)
ADAM = state_of_optimizer(support.trained_optimizer(MODEL), MODEL)
PARAMETERS = sum(q.numel() for q in MODEL.parameters())
SETTINGS = Settings(noise=False, microbatch_size=16)
ROWS = support.random_rollouts(8, 2, seed=4)


def report_of(rows: list[Rollout] = ROWS, *, vectors: float, **more: object) -> Report:
    """With memory in which so many float64 vectors fit."""
    settings = replace(SETTINGS, memory_bytes=2 * 8 * PARAMETERS * vectors, **more)
    return probe(MODEL, ADAM, rows, settings).report


def test_targets_are_given_where_they_fit_and_change_no_plan() -> None:
    room, tight = report_of(vectors=33), report_of(vectors=31)
    assert [target.name for target in room.targets] == [target.name for target in ALSO_MOVED]
    assert all(target.delta is not None and target.se is not None for target in room.targets)
    assert tight.first_order.delta_h1 == room.first_order.delta_h1
    assert replace(tight.units, reason="") == replace(room.units, reason="")
    assert "sets of 4 vectors" in room.units.reason
    assert all(target.delta is None for target in tight.targets)
    assert "do not fit beside the entropy's" in tight.targets[0].null_reasons["ci95"]
    streamed = report_of(vectors=1)
    assert streamed.units.storage == "streamed"
    assert "vectors are streamed" in streamed.targets[1].null_reasons["delta"]


def test_targets_that_are_asked_for_are_given_streamed_too() -> None:
    stored = report_of(vectors=33)
    streamed = report_of(vectors=31, mode=Mode.EXACT, targets=True)
    assert streamed.units.storage == "streamed"
    assert "sets of 4 vectors" in streamed.units.reason
    for found, expected in zip(streamed.targets, stored.targets, strict=True):
        assert found.delta == pytest.approx(expected.delta, rel=1e-9)
        assert found.se is not None


def test_a_reward_that_never_differs_tells_nothing() -> None:
    equal = [replace(row, reward=0.7, advantage=float(n % 2)) for n, row in enumerate(ROWS)]
    reward, length = report_of(equal, vectors=25).targets
    assert reward.delta is None
    assert reward.null_reasons["delta"].startswith("the responses to each prompt are alike in reward")
    assert length.delta is not None


@pytest.mark.parametrize("scale", [1e38, 1e-38])
def test_rewards_that_float32_vectors_do_not_hold_cost_nothing_but_their_own_change(scale: float) -> None:
    rows = [replace(row, reward=row.reward * scale, advantage=float(n % 2)) for n, row in enumerate(ROWS)]
    found = report_of(rows, vectors=33)
    reward, length = found.targets
    assert "scale it" in reward.null_reasons["delta"]
    assert length.delta is not None
    assert found.to_dict()["targets"][0]["delta"] is None


def test_where_no_rule_serves_a_parameter_targets_are_given_when_asked_for_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_rules = report_of(vectors=33)
    original = treatments.first_treatment

    def slower(module: nn.Module, parameter: nn.Parameter) -> Treatment:
        return Treatment.FALLBACK if parameter.dim() == 1 else original(module, parameter)

    monkeypatch.setattr(treatments, "first_treatment", slower)
    unasked, asked = report_of(vectors=33), report_of(vectors=33, targets=True)
    assert "take a backward a target" in unasked.targets[0].null_reasons["delta"]
    assert "pairs of vectors" in unasked.units.reason
    assert asked.targets[0].delta == pytest.approx(by_rules.targets[0].delta, rel=1e-6)


def test_where_x_and_y_both_weigh_tokens_targets_are_given_when_asked_for_alone() -> None:
    rows = [
        replace(row, token_weight=tuple(0.5 + 0.1 * place for place in range(len(row.response_ids)))) for row in ROWS
    ]
    unasked, asked = report_of(rows, vectors=33), report_of(rows, vectors=33, targets=True)
    assert "take a backward of their own" in unasked.targets[0].null_reasons["delta"]
    assert "pairs of vectors" in unasked.units.reason
    # The score estimator weighs responses, and a target shares its backward.
    by_score = report_of(rows, vectors=33, estimator=Estimator.SCORE)
    for found, expected in zip(by_score.targets, asked.targets, strict=True):
        assert found.delta == pytest.approx(expected.delta, rel=1e-6)
    assert asked.targets[0].delta != pytest.approx(report_of(vectors=33).targets[0].delta, rel=1e-3)


def test_the_command_says_them_and_takes_targets(tmp_path: Path) -> None:
    checkpoint = support.make_checkpoint(tmp_path / "checkpoint")
    write_rollouts(support.random_rollouts(4, 3), tmp_path / "rows.jsonl")
    arguments = ("run", checkpoint, "--rollouts", tmp_path / "rows.jsonl", "--no-noise", "--memory", "1e-4")
    found = support.run_command(*arguments)
    assert found.code == 0, found.err
    assert "Also moved by the preconditioned step" in found.out
    assert "vectors are streamed" in found.out
    found = support.run_command(*arguments, "--targets")
    assert found.code == 0, found.err
    assert "expected tokens a response" in found.out
    assert "vectors are streamed; set" not in found.out


def test_planted_a_target_in_the_channel_of_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = UnitVectors.of

    def swapped(self: UnitVectors, name: str, units: range) -> Tensor:
        found = right(self, name, units)
        return found[:, [0, 1, 3, 2, 4]] if found.shape[1] == 5 else found

    monkeypatch.setattr(UnitVectors, "of", swapped)
    found, expected = both(
        support.tiny_model(dtype=torch.float64), BATCH, exact_units(5), 7, TARGETS[0], Storage.STORED
    )
    with pytest.raises(AssertionError):
        assert_all_same(found, expected)
