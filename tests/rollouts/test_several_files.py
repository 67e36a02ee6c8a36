"""Several files are one batch; a pattern stands for the files that it fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from dumps import written
from entropy_probe import InputError, read_batch, read_rollouts, write_rollouts
from support import random_rollouts


def test_files_are_read_one_after_the_other_and_a_prompt_may_stand_in_several(tmp_path: Path) -> None:
    rows = random_rollouts(3, 4)
    parts = [tmp_path / f"step-00051-rank{rank}.jsonl" for rank in (0, 1)]
    write_rollouts(rows[::2], parts[0])
    write_rollouts(rows[1::2], parts[1])
    assert read_rollouts(parts) == [*rows[::2], *rows[1::2]]
    assert read_rollouts(tmp_path / "step-00051-rank*.jsonl") == read_rollouts(parts)
    assert read_batch(parts).group_sizes == (4, 4, 4)


def test_a_file_that_is_called_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    rows = random_rollouts(2, 2)
    write_rollouts(rows, tmp_path / "rows[1].jsonl")
    assert read_rollouts(tmp_path / "rows[1].jsonl") == rows


def test_what_is_no_batch_of_files_is_refused(tmp_path: Path) -> None:
    ours = tmp_path / "ours.jsonl"
    write_rollouts(random_rollouts(2, 2), ours)
    with pytest.raises(InputError, match="fits no file"):
        read_rollouts(tmp_path / "none*.jsonl")
    with pytest.raises(InputError, match=r"ours.jsonl is given twice"):
        read_rollouts([ours, tmp_path / "." / "ours.jsonl"])
    with pytest.raises(InputError, match="rollouts is an empty list"):
        read_rollouts([])
    with pytest.raises(InputError, match=r"rank_0.jsonl hold our own rows, prime-rl; one batch is of one layout"):
        read_rollouts([ours, written("prime-rl", tmp_path)])
    with pytest.raises(InputError, match=r"expected a path"):
        read_rollouts([ours, 3])  # type: ignore[list-item]
