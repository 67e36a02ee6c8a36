"""Dumps with token ids are read as what was drawn: tokens, masks, log-probs, advantages, prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dumps import EXACT, Row, drawn, lines, open_instruct, prime_rl, saved, slime, without_tools, written
from entropy_probe import InputError, group_rollouts, read_batch, read_rollouts
from entropy_probe.data.rollouts.formats.base import DumpOptions
from entropy_probe.data.rollouts.reading import read_files

WITH_TOOLS = ("nemo-rl", "slime", "prime-rl")


@pytest.mark.parametrize("name", EXACT)
def test_a_dump_is_known_by_its_columns_and_holds_what_was_drawn(name: str, tmp_path: Path) -> None:
    read = read_files(written(name, tmp_path))
    assert read.layout is not None
    assert read.told.startswith(str(tmp_path / EXACT[name][0]))
    expected = drawn() if name in WITH_TOOLS else without_tools()
    assert [row.prompt_ids for row in read.rollouts] == [tuple(row.prompt) for row in expected]
    assert [row.response_ids for row in read.rollouts] == [tuple(row.response) for row in expected]
    for row, true in zip(read.rollouts, expected, strict=True):
        assert row.at_sampled(row.logprobs or ()) == tuple(
            value for value, here in zip(true.logprobs, true.sampled, strict=True) if here
        )
        assert row.sampled == (None if all(true.sampled) else tuple(true.sampled))
        assert row.loss_mask is None
        if name in ("nemo-rl", "prime-rl"):
            kept = tuple(value for value, here in zip(true.trainers, true.sampled, strict=True) if here)
            assert row.at_sampled(row.old_logprobs or ()) == kept
        else:
            assert row.old_logprobs is None
        assert row.advantage == (None if name == "slime" else true.advantage)
        assert row.reward == (None if name == "prime-rl" else true.reward)
    batch = group_rollouts(read.rollouts)
    assert batch.group_sizes == (2, 2)
    assert {row.step for row in read.rollouts} == {None if name == "slime" else 51}


@pytest.mark.parametrize("name", EXACT)
def test_the_named_layout_reads_the_same(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    assert read_files(path, name).rollouts == read_rollouts(path)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_drawn_tokens_outside_of_the_loss_are_told_from_a_tools_by_the_samplers_log_probs(
    name: str, tmp_path: Path
) -> None:
    mask = {"nemo-rl": "token_loss_mask", "slime": "loss_mask", "prime-rl": "loss_mask"}[name]

    def leave_out(rows: list[Row]) -> None:
        last = len(rows[0][mask]) - 1 if name != "nemo-rl" else 5
        rows[0][mask][last] = type(rows[0][mask][last])(0)

    first, *others = read_rollouts(written(name, tmp_path, leave_out))
    assert first.response_ids == (8, 9, 1)
    assert first.loss_mask == (1, 1, 0)
    assert first.sampled is None
    assert others[-1].sampled == (True, False, False, True, True)
    assert others[-1].loss_mask is None


def test_token_advantages_stay_a_list(tmp_path: Path) -> None:
    def spread(rows: list[Row]) -> None:
        rows[1]["advantages"] = [float(place) for place in range(len(rows[1]["advantages"]))]

    for name in ("nemo-rl", "prime-rl"):
        rows = read_rollouts(written(name, tmp_path, spread))
        assert rows[1].advantage == (3.0, 4.0)
        assert rows[0].advantage == 0.5


# open-instruct


def test_rows_of_one_step_are_taken_of_a_shard_and_several_are_refused_with_their_list(tmp_path: Path) -> None:
    path = lines(tmp_path / "shard.jsonl", [*open_instruct(without_tools(), 3), *open_instruct(without_tools(), 4)])
    with pytest.raises(InputError, match=r"shard.jsonl holds 2 steps \(3, 4\)"):
        read_rollouts(path)
    rows = read_files(path, options=DumpOptions(step=4)).rollouts
    assert [row.prompt_id for row in rows] == ["4/0", "4/0", "4/1", "4/1"]
    assert {row.step for row in rows} == {5}
    with pytest.raises(InputError, match=r"no rows of step 9, but of 3, 4"):
        read_files(path, options=DumpOptions(step=9))


def test_a_step_over_two_shards_is_one_batch(tmp_path: Path) -> None:
    rows = open_instruct(without_tools())
    first, second = lines(tmp_path / "a_0.jsonl", rows[:3]), lines(tmp_path / "a_1.jsonl", rows[3:])
    assert read_batch([first, second]).group_sizes == (2, 2)
    assert read_batch(str(tmp_path / "a_*.jsonl")) == read_batch([first, second])


def test_an_end_token_of_the_trainers_own_has_no_log_prob(tmp_path: Path) -> None:
    def empty(rows: list[Row]) -> None:
        rows[1] |= {"response_tokens": [1], "logprobs": [float("nan")]}

    read = read_files(written("open-instruct", tmp_path, empty))
    assert [row.logprobs is None for row in read.rollouts] == [False, True, False, False]
    assert "1 of 4 rows" in read.notes[0].seen


# NeMo-RL


def test_a_sample_that_the_loss_leaves_out_keeps_its_tokens(tmp_path: Path) -> None:
    rows = read_rollouts(written("nemo-rl", tmp_path, lambda rows: rows[3].update(sample_loss_mask=0.0)))
    assert rows[3].loss_mask == (0,) * 5
    assert rows[3].sampled == (True, False, False, True, True)
    assert rows[0].loss_mask is None


def test_old_log_probs_that_the_trainer_did_not_compute_are_none(tmp_path: Path) -> None:
    def on_policy(rows: list[Row]) -> None:
        for row in rows:
            row["prev_logprobs"] = [0.0] * len(row["prev_logprobs"])

    assert all(row.old_logprobs is None for row in read_rollouts(written("nemo-rl", tmp_path, on_policy)))


def test_what_follows_the_last_drawn_token_is_cut(tmp_path: Path) -> None:
    def follow(rows: list[Row]) -> None:
        rows[0]["token_ids"][6] = 12  # the environment's word after the policy's end
        rows[0]["input_lengths"] += 1

    assert read_rollouts(written("nemo-rl", tmp_path, follow))[0].response_ids == (8, 9, 1)


# slime


def test_tensors_of_a_sample_count_as_lists(tmp_path: Path) -> None:
    def tensors(rows: list[Row]) -> None:
        for row in rows:
            row["tokens"] = torch.tensor(row["tokens"])
            row["rollout_log_probs"] = torch.tensor(row["rollout_log_probs"])

    read = read_rollouts(written("slime", tmp_path, tensors))
    assert read[0].response_ids == (8, 9, 1)
    assert read[0].logprobs == (-0.25, -0.375, -0.5)


def test_a_removed_sample_is_out_of_the_loss_and_a_truncated_one_is_cut(tmp_path: Path) -> None:
    def change(rows: list[Row]) -> None:
        rows[0]["remove_sample"] = True
        rows[1]["status"] = "truncated"
        rows[2] |= {"loss_mask": None, "rollout_log_probs": None}

    first, second, third, _ = read_rollouts(written("slime", tmp_path, change))
    assert first.loss_mask == (0, 0, 0)
    assert [first.cut, second.cut] == [False, True]
    assert third.loss_mask is None
    assert third.logprobs is None


def test_one_of_several_rewards_is_taken_by_its_key(tmp_path: Path) -> None:
    def several(rows: list[Row]) -> None:
        for row in rows:
            row["reward"] = {"score": row["reward"], "acc": 0.0}

    path = written("slime", tmp_path, several)
    with pytest.raises(InputError, match=r"sample 0 has several rewards \(acc, score\)"):
        read_rollouts(path)
    assert [row.reward for row in read_files(path, options=DumpOptions(reward_key="score")).rollouts] == [1, 0, 0, 1]


def test_samples_of_two_policies_are_refused(tmp_path: Path) -> None:
    path = written("slime", tmp_path, lambda rows: rows[2].update(weight_versions=["7", "8"]))
    with pytest.raises(InputError, match=r"sample 2 was sampled with weight version 8, .* with 7: 2 policies"):
        read_rollouts(path)
    first = saved(tmp_path / "a_0.pt", slime(drawn()))
    second = saved(tmp_path / "a_1.pt", slime(drawn(), version="8"))
    with pytest.raises(InputError, match="2 policies"):
        read_rollouts([first, second])


class Planted:
    """Unpickled by a reader that runs code, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_planted_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = written("slime", tmp_path, lambda rows: rows[1].update(metadata={"x": Planted(mark)}))
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would do its harm
    mark.unlink()
    with pytest.raises(InputError, match=r"rollout_50.pt is not read: it names .*, and weights_only=True runs no code"):
        read_rollouts(path)
    assert not mark.exists()
    (tmp_path / "global_step_3_training_input.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"\.pkl.*a pickle runs code"):
        read_rollouts(tmp_path / "global_step_3_training_input.pkl")


# prime-rl


def test_the_files_of_all_ranks_are_one_batch_whose_equal_prompts_are_one(tmp_path: Path) -> None:
    first = lines(tmp_path / "rank_0.jsonl", prime_rl([drawn()[0], drawn()[2]]))
    second = lines(tmp_path / "rank_1.jsonl", prime_rl([drawn()[1], drawn()[3]], rank=1))
    assert read_batch([first, second]).group_sizes == (2, 2)
    lines(second, prime_rl([drawn()[1], drawn()[3]], step=52, rank=1))
    with pytest.raises(InputError, match=r"2 steps \(51, 52\)"):
        read_rollouts([first, second])


def test_weights_and_the_trust_region_of_a_token_are_its_weight(tmp_path: Path) -> None:
    def weigh(rows: list[Row]) -> None:
        rows[0]["is_masked"] = [False, False, False, False, True, False]
        rows[1]["rl_weights"] = [0.0, 0.0, 0.0, 0.5, 0.0]

    first, second, third, _ = read_rollouts(written("prime-rl", tmp_path, weigh))
    assert first.token_weight == (1.0, 0.0, 1.0)
    assert first.loss_mask is None  # it stays in what the loss divides by
    assert second.token_weight == (0.5, 0.0)
    assert second.loss_mask == (1, 0)
    assert third.token_weight is None


# Damage


Spoil = Callable[[list[Row]], object]
DAMAGED: dict[str, tuple[str, Spoil, str]] = {
    "tools": ("open-instruct", lambda rows: rows[2]["request_info"].update(num_calls=1), "line 3 called tools"),
    "no-column": ("open-instruct", lambda rows: rows[2].update(prompt_idx=None), "line 3 has no prompt_idx"),
    "step-of-text": ("open-instruct", lambda rows: rows[1].update(step="3"), "line 2: step is a str"),
    "truncated": ("nemo-rl", lambda rows: rows[1]["token_loss_mask"].pop(), "line 2: token_loss_mask has 8 values for 9"),
    "too-long": ("nemo-rl", lambda rows: rows[1].update(input_lengths=99), "line 2: input_lengths is 99 for 9"),
    "all-masked": (
        "nemo-rl",
        lambda rows: rows[1].update(token_loss_mask=[0] * 9, generation_logprobs=[0.0] * 9),
        "line 2: no token is in the loss",
    ),
    "no-prompt": ("prime-rl", lambda rows: rows[1]["loss_mask"].__setitem__(0, True), "line 2: the mask of the loss begins"),
    "no-ids": ("nemo-rl", lambda rows: [row.pop("token_ids") for row in rows], "line 1 has text and no token_ids"),
    "response-length": ("slime", lambda rows: rows[1].update(response_length=5), "sample 1: response_length is 5 of 5"),
    "short-mask": ("slime", lambda rows: rows[1]["loss_mask"].pop(), "sample 1: loss_mask has 1 values for 2 tokens"),
    "images": ("slime", lambda rows: rows[1].update(multimodal_train_inputs={}), "sample 1 has multimodal_train_inputs"),
    "top-p": ("slime", lambda rows: rows[1].update(rollout_top_p_token_ids=[1]), "sample 1 was sampled with top_p"),
    "other-loss": ("prime-rl", lambda rows: rows[1].update(ce_weights=[1.0] * 5), "line 2 has ce_weights"),
    "channel": (
        "prime-rl",
        lambda rows: rows[1].update(losses=[{"ce": {"advantage": 1.0, "mask": True}}]),
        "line 2 has tokens in the loss 'ce'",
    ),
    "null-advantage": ("prime-rl", lambda rows: rows[1]["advantages"].__setitem__(4, None), "line 2: advantages is null"),
    "positive": ("prime-rl", lambda rows: rows[1]["inference_logprobs"].__setitem__(4, 0.5), "line 2: .*logprobs holds 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line_with_the_place(case: str, tmp_path: Path) -> None:
    name, change, said = DAMAGED[case]
    with pytest.raises(InputError, match=said) as refused:
        read_rollouts(written(name, tmp_path, change))
    assert str(tmp_path / EXACT[name][0]) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_step_that_the_files_name_contradicts_and_options_that_a_dump_does_not_have_are_refused(
    tmp_path: Path,
) -> None:
    path = written("nemo-rl", tmp_path)
    other = written("nemo-rl", tmp_path).rename(tmp_path / "train_data_step52.jsonl")
    path = written("nemo-rl", tmp_path)
    with pytest.raises(InputError, match="steps 51, 52 by their names"):
        read_rollouts([path, other])
    with pytest.raises(InputError, match="slime's rollout data has no step to choose"):
        read_files(written("slime", tmp_path), options=DumpOptions(step=3))


def test_other_containers_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rank_0.bin").write_bytes(b"\x93\x01")
    with pytest.raises(InputError, match=r"rank_0.bin ends in '.bin'; msgpack micro-batches"):
        read_rollouts(tmp_path / "rank_0.bin")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match=r"list.pt holds list; expected torch.save of a dictionary"):
        read_rollouts(tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes(written("slime", tmp_path).read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut.pt cannot be read with weights_only=True"):
        read_rollouts(tmp_path / "cut.pt")
