"""Nonsense options and outputs are refused, in a process of its own too: exit code 2, one line, nothing written."""

from __future__ import annotations

import importlib
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from spoiled import Malicious, Place, assert_refused, refuse, refuse_run
from support import (
    Outcome,
    fingerprint,
    run_command,
)


def test_the_unspoiled_place_is_accepted_and_both_outputs_appear(place: Place) -> None:
    before = fingerprint(place.root)
    arguments = ["run", place.checkpoint, "--rollouts", place.rollouts, "--json", "report.json", "--out", "report"]
    outcome = run_command(*arguments)
    assert outcome.code == 0, outcome.err
    assert not outcome.lines
    after = fingerprint(place.root)
    assert before.items() <= after.items()
    new = {"report", "report.json", "report/report.json", "report/kernel.npy", "report/row_means.png"}
    assert set(after) - set(before) == new | {"report/predicted_and_realized.png"}


OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown-option": (["--nonsense"], "--nonsense"),
    "extra-argument": (["surplus"], "surplus"),
    "mode": (["--mode", "nonsense"], "--mode"),
    "blocks-0": (["--blocks", "0"], "0 blocks"),
    "blocks-1": (["--blocks", "1"], "1 blocks"),
    "blocks-negative": (["--blocks", "-3"], "-3 blocks"),
    "blocks-past-the-prompts": (["--blocks", "5"], "5 blocks"),
    "blocks-with-exact": (["--blocks", "2", "--mode", "exact"], "number of blocks"),
    "microbatch-0": (["--microbatch", "0"], "--microbatch"),
    "learning-rate-nan": (["--learning-rate", "nan"], "learning_rate is nan"),
    "learning-rate-negative": (["--learning-rate", "-1"], "learning_rate is -1"),
    "learning-rate-infinite": (["--learning-rate", "inf"], "learning_rate is inf"),
    "learning-rate-text": (["--learning-rate", "abc"], "--learning-rate"),
    "learning-rate-beyond-the-number-type": (["--learning-rate", "1e38"], "learning rate"),
    "learning-rate-beyond-float64": (["--learning-rate", "1e308"], "learning rate"),
    "memory-negative": (["--memory", "-1"], "memory"),
    "memory-nan": (["--memory", "nan"], "memory"),
    "memory-infinite": (["--memory", "inf"], "memory"),
    "constant-of-another-loss": (["--length-weight", "bnpo", "--max-completion-length", "64"], "does not use it"),
    "constant-missing": (["--length-weight", "dr_grpo"], "max_completion_length"),
    "constant-too-short": (
        ["--length-weight", "dr_grpo", "--max-completion-length", "1"],
        "max_completion_length is 1",
    ),
    "constant-0": (["--length-weight", "dr_grpo", "--max-completion-length", "0"], "--max-completion-length"),
    "length-weight": (["--length-weight", "nonsense"], "--length-weight"),
    "advantage-not-given": (["--advantage", "given"], "advantage"),
    "advantage": (["--advantage", "nonsense"], "--advantage"),
    "estimator": (["--estimator", "nonsense"], "--estimator"),
    "autocast-over-float64": (
        ["--autocast", "bfloat16", "--dtype", "float64"],
        "autocast to bfloat16 over float64 weights",
    ),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "temperature-0": (["--temperature", "0"], "temperature is 0"),
    "temperature-negative": (["--temperature", "-1"], "temperature is -1"),
    "temperature-nan": (["--temperature", "nan"], "temperature is nan"),
    "seed-too-large": (["--seed", str(2**80)], "seed"),
    "seed-text": (["--seed", "x"], "--seed"),
    "sweep-text": (["--sweep", "nonsense"], "sweep is"),
    "sweep-backwards": (["--sweep", "10:0.1:9"], "0 < LOW < HIGH"),
    "sweep-of-one": (["--sweep", "0.1:10:1"], "sweep of 1 factors"),
    "sweep-beyond-the-number-type": (["--sweep", "1:1e300:2"], "leaves the range"),
    "interval-streamed": (["--interval", "skewed_t", "--memory", "1e-6"], "needs the matrix of unit dots"),
    "interval-unknown": (["--interval", "bootstrap"], "bootstrap"),
    "resample-batch-without-resample": (["--resample-batch", "8"], "no fresh responses are asked for"),
    "resample-batch": (["--resample", "--resample-batch", "0"], "resample-batch"),
    "resample-beyond-the-context": (
        ["--resample", "--length-weight", "dr_grpo", "--max-completion-length", "100000"],
        "context",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_nonsense_options_are_refused(name: str, place: Place) -> None:
    options, culprit = OPTIONS[name]
    refuse_run(place, culprit, options=options)


def test_a_temperature_that_the_rows_contradict_is_refused(place: Place) -> None:
    place.edit_rows(lambda rows: [row.update(temperature=0.7) for row in rows])
    refuse_run(place, "0.7", "0.9", options=["--temperature", "0.9"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_cuda_without_a_cuda_device_is_refused(place: Place) -> None:
    refuse_run(place, "device cuda", options=["--device", "cuda"])


def test_commands_without_their_arguments_are_refused(place: Place) -> None:
    refuse(place, ["frobnicate"], "frobnicate")
    refuse(place, ["run"], "CHECKPOINT")
    refuse(place, ["run", place.checkpoint], "--rollouts")
    refuse(place, ["inspect"], "CHECKPOINT")
    refuse(place, ["--nonsense"], "--nonsense")


def test_outputs_that_could_not_be_written_are_refused_before_the_work(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for command in ("run", "demo"):
        monkeypatch.setattr(importlib.import_module(f"entropy_probe.cli.{command}"), "probe_checkpoint", work)
    run = ["run", place.checkpoint, "--rollouts", place.rollouts]
    refuse(place, [*run, "--out", place.rollouts], "rollouts.jsonl", "is a file")
    refuse(place, [*run, "--out", place.root / "missing" / "report"], "missing")
    refuse(place, [*run, "--json", place.root / "missing" / "report.json"], "missing")
    refuse(place, [*run, "--json", place.checkpoint], "checkpoint-3", "is a folder")
    refuse(place, ["demo", "--json", place.root / "missing" / "report.json"], "missing")
    refuse(place, ["demo", "--out", place.rollouts], "rollouts.jsonl", "is a file")


def as_module(folder: Path, arguments: Sequence[str]) -> None:
    """What ``python -m entropy_probe`` does, with standard output and error in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["entropy_probe", *arguments]
    runpy.run_module("entropy_probe", run_name="__main__", alter_sys=True)


def test_in_a_process_of_its_own_bad_input_ends_with_2_and_one_line(place: Place) -> None:
    """One forked from this one, which has imported everything, and one that is really started."""

    def forked(*arguments: str) -> Outcome:
        process = get_context("fork").Process(target=as_module, args=(place.root.parent, arguments))
        process.start()
        process.join(100)
        process.kill()
        return Outcome(process.exitcode or 0, *((place.root.parent / name).read_text() for name in ("out", "err")))

    def started(*arguments: str) -> Outcome:
        command = [sys.executable, "-m", "entropy_probe", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place.root, timeout=100, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    whole = place.optimizer.read_bytes()
    place.optimizer.write_bytes(pickle.dumps(Malicious(place.root / "planted"), protocol=4))
    before = fingerprint(place.root)
    assert_refused(forked("inspect", "checkpoint-3"), "optimizer.pt")
    assert fingerprint(place.root) == before
    place.optimizer.write_bytes(whole)
    place.edit_optimizer(lambda saved: saved["state"][2]["exp_avg_sq"].fill_(float("nan")))
    before = fingerprint(place.root)
    outcome = started("run", "checkpoint-3", "--rollouts", "rollouts.jsonl", "--json", "report.json")
    assert_refused(outcome, place.names()[2], "NaN")
    assert fingerprint(place.root) == before
