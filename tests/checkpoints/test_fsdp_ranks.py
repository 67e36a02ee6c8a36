"""What torch's own FSDP1 and FSDP2 leave on three ranks, saved as verl saves it, against their own full state dicts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.api import FullStateDictConfig
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.checkpoints.files import flat_units
from entropy_probe.errors import InputError
from entropy_probe.ranks.collectives import Ranks
from rank_processes import on_ranks
from support import lora_model, tiny_model

COUNT = 3


def trained(model: Any) -> torch.optim.Optimizer:
    """One group of all parameters, frozen ones too, as verl makes it, after two steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(3, 13).view(1, 10)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def layers(model: Any) -> set[type[Any]]:
    return {type(module) for module in model.modules() if type(module).__name__.endswith(("DecoderLayer", "GPT2Block"))}


def trainable_leaf(module: Any) -> bool:
    """verl's rule for LoRA."""
    return (
        not list(module.named_children())
        and getattr(module, "weight", None) is not None
        and module.weight.requires_grad
    )


def fsdp1(model: Any, mesh: DeviceMesh) -> tuple[Any, Any, dict[str, Tensor]]:
    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=trainable_leaf),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers(model)),
    ]
    chosen = policies if hasattr(model, "peft_config") else policies[1:]
    whole = FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(_or_policy, policies=chosen),
        device_id=torch.device("cpu"),
        device_mesh=mesh,
    )
    optimizer = trained(whole)
    with FullyShardedDataParallel.state_dict_type(whole, StateDictType.SHARDED_STATE_DICT):
        weights = whole.state_dict()
    with FullyShardedDataParallel.state_dict_type(
        whole, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    ):
        truth = {f"{name}|weight": t.clone() for name, t in whole.state_dict().items()}
        state = FullyShardedDataParallel.full_optim_state_dict(whole, optimizer, rank0_only=False)["state"]
    truth |= {f"{name}|{key}": e[key] for name, e in state.items() for key in ("exp_avg", "exp_avg_sq") if key in e}
    return weights, optimizer.state_dict(), truth


def fsdp2(model: Any, mesh: DeviceMesh) -> tuple[Any, Any, dict[str, Tensor]]:
    kinds = tuple(layers(model))
    for module in list(model.modules()):
        if isinstance(module, kinds):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = trained(model)
    names = {id(p): name for name, p in model.named_parameters()}
    truth = {f"{name}|weight": p.full_tensor() for name, p in model.state_dict().items()}
    for p, entry in optimizer.state.items():
        truth |= {f"{names[id(p)]}|{key}": entry[key].full_tensor() for key in ("exp_avg", "exp_avg_sq")}
    return model.state_dict(), optimizer.state_dict(), truth


def model_of(kind: str) -> Any:
    model = lora_model(tiny_model()) if kind == "lora" else tiny_model("llama-tied" if kind == "frozen" else kind)
    if kind == "frozen":
        model.model.layers[0].requires_grad_(False)
    return model


def save(
    root: Path, kind: str, wrap: Callable[[Any, DeviceMesh], tuple[Any, Any, dict[str, Tensor]]], ranks: Ranks
) -> None:
    model = model_of(kind)
    configuration, group = model.config, dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("fsdp",))
    weights, state, truth = wrap(model, mesh)
    actor = root / "global_step_2" / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(weights, actor / f"model_world_size_{ranks.count}_rank_{ranks.rank}.pt")
    torch.save(state, actor / f"optim_world_size_{ranks.count}_rank_{ranks.rank}.pt")
    if ranks.rank == 0:
        configuration.save_pretrained(actor / "huggingface")
        if kind == "lora":
            meta = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}
            (actor / "lora_train_meta.json").write_text(json.dumps(meta))
        torch.save(truth, root / "truth.pt")
    dist.barrier()


CASES = {
    f"{wrap.__name__}-{kind}": (kind, wrap)
    for wrap in (fsdp1, fsdp2)
    for kind in ("llama-tied", "llama-untied", "gpt2", "lora", "frozen")
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")

    def work(ranks: Ranks) -> None:
        for name, (kind, wrap) in CASES.items():
            save(root / name, kind, wrap, ranks)

    on_ranks(COUNT, work, seconds=300.0)
    return root


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_three_ranks_files_hold_what_the_ranks_gather(case: str, folders: Path) -> None:
    found = load_checkpoint(folders / case)
    truth: dict[str, Tensor] = torch.load(folders / case / "truth.pt", weights_only=True)
    weights = dict(found.model.named_parameters(remove_duplicate=False))
    moments = found.adam.moments
    assert {key.partition("|")[0] for key in truth if not key.endswith("|weight")} == set(moments)
    for key, value in truth.items():
        name, _, field = key.partition("|")
        assert torch.equal(weights[name] if field == "weight" else getattr(moments[name], field), value), key
    assert ("frozen" in case) == ("not trained" in found.mapping.rule)
    assert found.trainer_step == 2


@pytest.mark.long
def test_units_in_the_order_of_names_are_not_taken(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: LoRA's modules after the layers that they are in."""

    def in_order_of_names(names: list[str], scheme: Callable[[str], str]) -> flat_units.Units:
        found: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: "lora_" in name):
            found.setdefault(scheme(name), []).append(name)
        return list(found.values())

    monkeypatch.setattr(flat_units, "_units", in_order_of_names)
    with pytest.raises(InputError, match="no known way to wrap"):
        load_checkpoint(folders / "fsdp1-lora")
