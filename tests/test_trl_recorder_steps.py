"""Which steps the recorder writes, and what it says of a truncated sampler."""

from __future__ import annotations

from pathlib import Path

import pytest

from entropy_probe.errors import InputError
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.rollouts import group_rollouts, read_rollouts
from test_trl_recorder import make_trainer, train


def test_every_records_the_steps_after_each_checkpoint_and_nothing_of_those_between(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.add_callback(RolloutRecorder(trainer, tmp_path / "rollouts", every=2))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step-00001.jsonl", "step-00003.jsonl"]
    for step in (1, 3):
        rows = read_rollouts(tmp_path / "rollouts" / f"step-{step:05d}.jsonl")
        assert len(rows) == 24
        assert {str(row.prompt_id).split("-")[0] for row in rows} == {str(step)}


def test_a_truncated_sampler_is_recorded_as_such_and_the_probe_refuses_its_rows(tmp_path: Path) -> None:
    _, _, (rows,) = train(tmp_path, max_steps=1, top_p=0.9, top_k=7)
    assert {(row.top_k, row.top_p) for row in rows} == {(7, 0.9)}
    with pytest.raises(InputError, match="top_k = 7"):
        group_rollouts(rows)
