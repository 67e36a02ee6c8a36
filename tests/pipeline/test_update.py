"""The update's coefficients from rows as files have them, against the gradient of TRL's own loss over a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_probe.data.groups import repeat_by_group
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.losses.length_weights import length_weights
from entropy_probe.losses.objective import Objective, TokenWeights
from entropy_probe.losses.rows import LossRows
from entropy_probe.model.measured import Measured
from entropy_probe.pipeline import inputs
from entropy_probe.pipeline.update import UpdateRule
from trl_loss import BY_NAME, CASES, DEFAULTS, MAX_LENGTH, STEPS, TRLCase, rloo_gradient, trls_gradients
from update_rows import MICRO_BATCHES, as_pair, loss_rows, measured_of, rows_of_a_step, rule_of, said

TOLERANCE = 1e-12
OTHER_WINDOWS = 41.0
"""Tokens of the generation batch that other steps consume."""


def columns_of(case: TRLCase) -> dict[str, Any]:
    """As a recorder says a configuration, TRL's defaults included where they have an effect."""
    columns = {name: value for name, value in (DEFAULTS | case.options).items() if value is not None}
    if case.correction is not None:
        columns |= {
            "importance_sampling_mode": str(case.correction.mode),
            "importance_sampling_clip_min": case.correction.low,
            "importance_sampling_clip_max": case.correction.high,
        }
    return columns


@dataclass(frozen=True)
class Step:
    """A step of TRL's: its rows with their columns, what θ makes of them, and over how many processes they are dealt."""

    case: TRLCase
    batch: RolloutBatch
    measured: Measured
    processes: int = 1

    @staticmethod
    def of(case: TRLCase, rows: Sequence[Rollout] | None = None, *, processes: int = 1, seed: int = 0) -> Step:
        rows = rows_of_a_step(seed) if rows is None else rows
        tokens = sum(sum(row.at_sampled(row.loss_mask or (1,) * len(row.response_ids))) for row in rows)
        window = (tokens + OTHER_WINDOWS) / STEPS
        batch = said(
            rows, columns_of(case), loss_type=case.loss_type, window_tokens=window, max_completion_length=MAX_LENGTH
        )
        return Step(case, batch, measured_of(batch, seed + 1), processes)

    @property
    def rule(self) -> UpdateRule:
        return rule_of(self.batch)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """TRL's own, micro-batch after micro-batch: minus the gradient by log π and by H of every response token."""
        batch, first = self.batch, self.batch.first_token
        expected = torch.zeros(batch.tokens, dtype=torch.float64), torch.zeros(batch.tokens, dtype=torch.float64)
        window = batch.responses[0].window_tokens
        assert window is not None
        parts = sorted({row.micro_batch or 0 for row in batch.responses})
        for part in parts:
            kept = [i for i, row in enumerate(batch.responses) if row.micro_batch == part]
            found = trls_gradients(
                self.case,
                loss_rows(batch, self.measured, kept),
                accumulation=len(parts) // self.processes,
                processes=self.processes,
                items=STEPS * window,
            )
            places = torch.tensor([t for i in kept for t in range(first[i], first[i + 1])])
            for whole, values in zip(expected, found, strict=True):
                whole[places] = values
        return expected

    def error(self, rule: UpdateRule | None = None) -> float:
        """How far the coefficients of a rule are from TRL's, as a share of the largest."""
        found = as_pair((rule or self.rule).update(self.measured), self.batch)
        return max(_error(mine, theirs) for mine, theirs in zip(found, self.gradients(), strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / (largest or 1.0)


DEALT = [(case, 1) for case in CASES] + [(case, 2) for case in CASES if "top_entropy_quantile" not in case.options]
"""TRL takes that quantile over the micro-batches of all processes, of which rows do not tell."""


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize(("case", "processes"), DEALT, ids=lambda value: getattr(value, "name", value))
def test_a_whole_step_has_the_gradient_of_trls_loss(case: TRLCase, processes: int, seed: int) -> None:
    step = Step.of(case, processes=processes, seed=seed)
    assert {row.micro_batch for row in step.batch.responses} == set(range(MICRO_BATCHES))
    assert step.error() <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tool_output_is_in_no_loss_and_no_count(case: TRLCase) -> None:
    """TRL multiplies its masks; here such tokens are in no column at all."""
    rows = [
        replace(row, sampled=[t != 1 for t in range(len(row.response_ids))]) if i % 2 else row
        for i, row in enumerate(rows_of_a_step(3))
    ]
    step = Step.of(case, rows)
    assert step.batch.tokens == sum(len(row.response_ids) - i % 2 for i, row in enumerate(rows))
    assert step.error() <= TOLERANCE


def uneven() -> list[Rollout]:
    rows = [row for i, row in enumerate(rows_of_a_step(4)) if i not in (0, 3)]
    return [replace(row, micro_batch=i % 2) for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "sapo", "luspo"])
def test_a_mean_by_prompt_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step.of(BY_NAME[name], uneven())

    def by_prompt(lengths: Sequence[int], sizes: Sequence[int], *given: Any, **constants: Any) -> Tensor:
        counts = repeat_by_group(sizes, sizes)
        return length_weights(lengths, sizes, *given, **constants) * len(lengths) / (len(sizes) * counts)

    monkeypatch.setattr(inputs, "length_weights", by_prompt)
    assert step.error() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_dealt_out_unevenly_over_prompts_count_alike(case: TRLCase) -> None:
    """One of several steps on a shuffled batch: TRL's mean is over rows, whatever prompt they are of."""
    step = Step.of(case, uneven())
    assert sorted(step.batch.group_sizes) != [step.batch.group_sizes[0]] * len(step.batch.groups)
    assert step.error() <= TOLERANCE


@pytest.mark.parametrize("by_name", [True, False])
def test_gspo_by_its_name_is_the_ratio_of_responses(by_name: bool) -> None:
    step = Step.of(BY_NAME["kl-corrected-sequence"])
    if by_name:
        columns = columns_of(step.case)
        del columns["importance_sampling_level"]
        rule = rule_of(said(step.batch.responses, columns, loss_type="gspo"))
        assert step.error(rule) <= TOLERANCE
    else:
        assert step.error() <= TOLERANCE


@pytest.mark.parametrize("seed", [0, 10])
def test_rloo_over_micro_batches(seed: int) -> None:
    rows = rows_of_a_step(seed)
    step = Step.of(TRLCase("rloo", "rloo"), rows, seed=seed)
    quiet = measured_of(step.batch, seed + 1, spread=0.05)
    first = step.batch.first_token
    expected = torch.zeros(step.batch.tokens, dtype=torch.float64)
    for part in range(MICRO_BATCHES):
        kept = [i for i, row in enumerate(step.batch.responses) if row.micro_batch == part]
        places = torch.tensor([t for i in kept for t in range(first[i], first[i + 1])])
        expected[places] = rloo_gradient(loss_rows(step.batch, quiet, kept), accumulation=MICRO_BATCHES)
    found, _ = as_pair(step.rule.update(quiet), step.batch)
    assert _error(found, expected) <= TOLERANCE
    assert expected.any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_terms_are_told_apart(case: TRLCase) -> None:
    """The KL term is what beta = 0 would take away, and the bonus all that stands on ∇H."""
    step = Step.of(case)
    update = step.rule.update(step.measured)
    names = {"beta": "kl", "entropy_coef": "bonus"}
    assert set(update.terms) == {name for column, name in names.items() if case.options.get(column)}
    without = rule_of(said(step.batch.responses, columns_of(case) | {"beta": 0.0, "entropy_coef": 0.0}))
    reward, none = as_pair(without.update(step.measured), step.batch)
    whole, bonus = as_pair(update, step.batch)
    assert not none.any()
    kl = torch.zeros_like(reward)
    if "kl" in update.terms:
        kl = update.terms["kl"].log_probs / len(step.batch.groups)
    assert torch.allclose(whole, reward + kl, rtol=1e-12, atol=1e-15)
    if "bonus" in update.terms:
        entropies = update.terms["bonus"].entropies
        assert entropies is not None
        assert torch.equal(entropies / len(step.batch.groups), bonus)
        assert not update.terms["bonus"].log_probs.any()


class KLUnderTheCorrection(Objective):
    """A bug: TRL adds the KL term after the correction."""

    def token_weights(self, rows: LossRows, average: Tensor, kl_average: Tensor | None = None) -> TokenWeights:
        found = super().token_weights(rows, average, kl_average)
        assert self.correction is not None
        assert found.kl is not None
        return replace(found, kl=found.kl * self.correction.weights(rows))


def test_a_kl_term_under_the_correction_is_seen() -> None:
    step = Step.of(replace(BY_NAME["vllm-token_mask"], options={"beta": 0.04, "use_bias_correction_kl": False}))
    objective = step.rule.loss.objective
    planted = KLUnderTheCorrection(objective.loss, objective.correction, kl=objective.kl)
    assert step.error() <= TOLERANCE
    assert step.error(replace(step.rule, loss=replace(step.rule.loss, objective=planted))) > 1e-3


@pytest.mark.parametrize("name", ["grpo", "bnpo", "sapo"])
def test_an_average_that_counts_masked_tokens_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step.of(BY_NAME[name])
    monkeypatch.setattr(LossRows, "tokens_in_loss", property(lambda rows: list(rows.lengths)))
    assert step.error() > 1e-3


@pytest.mark.parametrize("name", ["bonus", "bnpo", "bonus-quantile", "entropy-quantile"])
def test_micro_batches_taken_as_one_are_seen(name: str) -> None:
    step = Step.of(BY_NAME[name])
    whole = said(
        [replace(row, micro_batch=0) for row in step.batch.responses],
        columns_of(step.case),
    )
    assert step.error(rule_of(whole)) > 1e-3


@pytest.mark.parametrize("column", ["old_logprobs", "loss_mask", "micro_batch", "window_tokens"])
def test_a_column_that_is_dropped_is_seen(column: str) -> None:
    case = replace(BY_NAME["all"], loss_type="bnpo" if column == "micro_batch" else "dapo")
    step = Step.of(case)
    lacking = said([replace(row, **{column: None}) for row in step.batch.responses], columns_of(case))
    assert step.error() <= TOLERANCE
    assert step.error(rule_of(lacking)) > 1e-3
