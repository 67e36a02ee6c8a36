"""A real TRL run, full and LoRA: train, save, probe the checkpoint with the batch that the next step consumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import support
from entropy_probe import Settings, probe_checkpoint, read_batch
from entropy_probe.cli import main
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.losses.length_weights import LengthWeight


def tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", "<eos>", "<bos>", *"abcdefghijklmnopqrst"]
    words = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def train(folder: Path, kind: str) -> None:
    """Three optimizer steps of dr_grpo with two accumulation steps; checkpoints at every step."""
    model: Any = support.tiny_model("llama-tied")
    if kind == "lora":
        model.save_pretrained(folder / "base")
        model = support.lora_model(model)
    config = GRPOConfig(
        output_dir=str(folder / "run"), loss_type="dr_grpo", scale_rewards="none", beta=0.0, learning_rate=1e-3,
        lr_scheduler_type="constant", max_steps=3, save_strategy="steps", save_steps=1, logging_steps=1, num_generations=4,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, max_completion_length=6, temperature=1.0, top_k=0,
        top_p=1.0, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float("a" in c) + 0.25 * len(c) for c in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p} for p in ("abc", "bcd", "q", "rst", "hello", "e", "ff", "oo")]),
        processing_class=tokenizer(),
    )
    trainer.add_callback(RolloutRecorder(trainer, folder / "rollouts"))
    trainer.train()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_checkpoint_of_a_real_trl_run_is_probed_with_its_own_next_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, kind)
    checkpoint, rollouts = tmp_path / "run" / "checkpoint-2", tmp_path / "rollouts" / "step-00003.jsonl"
    base = tmp_path / "base" if kind == "lora" else None
    batch = read_batch(rollouts)
    assert len(batch.groups) == 4
    assert batch.group_sizes == (4, 4, 4, 4)
    settings = Settings(dtype=torch.float64, length_weight=LengthWeight.DR_GRPO)
    report = probe_checkpoint(checkpoint, rollouts, settings, base=base).report
    assert report.config.advantage == "given"
    assert report.first_order.learning_rate == pytest.approx(1e-3)
    assert report.checkpoint.adam_step == 2
    assert report.checkpoint.kind == kind
    assert report.first_order.u_cross != 0
    assert report.realized[0].predicted != 0

    command = ["entropy-probe", "run", str(checkpoint), "--rollouts", str(rollouts), "--dtype", "float64",
               "--length-weight", "dr_grpo"]  # fmt: skip
    monkeypatch.setattr("sys.argv", command + (["--base", str(base)] if base is not None else []))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert report.headline[:40] in capsys.readouterr().out
