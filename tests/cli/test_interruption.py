"""An interrupt or a full disk leaves no half-written report, and a fault of ours is not disguised as bad input."""

from __future__ import annotations

import importlib

import pytest

from entropy_probe.report import files as report_files
from spoiled import Place, interrupt
from support import (
    fingerprint,
    run_command,
)

PROBE = importlib.import_module("entropy_probe.pipeline.run")


@pytest.mark.parametrize(
    "target",
    ["numpy.save", "json.dumps", "pathlib.Path.replace", "entropy_probe.report.plots.plot_row_means"],
)
def test_an_interrupt_while_writing_leaves_nothing_and_ends_with_130(
    target: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(place.root)
    run = ["run", place.checkpoint, "--rollouts", place.rollouts]
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupt)
        outcome = run_command(*run, "--out", "report")
        assert outcome.code == 130
        assert len(outcome.lines) == 1
        assert "interrupted" in outcome.lines[0]
        assert fingerprint(place.root) == before
        if target in {"json.dumps", "pathlib.Path.replace"}:
            assert run_command(*run, "--json", "report.json").code == 130
            assert fingerprint(place.root) == before


def test_an_interrupt_while_writing_over_an_earlier_report_keeps_that_report_whole(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", place.checkpoint, "--rollouts", place.rollouts, "--out", "report"]
    assert run_command(*run).code == 0
    before = fingerprint(place.root)
    for target in ("numpy.save", "entropy_probe.report.plots.plot_row_means"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupt)
            assert run_command(*run, "--learning-rate", "0.5").code == 130
        assert fingerprint(place.root) == before
    assert run_command(*run, "--learning-rate", "0.5").code == 0
    assert fingerprint(place.root)["report/report.json"] != before["report/report.json"]


def test_an_interrupt_during_the_work_leaves_nothing_and_ends_with_130(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(place.root)
    monkeypatch.setattr(PROBE, "cross_statistics", interrupt)
    outcome = run_command(
        "run", place.checkpoint, "--rollouts", place.rollouts, "--json", "report.json", "--out", "report"
    )
    assert outcome.code == 130
    assert fingerprint(place.root) == before


def test_a_fault_of_ours_is_not_disguised_as_bad_input(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(PROBE, "cross_statistics", fault)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command("run", place.checkpoint, "--rollouts", place.rollouts)


def test_a_full_disk_while_writing_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = fingerprint(place.root)
    monkeypatch.setattr(report_files.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run_command("run", place.checkpoint, "--rollouts", place.rollouts, "--out", "report")
    assert fingerprint(place.root) == before
