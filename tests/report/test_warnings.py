"""Warnings appear where their evidence is, name its figures, and stay away where it is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.report.rollout_warnings import on_policy_warnings, pairing_warnings
from entropy_probe.report.sections.off_policy import OffPolicySection, few_effective_warnings


def with_rates(*rates: float) -> Any:
    """The report of a model whose optimizer groups have these learning rates."""
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return probe(model, state_of_optimizer(optimizer, model), support.random_batch(12, 4)).report


def codes(report: Any) -> dict[str, str]:
    return {w.code: w.seen for w in report.warnings}


@pytest.mark.parametrize("rates", [(1e-4, 1e-4), (1e-7, 1e-3), (1e-3, 1e-7)])
def test_the_sentence_and_the_warning_speak_of_one_interval(rates: tuple[float, float]) -> None:
    report = with_rates(*rates)
    low, high = report.first_order.delta_h1_ci95
    assert ("interval_includes_zero" in codes(report)) == (low <= 0 <= high)
    assert ("does not tell" in report.first_order.sentence) == (low <= 0 <= high)
    if low <= 0 <= high:
        assert f"[{low:.3g}, {high:.3g}]" in codes(report)["interval_includes_zero"]


def test_one_group_at_rate_zero_is_not_a_step_that_changes_nothing() -> None:
    report = with_rates(1e-4, 0.0)
    assert "in 1 of 2 parameter groups" in codes(report)["learning_rate_zero"]
    assert report.first_order.delta_h1 != 0
    nothing = with_rates(0.0, 0.0)
    assert "changes nothing" in codes(nothing)["learning_rate_zero"]
    assert "changes nothing" in nothing.headline
    assert "changes nothing" in nothing.first_order.sentence
    assert "clip · Σ_k" not in nothing.first_order.sentence
    assert "interval_includes_zero" not in codes(nothing)


def test_rewards_that_are_all_alike_give_no_update_at_all() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    rows = [dataclasses.replace(r, reward=0.1) for r in support.random_rollouts(6, 3)]
    report = probe(model, adam, group_rollouts(rows)).report
    assert report.first_order.u_cross == 0.0
    assert "6 of 6" in codes(report)["zero_advantage_groups"]
    assert "changes nothing" in report.first_order.sentence
    # Momentum still moves it.
    assert report.adamw.total != 0.0
    assert "changes nothing" not in report.headline


def long_responses(noise: float, tokens: int = 1000) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, scores = [], []
    for n in range(12):
        true = -2 - torch.rand(tokens, generator=generator, dtype=torch.float64)
        sampler = true + noise * torch.randn(tokens, generator=generator, dtype=torch.float64)
        rows.append(Rollout(n // 2, (3 + n // 2,), (4,) * tokens, 0.0, logprobs=tuple(sampler.tolist())))
        scores.append(float(true.sum()))
    return group_rollouts(rows), torch.tensor(scores, dtype=torch.float64)


def test_long_responses_do_not_hide_another_policy() -> None:
    """Differences of either sign cancel in the mean a token: 0.3 a token is about 0.01 of it over 1000."""
    (warning,) = on_policy_warnings(*long_responses(0.3))
    assert warning.code == "off_policy"
    assert on_policy_warnings(*long_responses(0.001)) == []


def test_rows_that_say_off_policy_are_told_of_where_they_count_as_the_policys_own() -> None:
    batch = group_rollouts(dataclasses.replace(r, on_policy=False) for r in support.random_rollouts(3, 2))
    off = OffPolicySection.unweighted("off", "sampler_weights is off")
    (warning,) = on_policy_warnings(batch, torch.zeros(6), off)
    assert (warning.code, "6 rows" in warning.seen) == ("declared_off_policy", True)
    weighed = OffPolicySection("response", 5.5, 0.92, 6, "asked for")
    assert on_policy_warnings(batch, torch.zeros(6), weighed) == []


def test_a_sampler_that_is_another_policy_is_told_of_with_what_its_rows_count() -> None:
    batch, scores = long_responses(0.3)
    (alone,) = on_policy_warnings(batch, scores, OffPolicySection.unweighted("off", "asked for"))
    assert "count as its own" in alone.seen
    (weighed,) = on_policy_warnings(batch, scores, OffPolicySection("prefix", 2.0, 0.17, 12, "asked for"))
    assert "importance weights (prefix)" in weighed.seen
    few = few_effective_warnings(OffPolicySection("prefix", 2.0, 0.17, 12, "asked for"))
    assert [w.code for w in few] == ["few_effective_rows"]
    assert few_effective_warnings(OffPolicySection("response", 7.0, 0.58, 12, "asked for")) == []


def recorded(**columns: Any) -> Any:
    return group_rollouts(dataclasses.replace(r, **columns) for r in support.random_rollouts(3, 2))


def test_rollouts_of_another_step_or_another_loss_are_named() -> None:
    batch = recorded(step=21, loss_type="dr_grpo")
    assert pairing_warnings(batch, 20, LengthWeight.DR_GRPO) == []
    (step,) = pairing_warnings(batch, 150, LengthWeight.DR_GRPO)
    assert step.code == "wrong_step"
    assert "step 21" in step.seen
    assert "checkpoint-20" in step.advice
    (loss,) = pairing_warnings(batch, 20, LengthWeight.GUIDE)
    assert loss.code == "other_loss"
    assert "length weight to dr_grpo" in loss.advice
    assert pairing_warnings(recorded(), None, LengthWeight.GUIDE) == []
    (one,) = pairing_warnings(recorded(), 20, LengthWeight.BNPO, None, ["bnpo"])
    assert one.code == "one_micro_batch"
    assert pairing_warnings(recorded(micro_batch=0), 20, LengthWeight.BNPO, None, ["bnpo"]) == []


def test_a_heavy_tail_is_said_where_it_matters_and_not_of_a_tiny_step() -> None:
    from entropy_probe.realized.changes import RealizedChange
    from entropy_probe.realized.measure import EntropyMeasure
    from entropy_probe.report.sections.realized import realized_warnings
    from entropy_probe.statistics.importance_sampling import entropy_change
    from entropy_probe.targets.entropy import EntropyTarget

    generator = torch.Generator().manual_seed(1)
    scores = -5 - torch.rand(400, generator=generator, dtype=torch.float64)
    tail = torch.empty(400, dtype=torch.float64).exponential_(generator=generator).exp().log()

    def said(scale: float) -> set[str]:
        change = entropy_change(scores.numpy(), (scores + scale * tail).numpy(), [40] * 10)
        row = RealizedChange("adamw", "clone", "same", EntropyMeasure(EntropyTarget()), change, 1e-3, 0.0, 1.0)
        return {w.code for w in realized_warnings([row])}

    assert "heavy_weights" in said(1.2)
    assert "heavy_weights" not in said(1e-6)


def test_scores_of_the_live_policy_pass_its_own_check() -> None:
    model = support.tiny_model("llama-tied")
    rows = support.random_rollouts(4, 2)
    scores = Policy(model).scores(rows)
    own = [
        dataclasses.replace(r, logprobs=(*(0.0,) * (len(r.response_ids) - 1), float(s)))
        for r, s in zip(rows, scores, strict=True)
    ]
    assert on_policy_warnings(group_rollouts(own), scores) == []


def test_inference_mode_is_refused_in_one_line() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        probe(model, adam, support.random_batch(3, 2), Settings())
