"""Rows that disagree about a constant of their batch are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from entropy_probe import InputError, group_rollouts
from support import random_rollouts


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (0.5, 0.7)),
        ("window_tokens", (40.0, 41.0)),
        ("window_tokens", (40.0, None)),
        ("max_completion_length", (8, 9)),
        ("max_completion_length", (8, None)),
        ("advantage", (0.5, None)),
        ("micro_batch", (0, None)),
    ],
)
def test_rows_that_disagree_about_a_constant_of_the_batch_are_refused(name: str, values: tuple[Any, Any]) -> None:
    rows = random_rollouts(2, 2)
    alike = [dataclasses.replace(r, **{name: values[0]}) for r in rows]
    assert all(getattr(r, name) == values[0] for r in group_rollouts(alike).responses)
    mixed = [*alike[:3], dataclasses.replace(rows[3], **{name: values[1]})]
    with pytest.raises(InputError, match=name):
        group_rollouts(mixed)
