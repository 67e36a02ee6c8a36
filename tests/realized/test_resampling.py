"""Fresh responses after a step: the entropy that they give is the exact one of the moved policy, and nothing is left moved."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import support
from entropy_probe import InputError, RolloutBatch, Settings, probe, state_of_optimizer
from entropy_probe.common.progress import Silent
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.realized.measure import EntropyMeasure, Predicted
from entropy_probe.realized.realize import realize
from entropy_probe.realized.resampling import plan_resampling, resample
from entropy_probe.realized.steps import Step
from entropy_probe.sampling.drawing import sample_rollouts
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.statistics.importance_sampling import entropy_estimate, resampled_change
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget

TOKENS, LIMIT, END = 5, 3, 1
PROMPTS = ((2, 3), (4,))


def small_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=None, eos_token_id=END, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def every_response() -> list[tuple[int, ...]]:
    others = [token for token in range(TOKENS) if token != END]
    ended = [(*body, END) for n in range(LIMIT) for body in itertools.product(others, repeat=n)]
    return [*ended, *itertools.product(others, repeat=LIMIT)]


def exact_entropy_and_length(policy: Policy) -> tuple[float, float]:
    """Mean over the prompts of H and of E[T], every response of the capped policy enumerated."""
    entropies, lengths = [], []
    for prompt in PROMPTS:
        rows = [Rollout("p", prompt, ids, 0.0) for ids in every_response()]
        scores = policy.scores(rows)
        assert float(scores.exp().sum()) == pytest.approx(1.0, abs=1e-5)
        entropies.append(-float((scores.exp() * scores).sum()))
        lengths.append(float(scores.exp() @ torch.tensor([float(len(r.response_ids)) for r in rows]).double()))
    return sum(entropies) / len(PROMPTS), sum(lengths) / len(PROMPTS)


def rollouts_of(policy: Policy, responses: int) -> RolloutBatch:
    prompts = [Prompt(f"p{n}", ids, "", {}) for n, ids in enumerate(PROMPTS)]
    settings = SamplingSettings(responses, policy.temperature, LIMIT, seed=3, eos_ids=(END,), batch_size=256)
    return group_rollouts(sample_rollouts(policy, prompts, settings, lambda *_: 0.0))


def a_step(model: Any, size: float) -> Step:
    generator = torch.Generator().manual_seed(5)
    return Step(
        "adamw",
        "virtual",
        {n: size * torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()},
    )


def sampled_error(values: np.ndarray, groups: int) -> float:
    """Standard error over responses for these very prompts."""
    parts = np.split(values, groups)
    return float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))) / groups


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_after_the_step_is_the_exact_one_of_the_moved_policy(temperature: float) -> None:
    model = small_llama()
    policy = Policy(model, temperature, microbatch_size=512)
    batch = rollouts_of(policy, 480)
    before = policy.measure(batch.responses)
    step = a_step(model, 0.4)
    measures = [EntropyMeasure(EntropyTarget(estimator, unit)) for estimator in Estimator for unit in EntropyUnit]
    rows = realize(
        policy, batch, before, step, [Predicted(measure, 0.0) for measure in measures], floors=[0.0] * len(measures)
    )
    weights = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    fresh = resample(policy, batch, before, [step], rows, plan_resampling(policy, batch, None, 0), Silent())
    assert torch.equal(torch.get_rng_state(), state)
    for n, p in model.named_parameters():
        assert p.data_ptr() == weights[n][0]
        assert torch.equal(p.detach(), weights[n][1])

    (h_before, t_before) = exact_entropy_and_length(policy)
    with virtual_step(model, step.deltas):
        (h_after, t_after) = exact_entropy_and_length(policy)
    for direct, row in zip(rows, fresh, strict=True):
        per_token = row.measure.target.unit is EntropyUnit.PER_TOKEN
        truth, old = (h_after / t_after, h_before / t_before) if per_token else (h_after, h_before)
        assert (row.method, row.change.weights.ess) == ("resampled", pytest.approx(960))
        assert row.change.entropy_before == pytest.approx(direct.change.entropy_before, rel=1e-14)
        assert row.change.delta_h == pytest.approx(row.change.entropy_after - row.change.entropy_before)
        # From sampling alone, these prompts given: a response's −S spreads by about a nat.
        error = 1.0 / np.sqrt(960) / (t_after if per_token else 1.0)
        assert abs(row.change.entropy_after - truth) < 4 * error
        # Drawn or scored without the step it would be the old entropy.
        assert abs(truth - old) > 8 * error


def test_rao_blackwell_of_fresh_responses_is_within_its_own_small_error() -> None:
    model = small_llama()
    policy = Policy(model, microbatch_size=512)
    batch = rollouts_of(policy, 480)
    before = policy.measure(batch.responses)
    step = a_step(model, 0.4)
    measure = EntropyMeasure(EntropyTarget(Estimator.RAO_BLACKWELL))
    rows = realize(policy, batch, before, step, [Predicted(measure, 0.0)], floors=[0.0])
    (row,) = resample(policy, batch, before, [step], rows, plan_resampling(policy, batch, None, 0), Silent())
    with virtual_step(model, step.deltas):
        truth, _ = exact_entropy_and_length(policy)
        again = rollouts_of(policy, 480)
        values = policy.measure(again.responses)
    assert values.entropies is not None
    parts = torch.split(values.entropies, [len(r.response_ids) for r in again.responses])
    error = sampled_error(np.array([float(part.sum()) for part in parts]), len(PROMPTS))
    assert abs(row.change.entropy_after - truth) < 4 * error < 0.12


def test_an_exception_while_sampling_or_scoring_leaves_weights_and_random_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_llama()
    policy = Policy(model)
    batch = rollouts_of(policy, 4)
    before = policy.measure(batch.responses)
    step = a_step(model, 0.1)
    rows = realize(policy, batch, before, step, [Predicted(EntropyMeasure(EntropyTarget()), 0.0)], floors=[0.0])
    plan = plan_resampling(policy, batch, None, 0)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state, config = torch.get_rng_state(), model.generation_config
    calls = fail_at = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise KeyboardInterrupt

    model.model.norm.register_forward_pre_hook(counted)
    resample(policy, batch, before, [step], rows, plan, Silent())
    total = calls
    assert total >= 3
    for fail_at in range(1, total + 1):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            resample(policy, batch, before, [step], rows, plan, Silent())
        assert all(torch.equal(p.detach(), weights[n]) for n, p in model.named_parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert model.generation_config is config
        assert calls == fail_at


def slow_change(v: np.ndarray, v_after: np.ndarray, sizes: list[int], sizes_after: list[int]) -> tuple[float, float]:
    """ΔH and its error from each prompt's difference of means."""
    starts, starts_after = np.cumsum([0, *sizes]), np.cumsum([0, *sizes_after])
    differences = [
        v_after[starts_after[n] : starts_after[n + 1]].mean() - v[starts[n] : starts[n + 1]].mean()
        for n in range(len(sizes))
    ]
    return float(np.mean(differences)), float(np.std(differences, ddof=1)) / np.sqrt(len(sizes))


def test_the_change_is_the_mean_of_the_prompts_differences() -> None:
    rng = np.random.default_rng(0)
    sizes, sizes_after = [3, 2, 5, 4], [6, 6, 6, 6]
    v, v_after = rng.normal(size=14), rng.normal(size=24)
    found = resampled_change(v, v_after, sizes, sizes_after)
    assert (found.delta_h, found.se) == pytest.approx(slow_change(v, v_after, sizes, sizes_after), rel=1e-12)
    assert found.weights.ess == pytest.approx(24)
    # Per token: each is a ratio of means.
    ones, twos = np.full(14, 2.0), np.full(24, 4.0)
    ratio = resampled_change(v, v_after, sizes, sizes_after, lengths=ones, lengths_after=twos)
    assert ratio.delta_h == pytest.approx(found.entropy_after / 4 - found.entropy_before / 2, rel=1e-12)


def test_the_error_covers_both_draws_and_not_what_prompts_differ_in() -> None:
    rng = np.random.default_rng(0)
    prompts, group, changes, errors, apart = 32, 8, [], [], []
    for _ in range(2000):
        level = 3.0 * rng.normal(size=prompts)
        v, w = (np.repeat(level, group) + rng.normal(size=prompts * group) for _ in range(2))
        sizes = [group] * prompts
        found = resampled_change(v, w - 0.5, sizes, sizes)
        changes.append(found.delta_h)
        errors.append(found.se)
        apart.append(np.hypot(entropy_estimate(v, sizes)[1], entropy_estimate(w, sizes)[1]))
    assert np.mean(errors) == pytest.approx(np.std(changes), rel=0.06)
    # As two separate errors it would be several times too long.
    assert np.mean(apart) > 5 * np.std(changes)


def test_the_length_limit_is_the_trainers_or_where_rollouts_were_cut_or_twice_the_longest() -> None:
    policy = Policy(small_llama())
    rows = [
        Rollout(f"p{n}", prompt, ids, 0.0)
        for n, prompt in enumerate(PROMPTS)
        for ids in ((3, END), (2, 2, 3, END), (END,))
    ]

    def limit(rows: list[Rollout], given: int | None = None) -> tuple[int, str]:
        plan = plan_resampling(policy, group_rollouts(rows), given, 0)
        return plan.settings.max_new_tokens, plan.limit

    assert limit(rows)[0] == 8
    assert limit([replace(r, cut=False) for r in rows])[0] == 8
    assert limit([*rows, Rollout("p0", PROMPTS[0], (2, 2, 2, 2, 3), 0.0)]) == (5, "where the rollouts were cut")
    # EOS last at the very limit, by the rows' own word: not a response that ended.
    assert limit([*rows, Rollout("p0", PROMPTS[0], (2, 2, 2, 2, 2, END), 0.0, cut=True)])[0] == 6
    assert limit([replace(r, max_completion_length=7) for r in rows]) == (7, "the trainer's limit")
    assert limit(rows, 6)[0] == 6
    assert limit([*rows, Rollout("p0", PROMPTS[0], (*[3] * 12, END), 0.0)])[0] == 16 - 2  # the context less the prompt


def test_fresh_responses_are_drawn_as_the_rollouts_were() -> None:
    policy = Policy(small_llama(), 0.7)
    batch = rollouts_of(policy, 4)
    larger = group_rollouts([*batch.responses, replace(batch.responses[0])])
    plan = plan_resampling(policy, larger, None, 9)
    assert (plan.settings.responses, plan.settings.temperature) == (5, 0.7)
    assert [prompt.prompt_ids for prompt in plan.prompts] == list(PROMPTS)
    assert plan.settings.seed != 9  # or fresh responses would be the rollouts again where those were sampled with it
    ended = [replace(r, response_ids=(*r.response_ids[:-1], 4), cut=False) for r in batch.responses]
    assert plan_resampling(policy, group_rollouts(ended), None, 0).settings.eos_ids == (
        END,
    )  # as the rows' sampler stopped
    unsaid = group_rollouts(replace(r, eos_ids=None) for r in ended)
    assert set(plan_resampling(policy, unsaid, None, 0).settings.eos_ids) == {END, 4}


def test_what_cannot_be_resampled_is_refused_before_the_work() -> None:
    from enumerable import EnumerablePolicy

    batch = rollouts_of(Policy(small_llama()), 4)
    with pytest.raises(InputError, match="need a transformers model with generate"):
        plan_resampling(Policy(EnumerablePolicy(2)), batch, None, 0)
    endless = small_llama()
    endless.config.eos_token_id = endless.generation_config.eos_token_id = None
    bare = [replace(r, logprobs=None, cut=None, eos_ids=None) for r in batch.responses]
    rows = [replace(r, response_ids=r.response_ids[:n]) for r in bare for n in (1, 2)]
    with pytest.raises(InputError, match="nothing tells what ends a fresh response"):
        plan_resampling(Policy(endless), group_rollouts(rows), None, 0)
    with pytest.raises(InputError, match="context holds 16"):
        plan_resampling(Policy(small_llama()), batch, 20, 0)


def test_resampled_rows_stand_beside_the_direct_ones_in_the_report_and_are_the_same_again() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    batch = support.random_batch(5, 3)
    reports = [probe(model, adam, batch, Settings(resample=True)).report for _ in range(2)]
    rows = reports[0].realized
    assert [(r.step, r.method == "resampled") for r in rows[4:]] == [
        ("preconditioned", True), ("preconditioned", True), ("adamw", True), ("adamw", True),
    ]  # fmt: skip
    for row in rows[4:]:
        (direct,) = [r for r in rows[:4] if (r.step, r.estimator) == (row.step, row.estimator)]
        assert row.batch == "same"
        assert row.predicted == direct.predicted
        assert row.entropy_before == direct.entropy_before
        assert "3 fresh responses a prompt" in row.note
        assert row.pareto_k is None
        assert "no importance weights" in row.null_reasons["pareto_k"]
    assert reports[0].to_dict()["realized"] == reports[1].to_dict()["realized"]
    assert reports[0].config.resample


def test_fresh_responses_are_drawn_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    sizes, generate = list[int](), type(model).generate

    def counting(self: Any, **arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        return generate(self, **arguments)

    monkeypatch.setattr(type(model), "generate", counting)
    report = probe(model, adam, support.random_batch(5, 3), Settings(resample=True, resample_batch=2)).report
    assert set(sizes) == {1, 2}
    assert report.config.resample_batch == 2
    assert any(row.method == "resampled" for row in report.realized)
