"""Folders of verl and DeepSpeed as these libraries wrote them: read exactly, probed alike, refused in one line when spoiled."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.checkpoints.sharded import load_sharded_checkpoint
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.ranks.collectives import Ranks
from rank_processes import failed_cases
from real_checkpoints import REAL, VOCABULARY, Real, assert_truth, plain_folder
from shard_checks import assert_same
from spoiled import Malicious, assert_refused
from support import assert_equal, random_rollouts, run_command

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("real", REAL.values(), ids=REAL)
def test_weights_and_moments_are_the_truth_from_every_folder_that_may_be_given(real: Real) -> None:
    base = real.base_of()
    for inside in ("", *real.inner):
        found = load_checkpoint(real.root / real.given / inside, base=base)
        assert_truth(found, real.truth())
        assert found.trainer_step == real.step
        assert {moments.step for moments in found.adam.moments.values()} == {real.step}
        assert found.folder.kind == ("lora" if real.lora else "full")
    assert "deepspeed" not in sys.modules
    assert "verl" not in sys.modules


@pytest.mark.parametrize("real", [real for real in REAL.values() if not real.lora], ids=lambda real: real.name)
def test_the_probe_says_what_it_says_of_the_plain_folder(real: Real, tmp_path: Path) -> None:
    plain = plain_folder(real, tmp_path / "plain")
    base = [] if real.base is None else ["--base", real.base_of()]
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(4, 2, vocabulary=VOCABULARY), rollouts)
    reports = []
    for given in ([plain], [real.root / real.given, *base]):
        outcome = run_command("run", *given, "--rollouts", rollouts, "--json", tmp_path / "report.json")
        assert outcome.code == 0, outcome.err
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    for section in ("first_order", "units", "realized", "adamw"):
        assert reports[0][section] == reports[1][section], section
    codes = [warning["code"] for warning in reports[1]["warnings"]]
    assert ("cast_forward" in codes) == ("bf16" in real.name or real.name == "ds_universal")


@pytest.mark.parametrize("real", REAL.values(), ids=REAL)
def test_inspect_names_format_step_and_world_size(real: Real) -> None:
    framework = "verl checkpoint" if real.name.startswith("verl") else "DeepSpeed checkpoint"
    for inside in ("", *real.inner):
        outcome = run_command("inspect", real.root / real.given / inside)
        assert (outcome.code, outcome.lines) == (0, []), outcome.err
        said = " ".join(outcome.out.split())
        assert f"format: {framework}" in said
        assert f"step {real.step}, written by 2 ranks" in said
        assert ("give as base" in said) == (real.base is not None)
        assert "model.layers.1.self_attn.q_proj" in said


def test_without_a_base_run_asks_for_it(tmp_path: Path) -> None:
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(4, 2, vocabulary=VOCABULARY), rollouts)
    outcome = run_command("run", REAL["ds_universal"].root, "--rollouts", rollouts)
    assert_refused(outcome, "no config.json", "as base")


def test_a_run_names_its_latest_step_and_several_without_a_name_are_told(tmp_path: Path) -> None:
    real = REAL["verl_fsdp2_qwen2_fp32_w2"]
    run = real.copy(tmp_path / "run")
    shutil.copytree(run / "global_step_4", run / "global_step_6")
    outcome = run_command("inspect", run)
    assert_refused(outcome, "holds global_step_4, global_step_6; give one of them")
    (run / "latest_checkpointed_iteration.txt").write_text("4")
    assert load_checkpoint(run).trainer_step == 4
    (run / "global_step_4" / "actor").rename(run / "global_step_4" / "policy")
    assert_truth(load_checkpoint(run), real.truth())
    zero = REAL["ds_zero1_fp32_qwen2_w2"]
    openrlhf = tmp_path / "ckpt"
    zero.copy(openrlhf / "_actor")
    (openrlhf / "_actor" / "global_step4").rename(openrlhf / "_actor" / "best")
    (openrlhf / "_actor" / "latest").write_text("best\n")
    found = load_checkpoint(openrlhf)
    assert_truth(found, zero.truth())
    assert found.trainer_step == 4


def test_weights_beside_ranks_optimizers_are_read_as_areal_saves_them(tmp_path: Path) -> None:
    real = REAL["verl_fsdp2_qwen2_fp32_w2"]
    folder = plain_folder(real, tmp_path / "epoch0epochstep3globalstep3")
    for name in ("optimizer.pt", "trainer_state.json"):
        (folder / name).unlink()
    for file in real.root.glob("*/actor/optim_*.pt"):
        shutil.copy(file, folder)
    found = load_checkpoint(folder)
    assert_truth(found, real.truth())
    assert found.trainer_step == 3


def test_lora_without_its_scale_is_refused_and_adapter_config_will_do(tmp_path: Path) -> None:
    real = REAL["verl_fsdp1_qwen2lora_fp32_w2"]
    run = real.copy(tmp_path / "run")
    expected = load_checkpoint(run)
    actor = run / "global_step_4" / "actor"
    assert expected.model.peft_config["default"].r == 4
    assert expected.model.peft_config["default"].lora_alpha == 8
    (actor / "lora_train_meta.json").unlink()
    assert_refused(run_command("inspect", run), "lora_train_meta.json", "adapter_config.json")
    expected.model.peft_config["default"].save_pretrained(actor)
    assert_equal(load_checkpoint(run), expected)


def test_an_adapter_alone_wants_its_base(tmp_path: Path) -> None:
    real = REAL["verl_fsdp1_qwen2lora_fp32_w2"]
    run = real.copy(tmp_path / "run")
    expected = load_checkpoint(run)
    expected.model.unload().save_pretrained(tmp_path / "base")
    expected = load_checkpoint(run)
    for file in run.glob("*/actor/model_*.pt"):
        state = torch.load(file, weights_only=True)
        torch.save({key: value for key, value in state.items() if "lora_" in key}, file)
    for file in run.glob("*/actor/optim_*.pt"):
        saved = torch.load(file, weights_only=True)
        saved["param_groups"][0]["params"] = sorted(saved["state"])
        torch.save(saved, file)
    outcome = run_command("inspect", run)
    assert outcome.code == 0, outcome.err
    assert "neither here nor named" in " ".join(outcome.out.split())
    assert "lora_B.default.weight" in outcome.out
    with pytest.raises(ValueError, match="base"):
        load_checkpoint(run)


OPTIM = {
    "verl_fsdp1_qwen2_fp32_w2": "global_step_4/actor/optim_world_size_2_rank_{}.pt",
    "verl_fsdp2_qwen2_fp32_w2": "global_step_4/actor/optim_world_size_2_rank_{}.pt",
    "ds_zero1_fp32_qwen2_w2": "global_step4/zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    "ds_zero3_bf16_qwen2_w2": "global_step4/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt",
}


def _truncated(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _missing(file: Path, _: Path) -> None:
    file.unlink()


def _planted(file: Path, place: Path) -> None:
    torch.save({"state": {0: Malicious(place / "planted")}, "param_groups": []}, file)


def _foreign(file: Path, _: Path) -> None:
    torch.save([torch.zeros(3)], file)


@pytest.mark.parametrize("spoil", [_truncated, _missing, _planted, _foreign])
@pytest.mark.parametrize("name", OPTIM)
def test_a_spoiled_ranks_file_is_one_line_with_its_name(
    name: str, spoil: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    run = REAL[name].copy(tmp_path / "run")
    file = run / OPTIM[name].format(1)
    spoil(file, tmp_path)
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(4, 2, vocabulary=VOCABULARY), rollouts)
    for command in (["inspect", run], ["run", run, "--rollouts", rollouts]):
        assert_refused(run_command(*command), file.name)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("name", OPTIM)
def test_files_of_two_steps_are_refused(name: str, tmp_path: Path) -> None:
    run = REAL[name].copy(tmp_path / "run")
    file = run / OPTIM[name].format(1)
    file.write_bytes(with_steps(file, 7.0))
    assert_refused(run_command("inspect", run), file.name, "at Adam's step 7.0", "different steps")


def with_steps(file: Path, step: float) -> bytes:
    """The content of a saved file with other values in every tensor of one number; the classes that it names are not here."""
    changed = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename and record.file_size == 4:
                header = changed[record.header_offset : record.header_offset + 30]
                start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
                changed[start : start + 4] = struct.pack("<f", step)
    return bytes(changed)


def test_model_states_of_another_step_are_refused(tmp_path: Path) -> None:
    run = REAL["ds_zero2_bf16_qwen2_w2"].copy(tmp_path / "run")
    file = run / "global_step4" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    state["module"]["model.norm.weight"] += 0.5
    torch.save(state, file)
    assert_refused(run_command("inspect", run), file.name, "model.norm.weight", "different steps")


def test_another_world_size_is_refused(tmp_path: Path) -> None:
    run = REAL["verl_fsdp2_qwen2_fp32_w2"].copy(tmp_path / "run")
    actor = run / "global_step_4" / "actor"
    for kind in ("model", "optim"):
        (actor / f"{kind}_world_size_2_rank_1.pt").unlink()
        (actor / f"{kind}_world_size_2_rank_0.pt").rename(actor / f"{kind}_world_size_1_rank_0.pt")
    assert_refused(run_command("inspect", run), "world_size_1_rank_0.pt", "rank of 2")
    run = REAL["verl_fsdp1_qwen2_fp32_w2"].copy(tmp_path / "mixed")
    actor = run / "global_step_4" / "actor"
    shutil.copy(actor / "optim_world_size_2_rank_0.pt", actor / "optim_world_size_4_rank_0.pt")
    assert_refused(run_command("inspect", run), "optim_world_size_*_rank_*.pt of several world sizes")
    run = REAL["ds_zero3_bf16_qwen2_w2"].copy(tmp_path / "zero")
    files = sorted((run / "global_step4").glob("*_optim_states.pt"))
    shutil.copy(files[1], files[1].with_name(files[1].name.replace("rank_1", "rank_2", 1)))
    assert_refused(run_command("inspect", run), "zero_pp_rank_2_", "2 ranks wrote it")


def _alike(real: Real, ranks: Ranks) -> None:
    given, base = real.root / real.given, real.base_of()
    expected = load_checkpoint(given, base=base)
    assert_same(load_sharded_checkpoint(given, ranks, base=base), expected, ranks, base=base)


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, str]]:
    return failed_cases(2, {name: partial(_alike, real) for name, real in REAL.items()})


@pytest.mark.parametrize("name", REAL)
def test_rows_on_two_ranks_are_those_of_one_process(name: str, on_two_ranks: list[dict[str, str]]) -> None:
    for rank, failures in enumerate(on_two_ranks):
        assert name not in failures, f"rank {rank}:\n{failures[name]}"
