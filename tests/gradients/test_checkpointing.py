"""Gradient checkpointing on and off: the same answers, less memory, flags as they were. Compiled models: run as written."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import engine, marked, reference, treatments
from entropy_probe.gradients.capture.checkpointing import checkpointed_layers
from entropy_probe.gradients.capture.uses import Capture
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.preparation import measure_activations
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.report import Report
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy
from gradient_pairs import assert_same, gradients

FAMILIES = ["llama-tied", "gpt2", "gemma2", "mixtral"]
LAYERS = {
    "llama-tied": ["model.layers.0", "model.layers.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "mixtral": ["model.layers.1"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_give_the_same_gradients(family: str) -> None:
    model = support.tiny_model(family, dtype=torch.float64)
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    policy = Policy(model, 0.8, microbatch_size=7)
    expected = gradients(reference, policy, batch)
    c = torch.randn(batch.tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    per_token = gradients(reference, policy, batch, c)
    with marked(model):
        assert len(checkpointed_layers(model)) == 2
        assert_same(gradients(engine, policy, batch), expected)
        assert_same(gradients(reference, policy, batch), expected)
        assert_same(gradients(engine, policy, batch, c), per_token)


def test_checkpointed_lora_needs_no_input_that_requires_grad() -> None:
    model = support.lora_model(support.tiny_model("llama-untied", dtype=torch.float64)).double()
    batch = support.random_batch(4, 3)
    policy = Policy(model, microbatch_size=5)
    expected = gradients(reference, policy, batch)
    with marked(model):
        assert_same(gradients(engine, policy, batch), expected)


@pytest.mark.parametrize("also_wrapped", [False, True])
def test_layers_run_twice_and_keep_less(also_wrapped: bool) -> None:
    model = support.tiny_model("llama-tied")
    policy, batch = Policy(model), support.random_batch(4, 3)
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = measure_activations(policy, batch).of_row(12)
    if also_wrapped:
        support.wrapped(model, LAYERS["llama-tied"])
    with marked(model):
        rules = treatments.prove_rules(policy, batch)
        assert measure_activations(policy, batch).of_row(12) < 0.5 * plain
        p = {n: torch.ones_like(q) for n, q in policy.trainable().items()}
        arguments = (
            batch,
            exact_units(4),
            Sides(EntropyTarget(), torch.ones(12, dtype=torch.float64)),
            Geometry.fixed(p),
        )
        calls.clear()
        engine.unit_gradients(Policy(model), *arguments, rules=rules)
        assert len(calls) == 2


def test_a_recomputation_outside_of_the_forwards_modes_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what is computed again in the backward runs uncaptured."""
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    monkeypatch.setattr(Capture, "modes", lambda self: nullcontext)
    batch = support.random_batch(4, 3)
    expected = gradients(reference, Policy(model), batch)
    with marked(model):
        try:
            found = gradients(engine, Policy(model), batch)
        except RuntimeError:
            return  # torch saw that the recomputation keeps other tensors
    # Or the check of rules saw it, and sent the parameters to the fallback: slow, never wrong.
    assert found.coverage.fallback != ()
    assert_same(found, expected)


def test_a_models_own_setting_counts_and_flags_come_back() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    batch = support.random_batch(5, 3)
    plain = probe(model, adam, batch).report.first_order
    asked = probe(model, adam, batch, Settings(gradient_checkpointing=True)).report.first_order
    assert checkpointed_layers(model) == []
    model.gradient_checkpointing_enable()
    model.train()
    own = probe(model, adam, batch).report.first_order
    assert len(checkpointed_layers(model)) == 2
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
    for found in (asked, own):
        assert found.row_means == pytest.approx(plain.row_means, rel=1e-10)
    with pytest.raises(RuntimeError, match="stop"), marked(model):
        raise RuntimeError("stop")
    assert len(checkpointed_layers(model)) == 2


def test_a_model_without_such_layers_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="GradientCheckpointingLayer"), marked(EnumerablePolicy(2, 3)):
        pass
    with marked(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))):
        pass  # what was asked for is there


@pytest.mark.parametrize("family", LAYERS)
def test_wrapped_layers_give_the_same_gradients(family: str) -> None:
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    model = support.tiny_model(family, dtype=torch.float64)
    policy = Policy(model, 0.8, microbatch_size=7)
    expected = gradients(engine, policy, batch)
    loss = reference.loss_gradient(policy, batch.responses, torch.ones(len(batch.responses)))
    kept = measure_activations(policy, batch).of_row(12)
    support.wrapped(model, LAYERS[family])
    found = gradients(engine, policy, batch)
    assert found.rules is not None
    assert expected.rules is not None
    assert found.rules.treatments == expected.rules.treatments
    assert found.coverage == expected.coverage
    assert_same(found, expected)
    for name, gradient in reference.loss_gradient(policy, batch.responses, torch.ones(len(batch.responses))).items():
        assert torch.equal(gradient, loss[name])
    assert measure_activations(policy, batch).of_row(12) < (0.5 if len(LAYERS[family]) == 2 else 0.8) * kept


class Entered:
    """Counts what a layer's own contexts, which can be entered once each, were entered for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return self._once("forward"), self._once("again")

    @contextmanager
    def _once(self, name: str) -> Iterator[None]:
        self.names.append(name)
        yield


def saves_products(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operation is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, saves_products)


@functools.cache
def probed_plain(dtype: torch.dtype) -> Report:
    model = support.tiny_model("llama-tied", dtype=dtype)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    return probe(model, adam, support.random_batch(5, 3), Settings(noise=False)).report


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("layers", torch.float32),
        ("layers", torch.float64),
        ("selective", torch.float64),
        ("function", torch.float32),
        ("inside", torch.float64),
        ("whole", torch.float64),
        ("marked", torch.float32),
    ],
)
def test_a_wrapped_model_is_probed_as_without(how: str, dtype: torch.dtype) -> None:
    model: Any = support.tiny_model("llama-tied", dtype=dtype)
    optimizer = support.trained_optimizer(model)
    batch, settings, expected = support.random_batch(5, 3), Settings(noise=False), probed_plain(dtype)
    layers = LAYERS["llama-tied"]
    if how == "selective":
        support.wrapped(model, layers, context_fn=selective)
    elif how == "function":
        support.wrapped(model, layers, checkpoint_fn=checkpoint, use_reentrant=False, debug=True)
    elif how == "inside":
        support.wrapped(model, [f"{layers[0]}.input_layernorm", f"{layers[0]}.mlp", layers[0], "model"])
    else:
        support.wrapped(model, layers)
    if how == "whole":
        model = checkpoint_wrapper(model)
    if how == "marked":
        model.gradient_checkpointing_enable()
        settings = Settings(noise=False, gradient_checkpointing=True)
    adam = state_of_optimizer(optimizer, model)
    assert all("_checkpoint" not in name for name in adam.moments)
    found = probe(model, adam, batch, settings).report
    assert found.engine.fallback == []
    assert found.first_order.row_means == pytest.approx(expected.first_order.row_means, rel=1e-5, abs=1e-7)
    for mine, theirs in zip(found.realized, expected.realized, strict=True):
        assert mine.delta_h == pytest.approx(theirs.delta_h, rel=1e-3 if dtype == torch.float32 else 1e-8)
    assert all("forward" not in vars(module) for module in model.modules())


def test_contexts_of_a_wrappers_own_are_entered_for_every_recomputation() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    batch, policy = support.random_batch(4, 3), Policy(model, microbatch_size=5)
    target = EntropyTarget(Estimator.RAO_BLACKWELL)  # X and Y by two backwards of one forward
    expected = gradients(engine, policy, batch, target)
    entered = Entered()
    support.wrapped(model, LAYERS["llama-tied"][:1], context_fn=entered)
    assert_same(gradients(engine, policy, batch, target), expected)
    assert 0 < entered.names.count("forward") < entered.names.count("again")


def test_a_wrapped_model_is_left_as_it_was_by_a_probe_that_fails() -> None:
    model = support.wrapped(support.tiny_model("llama-tied"), LAYERS["llama-tied"])
    policy, batch = Policy(model), support.random_batch(4, 3)

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(stops)
    with pytest.raises(KeyboardInterrupt):
        gradients(engine, policy, batch)
    handle.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    assert checkpointed_layers(model) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"checkpoint_impl": CheckpointImpl.REENTRANT}, r"'model\.layers\.0' .*reentrant.*NO_REENTRANT"),
        ({"checkpoint_fn": checkpoint}, r"'model\.layers\.0' .*reentrant.*NO_REENTRANT"),
        ({"checkpoint_fn": lambda layer, *_, **__: layer}, r"checkpoint_fn that is not torch's .*lambda.*NO_REENTRANT"),
    ],
)
def test_wrappers_of_another_kind_are_refused_by_name(how: dict[str, Any], message: str) -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    support.wrapped(model, LAYERS["llama-tied"], **how)
    with pytest.raises(InputError, match=message):
        probe(model, adam, support.random_batch(4, 3))
    with pytest.raises(InputError, match=message):
        reference.loss_gradient(Policy(model), support.random_batch(4, 3).responses, torch.ones(12))


@pytest.mark.parametrize("how", ["wrapped", "in place", "by layer", "forward"])
def test_a_compiled_model_is_probed_as_it_was_written(how: str) -> None:
    model: Any = support.tiny_model("llama-tied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model)
    batch = support.random_batch(5, 3)
    plain = probe(model, state_of_optimizer(optimizer, model), batch).report
    compiled: nn.Module = model
    graphs: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(1)
        return module.forward

    if how == "wrapped":
        compiled = torch.compile(model, backend=backend)  # type: ignore[assignment]
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "by layer":
        for layer in model.model.layers:
            layer.compile(backend=backend)
    else:
        model.forward = torch.compile(model.forward, backend=backend)
    compiled(input_ids=torch.tensor([[3, 4, 5]]))
    assert graphs
    found = probe(compiled, state_of_optimizer(optimizer, compiled), batch).report
    assert found.first_order.row_means == pytest.approx(plain.first_order.row_means, rel=1e-10)
    assert found.engine.fallback == []
    # Compiled code runs again: a model never seen is compiled.
    before = len(graphs)
    torch.compile(nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    assert len(graphs) > before
