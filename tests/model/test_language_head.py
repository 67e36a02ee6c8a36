"""Logits of response positions alone and in chunks: the same log-probs and gradients, without the logits in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.data.rollouts import Rollout
from entropy_probe.gradients import engine, loss_gradient, reference
from entropy_probe.model import language_head
from entropy_probe.model.head_choice import choose_head
from entropy_probe.model.language_head import HeadMode
from entropy_probe.model.policy import Policy
from enumerable import EnumerablePolicy
from gradient_pairs import assert_same, coefficients, gradients

ROWS = (Rollout("a", (3,), (4, 5, 6), 0.0), Rollout("b", (7, 8), (9,), 0.0))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_head, "CHUNK_VALUES", 7 * support.VOCABULARY)


def models() -> dict[str, Any]:
    return {
        **{
            name: support.tiny_model(name, dtype=torch.float64)
            for name in ("llama-tied", "llama-untied", "phi", "gpt2")
        },
        "frozen head": support.lora_model(support.tiny_model("llama-untied", dtype=torch.float64)).double(),
    }


@pytest.mark.parametrize("mode", [HeadMode.RESPONSES, HeadMode.CHUNKED])
@pytest.mark.parametrize("name", list(models()))
def test_every_head_gives_the_same_scores_and_gradients(name: str, mode: HeadMode) -> None:
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    whole = Policy(models()[name], 0.8, microbatch_size=7)
    expected = gradients(reference, whole, batch)
    for backend in (engine, reference):
        assert_same(gradients(backend, replace(whole, head=mode), batch), expected)
    weights = coefficients(batch)
    for parameter, gradient in loss_gradient(replace(whole, head=mode), batch.responses, weights).items():
        torch.testing.assert_close(
            gradient, loss_gradient(whole, batch.responses, weights)[parameter], rtol=1e-9, atol=1e-11
        )


def test_coefficients_a_token_go_through_the_chunked_head() -> None:
    batch = support.random_batch(4, 3)
    c = torch.randn(batch.tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    whole = Policy(models()["phi"], 0.8, microbatch_size=5)
    assert_same(
        gradients(engine, replace(whole, head=HeadMode.CHUNKED), batch, c), gradients(reference, whole, batch, c)
    )


def test_a_wrong_chunk_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the temperature is left out of the logits' gradient. Scores stay right; the rules' check has no part in it."""
    right = language_head.logit_gradient
    monkeypatch.setattr(language_head, "logit_gradient", lambda z, y, d, tau: right(z, y, d, 1.0))
    batch = support.random_batch(4, 3)
    whole = Policy(models()["frozen head"], 0.8, microbatch_size=5)
    with pytest.raises(AssertionError):
        assert_same(
            gradients(reference, replace(whole, head=HeadMode.CHUNKED), batch), gradients(reference, whole, batch)
        )


aten = torch.ops.aten
LOGITS = {aten.mm.default, aten.addmm.default, aten._softmax.default, aten._log_softmax.default}


class Widest(TorchDispatchMode):
    """The most logits, or probabilities, that one operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in LOGITS and found.shape[-1] == support.VOCABULARY:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("name", ["phi", "frozen head"])
def test_logits_of_more_than_a_chunk_never_stand_in_memory(name: str) -> None:
    batch = support.random_batch(5, 3)
    policy = Policy(models()[name], 0.8, microbatch_size=4)
    assert max(len(r.response_ids) for r in batch.responses) * 4 > 7
    seen = {}
    for mode in HeadMode:
        with Widest() as widest:
            gradients(engine, replace(policy, head=mode), batch)
        seen[mode] = widest.elements
    assert 0 < seen[HeadMode.CHUNKED] <= 7 * support.VOCABULARY < seen[HeadMode.RESPONSES] <= seen[HeadMode.WHOLE]


def test_a_softcap_after_the_head_keeps_logits_out_of_chunks() -> None:
    policy = Policy(support.tiny_model("gemma2"))
    choice = choose_head(policy, ROWS, chunked=True)
    assert choice.policy.head is HeadMode.RESPONSES
    assert "more than one linear layer" in str(choice.reason)
    assert choose_head(policy, ROWS, chunked=False).reason is None


class Scaled(nn.Module):
    """A model that scales its logits by so little that bfloat16 hides it in a log-prob."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = support.tiny_model("llama-untied", dtype=torch.bfloat16)
        self.factor = factor

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize(("factor", "expected"), [(1.0, HeadMode.CHUNKED), (1.01, HeadMode.RESPONSES)])
def test_a_small_scale_after_the_head_is_not_left_out_in_bfloat16(factor: float, expected: HeadMode) -> None:
    assert choose_head(Policy(Scaled(factor)), ROWS, chunked=True).policy.head is expected


def test_a_head_with_an_adapter_or_a_hook_is_not_chunked() -> None:
    model = support.tiny_model("llama-untied")
    assert choose_head(Policy(model), ROWS, chunked=True).policy.head is HeadMode.CHUNKED
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    assert choose_head(Policy(model), ROWS, chunked=True).policy.head is HeadMode.RESPONSES
    handle.remove()
    # Nor one whose forward was replaced, which the layer's own weight knows nothing of.
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2.0 * original(hidden)
    choice = choose_head(Policy(model), ROWS, chunked=True)
    assert choice.policy.head is HeadMode.RESPONSES
    assert vars(model.lm_head)["forward"](torch.ones(1, 1, 16)).shape[-1] == support.VOCABULARY


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_the_chunked_head_in_low_precision_is_the_whole_head(how: str, bias: bool) -> None:
    """Against whole logits in the same arithmetic: chunks round no other way than a product of other shape does."""
    dtype, autocast = (torch.bfloat16, None) if how == "bfloat16" else (torch.float32, torch.bfloat16)
    model = support.tiny_model("phi" if bias else "llama-tied", dtype=dtype, std=0.1)
    batch = support.random_batch(4, 3)
    policy = Policy(model, 0.8, microbatch_size=5, autocast=autocast)
    whole, chunked = (
        gradients(engine, replace(policy, head=mode), batch) for mode in (HeadMode.WHOLE, HeadMode.CHUNKED)
    )
    assert chunked.coverage.fallback == ()
    assert torch.allclose(chunked.scores, whole.scores, rtol=1e-2)
    for name, y in whole.ascent.items():
        assert float((chunked.ascent[name] - y).norm()) <= 0.03 * max(float(y.norm()), 1e-2), name


def test_a_model_without_a_head_gives_whole_logits_and_says_so() -> None:
    policy = Policy(EnumerablePolicy(2, 3))
    choice = choose_head(policy, (Rollout("a", (3,), (1, 0), 0.0), Rollout("b", (4,), (0,), 0.0)), chunked=True)
    assert choice.policy.head is HeadMode.WHOLE
    assert "names no output head" in str(choice.reason)


def test_a_model_that_calls_its_head_twice_gives_whole_logits() -> None:
    model = support.tiny_model("llama-untied")
    forward = model.forward

    def twice(**inputs: Any) -> Any:
        output = forward(**inputs)
        model.lm_head(torch.zeros(1, 1, 16))
        return output

    model.forward = twice
    choice = choose_head(Policy(model), ROWS, chunked=True)
    assert choice.policy.head is HeadMode.WHOLE
    assert "2 times" in str(choice.reason)


def test_little_memory_chunks_logits_streams_vectors_and_changes_no_result() -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    batch = support.random_batch(6, 4)
    plain, tight = (probe(model, adam, batch, Settings(memory_bytes=m)).report for m in (1e9, 2e3))
    assert (plain.engine.head, plain.units.storage, plain.engine.microbatch) == ("responses", "stored", 24)
    assert (tight.engine.head, tight.units.storage, tight.engine.microbatch) == ("chunked", "streamed", 1)
    assert tight.first_order.u_cross == pytest.approx(plain.first_order.u_cross, rel=1e-10)
    assert tight.first_order.row_means == pytest.approx(plain.first_order.row_means, rel=1e-9)
    for row, other in zip(tight.realized, plain.realized, strict=True):
        assert row.delta_h == pytest.approx(other.delta_h, rel=1e-9)
    assert "forward" not in vars(model.lm_head)
