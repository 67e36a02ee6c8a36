"""Moments in codes, as bitsandbytes and torchao wrote them: read as the numbers that these dequantise, neither installed.

``tests/data/checkpoints`` has files that bitsandbytes 0.50 and torchao 0.18 wrote on a CPU; ``truth.json`` has the SHA-256 of
every moment as the library's own optimizer dequantised it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.checkpoints.adam_state import load_adam_state
from entropy_probe.checkpoints.files.coded import CodedTensor
from entropy_probe.checkpoints.files.optimizer_pt import read_optimizer_file, stored_optimizer
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.checkpoints.files.torchao_state import Coded
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.optimizers.adamw_step import adamw_deltas
from entropy_probe.optimizers.rounded_step import rounded_adamw
from entropy_probe.optimizers.rounding import NEAREST
from entropy_probe.optimizers.state import Library
from entropy_probe.optimizers.stored_precision import narrow_type
from entropy_probe.ranks.sharding import WHOLE
from spoiled import Malicious, assert_refused
from support import VOCABULARY, fingerprint, make_checkpoint, random_rollouts, run_command, tiny_model

DATA = Path(__file__).parent.parent / "data" / "checkpoints"
WRITTEN = {
    "trainer_adamw_bnb_8bit": Library.BITSANDBYTES,
    "trainer_adamw_torch_8bit": Library.TORCHAO,
    "trainer_adamw_torch_4bit": Library.TORCHAO,
    "misc_torchao_fp8": Library.TORCHAO,
}
QUANTISED = "model.layers.0.mlp.gate_proj.weight"


def _model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DATA / name))
    with torch.no_grad():
        for p in model.parameters():  # norms and biases begin at 1 and 0, which every type holds
            p.add_(torch.randn(p.shape), alpha=1e-2)
    return model


def _folder(name: str, path: Path) -> Path:
    """A Trainer's folder with the real optimizer and random weights of its shapes."""
    _model(name).save_pretrained(path)
    shutil.copy(DATA / name / "optimizer.pt", path)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": []}))
    return path


def _saved(name: str) -> dict[str, Any]:
    with torch.serialization.safe_globals([(Coded, f"torchao.optim.subclass_{k}.OptimState{n}") for k, n in KINDS]):
        return torch.load(DATA / name / "optimizer.pt", weights_only=True)  # type: ignore[no-any-return]


KINDS = (("8bit", "8bit"), ("4bit", "4bit"), ("fp8", "Fp8"))


def _number_by_number(entry: dict[str, Any], key: str) -> Tensor:
    """Of either library, one element at a time, from what it published: value(code) · scale of the element's block."""
    inside = entry.get("__bnb_optimizer_quant_state__")
    if inside is not None:
        number = {"exp_avg": 1, "exp_avg_sq": 2}[key]
        codes = inside[f"state{number}"]
        if codes.dtype is torch.float32:
            return codes  # type: ignore[no-any-return]
        shape, scale, qmap, block = codes.shape, inside[f"absmax{number}"], inside[f"qmap{number}"], 256
    else:
        held = vars(entry[key])
        if not isinstance(entry[key], Coded):
            return entry[key]  # type: ignore[no-any-return]
        codes, scale, qmap, block = held["codes"], held["scale"], held.get("qmap"), held["block_size"]
        shape = held.get("_shape", codes.shape)
        if "_shape" in held:
            codes = torch.tensor([nibble for byte in codes.tolist() for nibble in (byte // 16, byte % 16)])
    values = (
        codes.flatten().float().tolist() if qmap is None else [float(qmap[code]) for code in codes.flatten().tolist()]
    )
    products = [torch.tensor(value) * scale[i // block] for i, value in enumerate(values)]
    return torch.stack(products).reshape(shape)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_moment_is_what_the_optimizer_itself_dequantises(name: str) -> None:
    truth = json.loads((DATA / name / "truth.json").read_text())
    state, _ = load_adam_state(DATA / name / "optimizer.pt", _model(name))
    found = {}
    for parameter, moments in state.moments.items():
        for key in ("exp_avg", "exp_avg_sq"):
            value: Tensor = getattr(moments, key)
            assert value.dtype is torch.float32
            found[f"{parameter}|{key}"] = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    assert found == truth
    assert {group.library for group in state.groups} == {WRITTEN[name]}
    assert all(group.decoupled_weight_decay and group.in_float32 for group in state.groups)


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_of_codes_are_the_rows_of_the_tensor(name: str) -> None:
    coded = [
        moment
        for entry in read_optimizer_file(DATA / name / "optimizer.pt").state.values()
        for moment in entry.values()
        if isinstance(moment, CodedTensor)
    ]
    assert len(coded) == 12
    for moment in coded[:4]:
        whole = moment.read()
        rows = moment.shape[0]
        for first, stop in ((0, 1), (1, rows // 2 + 1), (3, 3), (rows - 1, rows), (0, rows)):
            assert torch.equal(moment.read(slice(first, stop)), whole[first:stop])


def test_codes_whose_rows_begin_inside_a_byte_and_a_block() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (27,), generator=generator, dtype=torch.uint8)
    scale, qmap = torch.rand(7, generator=generator), torch.linspace(-1, 1, 16)
    moment = CodedTensor.of((6, 9), codes, scale, qmap, [8], packed=True)
    nibbles = [n for byte in codes.tolist() for n in (byte // 16, byte % 16)]
    expected = torch.stack([qmap[n] * scale[i // 8] for i, n in enumerate(nibbles)]).reshape(6, 9)
    assert torch.equal(moment.read(), expected)
    for first in range(6):
        assert torch.equal(moment.read(slice(first, first + 1)), expected[first : first + 1])
    # The bug that the test is for: the low bits first.
    swapped = [n for byte in codes.tolist() for n in (byte % 16, byte // 16)]
    assert not torch.equal(
        torch.stack([qmap[n] * scale[i // 8] for i, n in enumerate(swapped)]).reshape(6, 9), expected
    )


def _as_before_0_46(saved: dict[str, Any]) -> None:
    for entry in saved["state"].values():
        entry.update(entry.pop("__bnb_optimizer_quant_state__"))
    for group in saved["param_groups"]:
        for key in ("alpha", "t_alpha", "t_beta3"):
            del group[key]


def _as_before_0_45(saved: dict[str, Any]) -> None:
    """A scale for 2048 elements: the same codes, other scales."""
    _as_before_0_46(saved)
    for entry in saved["state"].values():
        for number in (1, 2):
            if f"absmax{number}" in entry:
                count = -(-entry[f"state{number}"].numel() // 2048)
                entry[f"absmax{number}"] = entry[f"absmax{number}"][:count].clone()


@pytest.mark.parametrize(("change", "block"), [(_as_before_0_46, 256), (_as_before_0_45, 2048)])
def test_older_files_of_bitsandbytes(change: Callable[[dict[str, Any]], None], block: int, tmp_path: Path) -> None:
    saved = _saved("trainer_adamw_bnb_8bit")
    change(saved)
    torch.save(saved, tmp_path / "optimizer.pt")
    stored = read_optimizer_file(tmp_path / "optimizer.pt")
    index = next(i for i, entry in stored.state.items() if isinstance(entry["exp_avg"], CodedTensor))
    moment, entry = stored.state[index]["exp_avg"], saved["state"][index]
    values = entry["qmap1"][entry["state1"].flatten().long()]
    expected = values * entry["absmax1"][torch.arange(values.numel()) // block]
    assert torch.equal(moment.read(), expected.reshape(entry["state1"].shape))


def test_plain_moments_of_bitsandbytes_are_read_as_torchs(tmp_path: Path) -> None:
    """``paged_adamw_32bit``, whose tensors were in pageable memory and say so."""
    folder = make_checkpoint(tmp_path / "plain")
    expected = load_checkpoint(folder)
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for entry in saved["state"].values():
        states = {"state1": entry.pop("exp_avg"), "state2": entry.pop("exp_avg_sq")}
        for state in states.values():
            state.is_paged, state.page_deviceid = True, 0
        entry.update({"step": int(entry["step"]), "__bnb_optimizer_quant_state__": states})
    keep = ("lr", "betas", "eps", "weight_decay", "params")
    saved["param_groups"] = [{key: group[key] for key in keep} | {"alpha": 0.0} for group in saved["param_groups"]]
    other = tmp_path / "paged"  # the file that is there is mapped by what was read from it
    shutil.copytree(folder, other)
    (other / "optimizer.pt").unlink()
    torch.save(saved, other / "optimizer.pt")
    found = load_checkpoint(other)
    for name, moments in expected.adam.moments.items():
        assert found.adam.moments[name].step == moments.step
        assert torch.equal(found.adam.moments[name].exp_avg, moments.exp_avg)
        assert torch.equal(found.adam.moments[name].exp_avg_sq, moments.exp_avg_sq)
    assert found.folder.notes == ()


@pytest.mark.parametrize("name", WRITTEN)
def test_delta_h1_is_that_of_a_plain_folder_of_the_same_state(name: str, tmp_path: Path) -> None:
    """The plain one has the dequantised numbers in torch's own layout, and the report says what quantising does."""
    folder = _folder(name, tmp_path / "coded")
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    saved = _saved(name)
    for index, entry in saved["state"].items():
        moments = {key: _number_by_number(entry, key) for key in ("exp_avg", "exp_avg_sq")}
        saved["state"][index] = {"step": torch.tensor(float(entry["step"])), **moments}
    saved["param_groups"] = [{**group, "lr": float(group["lr"]), "amsgrad": False} for group in saved["param_groups"]]
    torch.save(saved, plain / "optimizer.pt")
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(random_rollouts(6, 3, vocabulary=29), rollouts)
    reports = {}
    for path in (folder, plain):
        options = ("--no-noise", "--length-weight", "grpo", "--json", tmp_path / "report.json")
        outcome = run_command("run", path, "--rollouts", rollouts, *options)
        assert outcome.code == 0, outcome.err
        reports[path] = json.loads((tmp_path / "report.json").read_text())
    ours, theirs = reports[folder], reports[plain]
    assert ours["first_order"] == theirs["first_order"]
    assert ours["adamw"]["total"] == theirs["adamw"]["total"]
    warning = next(w for w in ours["warnings"] if w["code"] == "quantised_moments")
    assert "changes the adamw step by 0" in warning["seen"]
    assert not any(w["code"] == "quantised_moments" for w in theirs["warnings"])


def _library_step(name: str, theta: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: int, group: Any) -> Tensor:
    """θ⁺ by the sources of bitsandbytes 0.50 (``_optimizer_update_8bit_blockwise_cpu``) and torchao 0.18
    (``single_param_adam``), in their float32."""
    p, g = theta.float(), gradient.float()
    beta1, beta2 = group.beta1, group.beta2
    if WRITTEN[name] is Library.BITSANDBYTES:
        m = m.clone().mul_(beta1).add_(g, alpha=1.0 - beta1)
        v = v.clone().mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = (v.sqrt() / (1.0 - beta2**t) ** 0.5).add_(group.eps)
        p = p.clone().mul_(1.0 - group.learning_rate * group.weight_decay)
        p.addcdiv_(m, denominator, value=-group.learning_rate / (1.0 - beta1**t))
    else:
        p = p - group.learning_rate * group.weight_decay * p
        m, v = m.lerp(g, 1 - beta1), v.lerp(g.square(), 1 - beta2)
        denominator = (v.sqrt() / torch.tensor(1 - beta2**t).sqrt()) + group.eps
        p = p - group.learning_rate * (m / (1 - beta1**t)) / denominator
    return p.to(theta.dtype)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_is_the_one_that_the_library_takes(name: str, dtype: torch.dtype) -> None:
    """With moments as dequantised, m⁺ and v⁺ unquantised; weights in bfloat16 are rounded once, at the end."""
    model = _model(name).to(dtype)
    state, _ = load_adam_state(DATA / name / "optimizer.pt", model)
    generator = torch.Generator().manual_seed(1)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    ascent = {n: (torch.randn(p.shape, generator=generator) * 1e-3).to(dtype).double() for n, p in parameters.items()}
    deltas = adamw_deltas(parameters, state, ascent)
    rounded = rounded_adamw(parameters, state, ascent, deltas, clip_factor=1.0, rule=NEAREST, sharding=WHOLE)
    assert (rounded is None) == (dtype is torch.float32)
    moved = deltas if rounded is None else rounded.deltas
    groups = state.group_of()
    far = 0
    for parameter, theta in parameters.items():
        moments = state.moments[parameter]
        given = (-ascent[parameter]).to(dtype)
        new = _library_step(
            name, theta, given, moments.exp_avg, moments.exp_avg_sq, moments.step + 1, groups[parameter]
        )
        difference = new.double() - (theta.double() + moved[parameter])
        if dtype is torch.float32:
            # Two roundings of θ in float32, and those of terms that are at most η and may cancel.
            bound = 1.5e-7 * theta.double().abs() + 1e-6 * groups[parameter].learning_rate
            assert bool((difference.abs() <= bound).all()), parameter
        else:
            far += int((difference != 0).sum())
    # A result between two numbers of bfloat16 to within float32's error may go to either.
    assert far <= 2


def test_moments_quantised_before_the_step_would_be_another_step() -> None:
    """The bug that the test above is for."""
    name = "trainer_adamw_torch_4bit"
    model = _model(name)
    state, _ = load_adam_state(DATA / name / "optimizer.pt", model)
    theta, moments = dict(model.named_parameters())[QUANTISED].detach(), state.moments[QUANTISED]
    group = state.group_of()[QUANTISED]
    gradient = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    held = next(vars(e["exp_avg_sq"]) for e in _saved(name)["state"].values() if isinstance(e["exp_avg_sq"], Coded))
    v = moments.exp_avg_sq.lerp(gradient.square(), 1 - group.beta2).reshape(-1, held["block_size"])
    scale = v.amax(-1, keepdim=True)
    again = held["qmap"][(v / scale)[..., None].sub(held["qmap"]).abs().argmin(-1)] * scale
    assert float((again.sqrt() / v.sqrt() - 1).abs().mean()) > 0.01


def test_weights_alone_say_whether_an_optimizer_of_another_library_holds_them_in_a_narrow_type() -> None:
    name = "trainer_adamw_bnb_8bit"
    model = _model(name)
    state, _ = load_adam_state(DATA / name / "optimizer.pt", model)
    theta, group = dict(model.named_parameters())[QUANTISED].detach(), state.group_of()[QUANTISED]
    moments = state.moments[QUANTISED]
    assert narrow_type(theta, moments, group) is None
    assert narrow_type(theta.bfloat16(), moments, group) is torch.bfloat16
    assert narrow_type(theta.bfloat16().float(), moments, group) is torch.bfloat16


def _lose(key: str) -> Callable[[dict[str, Any]], None]:
    def change(inside: dict[str, Any]) -> None:
        del inside[key]

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no-codes": (_lose("state2"), "no state2"),
    "no-scales": (_lose("absmax1"), "no absmax1"),
    "no-table": (_lose("qmap2"), "no qmap2"),
    "too-few-scales": (lambda inside: inside.update(absmax1=inside["absmax1"][:-1].clone()), "17 scales"),
    "too-short-a-table": (lambda inside: inside.update(qmap1=inside["qmap1"][:16].clone()), "16 values"),
    "codes-of-another-type": (lambda inside: inside.update(state1=inside["state1"].to(torch.int16)), "int16"),
    "a-number": (lambda inside: inside.update(absmax1=1.0), "absmax1 is a float"),
    "one-scale-for-all": (lambda inside: inside.update(max1=inside.pop("absmax1")), "block_wise"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_codes_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, what = DAMAGES[name]
    folder = _folder("trainer_adamw_bnb_8bit", tmp_path / "checkpoint-4")
    saved = _saved("trainer_adamw_bnb_8bit")
    index = next(i for i, e in saved["state"].items() if "qmap1" in e["__bnb_optimizer_quant_state__"])
    change(saved["state"][index]["__bnb_optimizer_quant_state__"])
    torch.save(saved, folder / "optimizer.pt")
    assert_refused(run_command("inspect", folder), "optimizer.pt", what)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_truncated_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folder = _folder(name, tmp_path / "checkpoint-4")
    content = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").write_bytes(content[: len(content) // 2])
    outcome = run_command("inspect", folder)
    assert_refused(outcome, "optimizer.pt")
    assert "\x1b" not in outcome.err


def test_a_pickle_with_code_beside_coded_moments_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = _folder("trainer_adamw_bnb_8bit", tmp_path / "checkpoint-4")
    planted = tmp_path / "planted"
    saved = _saved("trainer_adamw_bnb_8bit")
    saved["state"][0]["__bnb_optimizer_quant_state__"]["qmap1"] = Malicious(planted)
    torch.save(saved, folder / "optimizer.pt")
    before = fingerprint(tmp_path)
    outcome = run_command("inspect", folder)
    assert_refused(outcome, "optimizer.pt", "weights_only=True runs no code")
    assert "\x1b" not in outcome.err
    assert fingerprint(tmp_path) == before
    pickle.loads(pickle.dumps(Malicious(planted)))
    assert planted.exists()


def _one_state(betas: tuple[float, ...], eps: float, more: tuple[str, ...] = ()) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for index, entry in saved["state"].items():
            inside = {"state1": entry["exp_avg"], **{key: torch.zeros(1) for key in more}}
            saved["state"][index] = {"step": 3, "__bnb_optimizer_quant_state__": inside}
        _bitsandbytes_groups(saved, betas, eps)

    return change


def _two_states(betas: tuple[float, ...], more: tuple[str, ...] = ()) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for index, entry in saved["state"].items():
            inside = {
                "state1": entry["exp_avg"],
                "state2": entry["exp_avg_sq"],
                **{key: torch.zeros(1) for key in more},
            }
            saved["state"][index] = {"step": 3, "__bnb_optimizer_quant_state__": inside}
        _bitsandbytes_groups(saved, betas, 1e-8)

    return change


def _bitsandbytes_groups(saved: dict[str, Any], betas: tuple[float, ...], eps: float) -> None:
    for group in saved["param_groups"]:
        params = group["params"]
        group.clear()
        group.update(lr=1e-3, betas=betas, eps=eps, weight_decay=0.0, params=params)


def _entries(make: Callable[[Tensor], dict[str, Any]], **settings: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["state"] = {index: make(entry["exp_avg_sq"]) for index, entry in saved["state"].items()}
        for group in saved["param_groups"]:
            params = group["params"]
            group.clear()
            group.update(lr=1e-3, params=params, **settings)

    return change


OTHERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "bitsandbytes' AdEMAMix": _two_states((0.9, 0.999, 0.9999)),
    "bitsandbytes' LAMB": _two_states((0.9, 0.999), ("unorm_vec",)),
    "bitsandbytes' Adam with percentile clipping": _two_states((0.9, 0.999), ("gnorm_vec",)),
    "bitsandbytes' Lion": _one_state((0.9, 0.99), 0.0),
    "bitsandbytes' RMSprop": _one_state((0.99, 0.0), 1e-8),
    "bitsandbytes' Adagrad": _one_state((0.0, 0.0), 1e-10),
    "bitsandbytes' SGD": _one_state((0.9, 0.0), 0.0),
    "bitsandbytes' LARS": _one_state((0.9, 0.0), 0.0, ("unorm_vec",)),
    "Muon": _entries(lambda v: {"momentum_buffer": v}, ns_steps=5, nesterov=True),
    "SGD with momentum": _entries(lambda v: {"momentum_buffer": v}, dampening=0.0),
    "Lion": _entries(lambda v: {"exp_avg": v}, betas=(0.9, 0.99), weight_decay=0.0),
    "CAME": _entries(lambda v: {"step": 1, "exp_avg": v, "exp_avg_sq_row": v, "exp_avg_res_row": v, "exp_avg_res": v}),
    "Adafactor": _entries(lambda v: {"step": 1, "exp_avg_sq_row": v, "exp_avg_sq_col": v}),
    "RMSprop": _entries(lambda v: {"step": 1, "square_avg": v}, alpha=0.9),
    "Adadelta": _entries(lambda v: {"step": 1, "square_avg": v, "acc_delta": v}),
    "AdEMAMix": _entries(lambda v: {"exp_avg_fast": v, "exp_avg_slow": v, "exp_avg_sq": v}),
    "StableAdamW": _entries(lambda v: {"exp_avg": v, "exp_avg_sq": v, "eps_sq": v}, betas=(0.9, 0.99)),
    "schedule-free": _entries(lambda v: {"z": v, "exp_avg_sq": v}, betas=(0.9, 0.99)),
    "LOMO": _entries(lambda v: {}, clip_grad_norm=1.0, clip_grad_value=None),
    "AdaLomo": _entries(lambda v: {}, clip_grad_norm=1.0, clip_threshold=1.0, decay_rate=-0.8),
    "GrokAdamW": _entries(lambda v: {}, betas=(0.9, 0.999), state={0: {}}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_is_refused_by_its_name_with_what_can_be_done(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    OTHERS[name](saved)
    torch.save(saved, folder / "optimizer.pt")
    outcome = run_command("inspect", folder)
    assert_refused(outcome, str(folder / "optimizer.pt"), name, "adamw_torch")


class GaLoreProjector:
    def __init__(self) -> None:
        self.rank = 4


GaLoreProjector.__module__ = "galore_torch.galore_projector"


def test_an_optimizer_whose_file_names_its_own_classes_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("galore_torch", "galore_torch.galore_projector"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules["galore_torch.galore_projector"], "GaLoreProjector", GaLoreProjector, raising=False)
    folder = make_checkpoint(tmp_path / "checkpoint-3")
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"][0]["projector"] = GaLoreProjector()
    torch.save(saved, folder / "optimizer.pt")
    outcome = run_command("inspect", folder)
    assert_refused(outcome, "optimizer.pt", "GaLore", "weights_only=True runs no code", "adamw_torch")
    assert "\x1b" not in outcome.err


def test_a_record_of_torchaos_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    broken = Coded._make_wrapper_subclass(Coded, (2, 2), dtype=torch.float32)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"optimizer\.pt holds a record of torchao's with nothing"):
        stored_optimizer(tmp_path / "optimizer.pt", [{"params": [0]}], {0: {"exp_avg": broken}})


def test_a_group_a_parameter_is_matched_in_the_order_of_the_parameters(tmp_path: Path) -> None:
    """Layer-wise learning rates: equal shapes in many groups, told by the order alone."""
    model = tiny_model()
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 1e-3 * n} for n, p in enumerate(model.parameters(), 1)])
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state, mapping = load_adam_state(tmp_path / "optimizer.pt", model)
    assert mapping.rule.startswith("a group a parameter")
    assert mapping.rivals
    for (name, p), group in zip(model.named_parameters(), state.groups, strict=True):
        assert group.names == (name,)
        assert torch.equal(state.moments[name].exp_avg, optimizer.state[p]["exp_avg"])


def test_stored_moments_are_told_by_shape_and_type_before_they_are_read() -> None:
    stored = read_optimizer_file(DATA / "trainer_adamw_bnb_8bit" / "optimizer.pt")
    shapes = {name: tuple(p.shape) for name, p in _model("trainer_adamw_bnb_8bit").named_parameters()}
    found = [entry["exp_avg"] for entry in stored.state.values()]
    assert all(isinstance(moment, StoredTensor) and moment.dtype is torch.float32 for moment in found)
    assert sorted(moment.shape for moment in found) == sorted(shapes.values())
