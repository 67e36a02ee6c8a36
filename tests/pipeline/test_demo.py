"""The bundled data: real, complete, small, free of pickles, and its recorded batch is the one that the next step consumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entropy_probe import Settings
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.data.bundled_run import demo_files, demo_folder
from entropy_probe.data.rollouts import read_batch
from entropy_probe.gradients import loss_gradient
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.pipeline.run import probe_checkpoint
from oracle import optimizer_step

DATA = demo_folder()
INDEX = json.loads((DATA / "demo.json").read_text())
CHECKPOINTS = sorted(p for kind in ("full", "lora") for p in (DATA / kind).glob("checkpoint-*"))
ALLOWED = {
    "config.json", "generation_config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors",
    "optimizer.pt", "trainer_state.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
}  # fmt: skip


def rollouts_of(checkpoint: Path) -> Path:
    return checkpoint.parent / "rollouts" / f"{checkpoint.name}.jsonl"


def test_three_full_checkpoints_one_adapter_and_both_pairs_are_there_in_12_megabytes() -> None:
    assert len(list((DATA / "full").glob("checkpoint-*"))) >= 3
    assert len(list((DATA / "lora").glob("checkpoint-*"))) >= 1
    for kind in ("full", "lora"):
        before, after, recorded = INDEX["pair"][kind]
        assert after == before + 1
        assert (DATA / kind / f"checkpoint-{before}").is_dir()
        assert (DATA / kind / f"checkpoint-{after}").is_dir()
        assert (DATA / recorded).is_file()
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 12e6
    assert sum(p.numel() for p in load_file(DATA / "base" / "model.safetensors").values()) <= 150_000


def test_folders_hold_only_what_is_shipped_and_no_path_of_a_machine() -> None:
    for checkpoint in CHECKPOINTS:
        assert {p.name for p in checkpoint.iterdir()} <= ALLOWED, checkpoint
        assert (checkpoint / "optimizer.pt").is_file()
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for file in DATA.rglob("*.json*"):
        text = file.read_text()
        assert not [word for word in ('"/', "/home/", "/root", "/tmp", "\\\\") if word in text], file
    for config in DATA.rglob("adapter_config.json"):
        base = json.loads(config.read_text())["base_model_name_or_path"]
        assert not Path(base).is_absolute()
        assert (config.parent / base / "config.json").is_file()


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_every_checkpoint_has_rollouts_sampled_from_it(checkpoint: Path) -> None:
    if not rollouts_of(checkpoint).is_file():
        # N + 1 of a pair is there for the weights that step N + 1 left.
        assert checkpoint.name in {f"checkpoint-{INDEX['pair'][kind][1]}" for kind in ("full", "lora")}
        return
    batch = read_batch(rollouts_of(checkpoint))
    assert len(batch.groups) >= 32
    assert min(batch.group_sizes) >= 8
    model = load_checkpoint(checkpoint).model
    scores = Policy(model, batch.temperature, microbatch_size=256).scores(batch.responses)
    sampled = torch.tensor([sum(r.logprobs or ()) for r in batch.responses], dtype=torch.float64)
    torch.testing.assert_close(scores, sampled, rtol=0, atol=2e-4)
    assert all(r.temperature == 1.0 and r.top_k == 0 and r.top_p == 1.0 for r in batch.responses)


def test_the_entropy_that_the_trainer_logged_visibly_falls() -> None:
    last = max((DATA / "full").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    log = [e["entropy"] for e in json.loads((last / "trainer_state.json").read_text())["log_history"] if "entropy" in e]
    assert sum(log[-5:]) < 0.7 * sum(log[:5])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_recorded_batch_and_adamw_reproduce_the_next_checkpoint(kind: str) -> None:
    """Ȳ from the recorder's file, clipped as TRL clips, stepped by torch: the weights that the trainer saved."""
    before, after, recorded = INDEX["pair"][kind]
    path = DATA / kind / f"checkpoint-{before}"
    batch = read_batch(DATA / recorded)
    checkpoint = load_checkpoint(path)
    policy = Policy(checkpoint.model, batch.temperature)
    advantages, _ = resolve_advantages(batch, None)
    weights = resolve_length_weights(batch, LengthWeight.DR_GRPO)
    ascent = loss_gradient(policy, batch.responses, advantages * weights / len(batch.groups))
    norm = float(torch.sqrt(sum((g**2).sum() for g in ascent.values())))
    logged = [e for e in _log(DATA / kind / f"checkpoint-{after}") if e.get("step") == after]
    assert norm == pytest.approx(logged[0]["grad_norm"], rel=1e-4)
    clip = min(1.0, batch.responses[0].extra["max_grad_norm"] / (norm + 1e-6))
    theta = policy.trainable()
    deltas = optimizer_step(theta, checkpoint.adam, {n: clip * g for n, g in ascent.items()})

    truth = dict(load_checkpoint(DATA / kind / f"checkpoint-{after}").model.named_parameters())
    moved = {n: truth[n].detach().double() - theta[n].detach().double() for n in theta}
    error = sum(((deltas[n] - moved[n]) ** 2).sum() for n in theta)
    size = sum((d**2).sum() for d in moved.values())
    assert float((error / size).sqrt()) < 2e-5
    # One advantage changed and it no longer does: the very batch, not one like it.
    planted = advantages.clone()
    planted[0] += 1.0
    wrong = loss_gradient(policy, batch.responses, planted * weights / len(batch.groups))
    missed = optimizer_step(theta, checkpoint.adam, {n: clip * g for n, g in wrong.items()})
    error = sum(((missed[n] - moved[n]) ** 2).sum() for n in theta)
    assert float((error / size).sqrt()) > 1e-3


def _log(checkpoint: Path) -> list[dict[str, float]]:
    return list(json.loads((checkpoint / "trainer_state.json").read_text())["log_history"])


def test_the_demo_resolves_a_fall_of_the_entropy() -> None:
    files = demo_files()
    settings = Settings(
        length_weight=LengthWeight.DR_GRPO,
        max_completion_length=files.max_completion_length,
        microbatch_size=256,
        noise=False,
    )
    report = probe_checkpoint(files.checkpoint, files.rollouts, settings).report
    assert "the optimizer's next step lowers entropy" in report.headline
    assert "(δH₁) lowers entropy" in report.first_order.sentence
    assert report.first_order.zero_v.elements == 0
    assert report.first_order.self_test_residual < 1e-10
    for row in report.realized:
        assert row.delta_h < 0
        assert row.predicted < 0
        assert row.ess_fraction > 0.3
