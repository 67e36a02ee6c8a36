"""What ranks hold of a checkpoint is, put together, what one process loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_probe.checkpoints import Checkpoint
from entropy_probe.model.input_limits import end_token_ids
from entropy_probe.optimizers.state import MOMENTS
from entropy_probe.ranks.collectives import Ranks


def shard_of(whole: Tensor, ranks: Ranks) -> Tensor:
    """As torch cuts: a rank beyond the last chunk has no rows."""
    chunks = whole.chunk(ranks.count)
    return chunks[ranks.rank] if ranks.rank < len(chunks) else whole[:0]


def assert_same(found: Checkpoint, expected: Checkpoint, ranks: Ranks, *, base: Path | None = None) -> None:
    parameters: dict[str, Any] = dict(found.model.named_parameters())
    assert list(parameters) == [name for name, _ in expected.model.named_parameters()]
    for name, whole in expected.model.named_parameters():
        shard = parameters[name]
        assert (shard.requires_grad, shard.dtype) == (whole.requires_grad, whole.dtype), name
        assert torch.equal(shard.full_tensor(), whole), name
        assert torch.equal(shard.to_local(), shard_of(whole, ranks)), name
    buffers = dict(expected.model.named_buffers())
    assert buffers.keys() == dict(found.model.named_buffers()).keys()
    for name, buffer in found.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    assert found.adam.groups == expected.adam.groups
    assert found.adam.moments.keys() == expected.adam.moments.keys()
    for name, moments in expected.adam.moments.items():
        assert found.adam.moments[name].step == moments.step
        for field in MOMENTS:
            own, whole = getattr(found.adam.moments[name], field), getattr(moments, field)
            assert (own is None) == (whole is None)
            if own is None:
                continue
            assert type(own) is Tensor
            assert torch.equal(own, shard_of(whole, ranks)), name
            assert own.untyped_storage().nbytes() == own.numel() * own.element_size(), "a view of more than the shard"
    for dot in ("plain_dot", "preconditioned_dot"):
        assert getattr(found.preconditioner_test, dot) == pytest.approx(
            getattr(expected.preconditioner_test, dot), rel=1e-9
        )
    for field in ("kind", "architecture", "vocabulary", "context_length"):
        assert getattr(found.folder, field) == getattr(expected.folder, field)
    assert found.folder.base == base
    assert (found.adam.learning_rates, found.trainer_step) == (expected.adam.learning_rates, expected.trainer_step)
    assert end_token_ids(found.model) == end_token_ids(expected.model)
