"""README's examples run, and print what README says they print; its links lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from entropy_probe import read_rollouts
from entropy_probe.checkpoints import load_model
from entropy_probe.data.bundled_run import demo_folder
from support import run_command, trained_optimizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/usage.md",
        "docs/limits.md",
        "docs/architecture.md",
        "docs/method.md",
    )
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def words(text: str) -> str:
    return " ".join(text.split())


def one(language: str, holding: str) -> str:
    (found,) = [block for block in blocks(language) if holding in block]
    return found


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundled data, and in it README's reward; the working folder is README's."""
    shutil.copytree(demo_folder(), tmp_path / "demo_data")
    here = tmp_path / "demo_data" / "full"
    (here / "my_rewards.py").write_text(one("python", "def is_right"))
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block.split()[2])
def test_a_command_prints_what_readme_says(block: str, bundled: Path) -> None:
    command, _, said = block.replace("\\\n", "").partition("\n")
    program, *arguments = command.removeprefix("$ ").split()
    assert program == "entropy-probe"
    found = run_command(*(argument.replace("/tmp", str(bundled)) for argument in arguments))
    assert found.code == 0, found.err
    told = words((found.out + found.err).replace(str(bundled), "/tmp"))
    place = 0
    for part in words(said).split("…"):
        place = told.find(part.strip(), place)
        assert place >= 0, f"not printed in this order: {part}"


def test_the_python_example_runs_on_a_live_model(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(bundled / "demo_data" / "full" / "checkpoint-20").model
    optimizer = trained_optimizer(model, vocabulary=14)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = read_rollouts("rollouts/checkpoint-60.jsonl")[:64]
    found: dict[str, object] = {"model": model, "optimizer": optimizer, "rows": rows}
    exec(one("python", "from entropy_probe import"), found)
    assert "the optimizer's next step" in capsys.readouterr().out
    assert found["low"] < found["high"]  # type: ignore[operator]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_recorder_is_added_to_a_trainer_by_the_line_of_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(ROOT / "examples" / "live_in_trl.py"))["make_trainer"](1, tmp_path / "run")
    exec(one("python", "RolloutRecorder"), {"trainer": trainer})
    trainer.train()
    assert os.listdir("rollouts") == ["step-00001.jsonl"]


def test_readme_fits_three_screens() -> None:
    assert len(README.splitlines()) <= 140


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path).resolve()
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"
