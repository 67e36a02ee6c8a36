"""The engine against the reference backend, in float64: kernel, row dots, mean update, scores; and planted errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import support
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.data.units import block_units, exact_units
from entropy_probe.errors import InputError
from entropy_probe.gradients import Storage, Wanted, prepare, treatments
from entropy_probe.gradients.capture.modules import Treatment, first_treatment
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.model.policy import Policy
from gradient_pairs import assert_same, both


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("family", list(support.CONFIGS))
def test_the_engine_agrees_with_the_reference(family: str, storage: Storage) -> None:
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    found, expected = both(
        support.tiny_model(family, dtype=torch.float64), batch, exact_units(5), 7, wanted=Wanted(storage)
    )
    assert_same(found, expected)
    assert found.coverage.fallback == ()


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_units_split_over_microbatches_and_blocks_of_prompts_change_nothing(size: int) -> None:
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    for storage in Storage:
        assert_same(*both(model, batch, block_units(5, 2), size, wanted=Wanted(storage)))


def test_lora_is_captured_without_fallback_and_dora_exactly() -> None:
    from peft import LoraConfig, get_peft_model

    batch = support.random_batch(4, 3)
    lora = support.lora_model(support.tiny_model("llama-untied", dtype=torch.float64)).double()
    found, expected = both(lora, batch, exact_units(4), 6)
    assert_same(found, expected)
    assert found.coverage.fallback == ()
    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    dora = get_peft_model(support.tiny_model("llama-untied", dtype=torch.float64), config).double()
    assert_same(*both(dora, batch, exact_units(4), 6))


def test_coefficients_a_token_go_through_two_backwards() -> None:
    batch = support.random_batch(4, 3)
    tokens = sum(len(r.response_ids) for r in batch.responses)
    c = torch.randn(tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert_same(*both(support.tiny_model("qwen2", dtype=torch.float64), batch, exact_units(4), 6, c))


class Mixing(nn.Module):
    """A language model whose norm has a gain that is read outside of any module's forward, and, on request, coupled rows."""

    def __init__(self, *, coupled: bool = False) -> None:
        super().__init__()
        self.inner = support.tiny_model("llama-untied", dtype=torch.float64)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, support.VOCABULARY, dtype=torch.float64))
        self.coupled = coupled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = output.logits * torch.diag(self.gain).sum(0)
        if self.coupled:
            output.logits = output.logits + output.logits.mean(0, keepdim=True)
        return output


def test_a_parameter_in_a_models_own_arithmetic_is_exact_and_named() -> None:
    found, expected = both(Mixing(), support.random_batch(4, 3), exact_units(4), 6)
    assert_same(found, expected)
    assert "gain" in (*found.coverage.recomputed, *found.coverage.fallback)


@pytest.mark.parametrize("storage", list(Storage))
def test_the_fallback_is_exact_and_named(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    def norms_fall_back(module: nn.Module, parameter: nn.Parameter) -> Treatment:
        return Treatment.FALLBACK if parameter.dim() == 1 else first_treatment(module, parameter)

    monkeypatch.setattr(treatments, "first_treatment", norms_fall_back)
    batch = support.random_batch(4, 3)
    model = support.tiny_model("llama-untied", dtype=torch.float64)
    found, expected = both(model, batch, exact_units(4), 6, wanted=Wanted(storage))
    assert_same(found, expected)
    names = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert set(found.coverage.fallback) == names
    assert 0 < found.coverage.fallback_share < 0.2


def test_sequences_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="depend on each other"):
        both(Mixing(coupled=True), support.random_batch(4, 3), exact_units(4), 6)


def test_a_wrong_rule_is_found_by_the_check_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every GEMM's gradient goes to the wrong sequence. The check sends the parameters to slower rules."""
    batch = support.random_batch(3, 3)
    right = UnitVectors.add_outer

    def swapped(self: UnitVectors, name: str, left: torch.Tensor, *rest: Any) -> None:
        right(self, name, left.flip(0), *rest)

    monkeypatch.setattr(UnitVectors, "add_outer", swapped)
    found, expected = both(support.tiny_model("llama-untied", dtype=torch.float64), batch, exact_units(3), 6)
    assert_same(found, expected)
    assert "lm_head.weight" in (*found.coverage.recomputed, *found.coverage.fallback)


def test_a_rule_that_is_wrong_only_later_makes_the_comparison_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted after the rules were proved: the second microbatch's GEMMs overwrite instead of adding."""
    batch = support.random_batch(3, 4)
    model = support.tiny_model("llama-untied", dtype=torch.float64)
    rules = treatments.prove_rules(Policy(model, 0.8), batch)
    assert_same(*both(model, batch, exact_units(3), 2, rules=rules))
    right = UnitVectors._first_touch
    monkeypatch.setattr(UnitVectors, "_first_touch", lambda self, *rest: right(self, *rest) or True)
    found, expected = both(model, batch, exact_units(3), 2, rules=rules)
    assert found.coverage.fallback == ()
    assert np.abs(found.total.kernel).max() > 0
    with pytest.raises(AssertionError):
        assert_same(found, expected)


class OneAtATime(nn.Module):
    """A language model that refuses batches of two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = support.tiny_model("llama-untied", dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        if len(input_ids) > 1:
            raise RuntimeError("one sequence at a time")
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_model_that_takes_no_batches_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="not two of different lengths") as caught:
        both(OneAtATime(), support.random_batch(4, 3), exact_units(4), 6)
    assert "one sequence at a time" in str(caught.value)


class LengthAware(nn.Module):
    """A language model whose logits follow the padded length of long batches, as dynamic rotary tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = support.tiny_model("llama-untied", dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = output.logits * (2.0 if input_ids.shape[1] > 8 else 1.0)
        return output


def test_what_only_real_rows_show_is_refused_too() -> None:
    batch = support.random_batch(6, 3, longest=12)
    assert min(r.length for r in batch.responses) <= 8 < max(r.length for r in batch.responses)
    policy = Policy(LengthAware())
    treatments.prove_rules(policy, batch)  # short rows do not show it
    with pytest.raises(InputError, match="depend on each other or on padding"):
        prepare(policy, batch, memory_bytes=1e9)


class Experts(nn.Module):
    """A language model with a router that sends every third token id, wherever it stands, through a trainable layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = support.tiny_model("llama-untied", dtype=torch.float64)
        self.expert = nn.Linear(support.VOCABULARY, support.VOCABULARY, bias=False, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        flat = output.logits.flatten(0, 1)
        chosen = ((input_ids % 3 == 0) & (attention_mask == 1)).flatten().nonzero()[:, 0]
        output.logits = flat.index_add(0, chosen, self.expert(flat[chosen])).view_as(output.logits)
        return output


def test_as_many_rows_as_sequences_are_not_taken_for_sequences() -> None:
    """Four tokens of four sequences, two of them of one sequence and none of another; the short rows have one each."""
    answers = ((6, 7, 5, 9, 5), (8, 7, 5), (5, 9, 8), (5, 9, 7))
    batch = group_rollouts([Rollout(f"p{k // 2}", (4,), ids, float(k % 2)) for k, ids in enumerate(answers)])
    found, expected = both(Experts(), batch, exact_units(2), 6)
    assert_same(found, expected)
    assert found.coverage.fallback == ("expert.weight",)


def test_gradients_flags_and_forwards_are_as_they_were() -> None:
    model = support.tiny_model("mixtral", dtype=torch.float64).train()
    batch = support.random_batch(3, 3)
    state = [(p.requires_grad, p.grad) for p in model.parameters()]
    both(model, batch, exact_units(3), 6)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == state
    assert all(module.training and "forward" not in vars(module) for module in model.modules())
