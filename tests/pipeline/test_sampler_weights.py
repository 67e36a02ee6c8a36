"""Which weights rows of another policy get, from the rows to the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import support
from entropy_probe import Settings, group_rollouts, probe, state_of_optimizer
from entropy_probe.data.importance import Importance
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.data.units import block_units, exact_units
from entropy_probe.errors import InputError
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy
from entropy_probe.pipeline import stages
from entropy_probe.pipeline.sampler_weights import may_need_weights, reweighted
from entropy_probe.statistics.importance_sampling import effective_sample_size
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from gradient_pairs import assert_same, both

FAST = Settings(noise=False, dtype=torch.float64, learning_rate=1e-5)


def own_log_probs(model: Any, rows: Sequence[Rollout]) -> list[torch.Tensor]:
    measured = Policy(model).measure(rows, entropies=False)
    assert measured.log_probs is not None
    return list(measured.log_probs.split([row.tokens for row in rows]))


def sampled_by_another(model: Any, rows: Sequence[Rollout], sigma: float, seed: int = 5) -> list[Rollout]:
    """The rows with log-probs of a sampler whose tokens' differ from the model's by normal noise."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row, own in zip(rows, own_log_probs(model, rows), strict=True):
        other = own + sigma * torch.randn(len(own), generator=generator, dtype=torch.float64)
        found.append(dataclasses.replace(row, logprobs=tuple(other.clamp(max=0.0).tolist())))
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return support.tiny_model("llama-tied", dtype=torch.float64)


@pytest.fixture(scope="module")
def adam(model: Any) -> Any:
    return state_of_optimizer(support.trained_optimizer(model), model)


def content(report: Any) -> dict[str, Any]:
    found: dict[str, Any] = report.to_dict()
    for name in ("timing", "versions", "engine", "ranks", "off_policy"):
        del found[name]
    return found


def test_the_policys_own_rows_keep_every_number_bit_for_bit(model: Any, adam: Any) -> None:
    rows = support.random_rollouts(6, 3)
    plain = probe(model, adam, rows, FAST).report
    own = [
        dataclasses.replace(row, logprobs=tuple(values.tolist()))
        for row, values in zip(rows, own_log_probs(model, rows), strict=True)
    ]
    rounded = [dataclasses.replace(row, logprobs=tuple(v - 1e-3 for v in row.logprobs or ())) for row in own]
    told = [dataclasses.replace(row, on_policy=True) for row in sampled_by_another(model, rows, 1.0)]
    for same in (own, rounded, told):
        report = probe(model, adam, same, FAST).report
        assert report.off_policy.weights == "none"
        found, expected = content(report), content(plain)
        # A sampler's log-probs that differ are told of, whatever the row says.
        assert found.pop("warnings")[: len(expected["warnings"])] or not expected["warnings"]
        expected.pop("warnings")
        assert found == expected


@pytest.mark.parametrize("unit", list(EntropyUnit))
@pytest.mark.parametrize(
    ("estimator", "by_prefix"), [("score", False), ("rao-blackwell", False), ("rao-blackwell", True)]
)
def test_the_engine_agrees_with_the_reference_on_weighted_rows(
    model: Any, estimator: str, by_prefix: bool, unit: EntropyUnit
) -> None:
    batch = group_rollouts(sampled_by_another(model, support.random_rollouts(5, 3), 0.3), 0.8)
    generator = torch.Generator().manual_seed(0)
    ratios = [0.3 * torch.randn(length, generator=generator, dtype=torch.float64) for length in batch.lengths]
    batch = dataclasses.replace(batch, importance=Importance.of(ratios, batch.group_sizes, by_prefix=by_prefix))
    target = EntropyTarget(Estimator(estimator), unit)
    for units in (exact_units(5), block_units(5, 3)):
        found, expected = both(model, batch, units, 4, target)
        assert_same(found, expected)
    plain, _ = both(model, dataclasses.replace(batch, importance=None), exact_units(5), 4, target)
    found, _ = both(model, batch, exact_units(5), 4, target)
    group = next(iter(found.dots))
    assert np.abs(found.dots[group].kernel - plain.dots[group].kernel).max() > 1e-3


@pytest.mark.parametrize("entropy", ["per-response", "per-token"])
@pytest.mark.parametrize(
    ("estimator", "asked", "taken"),
    [
        ("rao-blackwell", "auto", "response"),
        ("rao-blackwell", "prefix", "prefix"),
        ("score", "auto", "response"),
        ("rao-blackwell", "off", "off"),
    ],
)
def test_a_whole_probe_of_another_policys_rows(
    model: Any, adam: Any, estimator: str, asked: str, taken: str, entropy: str
) -> None:
    rows = sampled_by_another(model, support.random_rollouts(8, 3), 0.3)
    settings = dataclasses.replace(
        FAST, estimator=estimator, sampler_weights=asked, entropy=entropy, noise=True, split=2, targets=True
    )
    report = probe(model, adam, rows, settings).report
    found = report.off_policy
    assert found.weights == taken
    assert report.config.sampler_weights == asked
    codes = {warning.code: warning for warning in report.warnings}
    assert "off_policy" in codes
    plain = probe(model, adam, rows, dataclasses.replace(settings, sampler_weights="off")).report
    if taken == "off":
        assert (found.ess, found.rows_reweighted) == (None, 0)
        assert "count as its own" in codes["off_policy"].seen
        return
    assert f"importance weights ({taken})" in codes["off_policy"].seen
    assert 0.5 < found.ess_fraction < 0.999
    assert found.rows_reweighted > 12
    assert found.sentence in "".join(str(block) for block in report.blocks())
    assert report.first_order.u_cross != plain.first_order.u_cross
    assert report.entropy.per_response != plain.entropy.per_response
    assert report.targets[0].delta != plain.targets[0].delta
    assert report.noise.product is not None
    assert report.folds is not None
    assert report.folds.delta_h1_se is not None
    for row in report.realized:
        # The step is small: its change is its linear term.
        assert row.delta_h == pytest.approx(row.predicted, rel=0.05, abs=1e-9)
    own = [row for row in report.realized if row.estimator == estimator and row.batch == "same"]
    now = report.entropy.per_response if entropy == "per-response" else report.entropy.per_token
    assert own[0].entropy_before == pytest.approx(now, rel=1e-9)


def test_evaluation_rollouts_have_weights_of_their_own(model: Any, adam: Any) -> None:
    update = support.random_rollouts(6, 2)
    evaluation = sampled_by_another(model, support.random_rollouts(7, 2, seed=9), 0.3)
    weighed = probe(model, adam, update, FAST, evaluation=evaluation).report
    assert weighed.off_policy.weights == "none"
    assert weighed.two_batches is not None
    assert weighed.two_batches.off_policy.weights == "response"
    off = dataclasses.replace(FAST, sampler_weights="off")
    plain = probe(model, adam, update, off, evaluation=evaluation).report
    assert plain.two_batches is not None
    assert plain.two_batches.delta_h1 != weighed.two_batches.delta_h1
    assert plain.first_order.u_cross == weighed.first_order.u_cross


def test_blocks_and_streamed_vectors_carry_weights_too(model: Any, adam: Any) -> None:
    rows = sampled_by_another(model, support.random_rollouts(8, 3), 0.3)
    stored = probe(model, adam, rows, FAST).report.first_order
    streamed = probe(model, adam, rows, dataclasses.replace(FAST, memory_bytes=3e5)).report
    assert streamed.units.mode == "exact"
    np.testing.assert_allclose(streamed.first_order.row_means, stored.row_means, rtol=1e-9)
    blocks = probe(model, adam, rows, dataclasses.replace(FAST, blocks=4)).report.first_order
    assert len(blocks.row_means) == 4
    assert np.mean(blocks.row_means) == pytest.approx(blocks.u_cross, rel=1e-9)


def test_fresh_responses_count_once_beside_weighted_rows(model: Any, adam: Any) -> None:
    rows = sampled_by_another(model, support.random_rollouts(6, 3), 0.3)
    settings = dataclasses.replace(FAST, resample=True, max_completion_length=6)
    report = probe(model, adam, rows, settings).report
    before = {row.entropy_before for row in report.realized if row.estimator == "score"}
    assert max(before) - min(before) < 1e-9 * max(before)


def measured(batch: RolloutBatch, gap: float | Callable[[int], float]) -> Measured:
    """Log-probs at θ that are above the sampler's by ``gap`` at the last token of every row."""
    parts = []
    for n, row in enumerate(batch.responses):
        values = row.logprobs if row.logprobs is not None else row.old_logprobs
        own = torch.tensor(values if values is not None else [-1.0] * len(row.response_ids), dtype=torch.float64)
        own[-1] += gap if isinstance(gap, float) else gap(n)
        parts.append(own)
    flat = torch.cat(parts)
    return Measured(torch.stack([part.sum() for part in parts]), None, flat)


def rows_of(tokens: int = 4, count: int = 8, **columns: Any) -> RolloutBatch:
    given = {"logprobs": (-1.0,) * tokens} | columns
    return group_rollouts(Rollout(n // 2, (3,), (4,) * tokens, 0.0, **given) for n in range(count))


@pytest.mark.parametrize(
    ("tokens", "gap", "rows"),
    [(1, 0.0099, 0), (1, 0.0101, 8), (4, 0.0199, 0), (4, 0.0201, 8), (900, 0.099, 0), (900, 0.101, 8)],
)
def test_within_rounding_a_row_counts_exactly_once(tokens: int, gap: float, rows: int) -> None:
    batch = rows_of(tokens)
    found, told = reweighted(batch, measured(batch, gap), Settings())
    assert told.rows_reweighted == rows
    assert (found.importance is None) is (rows == 0)


def test_differences_that_cancel_at_the_end_are_no_rounding() -> None:
    batch = rows_of(4)
    other = measured(batch, 0.0)
    assert other.log_probs is not None
    swung = other.log_probs + torch.tensor([0.5, 0.0, 0.0, -0.5] * 8, dtype=torch.float64)
    found, told = reweighted(batch, dataclasses.replace(other, log_probs=swung), Settings())
    assert told.rows_reweighted == 8
    assert found.importance is not None
    assert found.importance.weights.tolist() == pytest.approx([1.0] * 8)


def test_rows_that_say_nothing_or_on_policy_count_once_beside_others() -> None:
    rows = [
        Rollout(0, (3,), (4, 5), 0.0, logprobs=(-1.0, -1.0), old_logprobs=(-2.0, -2.0), on_policy=True),
        Rollout(0, (3,), (4, 5), 0.0, old_logprobs=(-0.8, -0.8)),
        Rollout(1, (3,), (4, 5), 0.0, logprobs=(-1.0, -1.0), old_logprobs=(-3.0, -3.0)),
        Rollout(1, (3,), (4, 5), 0.0, old_logprobs=(-1.0, -1.5), on_policy=False),
    ]
    batch = group_rollouts(rows)
    theta = torch.full((8,), -0.8, dtype=torch.float64)
    found, told = reweighted(batch, Measured(torch.zeros(4), None, theta), Settings())
    assert told.rows_reweighted == 2
    assert found.importance is not None
    ratios = found.importance.log_weights + found.importance.log_mean
    # The sampler's column, else the trainer's.
    assert ratios.tolist() == pytest.approx([0.0, 0.0, 0.4, 0.9], abs=1e-12)


def test_both_columns_are_two_things() -> None:
    batch = rows_of(2, logprobs=(-1.0, -1.0), old_logprobs=(-3.0, -3.0))
    _, told = reweighted(batch, measured(batch, 0.0), Settings())
    assert told.weights == "none"


def test_tokens_of_a_tool_carry_no_weight() -> None:
    batch = rows_of(3, logprobs=(-1.0, -9.0, -1.0), sampled=(True, False, True))
    theta = torch.tensor([-1.0, -1.0] * 8, dtype=torch.float64)
    _, told = reweighted(batch, Measured(torch.zeros(8), None, theta), Settings())
    assert told.weights == "none"


def spread(large: float) -> Callable[[int], float]:
    return lambda n: large if n == 0 else 0.0


def fraction_of(large: float) -> float:
    weights = np.array([large] + [0.0] * 39)
    return effective_sample_size(weights, [2] * 20)[1]


def test_auto_takes_response_weights_then_prefix_then_refuses() -> None:
    batch = rows_of(4, 40)
    for large, taken in ((2.0, "response"), (3.0, "prefix")):
        assert (fraction_of(large) >= 0.5) is (taken == "response")
        found, told = reweighted(batch, measured(batch, spread(large)), Settings())
        assert told.weights == taken
        assert told.ess_fraction == pytest.approx(fraction_of(large), rel=1e-12)
        assert found.importance is not None
        assert found.importance.by_prefix is (taken == "prefix")
    _, told = reweighted(batch, measured(batch, spread(3.0)), Settings(estimator="score"))
    assert told.weights == "response"
    assert "by score there is no other" in told.reason
    assert fraction_of(6.0) < 0.1
    for estimator, names in (("rao-blackwell", "to response, prefix"), ("score", "to response ")):
        with pytest.raises(InputError, match=f"effective sample size of .* of all; .*sampler_weights {names}.* or off"):
            reweighted(batch, measured(batch, spread(6.0)), Settings(estimator=estimator))
    _, told = reweighted(batch, measured(batch, spread(6.0)), Settings(sampler_weights="response"))
    assert (told.weights, told.reason) == ("response", "asked for")


def test_what_cannot_be_weighed_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="prefix, but the score estimator weighs whole responses"):
        Settings(sampler_weights="prefix", estimator="score")
    with pytest.raises(InputError, match="known are auto, response, prefix, off"):
        Settings(sampler_weights="token")
    batch = rows_of(4, logprobs=None, on_policy=False)
    with pytest.raises(InputError, match="prompt_id 0 has a row that says on_policy false, and neither logprobs nor"):
        may_need_weights(batch, Settings())
    assert not may_need_weights(batch, Settings(sampler_weights="off"))
    batch = rows_of(4)
    with pytest.raises(InputError, match=r"8 rows come from another policy.*weighting is per-prompt"):
        reweighted(batch, measured(batch, 0.5), Settings(weighting="per-prompt"))
    far = measured(batch, lambda n: -2000.0 if n else 0.0)
    assert far.log_probs is not None
    swung = far.log_probs.clone()
    swung[:4] += torch.tensor([0.0, 900.0, 0.0, -2900.0], dtype=torch.float64)
    with pytest.raises(InputError, match="exceeds what float64 holds"):
        reweighted(batch, dataclasses.replace(far, log_probs=swung), Settings(sampler_weights="prefix"))


def test_rows_that_cannot_differ_cost_no_forward(model: Any, adam: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    measure = stages.measured_at_theta

    def counting(*given: Any, **more: Any) -> Measured:
        counted.append(True)
        return measure(*given, **more)

    monkeypatch.setattr(stages, "measured_at_theta", counting)
    rows = support.random_rollouts(4, 2)
    probe(model, adam, rows, FAST)
    probe(model, adam, [dataclasses.replace(r, on_policy=True, logprobs=(-1.0,) * r.tokens) for r in rows], FAST)
    assert not any(counted)
    probe(model, adam, sampled_by_another(model, rows, 0.1), FAST)
    assert sum(counted) == 1
