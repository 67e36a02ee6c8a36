"""Train with TRL's GRPOTrainer, record every batch, and probe the live model just before each optimizer step.

    python examples/live_in_trl.py --steps 4

The model is the bundled one, which adds two-digit numbers; four steps take seconds on a CPU. The probe leaves the model, its
gradients and its random state as they were, so the training is the same with it and without it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from entropy_probe import Settings, probe, read_rollouts, state_of_optimizer
from entropy_probe.data.bundled_run import demo_folder
from entropy_probe.integrations.trl import RolloutRecorder

PROMPTS, RESPONSES, LONGEST = 16, 4, 6


def sum_is_right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """TRL's form of a reward: 1 for the right sum."""
    return [float(found == expected) for found, expected in zip(completions, answer, strict=True)]


class ProbeEveryStep(TrainerCallback):  # type: ignore[misc]
    """Say what the coming optimizer step will do; added after the recorder, whose file it reads."""

    def __init__(self, trainer: GRPOTrainer, folder: Path) -> None:
        """Keep the trainer and the recorder's folder."""
        self.trainer, self.folder = trainer, folder

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the live model with the very batch that the step consumes."""
        step = state.global_step + 1
        if step == 1:
            return  # Adam has no second moment yet, so its preconditioner is not defined
        rows = read_rollouts(self.folder / f"step-{step:05d}.jsonl")
        adam = state_of_optimizer(self.trainer.optimizer, self.trainer.model)
        report = probe(self.trainer.model, adam, rows, Settings(noise=False)).report
        print(
            f"step {step}: entropy {report.entropy.per_response:.3f} nats per response, predicted change "
            f"{report.adamw.total:+.4f} ± {report.adamw.se:.4f}"
        )


def make_trainer(steps: int, run: Path) -> GRPOTrainer:
    """GRPO on the bundled model."""
    lines = (demo_folder() / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    base = demo_folder() / "base"
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        reward_funcs=sum_is_right,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        args=GRPOConfig(
            output_dir=str(run),
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * RESPONSES,
            num_generations=RESPONSES,
            max_completion_length=LONGEST,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.0,
            top_k=0,  # the whole distribution: the recorder refuses anything else
            learning_rate=2e-4,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )


def main() -> None:
    """A short run with recorder and probe."""
    parser = argparse.ArgumentParser(description="Probe a live model in TRL.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None, help="keep the rollouts here (default: a temporary folder)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's own use of renamed options
    with tempfile.TemporaryDirectory() as temporary:
        rollouts = arguments.out or Path(temporary) / "rollouts"
        trainer = make_trainer(arguments.steps, Path(temporary) / "run")
        trainer.add_callback(RolloutRecorder(trainer, rollouts))
        trainer.add_callback(ProbeEveryStep(trainer, rollouts))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
