"""Rows made of tensors as trainers lay them out are the responses laid out, and what does not fit is refused by name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import entropy_probe.integrations.rows as package
import trainer_tensors as made
from entropy_probe.data.rollouts import Rollout, group_rollouts, read_rollouts, write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows import (
    AREAL_DEFAULTS,
    OPENRLHF_DEFAULTS,
    PRIME_RL_DEFAULTS,
    SKYRL_DEFAULTS,
    SLIME_DEFAULTS,
    VERL_DEFAULTS,
    StepFacts,
    TrainersLoss,
    rows_of_areal,
    rows_of_openrlhf,
    rows_of_prime_rl,
    rows_of_skyrl,
    rows_of_slime,
    rows_of_verl,
)
from entropy_probe.losses.corrections import CorrectionMode
from entropy_probe.losses.length_weights import LossAggregation
from entropy_probe.losses.named import LossName

A, B = (11, 12), (13, 14, 15, 16)
WRITTEN = [
    # prompt, response, sampled, old, sampler, reference, advantage, reward
    Rollout(
        "a", A, (21, 22, 23, 24, 2), 1.0, (0.5, 0.0, 0.0, -1.0, 0.25), (-0.5, 0.0, 0.0, -1.25, -0.75),
        old_logprobs=(-0.375, 0.0, 0.0, -1.125, -0.875), ref_logprobs=(-0.625, 0.0, 0.0, -1.0, -0.875),
        sampled=(True, False, False, True, True),
    ),
    Rollout("a", A, (31, 2), 0.0, -0.75, (-1.125, -0.75), old_logprobs=(-1.125, -0.875), ref_logprobs=(-1.0, -0.875)),
    Rollout(
        "b", B, (41, 42, 43, 44, 45, 2), 0.5, 1.5, (-1.75, -0.5, -0.625, -0.75, -1.25, -0.75),
        old_logprobs=(-1.875, -0.375, -0.625, -0.875, -1.125, -0.875),
        ref_logprobs=(-1.375, -0.625, -0.75, -0.875, -1.0, -0.875),
    ),
    Rollout("b", B, (2,), 0.0, -2.0, (-0.75,), old_logprobs=(-0.875,), ref_logprobs=(-0.875,)),
    Rollout(
        "b", B, (51, 52, 53, 2), 0.25, -0.25, (-1.0, -1.125, 0.0, -0.75),
        old_logprobs=(-0.875, -1.125, 0.0, -0.875), ref_logprobs=(-0.875, -1.0, 0.0, -0.875),
        sampled=(True, True, False, True),
    ),
]  # fmt: skip
"""The five responses, by hand. One advantage a response where its drawn tokens have the same."""
FACTS = StepFacts(prompts=made.NAMES, rewards=made.REWARDS, temperature=0.5)

MAKERS: dict[str, Callable[[StepFacts], list[Rollout]]] = {
    "verl": lambda facts: rows_of_verl(made.verl(), facts),
    "verl-jagged": lambda facts: rows_of_verl(made.verl_jagged(), facts),
    "verl-jagged-ids": lambda facts: rows_of_verl(made.verl() | {"input_ids": made.verl_jagged()["input_ids"]}, facts),
    "openrlhf": lambda facts: rows_of_openrlhf(made.openrlhf(), facts),
    "skyrl": lambda facts: rows_of_skyrl(made.skyrl(divisors=(1.0,) * 5), facts, scaled=False),
    "slime": lambda facts: rows_of_slime(made.slime(), facts),
    "areal": lambda facts: rows_of_areal(made.areal(), facts),
    "areal-packed": lambda facts: rows_of_areal(made.areal_packed(), facts),
    "prime-rl": lambda facts: rows_of_prime_rl(made.prime_rl(), facts),
}
COUNTS = {"areal-packed": 6, "prime-rl": 6}
"""Of the trainer's rows, where some are padding."""


def for_each(facts: StepFacts, name: str) -> StepFacts:
    """The same facts of the rows that a trainer has, which may be more than the responses."""
    more = COUNTS.get(name, 5) - 5
    each = {
        field: [*values, *values[:1] * more]
        for field in ("prompts", "rewards", "mini_batches", "micro_batches", "cut")
        if (values := getattr(facts, field)) is not None
    }
    return replace(facts, **each)


def expected_of(name: str) -> list[Rollout]:
    """What the trainer's tensors hold of the responses written down."""
    if name == "prime-rl":
        # The ratio is to the sampler, and there is no reference.
        micro_batches = [index for index, bin_ in enumerate(made.BINS) for _ in bin_]
        return [
            replace(row, old_logprobs=row.logprobs, ref_logprobs=None, micro_batch=index)
            for row, index in zip(WRITTEN, micro_batches, strict=True)
        ]
    if name.startswith("areal"):
        return [replace(row, ref_logprobs=None) for row in WRITTEN]
    if name in ("openrlhf", "slime"):
        return [replace(row, cut=place == 2) for place, row in enumerate(WRITTEN)]
    return WRITTEN


@pytest.mark.parametrize("name", list(MAKERS))
def test_rows_are_the_responses_that_a_trainer_laid_out(name: str, tmp_path: Path) -> None:
    rows = MAKERS[name](for_each(FACTS, name))
    assert rows == [replace(row, temperature=0.5) for row in expected_of(name)]
    assert all(isinstance(value, float) for row in rows for value in row.logprobs or ())
    batch = group_rollouts(rows)
    assert (batch.group_sizes, batch.tokens) == ((2, 3), made.TOKENS)
    write_rollouts(rows, tmp_path / "rows.jsonl")
    assert read_rollouts(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("name", ["verl", "openrlhf", "skyrl", "slime", "areal"])
def test_rewards_stand_beside_the_tensors_and_prompts_are_told_by_their_ids(name: str) -> None:
    rows = MAKERS[name](StepFacts())
    assert [row.reward for row in rows] == made.REWARDS
    assert [row.prompt_id for row in rows] == [0, 0, 1, 1, 1]
    assert {row.temperature for row in rows} == {None}


def test_facts_of_rows_go_with_their_row_past_padding() -> None:
    facts = StepFacts(
        mini_batches=[0, 0, 1, 1, 1, 7], micro_batches=[3, 4, 5, 6, 7, 7], cut=[False] * 6, step=9, eos_ids=[2]
    )
    rows = rows_of_areal(made.areal_packed(), facts)
    assert [row.mini_batch for row in rows] == [0, 0, 1, 1, 1]
    assert [row.micro_batch for row in rows] == [3, 4, 5, 6, 7]
    assert {(row.step, row.eos_ids, row.cut) for row in rows} == {(9, (2,), False)}


def without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name not in names}


def changed(tensors: dict[str, Any], name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    value = tensors[name]
    return tensors | {name: change(value.clone() if isinstance(value, torch.Tensor) else list(value))}


def put(row: int, places: Any, value: Any) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[row, places] = value
        return values

    return change


# What masks mean


def test_a_row_of_which_the_mask_leaves_out_all_was_drawn_and_is_in_no_loss() -> None:
    rows = rows_of_verl(changed(made.verl(), "response_mask", put(1, slice(None), 0)), FACTS)
    assert (rows[1].sampled, rows[1].loss_mask) == (None, (0, 0))
    rows = rows_of_skyrl(changed(made.skyrl(), "loss_mask", put(1, slice(None), 0)), FACTS, scaled=False)
    assert (rows[1].sampled, rows[1].loss_mask) == (None, (0, 0))


def test_what_verl_rejected_of_drawn_tokens_is_in_no_loss() -> None:
    tensors = made.verl()
    before = tensors["response_mask"].clone()
    tensors = changed(changed(tensors, "response_mask", put(0, 3, 0)), "response_mask", put(1, slice(None), 0))
    rows = rows_of_verl(tensors, FACTS, sampled=before)
    assert rows[0].sampled == (True, False, False, True, True)
    assert rows[0].loss_mask == (1, 1, 1, 0, 1)
    assert rows[0].old_logprobs == WRITTEN[0].old_logprobs
    assert (rows[1].sampled, rows[1].loss_mask) == (None, (0, 0))
    assert [row.loss_mask for row in rows[2:]] == [None] * 3


def test_a_tools_output_at_a_responses_end_stays_where_the_response_is_bounded() -> None:
    rows = rows_of_verl(changed(made.verl(), "response_mask", put(2, 5, 0)), FACTS)
    assert (rows[2].response_ids[-1], rows[2].sampled) == (2, (True,) * 5 + (False,))
    rows = rows_of_openrlhf(changed(made.openrlhf(), "action_mask", put(2, 8, False)), FACTS)
    assert (rows[2].response_ids, rows[2].sampled) == ((41, 42, 43, 44, 45), None)


@pytest.mark.parametrize("name", ["openrlhf", "areal"])
def test_a_row_without_a_drawn_token_is_left_out_where_nothing_else_bounds_it(name: str) -> None:
    mask = made.MASKS[name]
    tensors = changed(getattr(made, name)(), mask, put(1, slice(None), 0))
    rows = {"openrlhf": rows_of_openrlhf, "areal": rows_of_areal}[name](tensors, FACTS)
    assert [row.response_ids[0] for row in rows] == [21, 41, 2, 51]
    assert [row.prompt_id for row in rows] == ["a", "b", "b", "b"]


def test_prime_rls_weights_of_tokens_are_in_the_loss_alone() -> None:
    batches = made.prime_rl()
    weights = torch.ones_like(batches[0]["advantages"])
    weights[0, 2], weights[0, 6] = 0.0, 2.0
    rows = rows_of_prime_rl([batches[0] | {"rl_weights": weights}, *batches[1:]], for_each(FACTS, "prime-rl"))
    assert rows[0].loss_mask == (0, 1, 1, 1, 1)
    assert rows[0].token_weight == (0.0, 0.0, 0.0, 1.0, 2.0)
    assert rows[2].token_weight is None


def test_verls_correction_is_a_tokens_weight() -> None:
    weights = torch.full_like(made.verl()["advantages"], 0.5)
    rows = rows_of_verl(made.verl() | {"rollout_is_weights": weights}, FACTS)
    assert rows[0].token_weight == (0.5, 0.0, 0.0, 0.5, 0.5)


def test_the_first_places_log_prob_is_that_of_the_second_id() -> None:
    """A planted shift by one puts another token's values into a row."""
    tensors = made.openrlhf()
    shifted = tensors | {name: torch.roll(tensors[name], 1, dims=1) for name in ("action_log_probs", "advantages")}
    assert rows_of_openrlhf(shifted, FACTS) != rows_of_openrlhf(tensors, FACTS)
    assert rows_of_areal(made.areal(), FACTS)[3].old_logprobs == (-0.875,)


# Old log-probs


def test_areals_ratio_is_to_the_sampler_where_it_computes_no_other() -> None:
    rows = rows_of_areal(without(made.areal(), "prox_logp"), FACTS)
    assert [row.old_logprobs for row in rows] == [row.logprobs for row in WRITTEN]
    rows = rows_of_areal(made.areal(), FACTS, recomputed=True)
    assert {row.logprobs for row in rows} == {None}
    assert [row.old_logprobs for row in rows] == [row.old_logprobs for row in WRITTEN]


def test_slimes_ratio_is_1_without_old_log_probs_and_to_the_sampler_where_it_is_so_set() -> None:
    assert {row.old_logprobs for row in rows_of_slime(without(made.slime(), "log_probs"), FACTS)} == {None}
    rows = rows_of_slime(made.slime(), FACTS, use_rollout_logprobs=True)
    assert [row.old_logprobs for row in rows] == [row.logprobs for row in WRITTEN]


# SkyRL's advantages


@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("mini_batches", [None, [0, 0, 1, 1, 1]])
def test_skyrls_division_is_undone_by_mini_batch(agg: str, mini_batches: list[int] | None) -> None:
    tokens = [sum(sample.drawn) for sample in made.SAMPLES]
    steps = mini_batches or [0] * 5
    divisors = []
    for row, step in enumerate(steps):
        same = [other for other in range(5) if steps[other] == step]
        of_all, responses = sum(tokens[other] for other in same), len(same)
        divisors.append({"token-mean": of_all, "seq-mean-token-mean": responses * tokens[row]}.get(agg, responses * 32))
    loss = replace(SKYRL_DEFAULTS, loss_agg=LossAggregation(agg), max_completion_length=32)
    facts = replace(FACTS, loss=loss, mini_batches=mini_batches)
    rows = rows_of_skyrl(made.skyrl(torch.float64, divisors=divisors), facts)
    for row, written in zip(rows, WRITTEN, strict=True):
        assert row.advantage == pytest.approx(written.advantage, rel=1e-15)
        assert isinstance(row.advantage, float) is isinstance(written.advantage, float)


# The loss


DEFAULTS = {
    "verl": VERL_DEFAULTS,
    "openrlhf": OPENRLHF_DEFAULTS,
    "skyrl": SKYRL_DEFAULTS,
    "slime": SLIME_DEFAULTS,
    "areal": AREAL_DEFAULTS,
    "prime-rl": PRIME_RL_DEFAULTS,
}


@pytest.mark.parametrize("name", list(DEFAULTS))
def test_a_loss_is_in_the_rows_where_the_caller_says_it(name: str) -> None:
    facts = for_each(FACTS, name)
    assert all(row.loss_type is None and not row.extra for row in MAKERS[name](facts))
    for row in MAKERS[name](replace(facts, loss=DEFAULTS[name])):
        assert row.loss_type == str(DEFAULTS[name].loss_type)
        assert row.extra | {"loss_type": row.loss_type} == DEFAULTS[name].columns()
        assert {"epsilon_low", "epsilon_high", "loss_agg"} <= row.extra.keys()


# Refusals


def wrong(change: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as refused:
        change()
    message = str(refused.value)
    assert "\n" not in message
    return message


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (lambda: rows_of_verl(without(made.verl(), "advantages")), "there is no advantages among the tensors"),
    "no ids": (lambda: rows_of_slime(without(made.slime(), "tokens")), "there is no tokens among the tensors"),
    "no lengths": (lambda: rows_of_slime(without(made.slime(), "response_lengths")), "no response_lengths"),
    "no sampler": (lambda: rows_of_areal(without(made.areal(), "logprobs")), "there is no logprobs"),
    "no tensor": (lambda: rows_of_verl(made.verl() | {"advantages": [0.0]}), "advantages is a list; expected a tensor"),
    "dimensions": (
        lambda: rows_of_openrlhf(made.openrlhf() | {"action_mask": torch.ones(5)}),
        "action_mask has shape [5]; expected 2 dimensions",
    ),
    "width": (
        lambda: rows_of_verl(changed(made.verl(), "old_log_probs", lambda t: t[:, :-1])),
        "old_log_probs has shape [5, 5]; expected [5, 6]",
    ),
    "rows": (
        lambda: rows_of_skyrl(changed(made.skyrl(), "loss_mask", lambda t: t[:-1])),
        "loss_mask has shape [4, 6]; expected [5, 6]",
    ),
    "actions": (
        lambda: rows_of_openrlhf(made.openrlhf() | {"action_mask": torch.ones(5, 10)}),
        "action_mask has shape [5, 10]; expected [5, 9]",
    ),
    "jagged and padded": (
        lambda: rows_of_verl(made.verl() | {"response_mask": made.verl_jagged()["response_mask"]}),
        "input_ids is padded, and response_mask is jagged",
    ),
    "jagged rows": (
        lambda: rows_of_verl(made.verl_jagged() | {"advantages": made.verl_jagged()["input_ids"]}),
        "advantages has rows of [7, 4, 10, 5, 8] values; expected [5, 2, 6, 1, 4]",
    ),
    "one length": (
        lambda: rows_of_slime(changed(made.slime(), "advantages", lambda rows: [rows[0][:-1], *rows[1:]])),
        "advantages has rows of [4, 2, 6, 1, 4] values; expected response_lengths",
    ),
    "stacked": (
        lambda: rows_of_slime(made.slime() | {"tokens": torch.ones(5, 4)}),
        "tokens is a Tensor; expected a list with a tensor a row",
    ),
    "denominators": (
        lambda: rows_of_slime(made.slime() | {"rollout_mask_sums": torch.tensor([5.0, 5.0, 6.0, 1.0, 3.0])}),
        "rollout_mask_sums: row 0 is divided by 5, and has 3 tokens in the loss",
    ),
    "packed": (
        lambda: rows_of_areal(changed(made.areal_packed(), "prox_logp", lambda t: t[:-1])),
        "prox_logp has 36 values, and cu_seqlens ends at 37",
    ),
    "packed samples": (
        lambda: rows_of_prime_rl([made.prime_rl()[0] | {"sequence_lengths": [7, 6]}]),
        "input_ids of micro-batch 0 has shape [1, 16]; expected [1, 13], the sum of sequence_lengths",
    ),
    "mask": (
        lambda: rows_of_verl(changed(made.verl(), "response_mask", put(0, 0, 2))),
        "response_mask holds 2; expected a mask of 0 and 1",
    ),
    "hole": (
        lambda: rows_of_verl(changed(made.verl(), "attention_mask", put(2, 6, 0))),
        "attention_mask: row 2 has padding inside of the response",
    ),
    "hole between turns": (
        lambda: rows_of_openrlhf(changed(made.openrlhf(), "attention_mask", put(0, 3, 0))),
        "row 0: padding stands inside of the response",
    ),
    "no prompt": (
        lambda: rows_of_verl(changed(made.verl(), "attention_mask", put(0, slice(0, 4), 0))),
        "row 0: no prompt stands before the response",
    ),
    "no rows": (lambda: rows_of_prime_rl([]), "none of the 0 rows has a token in its response"),
    "empty": (
        lambda: rows_of_openrlhf(made.openrlhf() | {"sequences": torch.ones(0, 4)}), "sequences has no rows"
    ),
    "facts": (
        lambda: rows_of_verl(made.verl(), StepFacts(rewards=[1.0] * 4)),
        "rewards has 4 values, and the tensors have 5 rows",
    ),
    "neither reward nor advantage finite": (
        lambda: rows_of_verl(changed(made.verl(), "advantages", put(3, 0, float("nan"))), FACTS),
        "row 3: prompt_id 'b': advantage is nan; expected a finite number",
    ),
    "log-probs": (
        lambda: rows_of_verl(changed(made.verl(), "old_log_probs", put(1, 1, 2.0)), FACTS),
        "row 1: prompt_id 'a': old_logprobs holds 2",
    ),
    "temperatures": (
        lambda: rows_of_prime_rl([changed(made.prime_rl()[0], "temperatures", put(0, 6, 0.75))]),
        "temperatures: sample 0 of micro-batch 0 has 2 of them (0.5 to 0.75)",
    ),
    "other losses": (
        lambda: rows_of_prime_rl([made.prime_rl()[0] | {"ce_weights": torch.ones(1, 16)}]),
        "micro-batch 0: ce_weights is not 0 throughout",
    ),
    "scaled by what": (lambda: rows_of_skyrl(made.skyrl(), FACTS), "advantages are divided by what SkyRL's loss averages"),
    "no reference": (
        lambda: rows_of_skyrl(without(made.skyrl(), "base_action_log_probs"), replace(FACTS, loss=SKYRL_DEFAULTS)),
        "the loss has a KL term (beta 0.001), and there is no base_action_log_probs",
    ),
    "no sampler for a correction": (
        lambda: rows_of_verl(without(made.verl(), "rollout_log_probs"), replace(FACTS, loss=CORRECTED)),
        "the loss has the correction token_truncate for the sampler, and there is no rollout_log_probs",
    ),
    "corrected twice": (
        lambda: rows_of_verl(
            made.verl() | {"rollout_is_weights": made.verl()["advantages"]}, replace(FACTS, loss=CORRECTED)
        ),
        "rollout_is_weights is the correction for the sampler, and the loss names token_truncate as well",
    ),
    "recomputed": (
        lambda: rows_of_areal(made.areal(), replace(FACTS, loss=CORRECTED), recomputed=True),
        "logprobs are recomputed, so that none of the sampler's are left",
    ),
}  # fmt: skip
CORRECTED = TrainersLoss(LossName.PPO_CLIP, importance_sampling_mode=CorrectionMode.TOKEN_TRUNCATE)


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_refused_in_a_line_that_names_it(case: str) -> None:
    change, expected = REFUSED[case]
    assert expected in wrong(change)


@pytest.mark.parametrize("module", [found.name for found in pkgutil.iter_modules(package.__path__)])
def test_the_examples_run(module: str) -> None:
    tests = doctest.testmod(
        importlib.import_module(f"{package.__name__}.{module}"), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tests.failed == 0
    assert tests.attempted > 0 or module in {"cutting", "defaults", "tensors"}
