"""Rows and options that describe no loss, or one that lacks something: exit code 2, one line, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spoiled import Place, Row, refuse_run

Edit = Callable[[Row, int], Any]


def tokens(row: Row, value: float) -> list[float]:
    return [value] * len(row["response_ids"])


def every(**columns: Any) -> Edit:
    """In every row; a function is called with the row."""
    return lambda row, _: row.update({n: v(row) if callable(v) else v for n, v in columns.items()})


def last(**columns: Any) -> Edit:
    """In the last row alone, of prompt p3."""
    return lambda row, left: None if left else every(**columns)(row, 0)


def both(*edits: Edit) -> Edit:
    return lambda row, left: [edit(row, left) for edit in edits]


OLD = {"old_logprobs": lambda row: tokens(row, -2.5)}
REFERENCE = {"ref_logprobs": lambda row: tokens(row, -2.5)}
SAMPLER = {"logprobs": lambda row: tokens(row, -2.5)}
LOSS = {"loss_type": "dapo"}

ROWS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "mask-too-short": (last(loss_mask=[1]), ("loss_mask", "expected one each")),
    "mask-too-long": (last(loss_mask=lambda row: [*tokens(row, 1), 1]), ("loss_mask", "expected one each")),
    "mask-of-halves": (last(loss_mask=lambda row: tokens(row, 0.5)), ("loss_mask holds 0.5", "0 and 1 alone")),
    "weights-too-short": (last(token_weight=[]), ("0 token_weight",)),
    "off-policy-without-log-probs": (
        both(every(**LOSS), last(on_policy=False)),
        ("on_policy false", "no old_logprobs; give"),
    ),
    "reference-above-0": (last(ref_logprobs=lambda row: tokens(row, 0.5)), ("ref_logprobs holds 0.5",)),
    "old-above-0": (last(old_logprobs=lambda row: tokens(row, 0.5)), ("old_logprobs holds 0.5",)),
    "kl-without-reference": (every(**LOSS, beta=0.1), ("without ref_logprobs", "the KL term needs")),
    "reference-in-some-rows": (
        both(every(**LOSS, beta=0.1, **REFERENCE), last(ref_logprobs=None)),
        ("1 of 8 rows have no ref_logprobs",),
    ),
    "correction-without-sampler": (
        every(**LOSS, importance_sampling_mode="token_mask", logprobs=None),
        ("without logprobs", "correction for the sampler needs"),
    ),
    "sampler-in-some-rows": (
        both(every(**LOSS, **SAMPLER, off_policy_mask_threshold=0.1), last(logprobs=None)),
        ("without logprobs", "off-policy mask needs"),
    ),
    "bound-without-mode": (
        every(**LOSS, importance_sampling_clip_max=2.0),
        ("importance_sampling_clip_max", "name no importance_sampling_mode", "sequence_mask"),
    ),
    "loss": (every(loss_type="grpx"), ("loss_type is 'grpx'", "known are", "luspo")),
    "kl-estimator": (every(**LOSS, kl_estimator="k9"), ("kl_estimator is 'k9'", "known are", "k3")),
    "mode": (every(**LOSS, importance_sampling_mode="mask"), ("importance_sampling_mode is 'mask'", "token_mask")),
    "level": (every(**LOSS, importance_sampling_level="turn"), ("importance_sampling_level is 'turn'", "sequence")),
    "aggregation": (every(**LOSS, loss_agg="mean"), ("loss_agg is 'mean'", "seq-mean-token-sum-norm")),
    "gspo-of-tokens": (
        every(loss_type="gspo", importance_sampling_level="token"),
        ("importance_sampling_level is token", "gspo"),
    ),
    "vespo-by-responses": (
        every(loss_type="vespo", importance_sampling_mode="sequence_mask"),
        ("importance_sampling_mode is sequence_mask", "token_truncate or token_mask"),
    ),
    "gmpo-by-tokens": (
        every(loss_type="gmpo", importance_sampling_mode="token_mask"),
        ("importance_sampling_mode is token_mask", "sequence_truncate or sequence_mask"),
    ),
    "rows-that-disagree": (both(every(**LOSS, beta=0.1), last(beta=0.2)), ("disagree about beta (0.1 and 0.2)",)),
    "one-row-without": (both(every(**LOSS, beta=0.1), last(beta=None)), ("disagree about beta (0.1 and None)",)),
    "no-clip": (every(**LOSS, **OLD), ("old_logprobs differ", "give epsilon_low and epsilon_high")),
    "no-clip-of-cispo": (
        every(loss_type="cispo", epsilon_low=0.2, **OLD),
        ("old_logprobs differ", "give epsilon_low and epsilon_high"),
    ),
    "beta-as-text": (every(**LOSS, beta="0.1"), ("beta is '0.1'", "expected a finite number")),
    "beta-negative": (every(**LOSS, beta=-0.1), ("beta is -0.1", "0 or above")),
    "beta-as-truth": (every(**LOSS, beta=True), ("beta is True",)),
    "scale-as-list": (every(**LOSS, loss_scale=[1.0, 2.0]), ("loss_scale is [1.0, 2.0]", "expected a finite number")),
    "bias-correction-as-number": (every(**LOSS, use_bias_correction_kl=1), ("use_bias_correction_kl is 1",)),
    "quantile-of-none": (every(**LOSS, top_entropy_quantile=0), ("top_entropy_quantile is 0", "1 at most")),
    "quantile-above-1": (every(**LOSS, top_entropy_quantile=1.5), ("top_entropy_quantile is 1.5",)),
    "quantile-of-processes": (
        every(**LOSS, top_entropy_quantile=0.5, num_processes=2),
        ("top_entropy_quantile", "all its processes"),
    ),
    "constant-missing": (every(loss_agg="seq-mean-token-sum-norm"), ("max_completion_length",)),
    "mini-batch-of-some-rows": (last(mini_batch=1), ("7 of 8 rows have no mini_batch",)),
    "mini-batch-as-text": (last(mini_batch="first"), ("mini_batch is 'first'", "expected an integer")),
}
OF_ALL_ROWS = {
    *(
        "loss",
        "constant-missing",
        "bound-without-mode",
        "quantile-of-none",
        "quantile-above-1",
        "quantile-of-processes",
    ),
    *("gspo-of-tokens", "vespo-by-responses", "gmpo-by-tokens"),
}
"""Faults of what all rows say alike, of which none is the culprit."""


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_describe_no_loss_are_refused_with_the_row(place: Place, name: str) -> None:
    edit, culprits = ROWS[name]
    place.edit_rows(lambda rows: [edit(row, len(rows) - 1 - i) for i, row in enumerate(rows)])
    named = () if name in OF_ALL_ROWS else ("prompt_id 'p",)
    refuse_run(place, *culprits, *named)


OPTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "two-averages": (
        ["--loss-agg", "token-mean", "--length-weight", "dapo"],
        ("loss_agg is token-mean and length_weight dapo",),
    ),
    "loss": (["--loss", "nonsense"], ("--loss",)),
    "aggregation": (["--loss-agg", "mean"], ("--loss-agg",)),
    "estimator": (["--beta", "0.1", "--kl-estimator", "k9"], ("--kl-estimator",)),
    "estimator-of-nothing": (["--kl-estimator", "k3"], ("kl_estimator is k3", "no KL term")),
    "kl-without-reference": (["--beta", "0.1"], ("prompt_id 'p0'", "without ref_logprobs")),
    "beta-negative": (["--beta", "-1"], ("beta is -1",)),
    "beta-text": (["--beta", "x"], ("--beta",)),
    "bonus-nan": (["--entropy-coef", "nan"], ("entropy_coef is nan",)),
    "epsilon-infinite": (["--epsilon-low", "inf"], ("epsilon_low is inf",)),
    "epsilon-negative": (["--epsilon-high", "-0.2"], ("epsilon_high is -0.2",)),
    "constant-missing": (["--loss", "dr_grpo"], ("max_completion_length",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_describe_no_loss_are_refused(place: Place, name: str) -> None:
    options, culprits = OPTIONS[name]
    refuse_run(place, *culprits, options=options)
