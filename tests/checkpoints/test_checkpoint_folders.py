"""Small print of checkpoint folders: the validator's seed, types and tokenizers of adapters, dots of float32 vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import support
from entropy_probe.checkpoints import load_checkpoint, load_model
from entropy_probe.checkpoints.inspection import look_into
from entropy_probe.data.units import exact_units
from entropy_probe.errors import InputError
from entropy_probe.gradients import Storage, Wanted, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.input_limits import end_token_ids
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.validation import validate_preconditioner
from entropy_probe.statistics.u_statistics import cross_statistics
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


def test_full_weights_without_a_configuration_take_that_of_the_given_base_and_nothing_else(tmp_path: Path) -> None:
    path, started = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "started"
    expected = load_checkpoint(path)
    with pytest.raises(InputError, match="leave it out"):
        load_checkpoint(path, base=path)
    started.mkdir()
    for file in ("config.json", "generation_config.json"):
        shutil.move(path / file, started)
    generation = json.loads((started / "generation_config.json").read_text())
    (started / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 5]}))
    with pytest.raises(InputError, match=r"has no config\.json; .* as base"):
        load_checkpoint(path)
    with pytest.raises(InputError, match=f"{started / 'nowhere'} is not a folder"):
        load_checkpoint(path, base=started / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_checkpoint(path, base=tmp_path)
    found = load_checkpoint(path, base=started)
    assert (found.folder.kind, found.folder.base, found.folder.tokenizer_folders) == ("full", started, (path, started))
    assert found.folder.architecture == expected.folder.architecture
    assert end_token_ids(found.model) == (1, 5)
    for (name, p), (other, q) in zip(found.model.named_parameters(), expected.model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
    (started / "generation_config.json").unlink()
    assert end_token_ids(load_checkpoint(path, base=started).model) == end_token_ids(expected.model)
    assert {file.pattern: file.required for file in look_into(path).files}["config.json"]
    assert not {file.pattern: file.required for file in look_into(path, started).files}["config.json"]


def test_an_adapter_without_its_configuration_is_told_how_to_write_it(tmp_path: Path) -> None:
    model = lora_model(tiny_model())
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint")
    (path / "adapter_config.json").unlink()
    for base in (None, tmp_path):
        with pytest.raises(
            InputError, match=r'adapter_config\.json; .*model\.peft_config\["default"\]\.save_pretrained'
        ):
            load_checkpoint(path, base=base)


@pytest.mark.parametrize("storage", list(Storage))
def test_dots_of_float32_vectors_are_taken_in_float64(storage: Storage) -> None:
    model = support.tiny_model(dtype=torch.float32)
    batch = support.random_batch(5, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    wanted = Wanted(storage)
    found = unit_gradients(Policy(model), batch, exact_units(5), Sides(a + 0.3, a), Geometry.fixed(p), wanted=wanted)
    # Streamed, the second pass contracts chunks of gradients in their own type and sums the chunks in float64.
    assert cross_statistics(found.total).self_test_residual < {Storage.STORED: 1e-12, Storage.STREAMED: 1e-7}[storage]
    narrow = support.tiny_model(dtype=torch.float32).to(torch.bfloat16)
    found = unit_gradients(Policy(narrow), batch, exact_units(5), Sides(a + 0.3, a), Geometry.fixed(p), wanted=wanted)
    mixed = Policy(narrow)
    one = unit_gradients(
        mixed, batch, exact_units(5), Sides(a + 0.3, a), Geometry.fixed({n: 1e-3 * q for n, q in p.items()})
    )
    # Scaling by √P in bfloat16 would round each element; in float32 the dots scale as P does.
    assert cross_statistics(one.total).u_cross == pytest.approx(1e-3 * cross_statistics(found.total).u_cross, rel=1e-5)


def test_a_folder_that_lost_its_adam_state_says_so(tmp_path: Path) -> None:
    model = tiny_model()
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint")
    (path / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"no optimizer\.pt, no optimizer_0/"):
        load_checkpoint(path)
