"""`probe` leaves a live model, its optimizer and every random state as they were: whatever happens."""

from __future__ import annotations

import importlib
import pkgutil
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import spoiled
from entropy_probe import InputError, LengthWeight, Settings, probe, state_of_optimizer
from entropy_probe.statistics.linearity import SweepRange
from support import (
    VOCABULARY,
    random_batch,
    tiny_model,
    trained_optimizer,
)


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
    frozen = dict(model.named_parameters())[
        "transformer.h.0.ln_1.bias" if name == "gpt2" else "model.layers.1.input_layernorm.weight"
    ]
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


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_a_sweep_and_fresh_responses_leave_everything_as_it_was(name: str) -> None:
    live = live_model(name)
    before = live.state()
    settings = Settings(sweep=SweepRange(0.5, 2.0, 3), resample=True)
    report = probe(live.model, state_of_optimizer(live.optimizer, live.model), random_batch(4, 2), settings).report
    assert len(report.sweep) == 4
    assert report.realized[-1].method == "resampled"
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
    assert total > 12
    for fail_at in (1, 2, 3, total // 4, total // 3, total // 2, total - 9, total - 8, total - 1, total):
        calls = 0
        with pytest.raises(error):
            probe(live.model, adam, batch)
        assert calls == fail_at
        _assert_same(live.state(), before)


@pytest.mark.parametrize(
    "target",
    [
        "entropy_probe.gradients.vectors.contractions:Contractions.add_outer",
        "entropy_probe.pipeline.run.cross_statistics",
        "torch:Tensor.double",
        "entropy_probe.targets.base.entropy_change",
        "entropy_probe.optimizers.adam.adamw_deltas",
        "entropy_probe.pipeline.run.assemble_report",
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
            pkgutil.resolve_name(module) if ":" in module else importlib.import_module(module), name, spoiled.interrupt
        )
        with pytest.raises(KeyboardInterrupt):
            probe(live.model, adam, batch)
    _assert_same(live.state(), before)


def test_a_probe_that_refuses_leaves_everything_as_it_was() -> None:
    live = live_model()
    adam = state_of_optimizer(live.optimizer, live.model)
    before = live.state()
    with pytest.raises(InputError, match="max_completion_length"):
        probe(live.model, adam, random_batch(4, 2), Settings(length_weight=LengthWeight.DR_GRPO))
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


def test_fsdp1_is_refused_by_name() -> None:
    """It cannot be entered without a GPU; what is told apart is the wrapper, inside of the model or around it."""
    model: Any = tiny_model()
    adam = state_of_optimizer(trained_optimizer(model), model)
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._modules["_fsdp_wrapped_module"] = model.model.layers[0]
    model.model.layers[0] = wrapper
    with pytest.raises(InputError, match=r"FullyShardedDataParallel \(FSDP1\).*entropy-probe run"):
        probe(model, adam, random_batch(4, 2))
