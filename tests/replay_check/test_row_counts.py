"""Whether a file holds the trainer's whole window is told by the tokens that its loss counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from entropy_probe.data.rollouts import RolloutBatch, group_rollouts
from entropy_probe.replay_check.row_causes import incomplete, surplus
from support import random_rollouts


def window(tokens: float, masked: bool) -> RolloutBatch:
    rows = random_rollouts(3, 2, longest=5)
    if masked:
        rows[0] = replace(rows[0], loss_mask=(0,) * len(rows[0].response_ids))
    return group_rollouts(replace(row, window_tokens=tokens) for row in rows)


@pytest.mark.parametrize("masked", [False, True])
def test_a_windows_tokens_are_those_in_the_loss(masked: bool) -> None:
    drawn = window(1.0, masked=False)
    counted = float(drawn.tokens - (drawn.lengths[0] if masked else 0))
    exact = window(counted, masked)
    assert exact.tokens == drawn.tokens
    assert (incomplete(exact, 2), surplus(exact, 2)) == (None, None)
    assert f"hold {counted:g} response tokens" in (incomplete(window(counted + 1, masked), 2) or "")
    assert f"hold {counted:g} response tokens" in (surplus(window(counted - 1, masked), 2) or "")


def test_of_a_part_of_a_generation_nothing_is_told() -> None:
    whole = window(1.0, masked=False)
    part = group_rollouts(replace(row, extra={"window_share": 0.5}) for row in whole.responses)
    assert surplus(whole, 2) is not None
    assert (incomplete(part, 3), surplus(part, 2)) == (None, None)
