"""Checkpoints: the optimizer's indices become the right names, and P is the one that torch's own step uses."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names

from entropy_probe import AdamState, InputError, group_rollouts, probe_checkpoint, state_of_optimizer, write_rollouts
from entropy_probe.adam_preconditioner import AdamMoments, preconditioner, preconditioners, validate_preconditioner
from entropy_probe.checkpoints import load_adam_state, load_checkpoint, load_model
from entropy_probe.checkpoints.decay_rules import RULES, NamedGroups
from entropy_probe.policy import Policy
from entropy_probe.scores import AdvantageRule, advantages_from_rewards
from support import (
    CONFIGS,
    hf_groups,
    lora_model,
    make_checkpoint,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)

# Decay rules


def _installed(model: nn.Module) -> list[str]:
    return list(Trainer.get_decay_parameter_names(None, model))


def _version_4_51(model: nn.Module) -> list[str]:
    return list(get_parameter_names(model, [nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm"]))


def _old_names(model: nn.Module, forbidden: Callable[[nn.Module], bool]) -> list[str]:
    """transformers.trainer_pt_utils.get_parameter_names as of 4.46: a walk over children, by type alone."""
    result = []
    for name, child in model.named_children():
        if not forbidden(child):
            result += [f"{name}.{inner}" for inner in _old_names(child, forbidden)]
    return result + list(model._parameters)


def _version_4_46(model: nn.Module) -> list[str]:
    return [name for name in _old_names(model, lambda m: isinstance(m, nn.LayerNorm)) if "bias" not in name]


def _version_4_46_registered(model: nn.Module) -> list[str]:
    names = _old_names(model, lambda m: isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm"))
    return [name for name in names if "bias" not in name]


ORACLES = (_installed, _version_4_51, _version_4_46_registered, _version_4_46)


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


# From indices to names


def assert_same_moments(found: AdamState, expected: AdamState) -> None:
    assert set(found.moments) == set(expected.moments)
    for name, moments in expected.moments.items():
        assert found.moments[name].step == moments.step, name
        assert torch.equal(found.moments[name].exp_avg, moments.exp_avg), name
        assert torch.equal(found.moments[name].exp_avg_sq, moments.exp_avg_sq), name


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
    monkeypatch.setattr("entropy_probe.checkpoints.adam_state.RULES", (RULES[0], rival))
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


# Adapters


@pytest.mark.parametrize("how", ["option", "relative-to-the-adapter", "relative-to-the-working-folder"])
def test_an_adapter_loads_over_its_base_and_only_the_adapter_trains(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    optimizer = trained_optimizer(model)
    adapter = save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = {"option": "", "relative-to-the-adapter": "../base", "relative-to-the-working-folder": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": names[how]}))
    monkeypatch.chdir(tmp_path)
    found = load_checkpoint(adapter, base=tmp_path / "base" if how == "option" else None)
    assert found.folder.kind == "lora"
    trainable = {name for name, p in found.model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert len(trainable) == 2 * 2 * 3
    assert_same_moments(found.adam, state_of_optimizer(optimizer, model))
    ours = dict(found.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(ours[name], p), name
    assert [len(group.names) for group in found.adam.groups] == [12, 0]
    frozen = load_model(adapter, base=tmp_path / "base", trainable=False).model
    assert not any(p.requires_grad for p in frozen.parameters())


def test_an_adapter_checkpoint_is_probed_by_the_command(tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    adapter = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    write_rollouts(random_rollouts(4, 2), tmp_path / "rollouts.jsonl")
    run = ["run", adapter, "--base", tmp_path / "base", "--rollouts", tmp_path / "rollouts.jsonl"]
    outcome = run_command(*run, "--json", tmp_path / "report.json")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["checkpoint"]["kind"] == "lora"
    assert report["checkpoint"]["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["checkpoint"]["frozen_parameters"] == sum(p.numel() for p in base.parameters() if not p.requires_grad)


# Learning rates


def probe_json(checkpoint: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    write_rollouts(random_rollouts(5, 3), folder / "rollouts.jsonl")
    target = folder / "report.json"
    outcome = run_command(
        "run", checkpoint, "--rollouts", folder / "rollouts.jsonl", "--json", target, "--dtype", "float64", *options
    )
    assert outcome.code == 0, outcome.err
    return json.loads(target.read_text()), outcome.out


def test_a_stored_learning_rate_of_zero_is_said_aloud(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", learning_rate=0.0)
    report, printed = probe_json(checkpoint, tmp_path)
    (warning,) = [w for w in report["warnings"] if w["code"] == "learning_rate_zero"]
    assert "0.0" in warning["seen"]
    assert "--learning-rate" in warning["advice"]
    assert "learning rate is 0.0" in " ".join(printed.split())
    assert report["first_order"]["delta_h1"] == 0.0
    assert report["first_order"]["u_cross"] != 0.0
    assert "learning rate is 0.0" in " ".join(run_command("inspect", checkpoint).out.split())


def test_a_given_learning_rate_replaces_the_stored_one(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", learning_rate=0.0)
    report, _ = probe_json(checkpoint, tmp_path, "--learning-rate", "2e-4")
    first = report["first_order"]
    assert first["learning_rate"] == 2e-4
    assert first["delta_h1"] == pytest.approx(-2e-4 * first["u_cross"], rel=1e-12)
    assert report["checkpoint"]["stored_learning_rates"] == [0.0]
    assert "learning_rate_zero" not in {w["code"] for w in report["warnings"]}


def test_groups_of_different_learning_rates_add_up_group_by_group(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = trained_optimizer(model)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 3e-3, 5e-4
    save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    report, printed = probe_json(tmp_path / "checkpoint", tmp_path)
    first = report["first_order"]
    assert first["learning_rate"] == [3e-3, 5e-4]
    assert "0.003, 0.0005" in printed

    # X_n and Y_n one prompt at a time by autograd, then one kernel X P Y for each group's parameters.
    loaded = load_checkpoint(tmp_path / "checkpoint", dtype=torch.float64)
    batch = group_rollouts(random_rollouts(5, 3))
    policy, p = Policy(loaded.model), preconditioners(loaded.adam)
    parameters = policy.trainable()
    kernels = {name: torch.zeros(5, 5, dtype=torch.float64) for name in parameters}
    xs, ys = [], []
    for group in batch.groups:
        with policy.arithmetic():
            scores = policy.forward_scores(group.responses)
        rewards = torch.tensor([r.reward for r in group.responses], dtype=torch.float64)
        advantages = advantages_from_rewards(rewards, [3], AdvantageRule.DR_GRPO)
        longest = max(len(r.response_ids) for r in group.responses)
        others = torch.stack([(scores.sum() - s) / 2 for s in scores]).detach()
        loss_x = ((scores.detach() - others) * scores).mean()
        loss_y = (advantages / longest * scores).mean()
        xs.append(torch.autograd.grad(loss_x, list(parameters.values()), retain_graph=True))
        ys.append(torch.autograd.grad(loss_y, list(parameters.values())))
    for u in range(5):
        for w in range(5):
            for index, name in enumerate(parameters):
                kernels[name][u, w] = (xs[u][index] * p[name] * ys[w][index]).sum()
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    by_group = [sum(float(kernels[name][off_diagonal].mean()) for name in group.names) for group in loaded.adam.groups]
    assert first["delta_h1"] == pytest.approx(-(3e-3 * by_group[0] + 5e-4 * by_group[1]), rel=1e-9)
    assert first["u_cross"] == pytest.approx(by_group[0] + by_group[1], rel=1e-9)
    assert abs(by_group[1]) > 1e-3 * abs(by_group[0])


def test_equal_learning_rates_of_two_groups_are_one_number(tmp_path: Path) -> None:
    report, _ = probe_json(make_checkpoint(tmp_path / "checkpoint"), tmp_path)
    first = report["first_order"]
    assert first["learning_rate"] == 1e-3
    assert first["delta_h1"] == pytest.approx(-1e-3 * first["u_cross"], rel=1e-12)


# inspect


def test_inspect_names_every_trainable_parameter_and_the_rule(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "gemma2")
    outcome = run_command("inspect", checkpoint)
    assert outcome.code == 0
    assert not outcome.lines
    lines = [line.split() for line in outcome.out.splitlines()]
    sound = {words[0] for words in lines if words and words[-1] == "ok"}
    assert sound == {name for name, _ in tiny_model("gemma2").named_parameters()}
    assert RULES[0].name in " ".join(outcome.out.split())


def test_inspect_on_a_narrow_terminal_still_shows_whole_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run_command("inspect", make_checkpoint(tmp_path)).out
    assert "\x1b[" in out
    assert "…" not in out


def test_inspect_points_at_the_parameter_whose_second_moment_is_missing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    model = tiny_model()
    names = [name for names in RULES[0].groups(model) for name in names]
    del saved["state"][6]
    torch.save(saved, checkpoint / "optimizer.pt")
    outcome = run_command("inspect", checkpoint)
    assert outcome.code == 2
    assert len(outcome.lines) == 1
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(names[6])]
    assert "no Adam state" in line
    assert sum(line.rstrip().endswith(" ok") for line in outcome.out.splitlines()) == len(names) - 1
    assert "1 without a usable Adam state" in outcome.out


def test_pickles_beside_the_optimizer_are_never_opened(tmp_path: Path) -> None:
    checkpoint, planted = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "planted"
    for name in ("training_args.bin", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "scaler.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Malicious(planted)))
    report, _ = probe_json(checkpoint, tmp_path)
    assert report["first_order"]["u_cross"] != 0
    assert run_command("inspect", checkpoint).code == 0
    assert not planted.exists()
    pickle.loads((checkpoint / "scheduler.pt").read_bytes())
    assert planted.exists()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


# The preconditioner


def adam_state(**changed: Any) -> tuple[AdamState, dict[str, torch.Size]]:
    """A state of three parameters, the second of them as told."""
    model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in ("a", "b", "c")}).double()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = state_of_optimizer(optimizer, model)
    moments = dict(state.moments)
    moments["b.weight"] = replace(moments["b.weight"], **changed)
    return AdamState(state.groups, moments), {name: p.shape for name, p in model.named_parameters()}


def _with(value: float) -> torch.Tensor:
    moment = torch.ones(2, 3, dtype=torch.float64)
    moment[1, 2] = value
    return moment


DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan-v": ({"exp_avg_sq": _with(float("nan"))}, "exp_avg_sq holds NaN"),
    "inf-v": ({"exp_avg_sq": _with(float("inf"))}, "exp_avg_sq holds an infinite value"),
    "negative-v": ({"exp_avg_sq": _with(-1e-300)}, "exp_avg_sq holds a negative value"),
    "nan-m": ({"exp_avg": _with(float("nan"))}, "exp_avg holds NaN"),
    "inf-m": ({"exp_avg": _with(float("-inf"))}, "exp_avg holds an infinite value"),
    "nan-maximum": ({"max_exp_avg_sq": _with(float("nan"))}, "max_exp_avg_sq holds NaN"),
    "negative-maximum": ({"max_exp_avg_sq": _with(-1.0)}, "max_exp_avg_sq holds a negative value"),
    "mis-shaped-v": ({"exp_avg_sq": torch.ones(3, 2)}, "exp_avg_sq has shape"),
    "mis-shaped-m": ({"exp_avg": torch.ones(6)}, "exp_avg has shape"),
    "step-0": ({"step": 0}, "step is 0"),
    "step-negative": ({"step": -2}, "step is -2"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_validator_names_the_parameter_and_its_defect(name: str) -> None:
    changed, what = DEFECTS[name]
    with pytest.raises(InputError, match=f"parameter b.weight: .*{what}"):
        validate_preconditioner(*adam_state(**changed))


def test_the_validator_names_a_parameter_without_state_or_group_and_a_zero_v_without_eps() -> None:
    state, shapes = adam_state()
    validate_preconditioner(state, shapes)
    without = {name: moments for name, moments in state.moments.items() if name != "c.weight"}
    with pytest.raises(InputError, match=r"parameter c.weight: no Adam state"):
        validate_preconditioner(AdamState(state.groups, without), shapes)
    with pytest.raises(InputError, match=r"parameter d.weight: no Adam state"):
        validate_preconditioner(state, shapes | {"d.weight": torch.Size([2, 3])})
    zero, _ = adam_state(exp_avg_sq=torch.zeros(2, 3, dtype=torch.float64))
    validate_preconditioner(zero, shapes)
    (group,) = zero.groups
    with pytest.raises(InputError, match=r"parameter b.weight: .*v holds zeros"):
        validate_preconditioner(AdamState((replace(group, eps=0.0),), zero.moments), shapes)


def test_the_validators_dots_are_those_of_its_vectors_and_leave_the_random_state_alone() -> None:
    state, shapes = adam_state()
    before = torch.get_rng_state()
    test = validate_preconditioner(state, shapes, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    plain = weighted = 0.0
    for name, shape in shapes.items():
        left = torch.randn(shape, generator=generator, dtype=torch.float64)
        right = torch.randn(shape, generator=generator, dtype=torch.float64)
        plain += float((left * right).sum())
        weighted += float((left * right / (state.moments[name].exp_avg_sq.div(1 - 0.999).sqrt() + 1e-8)).sum())
    assert test.plain_dot == pytest.approx(plain, rel=1e-12)
    assert test.preconditioned_dot == pytest.approx(weighted, rel=1e-12)


def step_by_torch(
    lr: float, beta2: float, eps: float, steps: int, amsgrad: bool, scales: list[float], seed: int
) -> tuple[AdamState, torch.Tensor, torch.Tensor]:
    """The state after torch's last step, that step's gradient, and what the step changed."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.0, beta2), eps=eps, weight_decay=0.0, amsgrad=amsgrad
    )
    for step in range(steps):
        model.weight.data.zero_()
        model.weight.grad = scales[step % len(scales)] * torch.randn(3, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
    assert model.weight.grad is not None
    return state_of_optimizer(optimizer, model), model.weight.grad, model.weight.detach()


HYPERPARAMETERS = {
    "lr": st.floats(1e-7, 1.0),
    "beta2": st.floats(0.0, 0.9999),
    "eps": st.sampled_from([1e-12, 1e-8, 1e-3]),
    "steps": st.integers(1, 12),
    "amsgrad": st.booleans(),
    "scales": st.lists(st.sampled_from([1e-6, 1e-2, 1.0, 100.0]), min_size=1, max_size=4),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(**HYPERPARAMETERS)
@example(lr=1e-3, beta2=0.999, eps=1e-8, steps=3, amsgrad=True, scales=[100.0, 1.0, 1e-2], seed=0)
def test_torchs_own_step_without_momentum_is_minus_lr_p_g(
    lr: float, beta2: float, eps: float, steps: int, amsgrad: bool, scales: list[float], seed: int
) -> None:
    state, gradient, change = step_by_torch(lr, beta2, eps, steps, amsgrad, scales, seed)
    p = preconditioner(state.moments["weight"], state.groups[0])
    torch.testing.assert_close(change, -lr * p * gradient, rtol=1e-12, atol=1e-12 * lr)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    beta2=st.floats(0.9, 0.9999),
    steps=st.integers(1, 12),
    amsgrad=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_planted_a_preconditioner_without_bias_correction_is_not_torchs(
    beta2: float, steps: int, amsgrad: bool, seed: int
) -> None:
    state, gradient, change = step_by_torch(1e-3, beta2, 1e-8, steps, amsgrad, [1.0], seed)
    moments = state.moments["weight"]
    v = moments.exp_avg_sq if moments.max_exp_avg_sq is None else moments.max_exp_avg_sq
    planted = 1.0 / (v.sqrt() + 1e-8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(change, -1e-3 * planted * gradient, rtol=1e-12, atol=1e-15)


def test_amsgrads_maximum_takes_vs_place_and_survives_the_file(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(hf_groups(model), lr=1e-3, amsgrad=True)
    for scale in (10.0, 0.1):
        for p in model.parameters():
            p.grad = scale * torch.randn_like(p)
        optimizer.step()
    found = load_checkpoint(save_checkpoint(model, optimizer, tmp_path)).adam
    for name, moments in found.moments.items():
        maximum = moments.max_exp_avg_sq
        assert maximum is not None
        assert bool((maximum >= moments.exp_avg_sq).all())
        group = found.group_of()[name]
        p = preconditioner(moments, group)
        by_hand = 1.0 / ((maximum.double() / (1 - 0.999**2)).sqrt() + 1e-8)
        torch.testing.assert_close(p, by_hand, rtol=1e-13, atol=0.0)
        without = preconditioner(AdamMoments(moments.step, moments.exp_avg, moments.exp_avg_sq), group)
        assert not torch.allclose(p, without, rtol=1e-4)


def test_p_is_one_over_root_v_hat_plus_eps_with_eps_outside_the_root() -> None:
    state, _ = adam_state(step=7, exp_avg_sq=torch.tensor([[4e-6, 1.0, 0.0], [9.0, 1e-16, 25.0]], dtype=torch.float64))
    p = preconditioner(state.moments["b.weight"], replace(state.groups[0], beta2=0.99, eps=1e-4))
    correction = 1 - 0.99**7
    for found, v in zip(p.flatten().tolist(), [4e-6, 1.0, 0.0, 9.0, 1e-16, 25.0], strict=True):
        assert found == pytest.approx(1.0 / ((v / correction) ** 0.5 + 1e-4), rel=1e-13)
    with pytest.raises(ValueError, match="0 steps"):
        preconditioner(adam_state(step=0)[0].moments["b.weight"], state.groups[0])


def test_a_live_optimizer_is_mapped_by_identity_whatever_its_order() -> None:
    model = tiny_model("gpt2")
    names = {id(p): name for name, p in model.named_parameters()}
    shuffled = sorted(model.parameters(), key=lambda p: hash(names[id(p)][::-1]))
    optimizer = torch.optim.AdamW([{"params": shuffled[:5], "lr": 0.1}, {"params": shuffled[5:]}], lr=1e-3)
    for number, p in enumerate(shuffled):
        p.grad = torch.full_like(p, float(number + 1))
    optimizer.step()
    state = state_of_optimizer(optimizer, model)
    for number, p in enumerate(shuffled):
        assert float(state.moments[names[id(p)]].exp_avg.mean()) == pytest.approx(0.1 * (number + 1), rel=1e-5)
    assert state.groups[0].names == tuple(names[id(p)] for p in shuffled[:5])
    with pytest.raises(InputError, match="does not have"):
        state_of_optimizer(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), model)
