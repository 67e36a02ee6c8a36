"""The optimizer's indices become the right names, by each version's decay rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from entropy_probe import probe_checkpoint, state_of_optimizer, write_rollouts
from entropy_probe.checkpoints import load_adam_state, load_checkpoint
from entropy_probe.checkpoints.decay_rules import RULES, NamedGroups
from support import (
    CONFIGS,
    assert_same_moments,
    make_checkpoint,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)
from trainer_decay_rules import ORACLES


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("number", range(len(ORACLES)))
def test_each_decay_rule_groups_parameters_as_its_version_of_the_trainer_does(number: int, family: str) -> None:
    model = tiny_model(family)
    frozen = next(iter(model.parameters()))
    for _ in range(2):
        decaying = set(ORACLES[number](model))
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        expected = [[n for n in trainable if n in decaying], [n for n in trainable if n not in decaying]]
        assert RULES[number].groups(model) == expected
        assert expected[0]
        # Once more with a parameter frozen: frozen parameters have no index.
        frozen.requires_grad_(False)


def test_the_rules_differ_so_that_trying_them_matters() -> None:
    def differ(family: str, one: int, other: int) -> bool:
        model = tiny_model(family)
        return RULES[one].groups(model) != RULES[other].groups(model)

    assert differ("gemma2", 0, 3)
    assert differ("llama-tied", 0, 1)
    assert differ("llama-tied", 0, 3)
    assert differ("llama-tied", 1, 2)
    assert differ("gpt2", 0, 4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_state_maps_to_the_same_names_as_the_live_optimizer(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    optimizer = trained_optimizer(model)
    live = state_of_optimizer(optimizer, model)
    checkpoint = load_checkpoint(save_checkpoint(model, optimizer, tmp_path))
    assert_same_moments(checkpoint.adam, live)
    assert checkpoint.adam.groups == live.groups
    assert checkpoint.mapping.rule == RULES[0].name
    assert checkpoint.mapping.rivals == ()
    assert checkpoint.trainer_step == 3
    # Hardly any two parameters share a second moment, so a swap of names would have been seen.
    sums = [float(m.exp_avg_sq.double().sum()) for m in live.moments.values()]
    assert len(set(sums)) >= len(sums) - 2
    for name, p in model.named_parameters():
        assert torch.equal(dict(checkpoint.model.named_parameters())[name], p), name


@pytest.mark.parametrize("number", range(1, len(RULES)))
def test_a_state_written_by_an_older_trainer_is_mapped_by_that_rule(number: int, tmp_path: Path) -> None:
    model = tiny_model("gemma2" if number < 4 else "gpt2")
    parameters = dict(model.named_parameters())
    groups = RULES[number].groups(model)
    optimizer = torch.optim.AdamW([{"params": [parameters[name] for name in names]} for names in groups], lr=1e-3)
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found, mapping = load_adam_state(tmp_path / "optimizer.pt", model)
    assert_same_moments(found, state_of_optimizer(optimizer, model))
    assert [list(group.names) for group in found.groups] == groups
    same = [rule.name for rule in RULES if rule.groups(model) == groups]
    assert mapping.rule in same


def test_a_single_group_optimizer_is_mapped_in_the_order_of_named_parameters(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    checkpoint = load_checkpoint(save_checkpoint(model, optimizer, tmp_path))
    live = state_of_optimizer(optimizer, model)
    assert_same_moments(checkpoint.adam, live)
    assert checkpoint.adam.groups == live.groups
    (group,) = checkpoint.adam.groups
    assert (group.learning_rate, group.beta1, group.beta2, group.eps) == (2e-3, 0.8, 0.95, 1e-6)
    assert group.names == tuple(name for name, _ in model.named_parameters())
    assert not group.decoupled_weight_decay
    assert "one group" in checkpoint.mapping.rule


def test_names_stored_in_the_groups_are_honoured_over_every_rule(tmp_path: Path) -> None:
    model = tiny_model()
    named = list(model.named_parameters())[::-1]
    half = len(named) // 3
    optimizer = torch.optim.AdamW([{"params": named[:half]}, {"params": named[half:], "lr": 5e-4}], lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found, mapping = load_adam_state(tmp_path / "optimizer.pt", model)
    assert_same_moments(found, state_of_optimizer(optimizer, model))
    assert "param_names" in mapping.rule
    assert found.group_of()[named[0][0]].learning_rate == 1e-3
    assert found.group_of()[named[-1][0]].learning_rate == 5e-4


@pytest.mark.parametrize(
    "names",
    [
        lambda right: [f"module.{name}" for name in right],
        lambda right: right[:-1],
        lambda right: [*right[:-1], right[0]],
        lambda right: right[::-1],
    ],
    ids=["prefixed", "too-few", "one-twice", "mis-shaped"],
)
def test_stored_names_that_do_not_fit_the_model_are_not_trusted(
    names: Callable[[list[str]], list[str]], tmp_path: Path
) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model)
    saved = optimizer.state_dict()
    for group, right in zip(saved["param_groups"], RULES[0].groups(model), strict=True):
        group["param_names"] = names(right)
    torch.save(saved, tmp_path / "optimizer.pt")
    found, mapping = load_adam_state(tmp_path / "optimizer.pt", model)
    assert mapping.rule == RULES[0].name
    assert_same_moments(found, state_of_optimizer(optimizer, model))


def test_a_mapping_that_shapes_cannot_settle_names_its_rivals_and_the_report_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    first = RULES[0].groups(model)

    def swapped(_: nn.Module) -> NamedGroups:
        decay = list(first[0])
        gate, up = decay.index("model.layers.0.mlp.gate_proj.weight"), decay.index("model.layers.0.mlp.up_proj.weight")
        decay[gate], decay[up] = decay[up], decay[gate]
        return [decay, first[1]]

    rival = replace(RULES[1], name="a rival rule", groups=swapped)
    monkeypatch.setattr("entropy_probe.checkpoints.index_names.RULES", (RULES[0], rival))
    save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint")
    _, mapping = load_adam_state(tmp_path / "checkpoint" / "optimizer.pt", model)
    assert mapping.rivals == ("a rival rule",)
    write_rollouts(random_rollouts(4, 2), tmp_path / "rollouts.jsonl")
    report = probe_checkpoint(tmp_path / "checkpoint", tmp_path / "rollouts.jsonl").report
    assert "ambiguous_mapping" in {warning.code for warning in report.warnings}
    assert "a rival rule" in run_command("inspect", tmp_path / "checkpoint").out


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    tied = load_checkpoint(make_checkpoint(tmp_path / "tied", "llama-tied"))
    untied = load_checkpoint(make_checkpoint(tmp_path / "untied", "llama-untied"))
    assert "lm_head.weight" not in tied.adam.moments
    assert "lm_head.weight" in untied.adam.moments
    assert sum(name.endswith("embed_tokens.weight") for name in tied.adam.moments) == 1
    assert tied.model.get_input_embeddings().weight is tied.model.get_output_embeddings().weight


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_step_may_be_an_int_or_a_tensor(as_tensor: bool, tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model, steps=2)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(2.0) if as_tensor else 2
    torch.save(saved, tmp_path / "optimizer.pt")
    found, _ = load_adam_state(tmp_path / "optimizer.pt", model)
    assert {moments.step for moments in found.moments.values()} == {2}
    assert all(isinstance(moments.step, int) for moments in found.moments.values())


def test_sharded_weights_load_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model)
    whole = load_checkpoint(save_checkpoint(model, optimizer, tmp_path / "whole"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    torch.save(optimizer.state_dict(), tmp_path / "shards" / "optimizer.pt")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    sharded = load_checkpoint(tmp_path / "shards")
    for (name, p), (other_name, other) in zip(
        whole.model.named_parameters(), sharded.model.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(p, other), name
    assert_same_moments(sharded.adam, whole.adam)
    assert sharded.trainer_step is None


def test_float64_weights_are_float64_everywhere(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(make_checkpoint(tmp_path), dtype=torch.float64)
    tensors = [*checkpoint.model.parameters(), *checkpoint.model.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
