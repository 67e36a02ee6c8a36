"""A dozen families of benchmarks/zoo.py: the engine against one-sequence-at-a-time autograd in float64."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from entropy_probe.gradients.vectors.unit_vectors import UnitVectors

FILE = Path(__file__).parents[2] / "benchmarks" / "zoo.py"
BY_RULES = (
    "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "falcon", "gpt_neox", "cohere2", "granite", "starcoder2", "stablelm",
)  # fmt: skip
WITH_FALLBACK = ("mamba", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def zoo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("zoo", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["zoo"]
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", BY_RULES)
def test_the_family_is_exact_by_rules_alone(zoo: ModuleType, family: str) -> None:
    row = zoo.measure(family)
    assert row.status == "rules", row.notes
    assert row.error <= 1e-9


@pytest.mark.parametrize("family", WITH_FALLBACK)
def test_the_family_is_exact_whatever_serves_its_parameters(zoo: ModuleType, family: str) -> None:
    row = zoo.measure(family)
    assert row.status in ("rules", "fallback"), row.notes
    assert row.error <= 1e-9


def test_a_sequence_given_to_its_neighbours_unit_is_seen(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted where the check of rules, which has one row a unit, cannot look: rows of a strip change places."""
    right = UnitVectors.add_outer

    def swapped(self: UnitVectors, name: str, left: torch.Tensor, *rest: object) -> None:
        right(self, name, left.roll(1, 0) if len(left) > 2 else left, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitVectors, "add_outer", swapped)
    assert zoo.measure("qwen3").error > 1e-3
