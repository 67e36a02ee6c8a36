"""What a report says of the loss, and of which rows the update is, by real probes of rows with all that a loss may use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import support
from entropy_probe import Settings, group_rollouts, probe, state_of_optimizer
from entropy_probe.common.source import Source
from entropy_probe.losses.length_weights import LengthWeight, LossAggregation
from entropy_probe.losses.named import LossName
from entropy_probe.report import Report
from entropy_probe.report.rollout_warnings import advantage_warnings, loss_warnings, pairing_warnings
from entropy_probe.report.rows import Rows
from entropy_probe.report.sections.base import Context
from entropy_probe.report.sections.config import ConfigSection

KL = {"beta": 0.04, "entropy_coef": 0.01}
CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}


def rows_of(columns: dict[str, Any], **declared: Any) -> list[support.Rollout]:
    """Rows with log-probs of three policies, four prompts with three responses each."""
    rows = []
    for i, row in enumerate(support.random_rollouts(4, 3, seed=3)):
        values = {name: [-3.0] * len(row.response_ids) for name in ("old_logprobs", "ref_logprobs", "logprobs")}
        declared_here = {name: value(i, row) if callable(value) else value for name, value in declared.items()}
        rows.append(replace(row, extra=columns, **({"advantage": float(i % 3 - 1)} | values | declared_here)))
    return rows


def report_of(columns: dict[str, Any], settings: Settings | None = None, **declared: Any) -> Report:
    model = support.tiny_model(dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    asked = settings or Settings(noise=False, sampler_weights="off")
    return probe(model, adam, group_rollouts(rows_of(columns, **declared)), asked).report


def facts(report: Report) -> dict[str, str]:
    """What the terminal shows of the settings, by label."""
    (block,) = report.config.shown(Context("nats", 4, 1, "float64"))
    assert isinstance(block, Rows)
    return {row.label: " ".join([row.value, row.note]).strip() for row in block.rows}


def codes(report: Report) -> set[str]:
    return {warning.code for warning in report.warnings}


def test_the_terms_of_the_loss_are_named() -> None:
    report = report_of(KL | CLIP, loss_type="dapo")
    found = facts(report)
    assert found["loss"] == "dapo, KL 0.04 (k3), entropy bonus 0.01, ratio clipped at 0.2/0.28"
    assert found["update"] == "of all 12 responses as one step: no row has a mini_batch"
    config = report.to_dict()["config"]
    assert (config["importance_ratios"], config["mini_batch"], config["update_responses"]) == (True, None, 12)


def test_the_mini_batch_that_the_update_is_of_is_named() -> None:
    report = report_of(CLIP, loss_type="grpo", mini_batch=lambda i, _: i % 2)
    assert facts(report)["update"] == "of mini-batch 0 6 of 12 responses"
    config = report.to_dict()["config"]
    assert (config["mini_batch"], config["update_responses"], config["responses"]) == (0, 6, 12)
    assert config["importance_sampling_level"] == "token"


def test_masks_and_corrections_are_named() -> None:
    columns = {
        "importance_sampling_mode": "token_truncate",
        "importance_sampling_level": "sequence",
        "top_entropy_quantile": 0.2,
        "off_policy_mask_threshold": 0.5,
        "loss_scale": 2.0,
    }
    found = facts(report_of(columns | CLIP, loss_type="grpo"))["loss"]
    assert found == (
        "grpo, ratio of a response clipped at 0.2/0.28, corrected for the sampler (token_truncate), "
        "top 20 % of tokens by entropy, off-policy mask at 0.5, times 2"
    )


def test_plain_rows_are_said_as_they_were() -> None:
    report = report_of(CLIP, loss_type="grpo", old_logprobs=None, ref_logprobs=None)
    found = facts(report)
    assert "loss" not in found
    assert "update" not in found
    config = report.to_dict()["config"]
    assert config["importance_ratios"] is False
    assert config["update_responses"] == config["responses"] == 12


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("cispo", "ratio at most 0.28"),
        ("rloo", "ratio of a response clipped at 0.2/0.28"),
        ("sapo", "ratio not clipped"),
    ],
)
def test_a_ratio_is_said_as_the_loss_takes_it(loss: str, expected: str) -> None:
    assert facts(report_of(CLIP, loss_type=loss))["loss"] == f"{loss}, {expected}"


def test_a_clip_that_nothing_names_is_said_to_be_assumed() -> None:
    settings = Settings(length_weight="dapo", epsilon_low=0.2, epsilon_high=0.2, noise=False, sampler_weights="off")
    report = report_of({}, settings)
    assert "loss_assumed" in codes(report)
    assert facts(report)["loss"] == "PPO's clip, ratio clipped at 0.2/0.2"
    assert "loss_assumed" not in codes(report_of(CLIP, loss_type="ppo"))
    assert [w.code for w in loss_warnings(LengthWeight.GUIDE, Source.UNKNOWN)] == ["length_weight_assumed"]


def test_a_bonus_without_micro_batches_is_taken_as_of_one() -> None:
    found = codes(report_of(KL | CLIP, loss_type="dapo"))
    assert "one_micro_batch" in found
    assert "one_micro_batch" not in codes(report_of(KL | CLIP, loss_type="dapo", micro_batch=0))
    assert "one_micro_batch" not in codes(report_of(KL | CLIP, loss_type="ppo"))


def batch_of(columns: dict[str, Any], loss_type: str | None) -> Any:
    return group_rollouts(rows_of(columns, loss_type=loss_type))


def test_another_loss_than_the_rows_own_is_told_from_another_average() -> None:
    dapo, ppo = batch_of({}, "dapo"), batch_of({"loss_agg": "seq-mean-token-mean"}, "ppo")
    assert pairing_warnings(dapo, None, LengthWeight.DAPO, LossName.DAPO) == []
    (other,) = pairing_warnings(dapo, None, LengthWeight.GRPO, LossName.GRPO)
    assert (other.code, other.seen) == ("other_loss", "the rollouts come from loss_type dapo, the loss here is grpo")
    assert "Set the loss to dapo, or leave it out" in other.advice
    (averaged,) = pairing_warnings(dapo, None, LengthWeight.GRPO, LossName.DAPO)
    assert "length weight here is grpo" in averaged.seen
    # verl's loss is named apart from its average, which is no contradiction.
    assert pairing_warnings(ppo, None, LossAggregation.SEQ_MEAN_TOKEN_MEAN, LossName.PPO) == []
    (agg,) = pairing_warnings(ppo, None, LossAggregation.TOKEN_MEAN, LossName.PPO)
    assert "loss_agg seq-mean-token-mean, the length weight here is token-mean" in agg.seen


def test_prompts_without_advantage_are_counted_by_tokens_and_beside_other_terms() -> None:
    (plain,) = advantage_warnings(torch.zeros(4), [2, 2])
    assert "give no update" in plain.seen
    (beside,) = advantage_warnings(torch.zeros(4), [2, 2], ("the KL term", "the entropy bonus"))
    assert beside.seen.endswith("give no update but that of the KL term and the entropy bonus")
    # Where they cancel in the mean of a response, its tokens have advantages all the same.
    cancelling = report_of(CLIP, loss_type="dapo", advantage=lambda _, row: alternating(len(row.response_ids)))
    assert "zero_advantage_groups" not in codes(cancelling)


def alternating(tokens: int) -> list[float]:
    """Advantages that sum to 0 where there is an even number."""
    return [float((-1) ** t) for t in range(tokens)]


def test_every_key_of_the_loss_is_in_the_report() -> None:
    config = report_of(KL | CLIP, loss_type="dapo").to_dict()["config"]
    names = {f.name for f in ConfigSection.__dataclass_fields__.values()}
    assert names == set(config)
