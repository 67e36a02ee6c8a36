"""Parameters that training left alone, and groups at rates of their own: by patterns, by names, or by shapes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from entropy_probe import InputError, probe_checkpoint, state_of_optimizer
from entropy_probe.checkpoints import OptimizerMapping, load_adam_state, load_checkpoint
from entropy_probe.checkpoints.assignments import Assignment, Shape, assignments
from entropy_probe.data.rollouts import write_rollouts
from support import (
    assert_same_moments,
    hf_groups,
    lora_model,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)


def stepped(model: nn.Module, groups: Sequence[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over these groups, after two steps on random gradients."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    torch.manual_seed(0)
    for _ in range(2):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, p in model.named_parameters():
        if any(part in name for part in names):
            p.requires_grad_(False)
    return model


def test_embeddings_that_were_frozen_are_found_by_shapes_and_said(tmp_path: Path) -> None:
    model = frozen(tiny_model("llama-untied"), "embed_tokens")
    optimizer = trained_optimizer(model)
    path = save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    write_rollouts(random_rollouts(), tmp_path / "rollouts.jsonl")
    loaded = load_checkpoint(path)
    assert_same_moments(loaded.adam, state_of_optimizer(optimizer, model))
    assert [name for name, p in loaded.model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    told = "model.embed_tokens.weight is not trained"
    assert told in loaded.mapping.rule
    assert "transformers 4.56" in loaded.mapping.rule
    found = probe_checkpoint(path, tmp_path / "rollouts.jsonl").report
    asked = probe_checkpoint(path, tmp_path / "rollouts.jsonl", freeze=("embed_tokens",)).report
    assert told in found.checkpoint.mapping
    assert asked.checkpoint.mapping.endswith("frozen as asked: model.embed_tokens.weight")
    assert (found.config.freeze, asked.config.freeze) == ([], ["embed_tokens"])
    assert found.first_order == asked.first_order
    assert found.checkpoint.frozen_parameters == asked.checkpoint.frozen_parameters > 0
    assert told in " ".join(run_command("inspect", path).out.split())


def test_equal_layers_are_not_guessed_and_the_refusal_names_the_way_out(tmp_path: Path) -> None:
    model = frozen(tiny_model("llama-untied"), "layers.0.")
    optimizer = trained_optimizer(model)
    path = save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    with pytest.raises(InputError, match=r"more than one way by shapes.*layers\.0\..* or not trained.*freeze"):
        load_checkpoint(path)
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(), rollouts)
    outcome = run_command("run", path, "--rollouts", rollouts)
    assert (outcome.code, len(outcome.lines)) == (2, 1)
    written = tmp_path / "report.json"
    patterns = ["--freeze", r"layers\.0\.mlp", "--freeze", r"layers\.0\.(self_attn|input_|post_)"]
    outcome = run_command("run", path, "--rollouts", rollouts, "--no-noise", "--json", written, *patterns)
    assert outcome.code == 0, outcome.err
    assert "frozen as asked: model.layers.0" in json.loads(written.read_text())["checkpoint"]["mapping"]
    assert run_command("inspect", path, *patterns).code == 0
    assert_same_moments(load_checkpoint(path, freeze=[r"layers\.0\."]).adam, state_of_optimizer(optimizer, model))


def test_replay_takes_what_is_frozen_as_the_run_had_it(tmp_path: Path) -> None:
    model = frozen(tiny_model("llama-untied"), "layers.0.", "embed_tokens")
    optimizer = trained_optimizer(model)
    before = save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    ids = torch.tensor([[4, 5, 6, 1]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = save_checkpoint(model, optimizer, tmp_path / "checkpoint-4", step=4)
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(), rollouts)
    options = ["--length-weight", "grpo", "--json", tmp_path / "replay.json"]
    assert run_command("replay", before, after, "--rollouts", rollouts, *options).code == 2
    outcome = run_command("replay", before, after, "--rollouts", rollouts, "--freeze", r"layers\.0\.", *options)
    assert outcome.code == 0, outcome.err
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = json.loads((tmp_path / "replay.json").read_text())
    assert report["parameters"] == trained
    assert report["config"]["freeze"] == [r"layers\.0\."]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (
            ["embed_tokens", "no_such"],
            r"'no_such', which is found in no trainable parameter's name; they are model\.embed",
        ),
        (["("], "no regular expression"),
        (["."], "leaves no parameter to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: list[str], said: str, tmp_path: Path) -> None:
    model = tiny_model("llama-untied")
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    with pytest.raises(InputError, match=said):
        load_checkpoint(path, freeze=patterns)


def test_a_pattern_may_stand_alone_and_name_a_tied_parameter_by_its_other_name(tmp_path: Path) -> None:
    model = frozen(tiny_model("llama-tied"), "embed_tokens")
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    loaded = load_checkpoint(path, freeze="lm_head")
    assert not dict(loaded.model.named_parameters())["model.embed_tokens.weight"].requires_grad


def test_too_much_frozen_does_not_fit(tmp_path: Path) -> None:
    model = tiny_model("llama-untied")
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint-3")
    count = len(list(model.parameters()))
    with pytest.raises(InputError, match=rf"trains {count} parameters, the model here {count - 1}\).*freeze"):
        load_checkpoint(path, freeze=["embed_tokens"])


def apart(model: nn.Module, *parts: str) -> list[dict[str, Any]]:
    """All but some parameters, then those at a rate of their own."""
    own = [p for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in parts)]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in own)]
    return [{"params": rest}, {"params": own, "lr": 1e-4}]


def decay_and_apart(model: nn.Module) -> list[dict[str, Any]]:
    """Decay and no-decay, the embeddings of the first at a rate of their own."""
    own = {id(model.get_parameter(name)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    decay, none = hf_groups(model)
    split = [[p for p in decay["params"] if (id(p) in own) is is_own] for is_own in (False, True)]
    return [{"params": split[0], "weight_decay": 0.1}, none, {"params": split[1], "lr": 1e-4}]


BUILDERS: dict[str, tuple[Callable[[nn.Module], list[dict[str, Any]]], str]] = {
    "embeddings": (
        lambda model: apart(model, "embed_tokens", "lm_head"),
        "group 1: model.embed_tokens.weight, lm_head.weight",
    ),
    "decay-and-embeddings": (decay_and_apart, "group 2: model.embed_tokens.weight, lm_head.weight"),
}


def mapped(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> OptimizerMapping:
    """How the optimizer's file was mapped, once what came out is the optimizer's own state."""
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    found, mapping = load_adam_state(folder / "optimizer.pt", model)
    live = state_of_optimizer(optimizer, model)
    assert_same_moments(found, live)
    assert found.groups == live.groups
    return mapping


@pytest.mark.parametrize("builder", BUILDERS)
def test_groups_at_rates_of_their_own_are_told_by_shapes(builder: str, tmp_path: Path) -> None:
    build, said = BUILDERS[builder]
    model = tiny_model("llama-untied")
    optimizer = stepped(model, build(model))
    mapping = mapped(optimizer, model, tmp_path)
    assert said in mapping.rule
    assert mapping.rivals == ()


def of_layers(model: nn.Module, layers: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A group for each list of layers, at a rate of its own, in the order of ``named_parameters``."""
    return [
        {
            "params": [p for name, p in model.named_parameters() if int(name.split(".")[0]) in chosen],
            "lr": 1e-3 / (n + 1),
        }
        for n, chosen in enumerate(layers)
    ]


@pytest.mark.parametrize("layers", [[[3], [0, 1, 2]], [[0, 2, 3], [1]], [[0], [1], [2], [3]], [[3], [2], [1], [0]]])
def test_layers_of_equal_shapes_at_rates_of_their_own_are_not_guessed(layers: list[list[int]], tmp_path: Path) -> None:
    """Whatever the order of groups, nothing in the file tells which layer is which."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)) for _ in range(4)))
    torch.save(stepped(model, of_layers(model, layers)).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(
        InputError, match=r"0\.0\.weight in group \d or in group \d.*nothing in the file.*param_names"
    ) as told:
        load_adam_state(tmp_path / "optimizer.pt", model)
    assert "freeze" not in str(told.value), "all parameters are trained: freezing tells nothing"


def test_many_groups_of_equal_shapes_are_refused_by_the_names_that_share_a_shape(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(20)))
    layers = [*([n] for n in range(18)), [18, 19]]
    torch.save(stepped(model, of_layers(model, layers)).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(
        InputError, match=r"0\.weight, 1\.weight.* 17 more have one shape, \(3, 3\).*groups 0, 1, 2 and 16"
    ):
        load_adam_state(tmp_path / "optimizer.pt", model)


@pytest.mark.parametrize("layers", [[[0], [1], [2]], [[2], [1], [0]], [[1], [0, 2]]])
def test_layers_at_rates_of_their_own_are_mapped_where_exactly_one_way_fits(
    layers: list[list[int]], tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6))
    mapping = mapped(stepped(model, of_layers(model, layers)), model, tmp_path)
    assert "the only groups that fit by shapes" in mapping.rule
    assert mapping.rivals == ()


def test_lora_plus_and_unsloths_embeddings_have_their_rules(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    adapted = lora_model(tiny_model())
    plus = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    embedded = get_peft_model(tiny_model("llama-untied"), LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    plus_embedded = create_loraplus_optimizer(embedded, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    saved = get_peft_model(
        tiny_model("llama-untied"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    unsloth = torch.optim.AdamW(apart(saved, "modules_to_save"), lr=1e-3)
    for model, optimizer, rule, alone in (
        (adapted, plus, "LoRA+", True),
        # The B of the embeddings and those of the layers are of one shape, in two groups.
        (embedded, plus_embedded, "LoRA+", False),
        (saved, unsloth, "Unsloth", True),
    ):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)
        optimizer.step()
        mapping = mapped(optimizer, model, tmp_path)
        assert rule in mapping.rule
        assert (mapping.rivals == ()) is alone


def test_a_rule_that_shapes_alone_would_leave_open_names_what_else_fits(tmp_path: Path) -> None:
    """LoRA+ over embeddings: their B and those of the layers are of one shape, in two groups; also with a head frozen."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    def adapted() -> nn.Module:
        config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
        return get_peft_model(tiny_model("llama-untied"), config)

    for trained in (adapted(), frozen(adapted(), "lm_head")):
        optimizer = create_loraplus_optimizer(trained, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
        torch.save(stepped(trained, optimizer.param_groups).state_dict(), tmp_path / "optimizer.pt")
        _, mapping = load_adam_state(tmp_path / "optimizer.pt", adapted())
        assert "LoRA+" in mapping.rule
        assert ("not trained" in mapping.rule) == bool(mapping.frozen)
        (rival,) = mapping.rivals
        assert "embed_tokens.lora_embedding_B.default in group 1 or in group 2" in rival
    assert mapping.frozen


def test_names_in_the_file_say_what_was_frozen(tmp_path: Path) -> None:
    model = tiny_model("llama-untied")
    named = [(name, p) for name, p in model.named_parameters() if "layers.0." not in name][::-1]
    optimizer = stepped(model, [{"params": named}])  # type: ignore[dict-item]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found, mapping = load_adam_state(tmp_path / "optimizer.pt", model)
    assert set(found.moments) == {name for name, _ in named}
    assert set(mapping.frozen) == {name for name, _ in model.named_parameters() if "layers.0." in name}
    assert "param_names" in mapping.rule
    assert "not trained" in mapping.rule
    frozen(model, "lm_head")
    with pytest.raises(InputError, match=r"trains lm_head\.weight, by its param_names, which is frozen here"):
        load_adam_state(tmp_path / "optimizer.pt", model)


def every_way(shapes: dict[str, Shape], places: list[list[Shape | None]]) -> list[Assignment]:
    """All of them, by trying every group, or none, for every parameter."""
    found = []
    for choice in itertools.product([*range(len(places)), None], repeat=len(shapes)):
        groups = [[name for name, c in zip(shapes, choice, strict=True) if c == g] for g in range(len(places))]
        fits = all(
            len(names) == len(stored) and all(s in (None, shapes[n]) for n, s in zip(names, stored, strict=True))
            for names, stored in zip(groups, places, strict=True)
        )
        if fits:
            left = tuple(name for name, c in zip(shapes, choice, strict=True) if c is None)
            found.append(Assignment(tuple(map(tuple, groups)), left))
    return found


def test_a_single_way_is_found_just_where_trying_all_finds_one() -> None:
    draw = random.Random(0)
    counts = {0: 0, 1: 0, 2: 0}
    for _ in range(150):
        shapes: dict[str, Shape] = {f"p{n}": (draw.randint(1, 3),) for n in range(draw.randint(1, 6))}
        groups = [draw.choice([0, 1, None]) for _ in shapes]
        places: list[list[Shape | None]] = [
            [
                None if draw.random() < 0.1 else shape
                for shape, g in zip(shapes.values(), groups, strict=True)
                if g == group
            ]
            for group in (0, 1)
        ]
        if draw.random() < 0.2 and places[0]:
            places[0][0] = (9,)
        expected, found = every_way(shapes, places), assignments(shapes, places)
        assert found is not None
        assert len(found) == min(2, len(expected))
        assert all(way in expected for way in found)
        assert len(set(found)) == len(found)
        counts[len(found)] += 1
    assert min(counts.values()) > 10, counts


def test_half_of_many_equal_layers_is_told_to_be_ambiguous_soon() -> None:
    layer: list[Shape] = [(64, 64), (16, 64), (64, 64), (128, 64), (64, 128), (64,), (64,)]
    shapes: dict[str, Shape] = {f"{n}.{k}": shape for n in range(48) for k, shape in enumerate(layer)}
    groups: list[list[Shape | None]] = [[], []]
    for _ in range(24):
        for shape in layer:
            groups[len(shape) == 1].append(shape)
    found = assignments(shapes, groups)
    assert found is None or len(found) == 2
