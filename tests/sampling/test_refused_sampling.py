"""`sample` refuses bad options, prompts and rewards: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spoiled import CONTEXT, NORM, Place, refuse
from support import (
    VOCABULARY,
    run_command,
)

REWARDS = """
import math

def one(prompt, response, row):
    return 1.0

def none(prompt, response, row):
    return None

def nan(prompt, response, row):
    return math.nan

def text(prompt, response, row):
    return "good"

def raising(prompt, response, row):
    raise KeyError("answer")

constant = 3
"""


@pytest.fixture
def sampling(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    (place.root / "spoiled_rewards.py").write_text(REWARDS)
    (place.root / "broken_module.py").write_text("def f(:\n")
    (place.root / "raising_module.py").write_text("1 / 0\n")
    (place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n{"prompt_ids": [5]}\n')
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield place
    for name in ("spoiled_rewards", "broken_module", "raising_module"):
        sys.modules.pop(name, None)


def sample_arguments(place: Place, **changed: str) -> list[str | Path]:
    options = {
        "prompts": "prompts.jsonl", "reward": "spoiled_rewards:one", "responses": "2", "out": "sampled.jsonl",
        "max-new-tokens": "4",
    } | changed  # fmt: skip
    return ["sample", place.checkpoint, *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_the_unspoiled_sampling_is_accepted(sampling: Place) -> None:
    outcome = run_command(*sample_arguments(sampling))
    assert outcome.code == 0, outcome.err
    assert len((sampling.root / "sampled.jsonl").read_text().splitlines()) == 4


SAMPLING: dict[str, tuple[dict[str, str], str]] = {
    "reward-without-colon": ({"reward": "spoiled_rewards"}, "module:function"),
    "reward-without-module": ({"reward": ":one"}, "module:function"),
    "reward-of-unknown-module": ({"reward": "no_such_module_here:one"}, "no_such_module_here"),
    "reward-of-empty-package": ({"reward": ".:one"}, "reward .:one"),
    "reward-of-broken-module": ({"reward": "broken_module:f"}, "broken_module"),
    "reward-of-raising-module": ({"reward": "raising_module:f"}, "raising_module"),
    "reward-of-unknown-function": ({"reward": "spoiled_rewards:nothing"}, "nothing"),
    "reward-not-callable": ({"reward": "spoiled_rewards:constant"}, "constant"),
    "reward-of-none": ({"reward": "spoiled_rewards:none"}, "None"),
    "reward-of-nan": ({"reward": "spoiled_rewards:nan"}, "nan"),
    "reward-of-text": ({"reward": "spoiled_rewards:text"}, "'good'"),
    "reward-raising": ({"reward": "spoiled_rewards:raising"}, "KeyError"),
    "temperature-0": ({"temperature": "0"}, "temperature"),
    "temperature-nan": ({"temperature": "nan"}, "temperature"),
    "temperature-negative": ({"temperature": "-0.5"}, "temperature"),
    "responses-1": ({"responses": "1"}, "--responses"),
    "responses-text": ({"responses": "many"}, "--responses"),
    "out-suffix": ({"out": "sampled.txt"}, "sampled.txt"),
    "out-in-a-missing-folder": ({"out": "missing/sampled.jsonl"}, "missing"),
    "out-a-folder": ({"out": "checkpoint-3"}, "checkpoint-3"),
    "prompts-missing": ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    "max-new-tokens-0": ({"max-new-tokens": "0"}, "--max-new-tokens"),
    "past-the-context": ({"max-new-tokens": str(CONTEXT)}, "context"),
    "batch-0": ({"batch": "0"}, "--batch"),
    "eos-outside-the-vocabulary": ({"eos-id": str(VOCABULARY)}, "end token"),
    "eos-negative": ({"eos-id": "-1"}, "end token"),
    "seed-too-large": ({"seed": str(2**80)}, "seed"),
    "dtype": ({"dtype": "int8"}, "--dtype"),
    "base": ({"base": "checkpoint-3"}, "a base has nothing to be the base of"),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_bad_sampling_options_are_refused(name: str, sampling: Place) -> None:
    changed, culprit = SAMPLING[name]
    refuse(sampling, sample_arguments(sampling, **changed), culprit)


PROMPTS: dict[str, tuple[str, str]] = {
    "empty": ("", "no prompts"),
    "text-without-a-tokenizer": ('{"prompt": "hello"}', "tokenizer"),
    "neither": ('{"text": "hello"}', "prompt_ids"),
    "prompt-not-text": ('{"prompt": 7, "prompt_ids": [3]}', "prompt is a int"),
    "empty-prompt": ('{"prompt_ids": []}', "empty prompt"),
    "id-outside-the-vocabulary": (json.dumps({"prompt_ids": [3, VOCABULARY]}), "vocabulary"),
    "negative-id": ('{"prompt_ids": [-1]}', "-1"),
    "boolean-id": ('{"prompt_ids": [true]}', "prompt_ids"),
    "ids-as-text": ('{"prompt_ids": "3 4"}', "prompt_ids"),
    "an-id-used-twice": ('{"prompt_id": 1, "prompt_ids": [3]}\n{"prompt_id": 1, "prompt_ids": [4]}', "prompt_id"),
    "an-id-that-is-a-list": ('{"prompt_id": [1], "prompt_ids": [3]}', "prompt_id"),
    "an-id-that-is-a-float": ('{"prompt_id": 1.5, "prompt_ids": [3]}', "prompt_id"),
    "malformed": ('{"prompt_ids": [3', "line 1"),
    "past-the-context": (json.dumps({"prompt_ids": [3] * (CONTEXT + 1)}), "context"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompts_are_refused(name: str, sampling: Place) -> None:
    content, culprit = PROMPTS[name]
    (sampling.root / "prompts.jsonl").write_text(content + "\n")
    refuse(sampling, sample_arguments(sampling), culprit)


def test_sampling_from_damaged_weights_or_a_damaged_tokenizer_is_refused(sampling: Place) -> None:
    (sampling.checkpoint / "tokenizer_config.json").write_text("{")
    refuse(sampling, sample_arguments(sampling), "tokenizer")
    (sampling.checkpoint / "tokenizer_config.json").unlink()
    sampling.edit_weights(lambda tensors: tensors[NORM].fill_(float("nan")))
    refuse(sampling, sample_arguments(sampling), NORM)
