"""Every option of the command line reaches the work, changed from its default."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entropy_probe import InputError, ProbeResult, Settings, probe, state_of_optimizer
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.data.units import Mode
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.linearity import SweepRange
from spoiled import Place, assert_refused
from support import random_batch, run_command, tiny_model, trained_optimizer

APP = importlib.import_module("entropy_probe.cli.app")


class Recorder:
    """Stands in for the work: keeps its arguments and refuses."""

    def __init__(self) -> None:
        self.positional: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, *positional: Any, **named: Any) -> Any:
        self.positional, self.named = positional, named
        raise InputError("the work was reached")


@pytest.fixture
def result() -> ProbeResult:
    model = tiny_model()
    adam = state_of_optimizer(trained_optimizer(model), model)
    return probe(model, adam, random_batch(4, 2))


RUN = {
    "--mode exact": {"mode": Mode.EXACT},
    "--blocks 3": {"blocks": 3},
    "--learning-rate 0.25": {"learning_rate": 0.25},
    "--advantage rloo": {"advantage": AdvantageRule.RLOO},
    "--length-weight dapo": {"length_weight": LengthWeight.DAPO},
    "--length-weight dr_grpo --max-completion-length 77": {
        "length_weight": LengthWeight.DR_GRPO,
        "max_completion_length": 77,
    },
    "--dtype float64": {"dtype": torch.float64},
    "--dtype bfloat16": {"dtype": torch.bfloat16},
    "--autocast bfloat16": {"autocast": torch.bfloat16},
    "--autocast float16": {"autocast": torch.float16},
    "--autocast off": {"autocast": "off"},
    "--max-grad-norm 0": {"max_grad_norm": 0.0},
    "--microbatch 5": {"microbatch_size": 5},
    "--memory 1.5": {"memory_bytes": 1.5e9},
    "--seed 11": {"seed": 11},
    "--sweep 0.5:2:3": {"sweep": SweepRange(0.5, 2.0, 3)},
    "--interval normal": {"interval": IntervalMethod.NORMAL},
    "--resample": {"resample": True},
    "--resample --resample-batch 7": {"resample": True, "resample_batch": 7},
}


@pytest.mark.parametrize("options", RUN)
def test_every_option_of_run_is_a_setting_of_the_probe(
    options: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Recorder()
    monkeypatch.setattr(APP, "probe_checkpoint", work)
    command = ["run", place.checkpoint, "--rollouts", place.rollouts, "--device", "cpu"]
    assert_refused(run_command(*command, *options.split()), "the work was reached")
    assert work.positional == (place.checkpoint, place.rollouts, Settings(**RUN[options]))


def test_base_temperature_and_device_of_run_reach_the_probe(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Recorder()
    monkeypatch.setattr(APP, "probe_checkpoint", work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = ["run", place.checkpoint, "--rollouts", place.rollouts, "--base", "elsewhere", "--temperature", "0.7"]
    assert_refused(run_command(*command, "--device", "cuda"), "the work was reached")
    assert work.named["base"] == Path("elsewhere")
    assert work.named["temperature"] == 0.7
    assert work.named["device"] == torch.device("cuda")


SAMPLE = {
    "--temperature 0.7": {"temperature": 0.7},
    "--max-new-tokens 9": {"max_new_tokens": 9},
    "--seed 11": {"seed": 11},
    "--eos-id 4 --eos-id 6": {"eos_ids": (4, 6)},
    "--batch 3": {"batch_size": 3},
}


@pytest.mark.parametrize("options", SAMPLE)
def test_every_option_of_sample_is_a_setting_of_the_sampler(
    options: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Recorder()
    monkeypatch.setattr(APP, "sample_rollouts", work)
    (place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n')
    command = ["sample", place.checkpoint, "--prompts", "prompts.jsonl", "--reward", "math:sqrt", "--responses", "2"]
    assert_refused(run_command(*command, "--out", "out.jsonl", *options.split()), "the work was reached")
    policy, prompts, settings, *_ = work.positional
    assert settings == SamplingSettings(**{"responses": 2, "eos_ids": (1,)} | SAMPLE[options])
    assert [prompt.prompt_ids for prompt in prompts] == [(3, 4)]
    assert policy.temperature == settings.temperature


def test_base_dtype_and_device_of_sample_reach_the_loading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Recorder()
    monkeypatch.setattr(APP, "load_model", work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = ["sample", place.checkpoint, "--prompts", "p.jsonl", "--reward", "math:sqrt", "--responses", "2"]
    options = ["--out", "out.jsonl", "--base", "elsewhere", "--dtype", "float64", "--device", "cuda"]
    assert_refused(run_command(*command, *options), "the work was reached")
    assert work.positional == (place.checkpoint,)
    assert work.named == {
        "base": Path("elsewhere"), "dtype": torch.float64, "device": torch.device("cuda"), "trainable": False,
    }  # fmt: skip


def test_the_demo_probes_what_demo_json_names_and_writes_where_it_is_told(
    result: ProbeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def work(*positional: Any, **_: Any) -> ProbeResult:
        seen.extend(positional)
        return result

    monkeypatch.setattr(APP, "probe_checkpoint", work)
    outputs = ["--json", tmp_path / "report.json", "--out", tmp_path / "report"]
    outcome = run_command("demo", "--dtype", "float64", *outputs)
    assert outcome.code == 0, outcome.err
    files = demo_files()
    assert seen == [
        files.checkpoint,
        files.rollouts,
        Settings(
            dtype=torch.float64,
            length_weight=LengthWeight.DR_GRPO,
            max_completion_length=files.max_completion_length,
        ),
    ]
    assert (tmp_path / "report.json").read_text() == (tmp_path / "report" / "report.json").read_text()
    assert result.report.headline in " ".join(outcome.out.split())


def test_the_checkpoints_tokenizer_ends_responses_too_and_decodes_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, tokenizer = Recorder(), SimpleNamespace(eos_token_id=7, decode=lambda ids, skip_special_tokens: "text")
    monkeypatch.setattr(APP, "sample_rollouts", work)
    monkeypatch.setattr(APP, "load_tokenizer", lambda folders: tokenizer)
    (place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n')
    command = ["sample", place.checkpoint, "--prompts", "prompts.jsonl", "--reward", "math:sqrt", "--responses", "2"]
    assert_refused(run_command(*command, "--out", "out.jsonl"), "the work was reached")
    assert work.positional[2].eos_ids == (1, 7)
    assert tokenizer in work.positional[3:]
