"""DeepSpeed's files as its layouts describe them, for any number of ranks; written apart from the reader."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FRAGMENT = "deepspeed.utils.tensor_fragment"
STAGE = "deepspeed.runtime.zero.config"


def write_zero(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, stage: int, ranks: int, dtype: torch.dtype
) -> Path:
    """ZeRO 1 to 3; ``dtype`` is the forward's, and the model's weights are the master. Gaps of one element stand between
    parameters below stage 3, as DeepSpeed aligns them."""
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    names = {id(p): name for name, p in model.named_parameters()}
    # A group without parameters, as the Trainer makes one for LoRA, has no flat vector.
    groups = [list(group["params"]) for group in optimizer.param_groups if group["params"]]
    trained = {id(p) for group in groups for p in group}
    frozen = {name: p.detach() for name, p in model.named_parameters() if id(p) not in trained}
    module = {name: value.detach().to(dtype) for name, value in model.state_dict().items()}
    shapes = [OrderedDict((names[id(p)], p.shape) for p in group) for group in groups]
    model_states = {
        "module": module if stage < 3 else {name: torch.empty(0, dtype=dtype) for name in module},
        "param_shapes": shapes,
        "shared_params": {} if stage == 3 else tied(model),
        "frozen_param_shapes": OrderedDict((name, p.shape) for name, p in frozen.items()),
        "global_steps": 3,
        "dp_world_size": ranks,
    }
    prefix = "bf16_" if dtype is torch.bfloat16 else ""
    cut = _pieces if stage == 3 else _parts
    for rank in range(ranks):
        if rank == 0 or stage == 3:
            fragments = {name: _pieces([p.to(dtype)], ranks)[0][rank] for name, p in frozen.items()}
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save(model_states | {"frozen_param_fragments": fragments if stage == 3 else {}}, tag / name)
        flats: dict[str, list[Tensor]] = {"fp32": [], "exp_avg": [], "exp_avg_sq": []}
        mappings = []
        for group in groups:
            values: Mapping[str, Sequence[Tensor]] = {
                "fp32": [p.detach() for p in group],
                **{key: [optimizer.state[p][key] for p in group] for key in ("exp_avg", "exp_avg_sq")},
            }
            for key, tensors in values.items():
                parts, places = cut(tensors, ranks)
                flats[key].append(parts[rank])
            mappings.append({names[id(p)]: place for p, place in zip(group, places[rank], strict=True) if place[0]})
        step = next(iter(optimizer.state.values()))["step"]
        settings, vectors = optimizer.state_dict()["param_groups"], list(range(len(groups)))
        base = {
            "state": {
                number: {"step": step, "exp_avg": flats["exp_avg"][number], "exp_avg_sq": flats["exp_avg_sq"][number]}
                for number in range(len(groups))
            },
            "param_groups": [group | {"params": [vectors.pop(0)] if group["params"] else []} for group in settings],
        }
        with deepspeed_classes() as classes:
            made = [{name: classes[FRAGMENT](*place) for name, place in mapping.items()} for mapping in mappings]
            state: dict[str, Any] = {"zero_stage": classes[STAGE](stage)}
            if stage == 3:
                state |= {"fp32_flat_groups": flats["fp32"], "optimizer_state_dict": base, "partition_count": ranks}
            else:
                state |= {
                    "single_partition_of_fp32_groups": flats["fp32"],
                    "base_optimizer_state": base,
                    "param_slice_mappings": made,
                    "partition_count": [ranks] * len(groups),
                }
            torch.save({"optimizer_state_dict": state}, tag / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that go by another name too."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if name != first[id(p)]}


Parts = tuple[list[Tensor], list[list[tuple[int, int]]]]


def _parts(tensors: Sequence[Tensor], ranks: int) -> Parts:
    """One after the other with a gap of one element, cut into equal parts; and by rank (elements, start) of every tensor."""
    flat, begins = [], []
    at = 0
    for tensor in tensors:
        begins.append(at)
        flat += [tensor.flatten(), torch.full((1,), float("nan"))]
        at += tensor.numel() + 1
    whole = torch.cat([*flat, torch.full((-at % ranks,), float("nan"))])
    each = whole.numel() // ranks
    places = [
        [
            (max(0, min(begin + t.numel(), (rank + 1) * each) - max(begin, rank * each)), max(begin - rank * each, 0))
            for begin, t in zip(begins, tensors, strict=True)
        ]
        for rank in range(ranks)
    ]
    return [part.clone() for part in whole.split(each)], places


def _pieces(tensors: Sequence[Tensor], ranks: int) -> Parts:
    """Every tensor in pieces of ⌈numel / ranks⌉, the last ones padded, and a rank's one after the other."""
    cut = []
    for tensor in tensors:
        each = -(-tensor.numel() // ranks)
        padding = torch.full((each * ranks - tensor.numel(),), float("nan"), dtype=tensor.dtype)
        cut.append(torch.cat([tensor.flatten(), padding]).split(each))
    return [torch.cat([pieces[rank] for pieces in cut]) for rank in range(ranks)], [[(0, 0)] * len(tensors)] * ranks


@contextmanager
def deepspeed_classes() -> Iterator[dict[str, Any]]:
    """Classes under DeepSpeed's names, which is not here, for as long as a file is pickled."""

    class fragment_address:  # noqa: N801 (its name)
        def __init__(self, numel: int, start: int) -> None:
            self.numel, self.start = numel, start

    class ZeroStageEnum:
        def __init__(self, value: int) -> None:
            self.value = value

        def __reduce__(self) -> tuple[Any, ...]:
            return type(self), (self.value,)

    found, before = {}, {}
    for module, made in ((FRAGMENT, fragment_address), (STAGE, ZeroStageEnum)):
        made.__module__, made.__qualname__ = module, made.__name__
        found[module] = made
        parts = module.split(".")
        for name in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
            before.setdefault(name, sys.modules.get(name))
            sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[module])[made.__name__] = made
    try:
        yield found
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
