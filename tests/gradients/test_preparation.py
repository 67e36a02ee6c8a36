"""Rules handed from one probe to the next, microbatches by memory, vectors in bfloat16, and traps of the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import Storage, Wanted, engine, passes, prepare, reference, treatments
from entropy_probe.gradients.capture.sequences import Mixing, Strip
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.preparation import ACTIVATION_SHARE, RESERVE
from entropy_probe.gradients.vectors import unit_vectors
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.targets.entropy import EntropyTarget
from gradient_pairs import assert_same, gradients


def setting(name: str = "llama-tied", **more: Any) -> tuple[Any, Any, Any]:
    model = support.tiny_model(name, **more)
    return model, state_of_optimizer(support.trained_optimizer(model), model), support.random_batch(6, 4)


def test_a_second_probe_takes_over_what_the_first_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adam, batch = setting(dtype=torch.float64)
    first = probe(model, adam, batch)

    def forbidden(*_: object) -> None:
        raise AssertionError("the rules were proved again")

    monkeypatch.setattr("entropy_probe.gradients.preparation.prove_rules", forbidden)
    again = probe(model, adam, batch, preparation=first.preparation)
    assert again.report.first_order == first.report.first_order
    with pytest.raises(AssertionError, match="proved again"):
        probe(model, adam, batch)
    # The microbatch is this batch's own; a head that has not been tried yet is tried.
    rows = [replace(r, prompt_id=f"{k} {r.prompt_id}") for k in range(3) for r in batch.responses]
    larger, earlier = support.group_rollouts(rows), first.preparation
    assert prepare(Policy(model), larger, memory_bytes=1e9, earlier=earlier).microbatch_size == 72
    assert prepare(Policy(model), larger, memory_bytes=1e9, microbatch_size=3, earlier=earlier).microbatch_size == 3
    for tried in (
        lambda: prepare(Policy(model), batch, memory_bytes=2e3, earlier=earlier),
        lambda: prepare(Policy(model), support.random_batch(4, 3, longest=30), memory_bytes=1e9, earlier=earlier),
    ):
        with pytest.raises(AssertionError, match="proved again"):
            tried()


@pytest.mark.parametrize("change", ["frozen", "other family", "float32"])
def test_what_another_model_found_is_refused(change: str) -> None:
    model, adam, batch = setting(dtype=torch.float64)
    preparation = probe(model, adam, batch).preparation
    if change == "frozen":
        model.lm_head.weight.requires_grad_(False)
    elif change == "float32":
        model.float()
    else:
        model, adam, batch = setting("qwen2", dtype=torch.float64)
    with pytest.raises(InputError, match="proved for another model"):
        probe(model, adam, batch, preparation=preparation)


def test_a_microbatch_holds_what_fits_and_whole_prompts_where_they_do() -> None:
    policy = Policy(support.tiny_model("llama-tied"))
    batch = support.random_batch(6, 4)
    longest = max(r.length for r in batch.responses)
    found = prepare(policy, batch, memory_bytes=1e9)
    row = RESERVE * found.activations.of_row(longest) / ACTIVATION_SHARE
    constant = RESERVE * found.activations.constant / ACTIVATION_SHARE

    def plan(rows: float) -> tuple[int, str]:
        tight = prepare(policy, batch, memory_bytes=rows * row + constant, earlier=found)
        return tight.microbatch_size, tight.reason

    assert plan(1000)[0] == len(batch.responses)
    assert plan(5.5)[0] == 5
    assert "what fits" in plan(5.5)[1]
    assert prepare(policy, batch, memory_bytes=1e9, microbatch_size=3).microbatch_size == 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activations_of_a_long_row_follow_from_those_of_short_ones(attention: str) -> None:
    """Eager attention keeps its matrix, which short rows hardly show: a straight line through them would be far off."""
    from entropy_probe.gradients import preparation

    model = support.tiny_model("llama-tied")
    model.set_attn_implementation(attention)
    policy = Policy(model)
    rows = support.random_rollouts(2, 2, longest=60)
    found = preparation.measure_activations(policy, support.group_rollouts(rows))
    ids = tuple(range(3, 23)) * 20
    true = preparation._bytes_kept(policy, replace(rows[0], prompt_ids=ids[:1], response_ids=ids[1:]))
    predicted = found.constant + found.of_row(len(ids))
    assert predicted == pytest.approx(true, rel=0.1)
    assert (found.quadratic * len(ids) > 0.5 * found.linear) is (attention == "eager")


def test_long_rows_make_microbatches_of_few_positions_but_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = Policy(support.tiny_model("llama-tied")), support.random_batch(6, 4)
    monkeypatch.setattr("entropy_probe.gradients.preparation.POSITIONS", {"cpu": 2})
    found = prepare(policy, batch, memory_bytes=1e9)
    assert found.microbatch_size == 4
    assert "the responses to one prompt" in found.reason


@pytest.mark.parametrize("storage", list(Storage))
def test_bfloat16_vectors_take_half_the_memory_and_keep_two_digits(storage: Storage) -> None:
    model, _, batch = setting()
    policy = Policy(model)
    p = {n: torch.ones_like(q) for n, q in policy.trainable().items()}
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    seen: list[int] = []
    original = unit_vectors.uninitialised

    def counted(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = original(shape, dtype, device)
        seen[-1] += made.numel() * made.itemsize
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_vectors, "uninitialised", counted)
        rules = treatments.prove_rules(policy, batch)
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            seen.append(0)
            arguments = (policy, batch, exact_units(6), Sides(EntropyTarget(), a), Geometry.fixed(p, dtype=dtype))
            found.append(engine.unit_gradients(*arguments, wanted=Wanted(storage), rules=rules).total)
        wide, narrow = found
    gap = np.abs(narrow.x_dot_sum - wide.x_dot_sum).max() / np.abs(wide.x_dot_sum).max()
    assert 1e-6 < gap < 2e-2
    assert seen[-1] == seen[-2] / 2 > 0


def test_a_bfloat16_models_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And planted: summed in bfloat16, 600 equal gradients stop growing at 256."""
    made: list[torch.dtype] = []
    original = passes.UnitVectors

    def recorded(shapes: Any, slots: int, dtype: torch.dtype, *rest: Any, **more: Any) -> Any:
        made.append(dtype)
        return original(shapes, slots, dtype, *rest, **more)

    monkeypatch.setattr(passes, "UnitVectors", recorded)
    model = support.tiny_model("llama-untied", dtype=torch.bfloat16)
    low = gradients(engine, Policy(model), support.random_batch(4, 3)).total.kernel
    high = gradients(reference, Policy(model.double()), support.random_batch(4, 3)).total.kernel
    assert made == [torch.float32]
    assert low is not None
    assert high is not None
    assert np.abs(low - high).max() < 0.05 * np.abs(high).max()

    def total(dtype: torch.dtype) -> float:
        vectors = original({"w": torch.Size([4])}, 1, dtype, torch.device("cpu"))
        vectors.open([0])
        strip = Strip((0,), 1)
        strip.mix(Mixing(torch.ones(2, 1), slice(0, 2)))
        for _ in range(600):
            vectors.add("w", torch.ones(1, 4), strip)
        return float(vectors.of("w", [0])[0, 0, 0])

    assert total(torch.float32) == 600.0
    assert total(torch.bfloat16) == 256.0


class Repeated(nn.Module):
    """A language model whose layers run three times over, each time with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = support.tiny_model("llama-tied", dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        layers = self.inner.model.layers
        self.inner.model.layers = nn.ModuleList([*layers, *layers, *layers])
        self.inner.config.num_hidden_layers = 6
        try:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        finally:
            self.inner.model.layers = layers
            self.inner.config.num_hidden_layers = 2


def test_a_module_called_three_times_in_a_forward_adds_up() -> None:
    policy, batch = Policy(Repeated(), microbatch_size=5), support.random_batch(4, 3)
    found = gradients(engine, policy, batch)
    assert_same(found, gradients(reference, policy, batch))
    assert found.coverage.fallback == ()


def test_a_prompt_without_advantages_moves_nothing_exactly() -> None:
    model, _, batch = setting(dtype=torch.float64)
    p = {n: torch.ones(q.shape, dtype=torch.float64) for n, q in model.named_parameters()}
    a = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a[4:8] = 0.0
    for size in (3, 100):
        found = engine.unit_gradients(
            Policy(model, microbatch_size=size), batch, exact_units(6), Sides(EntropyTarget(), a), Geometry.fixed(p)
        )
        kernel = found.total.kernel
        assert kernel is not None
        assert (kernel[:, 1] == 0.0).all()
        assert (np.abs(kernel[:, 0]) > 0).all()


def test_vectors_in_float64_go_with_float64_alone() -> None:
    with pytest.raises(InputError, match="float64 goes with float64"):
        Settings(vector_dtype=torch.float64)
    with pytest.raises(InputError, match="float64 goes with float64"):
        Settings(dtype=torch.float64, vector_dtype=torch.bfloat16)
