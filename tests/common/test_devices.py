"""One choice of a device for the command and the library: auto is a GPU where there is one, and float64 must be there."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

import support
from entropy_probe import InputError, probe, probe_checkpoint, replay, state_of_optimizer
from entropy_probe.cli.options import Device
from entropy_probe.common import devices
from entropy_probe.common.devices import check_device, choose_device, supports_float64
from spoiled import Place


@pytest.mark.parametrize(("there", "expected"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    # A Mac's GPU is there too, and has no float64.
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == Device.AUTO.torch_device == torch.device(expected)


def test_auto_of_several_ranks_is_where_their_collectives_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", torch.device("cpu")) == torch.device("cpu")
    assert choose_device("auto", torch.device("cuda:3")) == torch.device("cuda:3")
    assert choose_device("cpu", torch.device("cuda:3")) == torch.device("cpu")


def test_the_librarys_default_is_the_commands() -> None:
    for function in (probe_checkpoint, replay):
        assert inspect.signature(function).parameters["device"].default == "auto"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("mps", "device mps has no float64"),
        (torch.device("mps"), "use cpu or cuda"),
        ("xpu:0", "device xpu:0 has no float64"),
        ("meta", "holds no numbers"),
        ("cuda:7", "torch sees no CUDA device"),
        ("hpu", "device hpu is not known to have float64"),
        ("gpu", "device 'gpu': torch knows none of that name; expected auto, cpu or cuda"),
    ],
)
def test_a_device_that_will_not_do_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, asked: str | torch.device, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=said):
        choose_device(asked)


def test_a_gpu_that_is_not_among_those_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="cuda:2: torch sees 2 CUDA devices"):
        choose_device("cuda:2")


@pytest.mark.parametrize("has", [True, False])
def test_an_xpu_will_do_where_it_has_float64(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has))
    assert supports_float64(torch.device("xpu")) is has


def test_loading_onto_a_device_without_float64_is_refused_before_anything_is_read(place: Place) -> None:
    for work in (
        lambda: probe_checkpoint(place.checkpoint, place.rollouts, device="mps"),
        lambda: replay(place.checkpoint, place.checkpoint, place.rollouts, device="mps"),
    ):
        with pytest.raises(InputError, match="device mps has no float64"):
            work()


def test_a_live_model_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.tiny_model()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    monkeypatch.setattr(devices, "supports_float64", lambda device: False)
    with pytest.raises(InputError, match="device cpu is not known to have float64"):
        probe(model, adam, support.random_batch(4, 2))


def test_the_devices_of_the_tests_themselves_will_do() -> None:
    check_device(torch.device("cpu"))
    check_device(torch.device("cuda", 1))
