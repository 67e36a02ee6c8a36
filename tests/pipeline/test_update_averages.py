"""verl's averages, one of several mini-batches, weights and masks of tokens, and rows of which a weight a response says all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts
from entropy_probe.errors import InputError
from entropy_probe.losses.length_weights import LengthWeight, LossAggregation
from entropy_probe.losses.named import NAMED, LossName
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.targets.base import TokenPair
from loss_rows import flat, padded
from update_rows import as_pair, loss_rows, measured_of, rows_of_a_step, rule_of, said

TOLERANCE = 1e-12
HORIZON = 20
PPO = {"epsilon_low": 0.2, "epsilon_high": 0.28}


def agg_loss(losses: Tensor, mask: Tensor, mode: str, rows: int) -> Tensor:
    """verl's, as its workers call it: with the tokens and the rows of the whole mini-batch (verl 0.8)."""
    if mode == "token-mean":
        return (losses * mask).sum() / mask.sum()
    of_rows = (losses * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        of_rows = of_rows / mask.sum(-1).clamp(min=1.0)
    loss = of_rows.sum() / rows
    return loss / HORIZON if mode == "seq-mean-token-sum-norm" else loss


def verls_gradients(
    batch: RolloutBatch, measured: Any, mode: str, columns: dict[str, float], kl_mode: str | None = None
) -> tuple[Tensor, Tensor]:
    """Minus the gradient of verl's ppo_loss, by log π and by H: dual clip, KL by k3 and the entropy term, each by agg_loss."""
    rows = loss_rows(batch, measured, range(len(batch.responses)))
    lengths = rows.lengths
    log_probs, entropies = (padded(v, lengths).requires_grad_() for v in (rows.log_probs, rows.entropies))
    old, ref, mask, advantages = (
        padded(v, lengths) for v in (rows.old, rows.ref_log_probs, rows.mask, rows.advantages)
    )
    ratio = torch.exp(torch.clamp(log_probs - old, -20.0, 20.0))
    first, second = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - 0.2, 1 + 0.28)
    larger = torch.maximum(first, second)
    losses = torch.where(advantages < 0, torch.min(larger, -advantages * 3.0), larger)
    kl = torch.exp(ref - log_probs) - (ref - log_probs) - 1
    loss = agg_loss(losses, mask, mode, len(lengths))
    loss = loss - columns.get("entropy_coef", 0.0) * agg_loss(entropies, mask, mode, len(lengths))
    loss = loss + columns.get("beta", 0.0) * agg_loss(kl, mask, kl_mode or mode, len(lengths))
    found = torch.autograd.grad(loss, (log_probs, entropies), allow_unused=True)
    none = torch.zeros_like(log_probs)
    return tuple(-flat(none if g is None else g, lengths) for g in found)  # type: ignore[return-value]


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE * (float(expected.abs().max()) or 1.0)


@pytest.mark.parametrize("mode", list(LossAggregation))
@pytest.mark.parametrize("terms", [{}, {"beta": 0.05}, {"entropy_coef": 0.01}, {"beta": 0.05, "entropy_coef": 0.01}])
def test_verls_averages_with_rows_that_have_no_token_in_the_loss(
    mode: LossAggregation, terms: dict[str, float]
) -> None:
    rows = [
        replace(row, micro_batch=None, advantage=[row.advantage * (1 + 0.1 * t) for t in range(len(row.response_ids))])
        for row in rows_of_a_step(5)
    ]
    batch = said(rows, PPO | terms | {"loss_agg": mode}, loss_type="ppo", max_completion_length=HORIZON)
    measured = measured_of(batch, spread=0.9)
    assert sum(not any(row.loss_mask or (1,)) for row in batch.responses) == 2
    expected = verls_gradients(batch, measured, mode, terms)
    found = as_pair(rule_of(batch).update(measured), batch)
    assert all(close(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert expected[0].any()
    assert bool(expected[1].any()) is ("entropy_coef" in terms)


@pytest.mark.parametrize("kl_mode", list(LossAggregation))
def test_a_kl_term_may_have_an_average_of_its_own(kl_mode: LossAggregation) -> None:
    """As SkyRL's: its loss is averaged over tokens, its KL term over responses and their tokens."""
    columns = PPO | {"beta": 0.05, "loss_agg": "token-mean"}
    rows = [replace(row, micro_batch=None) for row in rows_of_a_step(5)]
    declared: dict[str, Any] = {"loss_type": "ppo", "max_completion_length": HORIZON}
    batch = said(rows, columns | {"kl_agg": str(kl_mode)}, **declared)
    measured = measured_of(batch, spread=0.9)
    expected = verls_gradients(batch, measured, "token-mean", columns, kl_mode)[0]
    assert close(as_pair(rule_of(batch).update(measured), batch)[0], expected)
    ignored = as_pair(rule_of(said(rows, columns, **declared)).update(measured), batch)[0]
    assert close(ignored, expected) is (kl_mode is LossAggregation.TOKEN_MEAN)


def test_a_squared_log_ratio_is_refused_where_the_loss_has_none() -> None:
    batch = said(rows_of_a_step(5), PPO | {"kl_tau": 1e-3}, loss_type="ppo")
    with pytest.raises(InputError, match="that the loss ppo has no place for; expected loss_type dppo"):
        rule_of(batch)


def first_of(rows: list[Rollout], taken: Callable[[int], bool]) -> list[Rollout]:
    """The rows of mini-batch 3 are those of these places, all others are of mini-batch 4."""
    return [replace(row, mini_batch=3 if taken(i) else 4) for i, row in enumerate(rows)]


COLUMNS = PPO | {"beta": 0.05, "entropy_coef": 0.01}
AVERAGES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "rloo", "vespo")),
    *({"loss_type": "ppo", "agg": str(mode)} for mode in LossAggregation),
]


@pytest.mark.parametrize("average", AVERAGES, ids=lambda a: "-".join(a.values()))
@pytest.mark.parametrize("whole_prompts", [True, False])
def test_a_step_on_one_of_several_mini_batches_is_that_of_its_rows_alone(
    average: dict[str, Any], whole_prompts: bool
) -> None:
    """With X of all rows: only B makes it another vector, and the mean over B prompts takes that out again."""
    rows = rows_of_a_step(6)
    taken: Callable[[int], bool] = (lambda i: i < 6) if whole_prompts else (lambda i: i % 3 > 0 and i != 4)
    columns = COLUMNS | ({"loss_agg": average["agg"]} if "agg" in average else {})
    declared = {"loss_type": average["loss_type"], "max_completion_length": HORIZON}
    every = said(first_of(rows, taken), columns, **declared)
    measured = measured_of(every)
    kept = [i for i in range(len(rows)) if taken(i)]
    alone = group_rollouts([every.responses[i] for i in kept], least_responses=1)
    places = torch.tensor([t for i in kept for t in range(every.first_token[i], every.first_token[i + 1])])
    of_alone = replace(
        measured,
        log_probs=measured.log_probs[places],
        entropies=measured.entropies[places],
        scores=measured.scores[kept],
    )
    rule = rule_of(every)
    assert (rule.mini_batch, len(rule.part.responses)) == (3, len(kept))
    found, expected = as_pair(rule.update(measured), every), as_pair(rule_of(alone).update(of_alone), alone)
    for mine, theirs in zip(found, expected, strict=True):
        assert close(mine[places], theirs)
        rest = torch.ones(every.tokens, dtype=torch.bool)
        rest[places] = False
        assert not mine[rest].any()
    assert found[0].any()
    unscaled = replace(rule, loss=replace(rule.loss, scale=len(alone.groups) / len(every.groups)))
    planted, _ = as_pair(unscaled.update(measured), every)
    assert close(planted[places], expected[0]) is (len(alone.groups) == len(every.groups))


def test_advantages_by_a_rule_are_of_all_rows_and_not_of_the_mini_batch() -> None:
    rows = [
        replace(row, advantage=None, reward=float(i * i), mini_batch=i % 2) for i, row in enumerate(rows_of_a_step(6))
    ]
    batch = said(rows, COLUMNS, loss_type="dapo")
    found = rule_of(batch, advantage="rloo").advantages
    assert torch.equal(found, resolve_advantages(said([replace(r, mini_batch=None) for r in rows], COLUMNS), "rloo")[0])


def test_the_scale_multiplies_the_whole_update() -> None:
    rows = rows_of_a_step(7)
    one = said(rows, COLUMNS, loss_type="bnpo")
    half = said(rows, COLUMNS | {"loss_scale": 0.5}, loss_type="bnpo")
    measured = measured_of(one)
    for whole, part in zip(
        as_pair(rule_of(one).update(measured), one), as_pair(rule_of(half).update(measured), half), strict=True
    ):
        assert whole.any()
        assert torch.equal(0.5 * whole, part)


def test_a_weight_of_tokens_multiplies_their_loss_and_no_term_beside_it() -> None:
    rows = rows_of_a_step(8)
    weights = [[0.5 + (t + i) % 3 for t in range(len(row.response_ids))] for i, row in enumerate(rows)]
    plain = said(rows, COLUMNS, loss_type="dapo")
    weighted = said([replace(r, token_weight=w) for r, w in zip(rows, weights, strict=True)], COLUMNS, loss_type="dapo")
    measured = measured_of(plain)
    one, other = rule_of(plain).update(measured), rule_of(weighted).update(measured)
    reward, kl = (update.terms["kl"].log_probs for update in (one, other))
    assert torch.equal(reward, kl)
    assert torch.equal(one.terms["bonus"].entropies, other.terms["bonus"].entropies)  # type: ignore[arg-type]
    of_tokens = torch.tensor([w for row in weights for w in row], dtype=torch.float64)
    parts = [TokenPair.of(update.whole).log_probs - kl for update in (one, other)]
    assert torch.allclose(of_tokens * parts[0], parts[1], rtol=1e-12, atol=1e-15)


def test_rewards_may_be_missing_where_rows_have_advantages() -> None:
    rows = rows_of_a_step(9)
    with_rewards = said(rows, COLUMNS, loss_type="dapo")
    without = said([replace(row, reward=None) for row in rows], COLUMNS, loss_type="dapo")
    measured = measured_of(with_rewards)
    found, expected = (as_pair(rule_of(b).update(measured), b) for b in (without, with_rewards))
    assert torch.equal(found[0], expected[0])


def test_without_negative_advantages_the_other_terms_stay() -> None:
    batch = said(rows_of_a_step(2), COLUMNS, loss_type="dapo")
    measured = measured_of(batch)
    rule = rule_of(batch)
    found, before = rule.without_negatives().update(measured), rule.update(measured)
    for name, pair in before.terms.items():
        assert torch.equal(pair.log_probs, found.terms[name].log_probs)
    reward, kl = TokenPair.of(found.whole).log_probs, before.terms["kl"].log_probs
    negative = torch.repeat_interleave(rule.advantages, torch.tensor(batch.lengths)) < 0
    assert torch.equal(reward[negative], kl[negative])
    assert torch.equal(reward[~negative], TokenPair.of(before.whole).log_probs[~negative])


def plain(loss: str, **columns: Any) -> RolloutBatch:
    """Rows that hold nothing but tokens, advantages, and what windows divide by."""
    names = ("old_logprobs", "logprobs", "ref_logprobs", "loss_mask")
    bare = [replace(row, **dict.fromkeys(names)) for row in rows_of_a_step(2)]
    return said(bare, columns, loss_type=loss, max_completion_length=HORIZON, window_tokens=101.0)


EXACT = {name for name in LossName if name not in (LossName.SAPO, LossName.GSPO, LossName.GMPO, LossName.RLOO)}
"""Losses whose derivative at ratio 1 takes no division: the others' is A w up to rounding."""


@pytest.mark.parametrize("name", list(LossName))
def test_a_plain_row_has_one_weight_and_needs_no_forward(name: LossName) -> None:
    batch = plain(name)
    rule = rule_of(batch)
    assert not rule.needs_forward
    update = rule.update(None)
    assert isinstance(update.whole, Tensor)
    assert len(update.whole) == len(batch.responses)
    assert not update.terms
    # RLOO's loss is of the whole response at each of its tokens, so that their mean is ∇S, undivided.
    average = LengthWeight.LUSPO if name is LossName.RLOO else NAMED[name].average
    weights = resolve_advantages(batch, None)[0] * resolve_length_weights(batch, average)
    if name in EXACT:
        assert torch.equal(update.whole, weights)
    else:
        assert torch.allclose(update.whole, weights, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("weight", list(LengthWeight))
def test_a_length_weight_in_the_place_of_a_loss_is_one_weight_too(weight: LengthWeight) -> None:
    batch = plain("one of my own")
    rule = rule_of(batch, length_weight=weight)
    whole = rule.update(None).whole
    assert isinstance(whole, Tensor)
    assert torch.equal(whole, resolve_advantages(batch, None)[0] * resolve_length_weights(batch, weight))


@pytest.mark.parametrize("clip", [0.2, 1.0, 1.5])
def test_cispos_bound_holds_a_ratio_of_1_too(clip: float) -> None:
    batch = plain("cispo", epsilon_high=clip)
    whole = rule_of(batch).update(None).whole
    weights = resolve_advantages(batch, None)[0] * resolve_length_weights(batch, LengthWeight.DAPO)
    assert torch.allclose(TokenPair.of(whole).log_probs, min(clip, 1.0) * weights, rtol=1e-15, atol=0.0)


def test_rows_that_are_left_out_whole_keep_one_weight_a_response() -> None:
    batch = plain("dapo")
    rows = [replace(row, loss_mask=(int(i % 4 > 0),) * len(row.response_ids)) for i, row in enumerate(batch.responses)]
    whole = rule_of(said(rows, {})).update(None).whole
    assert isinstance(whole, Tensor)
    assert [bool(w) for w in whole] == [i % 4 > 0 for i in range(len(rows))]


def test_one_masked_token_or_one_weight_makes_it_weights_of_tokens() -> None:
    batch = plain("dapo")
    for column in ("loss_mask", "token_weight"):
        first = batch.responses[0]
        values = (0, *(1,) * (len(first.response_ids) - 1))
        rule = rule_of(said([replace(first, **{column: values}), *batch.responses[1:]], {}))
        assert not rule.needs_forward
        assert isinstance(rule.update(None).whole, TokenPair)


def test_the_trainers_own_log_probs_at_theta_are_a_ratio_of_1_without_a_clip() -> None:
    rows = rows_of_a_step(3)
    batch = said(rows, {}, loss_type="dapo")
    rule = rule_of(batch)
    assert rule.needs_forward
    found, _ = as_pair(rule.update(measured_of(batch, spread=0.0)), batch)
    same = [replace(row, old_logprobs=None) for row in rows]
    expected, _ = as_pair(rule_of(said(same, {}, loss_type="dapo")).update(None), batch)
    assert torch.equal(found, expected)


def test_the_largest_advantages_are_of_tokens_in_the_loss_and_of_rows_that_the_step_consumes() -> None:
    rows = [
        replace(row, advantage=[2.0, *[-1.0] * (len(row.response_ids) - 1)], mini_batch=i % 3 // 2)
        for i, row in enumerate(rows_of_a_step(1))
    ]
    rule = rule_of(said(rows, {}, loss_type="dapo", old_logprobs=None))
    consumed = [row for row in rows if row.mini_batch == 0]
    assert rule.part.group_sizes == (2, 2, 2, 2)
    expected = [2.0 if any(row.loss_mask or (1,)) else 0.0 for row in consumed]
    assert rule.largest_advantages.tolist() == expected
