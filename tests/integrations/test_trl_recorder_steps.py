"""Which steps the recorder writes, and at which rates."""

from __future__ import annotations

from pathlib import Path

import torch

from entropy_probe.data.rollouts import read_rollouts
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.integrations.trl.trainer import learning_rates
from trl_training import make_trainer


def test_every_records_the_steps_after_each_checkpoint_and_nothing_of_those_between(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.add_callback(RolloutRecorder(trainer, tmp_path / "rollouts", every=2))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["step-00001.jsonl", "step-00003.jsonl"]
    for step in (1, 3):
        rows = read_rollouts(tmp_path / "rollouts" / f"step-{step:05d}.jsonl")
        assert len(rows) == 24
        assert {str(row.prompt_id).split("-")[0] for row in rows} == {str(step)}


def test_rates_that_differ_between_groups_are_recorded_each_and_empty_groups_left_out() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [], "lr": 0.5}, {"params": weights[1:], "lr": 0.2}]
    assert learning_rates(torch.optim.AdamW(groups)) == [0.1, 0.2]
    assert learning_rates(torch.optim.AdamW(groups[:2])) == 0.1
