"""Workflows, issue forms and the citation are well formed, and every `make` target that they name is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_AT_ITS_BOUND = {"ruff", "mypy", "pyarrow"}
"""Tools that `make test` does not run; and pyarrow, of which the tests' datasets wants a later one than the package does."""
REQUIREMENTS = [Requirement(r) for group in (PROJECT["dependencies"], *EXTRAS.values()) for r in group]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("path", sorted(GITHUB.glob("workflows/*.yml")), ids=lambda path: path.stem)
def test_a_workflow_runs_commands_that_are_there_and_reads_no_secret(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text(encoding="utf-8")
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            for command in re.findall(r"make ([a-z-]+)", step.get("run", "")):
                assert command in TARGETS
            for name in re.findall(r"CONSTRAINTS=([\w./-]+)", step.get("run", "")):
                assert name == "/dev/null" or (ROOT / name).is_file()


def test_ci_runs_what_a_contributor_types() -> None:
    typed = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert typed == ["lint", "types", "test", "test-long"]
    assert set(typed) <= TARGETS
    steps = load(GITHUB / "workflows" / "test.yml")["jobs"]["test"]["steps"]
    assert [step["run"].removeprefix("make ") for step in steps if "run" in step] == typed


def test_issue_forms_and_citation_are_well_formed() -> None:
    for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml"):
        form = load(path)
        assert form["name"], path
        assert form["description"], path
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids)), path
    citation = load(ROOT / "CITATION.cff")
    assert citation["authors"] == [{"name": "the entropy-probe developers"}]
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_constraints_pin_every_requirement() -> None:
    pinned = pins("constraints.txt")
    assert {r.name.lower() for r in REQUIREMENTS} | {"hatchling", "editables"} <= set(pinned)
    assert all(r.specifier.contains(pinned[r.name.lower()]) for r in REQUIREMENTS)


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    pinned = pins("constraints-oldest.txt")
    for requirement in REQUIREMENTS:
        for bound in requirement.specifier:
            if requirement.name in NOT_AT_ITS_BOUND:
                continue
            assert pinned[requirement.name.lower()].startswith(bound.version), requirement
