"""Small print of checkpoint folders: the validator's seed, types and tokenizers of adapters, dots of float32 vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import support
from entropy_probe.adam_preconditioner import validate_preconditioner
from entropy_probe.checkpoints import load_checkpoint, load_model
from entropy_probe.gradients import Storage, unit_gradients
from entropy_probe.policy import Policy
from entropy_probe.u_statistics import cross_statistics
from entropy_probe.units import exact_units
from support import lora_model, make_checkpoint, save_checkpoint, tiny_model, trained_optimizer


def test_the_seed_is_that_of_the_validators_vectors(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    zero, seven = load_checkpoint(path), load_checkpoint(path, seed=7)
    assert seven.preconditioner_test != zero.preconditioner_test
    shapes = {name: p.shape for name, p in seven.model.named_parameters()}
    assert seven.preconditioner_test == validate_preconditioner(seven.adam, shapes, seed=7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_has_the_type_asked_for_and_its_own_tokenizer_first(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    adapter = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint")
    folder = load_model(adapter, base=tmp_path / "base", dtype=dtype)
    assert {p.dtype for p in folder.model.parameters()} == {dtype}
    assert folder.tokenizer_folders == (adapter, tmp_path / "base")
    assert load_model(tmp_path / "base").tokenizer_folders == (tmp_path / "base",)


@pytest.mark.parametrize("storage", list(Storage))
def test_dots_of_float32_vectors_are_taken_in_float64(storage: Storage) -> None:
    model = support.tiny_model(dtype=torch.float32)
    batch = support.random_batch(5, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    rates = dict.fromkeys(p, 1.0)
    found = unit_gradients(Policy(model), batch, exact_units(5), a + 0.3, a, p, rates, storage=storage)
    # Streamed, the second pass contracts chunks of gradients in their own type and sums the chunks in float64.
    assert cross_statistics(found.total).self_test_residual < {Storage.STORED: 1e-12, Storage.STREAMED: 1e-7}[storage]
    narrow = support.tiny_model(dtype=torch.float32).to(torch.bfloat16)
    found = unit_gradients(Policy(narrow), batch, exact_units(5), a + 0.3, a, p, rates, storage=storage)
    mixed = Policy(narrow)
    one = unit_gradients(mixed, batch, exact_units(5), a + 0.3, a, {n: 1e-3 * q for n, q in p.items()}, rates)
    # Scaling by √P in bfloat16 would round each element; in float32 the dots scale as P does.
    assert cross_statistics(one.total).u_cross == pytest.approx(1e-3 * cross_statistics(found.total).u_cross, rel=1e-5)
