"""Gradient checkpointing on and off: the same answers, less memory, flags as they were. Compiled models: run as written."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.gradients import engine, marked, reference, treatments
from entropy_probe.gradients.capture import Capture
from entropy_probe.gradients.checkpointing import checkpointed_layers
from entropy_probe.gradients.preparation import measure_activations
from entropy_probe.policy import Policy
from entropy_probe.scores import EntropyTarget
from entropy_probe.units import exact_units
from enumerable import EnumerablePolicy
from test_engine import assert_same
from test_language_head import gradients

FAMILIES = ["llama-tied", "gpt2", "gemma2", "mixtral"]


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


def test_layers_run_twice_and_keep_less() -> None:
    model = support.tiny_model("llama-tied")
    policy, batch = Policy(model), support.random_batch(4, 3)
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = measure_activations(policy, batch).of_row(12)
    with marked(model):
        rules = treatments.prove_rules(policy, batch)
        assert measure_activations(policy, batch).of_row(12) < 0.5 * plain
        p = {n: torch.ones_like(q) for n, q in model.named_parameters()}
        arguments = (
            batch,
            exact_units(4),
            EntropyTarget(),
            torch.ones(12, dtype=torch.float64),
            p,
            dict.fromkeys(p, 1.0),
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
