"""A damaged, foreign or pickled optimizer state is refused: exit code 2, one line, nothing written or executed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spoiled import Malicious, Place, refuse, refuse_run
from support import (
    VOCABULARY,
    run_command,
    tiny_model,
)


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
    "radam": (_foreign(lambda model: torch.optim.RAdam(model.parameters())), "amsgrad"),
    "nadam": (_foreign(lambda model: torch.optim.NAdam(model.parameters())), "mu_product"),
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
    "another-model": (_foreign(lambda model: torch.optim.AdamW(list(model.parameters())[:3])), "more than one way"),
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


def test_a_missing_optimizer_file_is_refused(place: Place) -> None:
    place.optimizer.unlink()
    refuse_run(place, "optimizer.pt", str(place.checkpoint))
    outcome = run_command("inspect", place.checkpoint)
    assert outcome.code == 0, outcome.err
    assert "no Adam state is here" in outcome.out
