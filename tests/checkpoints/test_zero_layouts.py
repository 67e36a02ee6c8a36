"""DeepSpeed's layouts for other numbers of ranks, sizes, groups and types than the real folders have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.checkpoints.files import zero_flat
from entropy_probe.errors import InputError
from support import assert_equal, lora_model, run_command, save_checkpoint, tiny_model, trained_optimizer
from zero_writer import tied, write_zero


def both(tmp_path: Path, model: Any, stage: int, ranks: int, dtype: torch.dtype) -> tuple[Path, Path]:
    optimizer = trained_optimizer(model)
    plain = save_checkpoint(model, optimizer, tmp_path / "plain")
    zero = write_zero(tmp_path / "zero", model, optimizer, stage, ranks, dtype)
    model.config.save_pretrained(zero)
    return plain, zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 3, 8, 37])
@pytest.mark.parametrize("stage", [1, 3])
def test_any_number_of_ranks_holds_what_the_plain_folder_does(
    stage: int, ranks: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """With 37 ranks there are fewer elements than ranks in the norms."""
    plain, zero = both(tmp_path, tiny_model(), stage, ranks, dtype)
    found = load_checkpoint(zero)
    assert_equal(found, load_checkpoint(plain))
    assert [note.code for note in found.folder.notes] == ["cast_forward"] * (dtype is not torch.float32)
    assert f"written by {ranks} rank" in run_command("inspect", zero).out


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("family", ["llama-untied", "gpt2", "qwen2"])
def test_untied_heads_biases_and_frozen_parameters(family: str, stage: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    for name, p in model.named_parameters():
        if "layers.0" in name or "h.0" in name:
            # What is frozen is on disk as the forward had it.
            p.requires_grad_(False).data = p.data.bfloat16().float()
    plain, zero = both(tmp_path, model, stage, 3, torch.bfloat16)
    frozen = ["layers.0|h.0"]
    found = load_checkpoint(zero)
    assert_equal(found, load_checkpoint(plain, freeze=frozen))
    assert "not trained" in found.mapping.rule


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_is_read_over_its_base(stage: int, tmp_path: Path) -> None:
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = lora_model(base)
    optimizer = trained_optimizer(model)
    plain = save_checkpoint(model, optimizer, tmp_path / "plain")
    zero = write_zero(tmp_path / "zero", model, optimizer, stage, 3, torch.float32)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_checkpoint(zero, base=tmp_path / "base")
    model.peft_config["default"].save_pretrained(zero)
    assert_equal(load_checkpoint(zero, base=tmp_path / "base"), load_checkpoint(plain, base=tmp_path / "base"))


def test_a_start_counted_in_the_whole_vector_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: parameters one after the other, as older readers take them."""
    plain, zero = both(tmp_path, tiny_model(), 1, 3, torch.float32)
    monkeypatch.setattr(
        zero_flat, "_runs", lambda files, number, shapes, master: zero_flat._one_after_the_other(shapes, master)
    )
    with pytest.raises((AssertionError, InputError)):
        assert_equal(load_checkpoint(zero), load_checkpoint(plain))


@pytest.mark.parametrize("flat", [False, True])
def test_float16_without_zero_has_masters_without_names(flat: bool, tmp_path: Path) -> None:
    """DeepSpeed's own fused Adam, which has a flat vector a group, writes the step into the groups and no amsgrad."""
    model = tiny_model("llama-untied")
    optimizer = trained_optimizer(model)
    plain = save_checkpoint(model, optimizer, tmp_path / "plain")
    groups = [list(group["params"]) for group in optimizer.param_groups]
    saved = optimizer.state_dict()
    masters: Any = [[p.detach() for p in group] for group in groups]
    if flat:
        masters = [torch.cat([p.flatten() for p in group]) for group in masters]
        keep = ("lr", "betas", "eps", "weight_decay")
        saved["param_groups"] = [
            {key: group[key] for key in keep} | {"bias_correction": True, "step": 3, "params": [number]}
            for number, group in enumerate(saved["param_groups"])
        ]
        saved["state"] = {
            number: {
                key: torch.cat([optimizer.state[p][key].flatten() for p in group]) for key in ("exp_avg", "exp_avg_sq")
            }
            for number, group in enumerate(groups)
        }
    states = {
        "module": {name: value.detach().half() for name, value in model.state_dict().items()},
        "optimizer": {"optimizer_state_dict": saved, ("fp32_groups_flat" if flat else "fp32_groups"): masters},
        "param_shapes": None,
        "shared_params": tied(model),
        "global_steps": 3,
        "dp_world_size": 2,
    }
    folder = tmp_path / "zero" / "global_step3"
    folder.mkdir(parents=True)
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    model.config.save_pretrained(folder)
    assert_equal(load_checkpoint(folder), load_checkpoint(plain))


def test_fused_adam_without_bias_correction_and_lamb_are_refused(tmp_path: Path) -> None:
    for change, told in (({"bias_correction": False}, "bias correction"), ({"max_coeff": 10.0}, "amsgrad")):
        model = tiny_model()
        optimizer = trained_optimizer(model)
        for group in optimizer.param_groups:
            group.pop("amsgrad")
            group.update({"bias_correction": True} | change)
        zero = write_zero(tmp_path / told, model, optimizer, 1, 2, torch.float32)
        model.config.save_pretrained(zero)
        outcome = run_command("inspect", zero)
        assert (outcome.code, len(outcome.lines)) == (2, 1)
        assert told in outcome.err


def test_ranks_that_split_the_model_are_refused(tmp_path: Path) -> None:
    _, zero = both(tmp_path, tiny_model(), 1, 2, torch.float32)
    tag = zero / "global_step3"
    for name, told in (
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("layer_00_expert_0_mp_rank_00_model_states.pt", "expert"),
    ):
        (tag / name).write_bytes((tag / "mp_rank_00_model_states.pt").read_bytes())
        outcome = run_command("inspect", zero)
        assert (outcome.code, len(outcome.lines)) == (2, 1)
        assert told in outcome.err
        (tag / name).unlink()


def test_a_random_state_of_numpy_beside_the_model_is_not_run(tmp_path: Path) -> None:
    """open-instruct saves one, and DeepSpeed's records are read as what they hold."""
    import numpy

    plain, zero = both(tmp_path, tiny_model(), 2, 2, torch.float32)
    file = zero / "global_step3" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"rng_states": {"numpy": numpy.random.get_state()}}, file)
    assert_equal(load_checkpoint(zero), load_checkpoint(plain))
