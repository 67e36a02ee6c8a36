"""Each line of `inspect` belongs to its parameter."""

from __future__ import annotations

from pathlib import Path

from support import lora_model, run_command, save_checkpoint, tiny_model, trained_optimizer


def test_each_line_of_inspect_shows_the_group_the_rates_and_the_step_of_its_parameter(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model, steps=5)
    optimizer.param_groups[0].update(lr=3e-3, weight_decay=0.25)
    optimizer.param_groups[1].update(lr=5e-4, weight_decay=0.125)
    outcome = run_command("inspect", save_checkpoint(model, optimizer, tmp_path / "checkpoint"))
    lines = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.strip()}
    assert lines["model.embed_tokens.weight"][1:6] == ["23×16", "0", "0.003", "0.25", "5"]
    assert lines["model.norm.weight"][1:6] == ["16", "1", "0.0005", "0.125", "5"]


def test_inspect_counts_what_an_adapter_leaves_frozen_and_takes_its_base(tmp_path: Path) -> None:
    base = tiny_model()
    frozen = len(list(base.parameters()))
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    adapter = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint")
    (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json")
        .read_text()
        .replace('"base_model_name_or_path": null', '"base_model_name_or_path": ""')
    )
    outcome = run_command("inspect", adapter, "--base", tmp_path / "base")
    assert outcome.code == 0, outcome.err
    assert f"12 trainable parameters, {frozen} frozen, 0 without" in outcome.out
