"""Every option of the command line reaches the work, changed from its default."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from entropy_probe import InputError, ProbeResult, ReplaySettings, Settings, probe, state_of_optimizer
from entropy_probe.cli.app import app
from entropy_probe.cli.fields import PANELS, spelling_of, with_settings
from entropy_probe.common.fields import about, setting
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.data.units import Mode
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.length_weights import LengthWeight, LossAggregation
from entropy_probe.losses.named import LossName
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.pipeline.settings import COUNT, PARTS
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.choices import EntropyUnit, Estimator, SamplerWeights
from spoiled import Place, assert_refused
from support import random_batch, run_command, tiny_model, trained_optimizer

CLI_RUN, CLI_REPLAY, CLI_SAMPLE, CLI_DEMO = (
    importlib.import_module(f"entropy_probe.cli.{command}") for command in ("run", "replay", "sample", "demo")
)


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
    "--estimator score": {"estimator": Estimator.SCORE},
    "--entropy per-token": {"entropy": EntropyUnit.PER_TOKEN},
    "--importance-weights per-prompt": {"weighting": Weighting.PER_PROMPT},
    "--sampler-weights prefix": {"sampler_weights": SamplerWeights.PREFIX},
    "--zero-v guide": {"zero_v": ZeroV.GUIDE},
    "--target-se 0.01": {"target_se": 0.01},
    "--targets": {"targets": True},
    "--no-noise": {"noise": False},
    "--split 2": {"split": 2},
    "--learning-rate 0.25": {"learning_rate": 0.25},
    "--advantage rloo": {"advantage": AdvantageRule.RLOO},
    "--length-weight dapo": {"length_weight": LengthWeight.DAPO},
    "--length-weight dr_grpo --max-completion-length 77": {
        "length_weight": LengthWeight.DR_GRPO,
        "max_completion_length": 77,
    },
    "--loss gspo": {"loss_type": LossName.GSPO},
    "--loss-agg token-mean": {"loss_agg": LossAggregation.TOKEN_MEAN},
    "--beta 0.04": {"beta": 0.04},
    "--kl-estimator k2": {"kl_estimator": KLEstimator.K2},
    "--entropy-coef 0.01": {"entropy_coef": 0.01},
    "--epsilon-low 0.2": {"epsilon_low": 0.2},
    "--epsilon-high 0.28": {"epsilon_high": 0.28},
    "--dtype float64": {"dtype": torch.float64},
    "--dtype bfloat16": {"dtype": torch.bfloat16},
    "--autocast bfloat16": {"autocast": torch.bfloat16},
    "--autocast float16": {"autocast": torch.float16},
    "--autocast off": {"autocast": "off"},
    "--max-grad-norm 0": {"max_grad_norm": 0.0},
    "--weight-rounding stochastic": {"weight_rounding": Rounding.STOCHASTIC},
    "--microbatch 5": {"microbatch_size": 5},
    "--memory 1.5": {"memory_bytes": 1.5e9},
    "--vectors bfloat16": {"vector_dtype": torch.bfloat16},
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--seed 11": {"seed": 11},
    "--sweep 0.5:2:3": {"sweep": SweepRange(0.5, 2.0, 3)},
    "--interval normal": {"interval": IntervalMethod.NORMAL},
    "--resample": {"resample": True},
    "--resample --resample-batch 7": {"resample": True, "resample_batch": 7},
    "--what-if-learning-rate 0.5": {"what_if_learning_rate": 0.5},
    "--what-if-max-grad-norm 0.5": {"what_if_max_grad_norm": 0.5},
    "--what-if-no-negatives": {"what_if_no_negatives": True},
    "--what-if-fall 0.1": {"what_if_fall": 0.1},
}
REPLAY = {
    options: expected
    for options, expected in RUN.items()
    if expected.keys() <= {field.name for field in dataclasses.fields(ReplaySettings)} and "dtype bf" not in options
}


def command(name: str) -> Any:
    """The command of that name, as typer has made it."""
    return typer.main.get_command(app).commands[name]


@pytest.mark.parametrize(("name", "kind"), [("run", Settings), ("replay", ReplaySettings)])
def test_every_field_has_one_option_with_its_help_in_the_panel_of_its_part(name: str, kind: type) -> None:
    options = command(name).params
    text = " ".join(run_command(name, "--help").out.split())
    for field in dataclasses.fields(kind):
        (option,) = (option for option in options if option.name == field.name)
        (part,) = (part for part in PARTS if field.name in {each.name for each in dataclasses.fields(part)})
        assert option.rich_help_panel == part.__name__
        assert option.help == about(field).help
        assert f" --{spelling_of(field.name).name} " in text
    for option in options:
        assert option.param_type_name == "argument" or option.opts[0] in text


def test_both_commands_are_tried_with_another_value_for_every_field() -> None:
    for tried, kind in ((RUN, Settings), (REPLAY, ReplaySettings)):
        for expected in tried.values():
            assert kind(**expected) != kind()
        assert {name for expected in tried.values() for name in expected} == {
            field.name for field in dataclasses.fields(kind)
        }


@dataclasses.dataclass(frozen=True)
class More(Settings):
    new_count: int | None = setting(None, COUNT, "What is new.", "N")


def test_a_new_field_becomes_an_option_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PANELS, "new_count", "Loss")  # type: ignore[arg-type]
    seen: list[More] = []

    @with_settings(More)
    def more(*, settings: More) -> None:
        seen.append(settings)

    new = typer.Typer(rich_markup_mode=None)
    new.command()(more)
    typer.main.get_command(new).main(["--new-count", "3", "--noise"], standalone_mode=False)
    assert seen == [More(new_count=3)]


def test_help_lists_panels_in_plain_text() -> None:
    lines = run_command("run", "--help").out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    panels = ["Files", *(part.__name__ for part in PARTS), "Output", "Options"]
    assert titles == [f"{title}:" for title in ("Arguments", *panels)]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("options", RUN)
def test_every_option_of_run_is_a_setting_of_the_probe(
    options: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Recorder()
    monkeypatch.setattr(CLI_RUN, "probe_checkpoint", work)
    command = ["run", place.checkpoint, "--rollouts", place.rollouts, "--device", "cpu"]
    assert_refused(run_command(*command, *options.split()), "the work was reached")
    assert work.positional == (place.checkpoint, place.rollouts, Settings(**RUN[options]))


@pytest.mark.parametrize("options", REPLAY)
def test_every_option_of_replay_is_a_setting_of_the_replay(
    options: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Recorder()
    monkeypatch.setattr(CLI_REPLAY.replay_check, "replay", work)
    given = ["replay", place.checkpoint, place.root, "--rollouts", place.rollouts, "--device", "cpu"]
    assert_refused(run_command(*given, *options.split()), "the work was reached")
    assert work.positional == (place.checkpoint, place.root, place.rollouts, ReplaySettings(**REPLAY[options]))


def test_base_temperature_and_device_of_run_reach_the_probe(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Recorder()
    monkeypatch.setattr(CLI_RUN, "probe_checkpoint", work)
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
    monkeypatch.setattr(CLI_SAMPLE, "sample_rollouts", work)
    (place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n')
    command = ["sample", place.checkpoint, "--prompts", "prompts.jsonl", "--reward", "math:sqrt", "--responses", "2"]
    assert_refused(run_command(*command, "--out", "out.jsonl", *options.split()), "the work was reached")
    policy, prompts, settings, *_ = work.positional
    assert settings == SamplingSettings(**{"responses": 2, "eos_ids": (1,)} | SAMPLE[options])
    assert [prompt.prompt_ids for prompt in prompts] == [(3, 4)]
    assert policy.temperature == settings.temperature


def test_base_dtype_and_device_of_sample_reach_the_loading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Recorder()
    monkeypatch.setattr(CLI_SAMPLE, "load_model", work)
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

    monkeypatch.setattr(CLI_DEMO, "probe_checkpoint", work)
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
    monkeypatch.setattr(CLI_SAMPLE, "sample_rollouts", work)
    monkeypatch.setattr(CLI_SAMPLE, "load_tokenizer", lambda folders: tokenizer)
    (place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n')
    command = ["sample", place.checkpoint, "--prompts", "prompts.jsonl", "--reward", "math:sqrt", "--responses", "2"]
    assert_refused(run_command(*command, "--out", "out.jsonl"), "the work was reached")
    assert work.positional[2].eos_ids == (1, 7)
    assert tokenizer in work.positional[3:]
