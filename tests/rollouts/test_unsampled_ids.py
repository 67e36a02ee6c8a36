"""Ids that nobody sampled: padding beside what was sampled, and ids after an end token, are refused, or dropped by a mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
from entropy_probe import (
    InputError,
    Rollout,
    RolloutBatch,
    Settings,
    group_rollouts,
    probe,
    read_rollouts,
    state_of_optimizer,
    write_rollouts,
)
from entropy_probe.checkpoints import tokenizer_ids
from entropy_probe.data.rollouts import SpecialIds, doubtful_rows, refuse_unsampled
from entropy_probe.model.input_limits import special_ids
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.report.rollout_warnings import padding_warnings
from entropy_probe.targets.choices import Estimator
from rank_processes import on_ranks
from spoiled import Place, refuse_run
from support import EOS, random_rollouts, run_command, tiny_model, trained_optimizer

PAD = 0
APART = SpecialIds(pad=(PAD,), end=(EOS,), stop=(EOS,), begin=(2,))
"""Pad, end and begin are three ids, as the test models have them."""
TOLD = replace(APART, stop=(EOS, 12))
"""The tokenizer names an end token that the model's config does not."""
SHARED = SpecialIds(pad=(EOS,), end=(EOS, 9), stop=(EOS, 9))
"""The end token pads, as many chat models have it."""


def batch_of(*responses: Sequence[int], **columns: Any) -> RolloutBatch:
    return group_rollouts(
        Rollout(f"p{n // 2}", (3 + n // 2,), tuple(ids), 0.0, **columns) for n, ids in enumerate(responses)
    )


def of_prompts(*prompts: Sequence[int], **columns: Any) -> RolloutBatch:
    return group_rollouts(
        Rollout(n, tuple(ids), (5, EOS), 0.0, **columns) for n, ids in enumerate(prompts) for _ in range(2)
    )


SOUND = ((5, EOS), (6, 7, EOS), (8, 9, 10))
PADDED: dict[str, tuple[RolloutBatch, SpecialIds, tuple[str, ...]]] = {
    "a run": (batch_of(*SOUND, (5, 6, PAD, PAD)), APART, ("pad id 0", "1 of 4 rows", "2 of 4 ids", "'p1'")),
    "of every row": (batch_of(*((*ids, PAD, PAD) for ids in ((5,), (6,), (7,), (8,)))), APART, ("4 of 4 rows",)),
    "one after the end token": (batch_of(*SOUND, (5, EOS, PAD)), APART, ("end with padding", "1 of 4 rows", "1 of 3 ids")),
    "one after the tokenizer's end token": (batch_of(*SOUND, (5, 12, PAD)), TOLD, ("end with padding", "1 of 3 ids")),
    "two there in a rare row": (batch_of(*SOUND * 6, (5, 6), (5, 12, PAD, PAD)), TOLD, ("1 of 20 rows", "2 of 4 ids")),
    "nothing else": (batch_of(*SOUND, (PAD, PAD)), APART, ("2 of 2 ids",)),
    "one alone": (batch_of(*SOUND, (PAD,)), APART, ("1 of 1 ids",)),
    "one, though not cut": (batch_of(*SOUND, (5, PAD), cut=False), APART, ("1 of 2 ids",)),
    "log-probs of 0": (batch_of((5, 6), (6, 7), (5, 5), (5, PAD), logprobs=(-1.0, 0.0)), APART, ("1 of 2 ids",)),
    "the end token twice": (batch_of(*SOUND, (5, EOS, EOS)), SHARED, ("stands once", "1 of 3 ids")),
    "a pad of the tokenizer's": (batch_of(*SOUND, (5, 12, 12)), replace(APART, pad=(PAD, 12)), ("pad id 12",)),
    "rows that end elsewhere": (batch_of(*SOUND, (5, PAD, PAD), eos_ids=(7,)), APART, ("2 of 3 ids",)),
    "cut there, with no log-prob": (
        batch_of((5, PAD, PAD), (5, 6, 7), (5, 6, 7), (5, 6, 7), eos_ids=(EOS,), cut=True, logprobs=(-1.0, 0.0, 0.0)),
        APART,
        ("2 of 3 ids",),
    ),
    "after the end": (batch_of(*SOUND, (5, EOS, 6)), APART, ("go on after an end token of the model", "id 1 at place 1 of 3")),
    "after another end": (batch_of((5, 9, 6), *SOUND[:2], (7,)), SHARED, ("id 9 at place 1 of 3", "1 of 4 rows")),
    "after the rows' own end": (batch_of((5, 7, 6), (5, 7), (6,), (6,), eos_ids=(7,)), APART, ("end token of eos_ids", "id 7")),
    "a prompt's start": (of_prompts((PAD, PAD, 5), (3, 4, 5)), APART, ("2 of 4 rows", "prompt_id 0 begins with 2, of 3")),
    "one there": (of_prompts((PAD, 5), (3, 4)), APART, ("2 of 4 rows", "begins with 1, of 2 ids")),
    "a prompt's end": (of_prompts((3, 4, PAD, PAD), (3, 4, 5, 6)), APART, ("ends with 2, of 4 ids",)),
    "one at a prompt's end": (of_prompts((3, 4, PAD), (3, 4, 5)), APART, ("2 of 4 rows", "ends with 1, of 3 ids")),
    "unknown twice at a prompt's end": (
        of_prompts((3, PAD, PAD), (3, 4, 5)), replace(APART, unknown=(PAD,)), ("ends with 2",)
    ),
    "more than a beginning": (of_prompts((PAD, PAD, 5), (PAD, 4, 5)), replace(APART, begin=(PAD,)), ("2 of 4 rows",)),
    "a beginning of some": (of_prompts((PAD, 5), (3, 4)), replace(APART, begin=(PAD,)), ("begins with 1",)),
    "two in rows that are not rare": (batch_of(*SOUND * 6, (5, PAD, PAD), (6, PAD, PAD)), APART, ("2 of 20 rows",)),
    "three in a rare row": (batch_of(*SOUND * 6, (5, 6), (6, PAD, PAD, PAD)), APART, ("1 of 20 rows",)),
    "two that the sampler would not draw": (
        batch_of((5, 6, 7), (5, 6, 7), (5, 6, 7), (5, PAD, PAD), logprobs=(-1.0, -6.0, -6.5)), APART, ("1 of 4 rows",)
    ),
    "unknown twice": (of_prompts((PAD, PAD, 5), (3, 4)), replace(APART, unknown=(PAD,)), ("begins with 2",)),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_ids_that_nobody_sampled_are_refused_with_their_rows_and_the_way_out(name: str) -> None:
    batch, special, culprits = PADDED[name]
    with pytest.raises(InputError) as caught:
        refuse_unsampled(batch, special, "the rollouts")
    for culprit in (*culprits, "the rollouts"):
        assert culprit in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) <= 250


RIGHT: dict[str, tuple[RolloutBatch, SpecialIds, tuple[int, int]]] = {
    "ends and cuts": (batch_of(*SOUND, (5,)), APART, (0, 0)),
    "a pad within": (batch_of(*SOUND, (5, PAD, PAD, 6)), APART, (0, 0)),
    "the pad is the end": (batch_of(*SOUND[:2], (5, 9), (5, 6, EOS)), SHARED, (0, 0)),
    "nothing is known": (batch_of(*SOUND, (5, EOS, PAD, PAD)), SpecialIds(), (0, 0)),
    "one at the end may be": (batch_of(*SOUND, (5, PAD)), APART, (0, 1)),
    "one id each": (batch_of((PAD,), (5,), (6,), (7,)), APART, (0, 1)),
    "the sampler says so": (
        batch_of((5, PAD, PAD), (5, 6, 7), (5, 6, 7), (5, 6, 7), eos_ids=(EOS,), cut=True, logprobs=(-1.0, -2.0, -3.0)),
        APART,
        (0, 0),
    ),
    "two in a rare row may be": (batch_of(*SOUND * 6, (5, 6), (6, PAD, PAD)), APART, (0, 1)),
    "two that the sampler may draw": (
        batch_of((5, 6, 7), (5, 6, 7), (5, 6, 7), (5, PAD, PAD), logprobs=(-1.0, -3.5, -4.0)), APART, (0, 1)
    ),
    "rows that stop elsewhere": (batch_of((5, EOS, 7), (EOS, 7), (6,), (6,), eos_ids=(7,)), APART, (0, 0)),
    "rows that never stop": (batch_of((5, EOS, 7), (EOS, 7), (6,), (6,), eos_ids=()), APART, (0, 0)),
    "all begin with it": (of_prompts((PAD, 5), (PAD, 4)), replace(APART, begin=(PAD,)), (0, 0)),
    "it is unknown text": (of_prompts((PAD, 5), (3, 4)), replace(APART, unknown=(PAD,)), (2, 0)),
    "a template ends so": (of_prompts((3, 4, PAD), (3, PAD)), APART, (0, 0)),
    "an end token ends some": (of_prompts((3, 4, EOS), (3, 4, 5)), SHARED, (0, 0)),
    "a mask says that the end was seen": (
        of_prompts((3, 4, PAD), (3, 4, 5), extra={"prompt_attention_mask": [1, 1, 1]}), APART, (0, 0)
    ),
    "the tokenizer's end token before the model's, which pads": (
        batch_of(*SOUND, (5, 12, EOS)), replace(TOLD, pad=(EOS,)), (0, 0)
    ),
    "a mask says that it was seen": (
        of_prompts((PAD, PAD, 5), (3, 4, 6), extra={"prompt_attention_mask": [1, 1, 1]}), APART, (0, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_ids_that_may_have_been_sampled_are_taken_and_doubtful_ones_counted(name: str) -> None:
    batch, special, doubtful = RIGHT[name]
    refuse_unsampled(batch, special, "the rollouts")
    found = doubtful_rows(batch, special)
    assert (found.starts, found.responses) == doubtful


def test_one_unknown_token_at_a_prompts_end_is_counted_and_warned_of_unless_all_end_so() -> None:
    special = replace(APART, unknown=(PAD,))
    for prompts, expected in ((((3, PAD), (3, 4)), 2), (((3, PAD), (4, PAD)), 0)):
        batch = of_prompts(*prompts)
        refuse_unsampled(batch, special, "the rollouts")
        assert doubtful_rows(batch, special).ends == expected
        codes = [warning.code for warning in padding_warnings(batch, special)]
        assert codes == ["pad_at_the_prompts_end"] * (expected > 0)


def test_ids_after_an_end_token_that_the_tokenizer_alone_knows_are_warned_of() -> None:
    """The sampler may not have stopped there; where the rows say at which ids it did, they are believed."""
    rows = ((5, 12, 9), (5, 12), (6, EOS), (7, 12, 12))
    refuse_unsampled(batch_of(*rows), TOLD, "the rollouts")
    (warning,) = padding_warnings(batch_of(*rows), TOLD)
    assert warning.code == "tokens_after_stop"
    assert "2 of 4 responses" in warning.seen
    assert padding_warnings(batch_of(*rows, eos_ids=()), TOLD) == []


# Masks beside the ids


def padded_row(**columns: Any) -> Rollout:
    """[0 0 3 4 | 5 6 1 0 0] with log-probs."""
    return Rollout("a", (0, 0, 3, 4), (5, 6, 1, 0, 0), 0.5, logprobs=(-1.0, -2.0, -3.0, 0.0, 0.0), **columns)


WHOLE = [0, 0, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_mask": WHOLE},
        {"attention_mask": [bool(seen) for seen in WHOLE], "prompt_mask": np.array([0.0, 0.0, 1.0, 1.0])},
        {"prompt_attention_mask": [0, 0, 1, 1], "completion_attention_mask": [1, 1, 1, 0, 0]},
        {"attention_mask": [0, 0, 1, 1], "response_attention_mask": [1, 1, 1, 0, 0]},
    ],
)
def test_what_masks_call_padding_is_dropped_from_ids_log_probs_and_masks_of_tokens(extra: dict[str, Any]) -> None:
    more = {
        "response_mask": [1, 1, 1, 0, 0],
        "loss_mask": [0, 0, 0, 0, 1, 1, 1, 0, 0],
        "note": "kept",
        "tags": ["x"] * 5,
    }
    found = padded_row(extra=extra | more)
    assert found == Rollout(
        "a", (3, 4), (5, 6, 1), 0.5, logprobs=(-1.0, -2.0, -3.0), padding_id=0,
        extra={"response_mask": [1, 1, 1], "loss_mask": [0, 0, 1, 1, 1], "note": "kept", "tags": ["x"] * 5},
    )  # fmt: skip


def test_a_mask_that_drops_nothing_is_kept() -> None:
    row = Rollout("a", (3, 4), (5, 1), 0.0, extra={"attention_mask": [1, 1, 1, 1]})
    assert (row.prompt_ids, row.response_ids, row.padding_id) == ((3, 4), (5, 1), None)
    assert row.extra == {"attention_mask": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("extra", "culprits"),
    [
        ({"attention_mask": [1] * 8}, ("attention_mask has 8 values", "expected 9", "or 4 for prompt_ids")),
        ({"prompt_mask": WHOLE}, ("prompt_mask has 9 values", "expected 4")),
        ({"prompt_attention_mask": [0, 1, 0, 1]}, ("0 between ones of the prompt", "start")),
        ({"attention_mask": [0, 0, 1, 1, 1, 0, 1, 0, 0]}, ("0 between ones of the response", "end")),
        ({"attention_mask": [1, 1, 1, 1, 0, 1, 1, 1, 1]}, ("0 between ones of the response",)),
        ({"prompt_attention_mask": [0, 0, 0, 0]}, ("0 over the whole prompt",)),
        ({"prompt_attention_mask": [0, 2, 1, 1]}, ("holds 2", "0 and 1 alone")),
        ({"prompt_attention_mask": "0011"}, ("is a str",)),
        ({"prompt_mask": [0, 0, 1, 1], "prompt_attention_mask": [0, 1, 1, 1]}, ("disagree", "prompt_mask 2")),
        ({"attention_mask": [0, 0, 1, 1, 1, 1, 0, 0, 0]}, ("different ids at the response's end (0, 1)", "end token")),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(extra: dict[str, Any], culprits: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        padded_row(extra=extra)
    for culprit in ("'a'", *culprits):
        assert culprit in str(caught.value)


def test_a_mask_that_takes_the_end_token_with_its_like_is_refused() -> None:
    """Where the end token pads, a mask of "not the pad id" is 0 at the end token that was sampled, too."""

    def masked(seen: int, cut: bool | None) -> RolloutBatch:
        mask = [1] * (1 + seen) + [0] * (4 - seen)
        row = Rollout("a", (3,), (5, 6, EOS, EOS), 0.0, cut=cut, extra={"attention_mask": mask})
        return group_rollouts([*batch_of(*SOUND[:2], (5,), (6,)).responses, row, row])

    refuse_unsampled(masked(3, None), SHARED, "the rollouts")
    refuse_unsampled(masked(2, True), SHARED, "the rollouts")
    with pytest.raises(InputError, match=r"0 at every id 1 at a response's end, in 2 of 6 rows"):
        refuse_unsampled(masked(2, None), SHARED, "the rollouts")


# Where the ids come from


def test_the_models_configs_and_its_tokenizer_say_which_ids_are_special() -> None:
    model = tiny_model("llama-tied")
    assert special_ids(model) == APART
    model.config.pad_token_id, model.generation_config.pad_token_id = -1, 7
    model.generation_config.eos_token_id = [EOS, 9]
    tokenizer = SpecialIds(pad=(EOS,), stop=(12,), begin=(2,), unknown=(5,))
    assert special_ids(model, tokenizer) == SpecialIds((7, EOS), (EOS, 9), (EOS, 9, 12), (2,), (5,))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "<p>"}, "8": {"content": "<e>"}}}},
        {"tokenizer_config.json": {}, "added_tokens.json": {"<p>": 7, "<e>": 8}},
        {
            "tokenizer_config.json": {},
            "tokenizer.json": {"added_tokens": [{"content": "<p>", "id": 7}], "model": {"vocab": {"<e>": 8, "a": 0}}},
        },
        {"tokenizer_config.json": {}, "tokenizer.json": {"model": {"vocab": [[t, 0.0] for t in [*"abcdefg", "<p>", "<e>"]]}}},
        {"tokenizer_config.json": {}, "vocab.json": {"<p>": 7, "<e>": 8}},
    ],
)  # fmt: skip
def test_a_tokenizers_ids_are_found_wherever_its_files_keep_them(files: dict[str, Any], tmp_path: Path) -> None:
    named = {
        "pad_token": "<p>",
        "eos_token": {"content": "<e>", "lstrip": False},
        "bos_token": None,
        "unk_token": "<gone>",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content | named if name == "tokenizer_config.json" else content))
    assert tokenizer_ids([tmp_path / "missing", tmp_path]) == SpecialIds(pad=(7,), stop=(8,))
    assert tokenizer_ids([]) == SpecialIds()


# The commands


def left_padded(row: dict[str, Any], width: int) -> list[int]:
    return [PAD] * (width - len(row["prompt_ids"])) + row["prompt_ids"]


def test_run_refuses_padding_and_takes_it_away_where_a_mask_names_it(place: Place) -> None:
    def u_cross() -> float:
        report = place.root / "report.json"
        outcome = run_command("run", place.checkpoint, "--rollouts", place.rollouts, "--no-noise", "--json", report)
        assert outcome.code == 0, outcome.err
        found: float = json.loads(report.read_text())["first_order"]["u_cross"]
        report.unlink()
        return found

    exact = u_cross()
    whole = place.rollouts.read_text()
    place.edit_rows(lambda rows: [row.update(prompt_ids=left_padded(row, 6)) for row in rows])
    refuse_run(place, "pad id 0", "rows", "begins with", "prompt_attention_mask")
    place.edit_rows(
        lambda rows: [
            row.update(prompt_attention_mask=[int(token != PAD) for token in row["prompt_ids"]]) for row in rows
        ]
    )
    assert u_cross() == exact
    place.rollouts.write_text(whole)
    place.edit_rows(lambda rows: [row.update(response_ids=[5, 6, 7, PAD, PAD]) for row in rows[1:3]])
    refuse_run(place, "2 of 8 rows", "2 of 5 ids", "cut response_ids")
    refuse_run(
        place,
        "evaluation rollouts hold",
        options=["--evaluation-rollouts", place.rollouts],
        rollouts=kept(place, whole),
    )
    place.rollouts.write_text(whole)
    place.edit_rows(lambda rows: [row.update(response_ids=[5, EOS, 6]) for row in rows[:3]])
    refuse_run(place, "3 of 8 rows", "after an end token of the model", "eos_ids")


def kept(place: Place, content: str) -> Path:
    path = place.root / "sound.jsonl"
    path.write_text(content)
    return path


def test_run_knows_the_tokenizers_pad_id_too(place: Place) -> None:
    place.edit_rows(lambda rows: rows[1].update(response_ids=[5, 12, 12]))
    (place.checkpoint / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "<p>", "added_tokens_decoder": {"12": {"content": "<p>"}}})
    )
    refuse_run(place, "pad id 12", "1 of 8 rows")
    (place.checkpoint / "tokenizer_config.json").write_text("{")
    refuse_run(place, "tokenizer_config.json", "not JSON")


def test_what_sample_writes_run_takes_whatever_ended_it(place: Place) -> None:
    """It stops at 7 and goes on after the model's own end token, and a response may be cut at the pad id."""
    prompts = place.root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [3 + n, 4]}) + "\n" for n in range(4)))
    (place.root / "zero_reward.py").write_text("def reward(prompt, response, row):\n    return 0.0\n")
    out = place.root / "sampled.jsonl"
    options = ["--reward", "zero_reward:reward", "--responses", "256", "--eos-id", "7", "--max-new-tokens", "4"]
    outcome = run_command("sample", place.checkpoint, "--prompts", prompts, "--out", out, *options)
    assert outcome.code == 0, outcome.err
    rows = read_rollouts(out)
    assert all(row.eos_ids == (7,) for row in rows)
    assert any(EOS in row.response_ids[:-1] for row in rows)
    special = special_ids(tiny_model())
    assert any(row.response_ids[-2:] == (PAD, PAD) for row in rows)
    refuse_unsampled(group_rollouts(rows), special, "the rollouts")
    bare = group_rollouts(replace(row, eos_ids=None) for row in rows)
    with pytest.raises(InputError, match=r"pad id 0|go on after an end token of the model"):
        refuse_unsampled(bare, special, "the rollouts")
    kept = [row for n in range(4) for row in rows[256 * n : 256 * n + 3]]
    write_rollouts(kept, out)
    outcome = run_command("run", place.checkpoint, "--rollouts", out, "--no-noise")
    assert outcome.code == 0, outcome.err


def test_rows_without_end_tokens_are_right_and_are_not_taken_for_padded() -> None:
    model = tiny_model("llama-untied").double()
    optimizer = trained_optimizer(model)
    rows = random_rollouts(5, 3)
    bare = [replace(row, response_ids=row.response_ids[:-1] or (5,)) for row in rows]

    def with_padding(row: Rollout, **extra: Any) -> Rollout:
        return replace(row, response_ids=(*row.response_ids, *[PAD] * (8 - len(row.response_ids))), **extra)

    padded = [with_padding(row) for row in bare]
    masked = [
        with_padding(row, extra={"attention_mask": [1] * row.length + [0] * (8 - len(row.response_ids))})
        for row in bare
    ]
    adam = state_of_optimizer(optimizer, model)
    settings = Settings(estimator=Estimator.SCORE, noise=False)
    alone = oracle.one_at_a_time(model, group_rollouts(bare))
    root = np.sqrt(oracle.flat_preconditioner(model, optimizer))
    xs, ys = oracle.prompt_vectors(alone, group_rollouts(bare))
    (right, _, _) = oracle.double_loop(xs * root, ys * root)
    for given in (bare, masked):
        report = probe(model, adam, group_rollouts(given), settings).report
        assert report.first_order.u_cross == pytest.approx(right, rel=1e-9)
    with pytest.raises(InputError, match="pad id 0"):
        probe(model, adam, group_rollouts(padded), settings)


def test_every_rank_refuses_alike_what_nobody_sampled() -> None:
    rows = random_rollouts(4, 2)
    batch = group_rollouts([*rows[:-1], replace(rows[-1], response_ids=(5, PAD, PAD))])

    def work(ranks: Ranks) -> str:
        model = tiny_model()
        adam = state_of_optimizer(trained_optimizer(model, steps=1), model)
        try:
            probe(model, adam, batch, ranks=ranks)
        except InputError as error:
            return str(error)
        return "taken"

    first, second = on_ranks(2, work)
    assert first == second
    assert "1 of 8 rows" in first
