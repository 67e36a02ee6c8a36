"""Bad input is refused by the real command: exit code 2, one line that names the culprit, nothing written, nothing executed."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import pkgutil
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.report import files as report_files
from entropy_probe.rollouts import write_rollouts
from support import (
    VOCABULARY,
    Outcome,
    fingerprint,
    hf_groups,
    lora_model,
    make_checkpoint,
    random_batch,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)

PROBE = importlib.import_module("entropy_probe.probe")  # in the package, the name means the function
CONTEXT = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A folder with a sound checkpoint and sound rollouts in it, for a test to spoil."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint-3"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts.jsonl"

    @property
    def optimizer(self) -> Path:
        return self.checkpoint / "optimizer.pt"

    @property
    def weights(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def names(self) -> list[str]:
        """Parameter names in the order of the optimizer's indices."""
        model = tiny_model()
        names = {id(p): name for name, p in model.named_parameters()}
        return [names[id(p)] for group in hf_groups(model) for p in group["params"]]

    def edit_optimizer(self, change: Callable[[dict[str, Any]], object]) -> None:
        saved = torch.load(self.optimizer, weights_only=True)
        change(saved)
        torch.save(saved, self.optimizer)

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def edit_rows(self, change: Callable[[list[Row]], object]) -> None:
        rows = [json.loads(line) for line in self.rollouts.read_text().splitlines()]
        change(rows)
        self.rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sound")
    make_checkpoint(root / "checkpoint-3")
    write_rollouts(random_rollouts(4, 2), root / "rollouts.jsonl")
    return root


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(sound, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Place(tmp_path / "work")


def assert_refused(outcome: Outcome, *culprits: str) -> None:
    assert outcome.code == 2, (outcome.code, outcome.err)
    assert len(outcome.lines) == 1, outcome.err
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    for culprit in culprits:
        assert culprit in outcome.lines[0], (culprit, outcome.lines[0])


def refuse(place: Place, arguments: Sequence[str | Path], *culprits: str) -> None:
    """The command is refused, and no file under the working folder appears, disappears or changes."""
    before = fingerprint(place.root)
    outcome = run_command(*arguments)
    assert_refused(outcome, *culprits)
    assert fingerprint(place.root) == before


def refuse_run(place: Place, *culprits: str, options: Sequence[str] = (), rollouts: Path | None = None) -> None:
    chosen = place.rollouts if rollouts is None else rollouts
    outputs = ["--json", place.root / "report.json", "--out", place.root / "report"]
    refuse(place, ["run", place.checkpoint, "--rollouts", chosen, *outputs, *options], *culprits)


def test_the_unspoiled_place_is_accepted_and_both_outputs_appear(place: Place) -> None:
    before = fingerprint(place.root)
    arguments = ["run", place.checkpoint, "--rollouts", place.rollouts, "--json", "report.json", "--out", "report"]
    outcome = run_command(*arguments)
    assert outcome.code == 0, outcome.err
    assert not outcome.lines
    after = fingerprint(place.root)
    assert before.items() <= after.items()
    new = {"report", "report.json", "report/report.json", "report/kernel.npy", "report/row_means.png"}
    assert set(after) - set(before) == new | {"report/predicted_and_realized.png"}


# The optimizer's state


def _damage(index: int, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Place], str]:
    def spoil(place: Place) -> str:
        place.edit_optimizer(lambda saved: saved["state"][index].update({key: change(saved["state"][index][key])}))
        return place.names()[index]

    return spoil


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def _without(index: int, *keys: str) -> Callable[[Place], str]:
    def spoil(place: Place) -> str:
        def change(saved: dict[str, Any]) -> None:
            if keys:
                for key in keys:
                    del saved["state"][index][key]
            else:
                del saved["state"][index]

        place.edit_optimizer(change)
        return place.names()[index]

    return spoil


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], str]:
    def spoil(place: Place) -> str:
        place.edit_optimizer(change)
        return "optimizer.pt"

    return spoil


def _every_entry(entry: Callable[[torch.Tensor], dict[str, Any]]) -> Callable[[Place], str]:
    def change(saved: dict[str, Any]) -> None:
        for index, old in saved["state"].items():
            saved["state"][index] = entry(old["exp_avg"])

    return _state(change)


def _foreign(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Callable[[Place], str]:
    def spoil(place: Place) -> str:
        model = tiny_model()
        optimizer = make(model)
        ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), place.optimizer)
        return "optimizer.pt"

    return spoil


def _transformers_adafactor(v: torch.Tensor) -> dict[str, Any]:
    if v.dim() < 2:
        return {"step": 3, "exp_avg_sq": v * v, "RMS": 0.1}
    return {"step": 3, "exp_avg_sq_row": v[:, 0] ** 2, "exp_avg_sq_col": v[0] ** 2, "RMS": 0.1}


def _muon_beside_adam(v: torch.Tensor) -> dict[str, Any]:
    if v.dim() < 2:
        return {"step": torch.tensor(3.0), "exp_avg": v, "exp_avg_sq": v * v}
    return {"momentum_buffer": v}


OPTIMIZERS: dict[str, tuple[Callable[[Place], str], str]] = {
    "missing-entry": (_without(4), "no Adam state"),
    "missing-v": (_without(4, "exp_avg_sq"), "exp_avg_sq"),
    "missing-m": (_without(4, "exp_avg"), "exp_avg"),
    "missing-step": (_without(4, "step"), "step"),
    "nan-v": (_damage(2, "exp_avg_sq", _put(float("nan"))), "exp_avg_sq holds NaN"),
    "inf-v": (_damage(2, "exp_avg_sq", _put(float("inf"))), "exp_avg_sq holds an infinite value"),
    "negative-v": (_damage(2, "exp_avg_sq", _put(-1e-12)), "exp_avg_sq holds a negative value"),
    "nan-m": (_damage(2, "exp_avg", _put(float("nan"))), "exp_avg holds NaN"),
    "mis-shaped-v": (_damage(2, "exp_avg_sq", lambda v: v[:-1]), "shape"),
    "mis-shaped-m": (_damage(2, "exp_avg", lambda v: v[:-1]), "shape"),
    "step-0": (_damage(5, "step", torch.zeros_like), "step is 0"),
    "step-nan": (_damage(5, "step", lambda step: step * float("nan")), "step"),
    "step-vector": (_damage(5, "step", lambda step: torch.ones(3)), "step"),
    "v-not-a-tensor": (_damage(5, "exp_avg_sq", lambda v: v.tolist()), "exp_avg_sq"),  # type: ignore[arg-type,return-value]
    "v-of-integers": (_damage(5, "exp_avg_sq", lambda v: v.to(torch.int64)), "exp_avg_sq"),
    "v-sparse": (_damage(5, "exp_avg_sq", lambda v: v.to_sparse()), "exp_avg_sq"),
    "sgd": (_foreign(lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)), "SGD"),
    "sgd-without-momentum": (_foreign(lambda model: torch.optim.SGD(model.parameters(), 0.1)), "betas"),
    "muon-like": (_every_entry(lambda v: {"momentum_buffer": v}), "Muon"),
    "muon-beside-adam": (_every_entry(_muon_beside_adam), "Muon"),
    "adafactor": (_every_entry(_transformers_adafactor), "Adafactor"),
    "torch-adafactor": (_foreign(lambda model: torch.optim.Adafactor(model.parameters())), "exp_avg_sq"),
    "no-steps-yet": (_state(lambda saved: saved["state"].clear()), "has not taken a step"),
    "empty-entries": (_every_entry(lambda v: {}), "exp_avg_sq"),
    "entries-not-dicts": (_state(lambda saved: saved["state"].update({0: 1.0})), "state"),
    "state-is-a-list": (_state(lambda saved: saved.update(state=[1, 2])), "state"),
    "no-groups": (_state(lambda saved: saved.update(param_groups=[])), "group"),
    "groups-not-a-list": (_state(lambda saved: saved.update(param_groups={"lr": 1e-3})), "group"),
    "groups-of-numbers": (_state(lambda saved: saved.update(param_groups=[1, 2])), "group"),
    "group-without-params": (_state(lambda saved: saved["param_groups"][0].pop("params")), "params"),
    "group-without-lr": (_state(lambda saved: saved["param_groups"][0].pop("lr")), "lr"),
    "group-with-one-beta": (_state(lambda saved: saved["param_groups"][0].update(betas=(0.9,))), "betas"),
    "beta-out-of-range": (_state(lambda saved: saved["param_groups"][0].update(betas=(0.9, 1.0))), "beta"),
    "lr-nan": (_state(lambda saved: saved["param_groups"][0].update(lr=float("nan"))), "learning rate"),
    "eps-negative": (_state(lambda saved: saved["param_groups"][0].update(eps=-1.0)), "eps"),
    "group-sizes": (_state(lambda saved: saved["param_groups"][0]["params"].pop()), "group sizes"),
    "another-model": (_foreign(lambda model: torch.optim.AdamW(list(model.parameters())[:3])), "does not fit"),
    "not-a-state-dict": (lambda place: (torch.save([1, 2], place.optimizer), "optimizer.pt")[1], "'state'"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_damaged_or_foreign_optimizer_state_is_refused(name: str, place: Place) -> None:
    spoil, what = OPTIMIZERS[name]
    refuse_run(place, spoil(place), what)


def test_an_unreadable_optimizer_file_is_refused_and_nothing_in_it_is_executed(place: Place) -> None:
    planted = place.root / "planted"
    for payload in (pickle.dumps(Malicious(planted)), b"garbage", b"", b"PK\x03\x04 not a zip"):
        place.optimizer.write_bytes(payload)
        refuse_run(place, "optimizer.pt", "weights_only")
        refuse(place, ["inspect", place.checkpoint], "optimizer.pt", "weights_only")
    for content in (Malicious(planted), {"state": {0: Malicious(planted)}, "param_groups": []}):
        torch.save(content, place.optimizer)
        refuse_run(place, "optimizer.pt", "weights_only")
    truncated = (place.root.parent / "whole.pt", place.optimizer)
    torch.save({"state": {}, "param_groups": [torch.zeros(1000)]}, truncated[0])
    truncated[1].write_bytes(truncated[0].read_bytes()[:2000])
    refuse_run(place, "optimizer.pt", "weights_only")
    assert not planted.exists()
    # The payload works where it is let: what is tested above is the refusal, not a dud.
    pickle.loads(pickle.dumps(Malicious(planted)))
    assert planted.exists()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_missing_optimizer_file_is_refused(place: Place) -> None:
    place.optimizer.unlink()
    refuse_run(place, "optimizer.pt", str(place.checkpoint))
    refuse(place, ["inspect", place.checkpoint], "optimizer.pt")


# Weights and configuration


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Place], object]:
    def spoil(place: Place) -> None:
        path = place.checkpoint / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _only_pickled_weights(place: Place) -> None:
    torch.save(load_file(place.weights), place.checkpoint / "pytorch_model.bin")
    place.weights.unlink()


def _edit_config(**settings: Any) -> Callable[[Place], object]:
    return _rewrite("config.json", lambda old: json.dumps(json.loads(old) | settings).encode())


def _remote_code(place: Place) -> None:
    """A configuration that names code of its own, which would leave a mark if it ran."""
    (place.checkpoint / "modeling.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    _edit_config(model_type="homemade", auto_map=auto_map)(place)


def _missing_shard(place: Place) -> None:
    tiny_model().save_pretrained(place.checkpoint, max_shard_size="5KB")
    place.weights.unlink(missing_ok=True)
    sorted(place.checkpoint.glob("model-*.safetensors"))[1].unlink()


NORM = "model.layers.1.input_layernorm.weight"

WEIGHTS: dict[str, tuple[Callable[[Place], object], str]] = {
    "truncated": (_rewrite("model.safetensors", lambda old: old[:-100]), "checkpoint-3"),
    "cut-in-the-header": (_rewrite("model.safetensors", lambda old: old[:50]), "checkpoint-3"),
    "empty": (_rewrite("model.safetensors", lambda old: b""), "checkpoint-3"),
    "tensor-missing": (lambda place: place.edit_weights(lambda tensors: tensors.pop(NORM)), NORM),
    "tensor-too-many": (
        lambda place: place.edit_weights(lambda tensors: tensors.update(intruder=torch.zeros(2))),
        "intruder",
    ),
    "tensor-mis-shaped": (
        lambda place: place.edit_weights(lambda tensors: tensors.update({NORM: torch.ones(15)})),
        NORM,
    ),
    "tensor-nan": (
        lambda place: place.edit_weights(lambda tensors: tensors[NORM].fill_(float("nan"))),
        NORM,
    ),
    "only-pickled": (_only_pickled_weights, "pytorch_model.bin"),
    "no-weights": (lambda place: place.weights.unlink(), "no weights"),
    "missing-shard": (_missing_shard, "checkpoint-3"),
    "no-config": (lambda place: (place.checkpoint / "config.json").unlink(), "config.json"),
    "config-not-json": (_rewrite("config.json", lambda old: old[:-5]), "config.json"),
    "config-a-list": (_rewrite("config.json", lambda old: b"[1]"), "checkpoint-3"),
    "config-of-no-type": (_rewrite("config.json", lambda old: b"{}"), "checkpoint-3"),
    "config-of-unknown-type": (_edit_config(model_type="nonsense"), "checkpoint-3"),
    "config-of-an-encoder-decoder": (_edit_config(model_type="t5"), "checkpoint-3"),
    "config-of-a-wrong-value": (_edit_config(num_attention_heads=0), "checkpoint-3"),
    "config-with-code": (_remote_code, "checkpoint-3"),
    "trainer-state-not-json": (_rewrite("trainer_state.json", lambda old: b"{"), "trainer_state.json"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_and_configurations_are_refused(name: str, place: Place) -> None:
    spoil, culprit = WEIGHTS[name]
    spoil(place)
    refuse_run(place, culprit)


def test_a_checkpoint_path_that_is_no_folder_is_refused(place: Place) -> None:
    for path in (place.root / "nowhere", place.rollouts):
        for command in (["run", path, "--rollouts", place.rollouts, "--json", "report.json"], ["inspect", path]):
            refuse(place, command, str(path), "not a folder")


def test_an_adapter_without_its_base_is_refused(place: Place) -> None:
    adapter = place.root / "adapter"
    model = lora_model(tiny_model())
    save_checkpoint(model, trained_optimizer(model), adapter)
    arguments = ["--rollouts", place.rollouts, "--json", "report.json"]
    refuse(place, ["run", adapter, *arguments], "--base", "adapter")
    refuse(place, ["run", adapter, "--base", place.root / "nowhere", *arguments], "nowhere")
    refuse(place, ["run", adapter, "--base", adapter, *arguments], "config.json")
    assert run_command("run", adapter, "--base", place.checkpoint, *arguments).code == 0


@pytest.mark.parametrize("damage", ["truncated", "pickled", "tensor-missing", "nan", "config", "another-base"])
def test_a_damaged_adapter_is_refused(damage: str, place: Place) -> None:
    adapter, base = place.root / "adapter", place.checkpoint
    model = lora_model(tiny_model())
    save_checkpoint(model, trained_optimizer(model), adapter)
    weights = adapter / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    culprit = "adapter"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "pickled":
        torch.save(load_file(weights), adapter / "adapter_model.bin")
        weights.unlink()
    elif damage == "tensor-missing":
        save_file({name: t for name, t in load_file(weights).items() if name != key}, weights)
        culprit = key
    elif damage == "nan":
        save_file(load_file(weights) | {key: torch.full((16, 2), float("nan"))}, weights)
        culprit = "lora_B"
    elif damage == "config":
        (adapter / "adapter_config.json").write_text("{")
    else:
        base = make_checkpoint(place.root / "other", "gpt2")
    refuse(place, ["run", adapter, "--base", base, "--rollouts", place.rollouts, "--json", "report.json"], culprit)


def test_a_base_for_a_full_checkpoint_is_refused(place: Place) -> None:
    refuse_run(place, "--base", options=["--base", str(place.checkpoint)])


# Rollouts


def _row(number: int, **values: Any) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: rows[number].update(values))


def _rows(**values: Any) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: [row.update(values) for row in rows])


def _without_column(number: int, name: str) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: rows[number].pop(name))


def _line(number: int, text: str) -> Callable[[Place], object]:
    def spoil(place: Place) -> None:
        lines = place.rollouts.read_text().splitlines()
        lines[number] = text
        place.rollouts.write_text("\n".join(lines) + "\n")

    return spoil


def _content(content: bytes) -> Callable[[Place], object]:
    return lambda place: place.rollouts.write_bytes(content)


def _keep(count: int) -> Callable[[Place], object]:
    return lambda place: place.edit_rows(lambda rows: rows.__delitem__(slice(count, None)))


ROLLOUTS: dict[str, tuple[Callable[[Place], object], tuple[str, ...]]] = {
    "malformed-json": (_line(2, '{"prompt_id": "p1", '), ("line 3", "not JSON")),
    "a-list": (_line(2, "[1, 2]"), ("line 3", "list")),
    "a-number-too-long": (_line(2, "1" * 5000), ("line 3",)),
    "nested-too-deep": (_line(2, "[" * 100_000), ("line 3",)),
    "empty-file": (_content(b""), ("rollouts.jsonl", "no rollouts")),
    "blank-lines": (_content(b"\n\n"), ("rollouts.jsonl", "no rollouts")),
    "not-utf8": (_content(b"\xff\xfe{}\n"), ("rollouts.jsonl", "UTF-8")),
    "missing-file": (lambda place: place.rollouts.unlink(), ("rollouts.jsonl", "does not exist")),
    "no-reward": (_without_column(1, "reward"), ("line 2", "reward")),
    "null-reward": (_row(1, reward=None), ("line 2", "reward")),
    "no-prompt-id": (_without_column(1, "prompt_id"), ("line 2", "prompt_id")),
    "no-response-ids": (_without_column(1, "response_ids"), ("line 2", "response_ids")),
    "nan-reward": (_row(3, reward=float("nan")), ("line 4", "reward", "nan")),
    "huge-reward": (_row(3, reward=10**400), ("line 4", "reward")),
    "text-reward": (_row(3, reward="1.0"), ("line 4", "reward", "str")),
    "boolean-reward": (_row(3, reward=True), ("line 4", "reward", "bool")),
    "infinite-advantage": (_row(3, advantage=float("inf")), ("line 4", "advantage", "inf")),
    "advantages-in-some-rows": (_row(3, advantage=0.5), ("7 of 8", "advantage")),
    "one-response-a-prompt": (
        lambda place: place.edit_rows(lambda rows: rows.pop(3)),
        ("'p1'", "one response"),
    ),
    "one-prompt": (_keep(2), ("one prompt",)),
    "empty-prompt-ids": (_row(3, prompt_ids=[]), ("line 4", "prompt_ids", "empty")),
    "empty-response-ids": (_row(3, response_ids=[]), ("line 4", "response_ids", "empty")),
    "id-past-the-vocabulary": (_row(3, response_ids=[5, VOCABULARY]), ("'p1'", str(VOCABULARY), "vocabulary")),
    "huge-id": (_row(3, response_ids=[10**30]), ("'p1'", "vocabulary")),
    "negative-id": (_row(3, response_ids=[5, -1]), ("line 4", "response_ids", "-1")),
    "float-id": (_row(3, response_ids=[5.0]), ("line 4", "response_ids", "5.0")),
    "text-ids": (_row(3, response_ids=["5"]), ("line 4", "response_ids", "'5'")),
    "ids-as-text": (_row(3, response_ids="5 6"), ("line 4", "response_ids", "str")),
    "boolean-id": (_row(3, response_ids=[True]), ("line 4", "response_ids", "True")),
    "float-prompt-id": (_row(3, prompt_id=1.5), ("line 4", "prompt_id", "float")),
    "two-prompts-under-one-id": (_row(3, prompt_ids=[4, 4, 4, 4, 4, 4, 4, 4]), ("'p1'", "two different prompts")),
    "past-the-context": (_row(3, response_ids=[5] * CONTEXT), ("'p1'", str(CONTEXT), "context")),
    "temperature-0": (_rows(temperature=0), ("line 1", "temperature")),
    "negative-temperature": (_rows(temperature=-1.0), ("line 1", "temperature")),
    "temperatures-differ": (_row(3, temperature=0.5), ("temperature", "0.5")),
    "top-k": (_rows(top_k=50), ("top_k = 50",)),
    "top-p": (_rows(top_p=0.9), ("top_p = 0.9",)),
    "too-few-logprobs": (_row(3, response_ids=[5, 6, 1], logprobs=[-1.0, -2.0]), ("line 4", "2 logprobs", "3")),
    "nan-logprob": (_row(3, response_ids=[5], logprobs=[float("nan")]), ("line 4", "logprobs")),
    "cut-as-text": (_row(3, cut="no"), ("line 4", "cut")),
    "window-tokens-0": (_rows(window_tokens=0), ("line 1", "window_tokens")),
    "max-completion-length-0": (_rows(max_completion_length=0), ("line 1", "max_completion_length")),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_bad_rollouts_are_refused(name: str, place: Place) -> None:
    spoil, culprits = ROLLOUTS[name]
    spoil(place)
    refuse_run(place, *culprits)


def test_rollouts_of_a_wrong_suffix_or_damaged_parquet_are_refused(place: Place) -> None:
    wrong = place.root / "rollouts.csv"
    wrong.write_bytes(place.rollouts.read_bytes())
    refuse_run(place, "rollouts.csv", "'.csv'", rollouts=wrong)
    parquet = place.root / "rollouts.parquet"
    write_rollouts(random_rollouts(4, 2), parquet)
    whole = parquet.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"", b"PAR1 but no more", b"PAR1" + bytes(50) + b"PAR1"):
        parquet.write_bytes(damaged)
        refuse_run(place, "rollouts.parquet", "Parquet", rollouts=parquet)
    corrupted = bytearray(whole)
    corrupted[100:400] = bytes(300)
    parquet.write_bytes(bytes(corrupted))
    refuse_run(place, "rollouts.parquet", rollouts=parquet)
    refuse_run(place, str(place.checkpoint), rollouts=place.checkpoint)


# Options

OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown-option": (["--nonsense"], "--nonsense"),
    "extra-argument": (["surplus"], "surplus"),
    "mode": (["--mode", "nonsense"], "--mode"),
    "blocks-0": (["--blocks", "0"], "0 blocks"),
    "blocks-1": (["--blocks", "1"], "1 blocks"),
    "blocks-negative": (["--blocks", "-3"], "-3 blocks"),
    "blocks-past-the-prompts": (["--blocks", "5"], "5 blocks"),
    "blocks-with-exact": (["--blocks", "2", "--mode", "exact"], "--blocks"),
    "microbatch-0": (["--microbatch", "0"], "--microbatch"),
    "learning-rate-nan": (["--learning-rate", "nan"], "learning rate is nan"),
    "learning-rate-negative": (["--learning-rate", "-1"], "learning rate is -1"),
    "learning-rate-infinite": (["--learning-rate", "inf"], "learning rate is inf"),
    "learning-rate-text": (["--learning-rate", "abc"], "--learning-rate"),
    "learning-rate-beyond-the-number-type": (["--learning-rate", "1e38"], "learning rate"),
    "learning-rate-beyond-float64": (["--learning-rate", "1e308"], "learning rate"),
    "memory-negative": (["--memory", "-1"], "memory"),
    "memory-nan": (["--memory", "nan"], "memory"),
    "memory-infinite": (["--memory", "inf"], "memory"),
    "constant-missing": (["--length-weight", "dr_grpo"], "--max-completion-length"),
    "constant-too-short": (
        ["--length-weight", "dr_grpo", "--max-completion-length", "1"],
        "max_completion_length is 1",
    ),
    "constant-0": (["--length-weight", "dr_grpo", "--max-completion-length", "0"], "--max-completion-length"),
    "length-weight": (["--length-weight", "nonsense"], "--length-weight"),
    "advantage-not-given": (["--advantage", "given"], "advantage"),
    "advantage": (["--advantage", "nonsense"], "--advantage"),
    "estimator": (["--estimator", "nonsense"], "--estimator"),
    "autocast-over-float64": (["--autocast", "bfloat16", "--dtype", "float64"], "--autocast"),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "temperature-0": (["--temperature", "0"], "temperature is 0"),
    "temperature-negative": (["--temperature", "-1"], "temperature is -1"),
    "temperature-nan": (["--temperature", "nan"], "temperature is nan"),
    "seed-too-large": (["--seed", str(2**80)], "seed"),
    "seed-text": (["--seed", "x"], "--seed"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_nonsense_options_are_refused(name: str, place: Place) -> None:
    options, culprit = OPTIONS[name]
    refuse_run(place, culprit, options=options)


def test_a_temperature_that_the_rows_contradict_is_refused(place: Place) -> None:
    _rows(temperature=0.7)(place)
    refuse_run(place, "0.7", "0.9", options=["--temperature", "0.9"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_cuda_without_a_cuda_device_is_refused(place: Place) -> None:
    refuse_run(place, "--device cuda", options=["--device", "cuda"])


def test_commands_without_their_arguments_are_refused(place: Place) -> None:
    refuse(place, ["frobnicate"], "frobnicate")
    refuse(place, ["run"], "CHECKPOINT")
    refuse(place, ["run", place.checkpoint], "--rollouts")
    refuse(place, ["inspect"], "CHECKPOINT")
    refuse(place, ["--nonsense"], "--nonsense")


def test_outputs_that_could_not_be_written_are_refused_before_the_work(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(importlib.import_module("entropy_probe.cli.app"), "probe_checkpoint", work)
    run = ["run", place.checkpoint, "--rollouts", place.rollouts]
    refuse(place, [*run, "--out", place.rollouts], "rollouts.jsonl", "is a file")
    refuse(place, [*run, "--out", place.root / "missing" / "report"], "missing")
    refuse(place, [*run, "--json", place.root / "missing" / "report.json"], "missing")
    refuse(place, [*run, "--json", place.checkpoint], "checkpoint-3", "is a folder")
    refuse(place, ["demo", "--json", place.root / "missing" / "report.json"], "missing")
    refuse(place, ["demo", "--out", place.rollouts], "rollouts.jsonl", "is a file")


# Sampling

REWARDS = """
import math

def one(prompt, response, row):
    return 1.0

def none(prompt, response, row):
    return None

def nan(prompt, response, row):
    return math.nan

def text(prompt, response, row):
    return "good"

def raising(prompt, response, row):
    raise KeyError("answer")

constant = 3
"""


@pytest.fixture
def sampling(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    (place.root / "spoiled_rewards.py").write_text(REWARDS)
    (place.root / "broken_module.py").write_text("def f(:\n")
    (place.root / "raising_module.py").write_text("1 / 0\n")
    (place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n{"prompt_ids": [5]}\n')
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield place
    for name in ("spoiled_rewards", "broken_module", "raising_module"):
        sys.modules.pop(name, None)


def sample_arguments(place: Place, **changed: str) -> list[str | Path]:
    options = {
        "prompts": "prompts.jsonl", "reward": "spoiled_rewards:one", "responses": "2", "out": "sampled.jsonl",
        "max-new-tokens": "4",
    } | changed  # fmt: skip
    return ["sample", place.checkpoint, *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_the_unspoiled_sampling_is_accepted(sampling: Place) -> None:
    outcome = run_command(*sample_arguments(sampling))
    assert outcome.code == 0, outcome.err
    assert len((sampling.root / "sampled.jsonl").read_text().splitlines()) == 4


SAMPLING: dict[str, tuple[dict[str, str], str]] = {
    "reward-without-colon": ({"reward": "spoiled_rewards"}, "module:function"),
    "reward-without-module": ({"reward": ":one"}, "module:function"),
    "reward-of-unknown-module": ({"reward": "no_such_module_here:one"}, "no_such_module_here"),
    "reward-of-empty-package": ({"reward": ".:one"}, "--reward"),
    "reward-of-broken-module": ({"reward": "broken_module:f"}, "broken_module"),
    "reward-of-raising-module": ({"reward": "raising_module:f"}, "raising_module"),
    "reward-of-unknown-function": ({"reward": "spoiled_rewards:nothing"}, "nothing"),
    "reward-not-callable": ({"reward": "spoiled_rewards:constant"}, "constant"),
    "reward-of-none": ({"reward": "spoiled_rewards:none"}, "None"),
    "reward-of-nan": ({"reward": "spoiled_rewards:nan"}, "nan"),
    "reward-of-text": ({"reward": "spoiled_rewards:text"}, "'good'"),
    "reward-raising": ({"reward": "spoiled_rewards:raising"}, "KeyError"),
    "temperature-0": ({"temperature": "0"}, "temperature"),
    "temperature-nan": ({"temperature": "nan"}, "temperature"),
    "temperature-negative": ({"temperature": "-0.5"}, "temperature"),
    "responses-1": ({"responses": "1"}, "--responses"),
    "responses-text": ({"responses": "many"}, "--responses"),
    "out-suffix": ({"out": "sampled.txt"}, "sampled.txt"),
    "out-in-a-missing-folder": ({"out": "missing/sampled.jsonl"}, "missing"),
    "out-a-folder": ({"out": "checkpoint-3"}, "checkpoint-3"),
    "prompts-missing": ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    "max-new-tokens-0": ({"max-new-tokens": "0"}, "--max-new-tokens"),
    "past-the-context": ({"max-new-tokens": str(CONTEXT)}, "context"),
    "batch-0": ({"batch": "0"}, "--batch"),
    "eos-outside-the-vocabulary": ({"eos-id": str(VOCABULARY)}, "--eos-id"),
    "eos-negative": ({"eos-id": "-1"}, "--eos-id"),
    "seed-too-large": ({"seed": str(2**80)}, "seed"),
    "dtype": ({"dtype": "int8"}, "--dtype"),
    "base": ({"base": "checkpoint-3"}, "--base"),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_bad_sampling_options_are_refused(name: str, sampling: Place) -> None:
    changed, culprit = SAMPLING[name]
    refuse(sampling, sample_arguments(sampling, **changed), culprit)


PROMPTS: dict[str, tuple[str, str]] = {
    "empty": ("", "no prompts"),
    "text-without-a-tokenizer": ('{"prompt": "hello"}', "tokenizer"),
    "neither": ('{"text": "hello"}', "prompt_ids"),
    "prompt-not-text": ('{"prompt": 7, "prompt_ids": [3]}', "prompt is a int"),
    "empty-prompt": ('{"prompt_ids": []}', "empty prompt"),
    "id-outside-the-vocabulary": (json.dumps({"prompt_ids": [3, VOCABULARY]}), "vocabulary"),
    "negative-id": ('{"prompt_ids": [-1]}', "-1"),
    "boolean-id": ('{"prompt_ids": [true]}', "prompt_ids"),
    "ids-as-text": ('{"prompt_ids": "3 4"}', "prompt_ids"),
    "an-id-used-twice": ('{"prompt_id": 1, "prompt_ids": [3]}\n{"prompt_id": 1, "prompt_ids": [4]}', "prompt_id"),
    "an-id-that-is-a-list": ('{"prompt_id": [1], "prompt_ids": [3]}', "prompt_id"),
    "an-id-that-is-a-float": ('{"prompt_id": 1.5, "prompt_ids": [3]}', "prompt_id"),
    "malformed": ('{"prompt_ids": [3', "line 1"),
    "past-the-context": (json.dumps({"prompt_ids": [3] * (CONTEXT + 1)}), "context"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompts_are_refused(name: str, sampling: Place) -> None:
    content, culprit = PROMPTS[name]
    (sampling.root / "prompts.jsonl").write_text(content + "\n")
    refuse(sampling, sample_arguments(sampling), culprit)


def test_sampling_from_damaged_weights_or_a_damaged_tokenizer_is_refused(sampling: Place) -> None:
    (sampling.checkpoint / "tokenizer_config.json").write_text("{")
    refuse(sampling, sample_arguments(sampling), "tokenizer")
    (sampling.checkpoint / "tokenizer_config.json").unlink()
    sampling.edit_weights(lambda tensors: tensors[NORM].fill_(float("nan")))
    refuse(sampling, sample_arguments(sampling), NORM)


# A process of its own: nothing else, no library's warning, reaches standard error


def test_in_a_process_of_its_own_bad_input_ends_with_2_and_one_line(place: Place) -> None:
    def attempt(*arguments: str) -> Outcome:
        command = [sys.executable, "-m", "entropy_probe", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place.root, timeout=100, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    whole = place.optimizer.read_bytes()
    place.optimizer.write_bytes(pickle.dumps(Malicious(place.root / "planted"), protocol=4))
    before = fingerprint(place.root)
    assert_refused(attempt("inspect", "checkpoint-3"), "optimizer.pt")
    assert fingerprint(place.root) == before
    place.optimizer.write_bytes(whole)
    place.edit_optimizer(lambda saved: saved["state"][2]["exp_avg_sq"].fill_(float("nan")))
    before = fingerprint(place.root)
    outcome = attempt("run", "checkpoint-3", "--rollouts", "rollouts.jsonl", "--json", "report.json")
    assert_refused(outcome, place.names()[2], "NaN")
    assert fingerprint(place.root) == before


# Interruption


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "target",
    ["numpy.save", "json.dumps", "pathlib.Path.replace", "entropy_probe.report.files.plot_row_means"],
)
def test_an_interrupt_while_writing_leaves_nothing_and_ends_with_130(
    target: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(place.root)
    run = ["run", place.checkpoint, "--rollouts", place.rollouts]
    with monkeypatch.context() as patch:
        patch.setattr(target, interrupt)
        outcome = run_command(*run, "--out", "report")
        assert outcome.code == 130
        assert len(outcome.lines) == 1
        assert "interrupted" in outcome.lines[0]
        assert fingerprint(place.root) == before
        if target in {"json.dumps", "pathlib.Path.replace"}:
            assert run_command(*run, "--json", "report.json").code == 130
            assert fingerprint(place.root) == before


def test_an_interrupt_while_writing_over_an_earlier_report_keeps_that_report_whole(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", place.checkpoint, "--rollouts", place.rollouts, "--out", "report"]
    assert run_command(*run).code == 0
    before = fingerprint(place.root)
    for target in ("numpy.save", "entropy_probe.report.files.plot_row_means"):
        with monkeypatch.context() as patch:
            patch.setattr(target, interrupt)
            assert run_command(*run, "--learning-rate", "0.5").code == 130
        assert fingerprint(place.root) == before
    assert run_command(*run, "--learning-rate", "0.5").code == 0
    assert fingerprint(place.root)["report/report.json"] != before["report/report.json"]


def test_an_interrupt_during_the_work_leaves_nothing_and_ends_with_130(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(place.root)
    monkeypatch.setattr(PROBE, "cross_statistics", interrupt)
    outcome = run_command(
        "run", place.checkpoint, "--rollouts", place.rollouts, "--json", "report.json", "--out", "report"
    )
    assert outcome.code == 130
    assert fingerprint(place.root) == before


def test_a_fault_of_ours_is_not_disguised_as_bad_input(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(PROBE, "cross_statistics", fault)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command("run", place.checkpoint, "--rollouts", place.rollouts)


def test_a_full_disk_while_writing_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = fingerprint(place.root)
    monkeypatch.setattr(report_files.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run_command("run", place.checkpoint, "--rollouts", place.rollouts, "--out", "report")
    assert fingerprint(place.root) == before


# The library leaves a live model as it was


@dataclass
class Live:
    """A model in the middle of training, with everything that a probe could disturb."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """Copies of all of it, for comparison with ==."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        moments = self.optimizer.state_dict()["state"]
        return {
            "weights": [_bits(t) for t in (*self.model.parameters(), *self.model.buffers())],
            "storage": [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())],
            "grad": [None if p.grad is None else _bits(p.grad) for p in self.model.parameters()],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "training": [module.training for module in self.model.modules()],
            "hooks": [list(getattr(module, name)) for module in self.model.modules() for name in hooks],
            "tensor hooks": [p._backward_hooks for p in self.model.parameters()],
            "attributes": [sorted(vars(module)) for module in self.model.modules()],
            "random": [_bits(torch.get_rng_state()), random.getstate(), repr(np.random.get_state())],
            "moments": {
                index: {key: _bits(torch.as_tensor(value)) for key, value in entry.items()}
                for index, entry in moments.items()
            },
            "groups": repr(self.optimizer.state_dict()["param_groups"]),
            "grad mode": (torch.is_grad_enabled(), torch.get_default_dtype()),
        }


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def live_model(name: str = "gpt2", dtype: torch.dtype = torch.float32) -> Live:
    model = tiny_model(name, dtype=dtype)
    optimizer = trained_optimizer(model)
    frozen = dict(model.named_parameters())["transformer.h.0.ln_1.bias" if name == "gpt2" else NORM]
    frozen.requires_grad_(False)
    optimizer.state.pop(frozen)
    model.train()
    next(iter(model.children())).eval()
    for number, p in enumerate(model.parameters()):
        if number % 2:
            p.grad = torch.full_like(p, 0.125 * number)
    model.register_forward_hook(lambda *_: None)
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    return Live(model, optimizer)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", torch.float32), ("gpt2", torch.float64), ("llama-tied", torch.float32), ("llama-tied", torch.bfloat16)],
)
def test_a_probe_leaves_the_model_the_optimizer_and_random_states_as_they_were(name: str, dtype: torch.dtype) -> None:
    live = live_model(name, dtype)
    before = live.state()
    result = probe(live.model, state_of_optimizer(live.optimizer, live.model), random_batch(4, 2))
    assert result.report.realized[0].step_norm > 0
    _assert_same(live.state(), before)


class InjectedError(Exception):
    pass


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_that_fails_at_any_forward_leaves_everything_as_it_was(
    dtype: torch.dtype, error: type[BaseException]
) -> None:
    live = live_model("llama-tied", dtype)
    adam = state_of_optimizer(live.optimizer, live.model)
    batch = random_batch(4, 2)
    calls = 0
    fail_at = 0

    def counted(module: nn.Module, arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise error

    # On a module class of the model's inside, so that clones count too.
    live.model.get_submodule("model.norm").register_forward_pre_hook(counted)
    before = live.state()
    probe(live.model, adam, batch)
    total = calls
    assert total > 20
    for fail_at in (1, 2, 3, total // 4, total // 3, total // 2, total - 9, total - 8, total - 1, total):
        calls = 0
        with pytest.raises(error):
            probe(live.model, adam, batch)
        assert calls == fail_at
        _assert_same(live.state(), before)


@pytest.mark.parametrize(
    "target",
    [
        "entropy_probe.gradients.reference.probe_loss",
        "entropy_probe.probe.cross_statistics",
        "torch:Tensor.double",
        "entropy_probe.realized.entropy_change",
        "entropy_probe.realized.optimizer_step",
        "entropy_probe.probe.assemble_report",
        "torch.autograd.grad",
    ],
)
def test_a_probe_interrupted_inside_any_stage_leaves_everything_as_it_was(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = live_model()
    adam = state_of_optimizer(live.optimizer, live.model)
    batch = random_batch(4, 2)
    before = live.state()
    module, _, name = target.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(
            pkgutil.resolve_name(module) if ":" in module else importlib.import_module(module), name, interrupt
        )
        with pytest.raises(KeyboardInterrupt):
            probe(live.model, adam, batch)
    _assert_same(live.state(), before)


def test_a_probe_that_refuses_leaves_everything_as_it_was() -> None:
    live = live_model()
    adam = state_of_optimizer(live.optimizer, live.model)
    before = live.state()
    with pytest.raises(InputError, match="max-completion-length"):
        probe(live.model, adam, random_batch(4, 2), Settings(length_weight="dr_grpo"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="5 blocks"):
        probe(live.model, adam, random_batch(4, 2), Settings(blocks=5))
    with pytest.raises(InputError, match="vocabulary"):
        probe(live.model, adam, random_batch(4, 2, vocabulary=10 * VOCABULARY))
    _assert_same(live.state(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_live_model_without_finite_log_probs_is_refused_with_the_prompt_named(value: float) -> None:
    live = live_model()
    adam = state_of_optimizer(live.optimizer, live.model)
    with torch.no_grad():
        next(live.model.parameters())[0].fill_(value)
    before = live.state()
    with pytest.raises(InputError, match=r"prompt_id 'p0': a response has log-probability .*nan"):
        probe(live.model, adam, random_batch(4, 2))
    _assert_same(live.state(), before)


def test_the_library_refuses_an_optimizer_without_a_second_moment_by_name() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="SGD"):
        state_of_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    changed = [name for name in expected if found[name] != expected[name]]
    assert not changed
