"""bitsandbytes' AdamW and Adam, 8-bit, paged or 32-bit: ``state1`` is m, ``state2`` is v.

    state[i] = {step, "__bnb_optimizer_quant_state__": {state1, state2[, qmap1, qmap2, absmax1, absmax2]}}

Versions before 0.46 have the inner keys in the entry itself. In 8 bits a moment is qmap[code] · absmax of its block of 256
elements (2048 before 0.45); tensors of fewer than 4096 elements, and all of a 32-bit optimizer, are plain float32. Weight decay
is decoupled in Adam as in AdamW. All arithmetic is float32; moments are quantised again after the step. The class's other
optimizers keep other things in the same places, and are told apart by them. Source: bitsandbytes 0.50, ``optim/optimizer.py``,
``backends/cpu/ops.py``, ``csrc/kernels.cu``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from entropy_probe.checkpoints.files.coded import CodedTensor
from entropy_probe.checkpoints.files.quantised_note import quantised_note
from entropy_probe.checkpoints.files.stored import MappedTensor, StoredOptimizer, StoredTensor
from entropy_probe.errors import InputError
from entropy_probe.optimizers.state import Library

WRAPPED = "__bnb_optimizer_quant_state__"
BLOCKS = (256, 2048)
"""Elements a block, since 0.45 and before."""

Entry = Mapping[str, Any]


def adam_of_bitsandbytes(stored: StoredOptimizer, advice: str) -> StoredOptimizer:
    """The state as Adam's, where bitsandbytes wrote it; else as it is.

    Args:
        stored: as read; what is inside a wrapped entry are torch's tensors.
        advice: what to do where it is another optimizer's.

    Raises:
        InputError: another optimizer of bitsandbytes, or a damaged state.
    """
    entries = {index: _flat(entry) for index, entry in stored.state.items()}
    if not any("state1" in entry for entry in entries.values()):
        return stored
    other = _other(stored.groups, entries.values())
    if other is not None:
        raise InputError(f"{stored.path} holds the state of bitsandbytes' {other}, whose step is not Adam's; {advice}")
    state = {}
    for index, entry in entries.items():
        try:
            state[index] = (
                {"step": entry["step"], "exp_avg": _moment(entry, 1), "exp_avg_sq": _moment(entry, 2)} if entry else {}
            )
        except (ValueError, KeyError) as error:
            what = f"has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{stored.path}: index {index}: {what}; the optimizer state is damaged") from error
    groups = [
        {**group, "amsgrad": False, "library": Library.BITSANDBYTES, "decoupled_weight_decay": True}
        for group in stored.groups
    ]
    notes = stored.notes
    if any(isinstance(moment, CodedTensor) for entry in state.values() for moment in entry.values()):
        notes = (*notes, quantised_note("bitsandbytes", state.values(), "exp_avg_sq", _decay_order(groups)))
    return replace(stored, groups=groups, state=state, notes=notes)


def _decay_order(groups: Sequence[Mapping[str, Any]]) -> str:
    try:
        largest = max(float(group["lr"]) * float(group["weight_decay"]) for group in groups if group["params"])
    except (KeyError, TypeError, ValueError):
        largest = 0.0  # told where the groups are read
    return (
        "On GPUs it shrinks the weights by η λ after the update and not before it, which changes the step by a share of "
        f"η λ = {largest:.2g} at most"
    )


def _flat(entry: Entry) -> dict[str, Any]:
    wrapped = entry.get(WRAPPED)
    inside = wrapped if isinstance(wrapped, Mapping) else {}
    return {**{key: value for key, value in entry.items() if key != WRAPPED}, **inside}


def _moment(entry: Entry, number: int) -> StoredTensor:
    values = _tensor(entry, f"state{number}")
    if values.dtype is torch.float32:
        return MappedTensor.of(values)
    if values.dtype is not torch.uint8:
        raise ValueError(f"state{number} is of {values.dtype}, expected float32 or uint8")
    if f"absmax{number}" not in entry and f"max{number}" in entry:
        raise ValueError(
            f"state{number} has one scale for all (max{number}), as block_wise=False had it, and is not read"
        )
    absmax, qmap = _tensor(entry, f"absmax{number}"), _tensor(entry, f"qmap{number}")
    return CodedTensor.of(tuple(values.shape), values, absmax, qmap, BLOCKS)


def _tensor(entry: Entry, key: str) -> torch.Tensor:
    value = entry[key]
    value = value.read() if isinstance(value, StoredTensor) else value
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{key} is a {type(value).__name__}, expected a tensor")
    return value


def _other(groups: Sequence[Mapping[str, Any]], entries: Any) -> str | None:
    """The name of an optimizer of bitsandbytes that is not Adam or AdamW; None of these."""
    betas = [tuple(group.get("betas") or ()) for group in groups]
    keys = {key for entry in entries for key in entry}
    if any(len(found) == 3 for found in betas):
        return "AdEMAMix"
    if "state2" in keys:
        if "unorm_vec" in keys:
            return "LAMB (or Adam with max_unorm)"
        return "Adam with percentile clipping" if "gnorm_vec" in keys else None
    eps = [float(group.get("eps") or 0.0) for group in groups]
    if any(len(found) == 2 and found[1] for found in betas) and not any(eps):
        return "Lion"
    if not any(eps):
        return "LARS" if "unorm_vec" in keys else "SGD with momentum"
    return "Adagrad" if all(not any(found) for found in betas) else "RMSprop"
