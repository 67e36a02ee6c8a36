"""Entropies of the next-token distribution: values and gradients beside a spelled-out truth, under every head."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import support
from entropy_probe.data.rollouts import Rollout
from entropy_probe.gradients.capture.checkpointing import checkpointing
from entropy_probe.gradients.capture.layers import RULES
from entropy_probe.gradients.capture.modules import parameter_owners, treated
from entropy_probe.gradients.capture.sequences import Mixing, Strip, padded_length
from entropy_probe.gradients.capture.uses import Capture, leaked
from entropy_probe.gradients.treatments import prove_rules
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.model import language_head
from entropy_probe.model.float64_mode import Float64Mode
from entropy_probe.model.head_choice import choose_head
from entropy_probe.model.language_head import Deltas, HeadMode, chunked_values, log_probs_and_entropies
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Policy

V, D = 11, 6
TAU = 0.7


def naive(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p_y and −Σ p log p, by autograd's own operations; logits must be finite."""
    p = torch.exp(logits / temperature) / torch.exp(logits / temperature).sum(-1, keepdim=True)
    return p.gather(-1, targets[..., None])[..., 0].log(), -(p * p.log()).sum(-1)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = V) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two positions of three rows in a chunk, so that five make several and a rest; of the small models, three of one row."""
    monkeypatch.setattr(language_head, "CHUNK_VALUES", 7 * V)


CASES = list(itertools.product([True, False], [True, False], [1.0, TAU]))
EACH_CASE = pytest.mark.parametrize(("frozen", "with_bias", "temperature"), CASES)


def head_inputs(frozen: bool, with_bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states [3, 5, D], a weight and maybe a bias; the head's require gradients where it is not frozen."""
    hidden = draw(3, 5, D, seed=1).to(dtype).requires_grad_()
    weight = draw(V, D, seed=2).to(dtype).requires_grad_(not frozen)
    bias = draw(V, seed=3).to(dtype).requires_grad_(not frozen)
    return (hidden, weight, bias) if with_bias else (hidden, weight)


def chunked(inputs: tuple[Tensor, ...], targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    hidden, weight, *bias = inputs
    log_probs, entropies = chunked_values(hidden, weight, bias[0] if bias else None, targets, temperature, True)
    assert entropies is not None
    return log_probs, entropies


def spelled_out(inputs: tuple[Tensor, ...], targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    hidden, weight, *bias = inputs
    return naive(nn.functional.linear(hidden, weight, *bias), targets, temperature)


Values = Callable[[tuple[Tensor, ...], Tensor, float], tuple[Tensor, Tensor]]


def weighted_gradients(values: Values, inputs: tuple[Tensor, ...], targets: Tensor, temperature: float) -> list[Tensor]:
    """Of Σ w log π, of Σ w' H, and of both together, by all inputs that require gradients; then the values."""
    outputs = values(inputs, targets, temperature)
    weights = [draw(*targets.shape, seed=seed).to(outputs[0]) for seed in (4, 5)]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found: list[Tensor] = []
    for chosen in ((0,), (1,), (0, 1)):
        loss = [outputs[k] for k in chosen], wanted, [weights[k] for k in chosen]
        found.extend(torch.autograd.grad(*loss, retain_graph=True))
    return [*found, *(output.detach() for output in outputs)]


@EACH_CASE
def test_the_chunked_gradients_pass_gradcheck(frozen: bool, with_bias: bool, temperature: float) -> None:
    targets = tokens(3, 5)
    assert torch.autograd.gradcheck(
        lambda *inputs: chunked(inputs, targets, temperature), head_inputs(frozen, with_bias)
    )


@pytest.mark.parametrize("temperature", [1.0, TAU])
def test_the_gradients_from_whole_logits_pass_gradcheck(temperature: float) -> None:
    logits = draw(7, V).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: log_probs_and_entropies(z, tokens(7), temperature), logits)


@EACH_CASE
def test_chunks_give_the_spelled_out_values_and_gradients(frozen: bool, with_bias: bool, temperature: float) -> None:
    inputs, targets = head_inputs(frozen, with_bias), tokens(3, 5)

    def whole(inputs: tuple[Tensor, ...], targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        hidden, weight, *bias = inputs
        logits = nn.functional.linear(hidden, weight, *bias).flatten(0, 1)
        log_probs, entropies = log_probs_and_entropies(logits, targets.flatten(), temperature)
        return log_probs.view(targets.shape), entropies.view(targets.shape)

    expected = weighted_gradients(spelled_out, inputs, targets, temperature)
    for values in (chunked, whole):
        for found, truth in zip(weighted_gradients(values, inputs, targets, temperature), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@EACH_CASE
def test_float32_is_right_to_its_rounding(frozen: bool, with_bias: bool, temperature: float) -> None:
    targets = tokens(3, 5)
    exact = tuple(t.detach().float().double().requires_grad_(t.requires_grad) for t in head_inputs(frozen, with_bias))
    narrow = tuple(t.detach().float().requires_grad_(t.requires_grad) for t in exact)
    expected = weighted_gradients(spelled_out, exact, targets, temperature)
    for found, truth in zip(weighted_gradients(chunked, narrow, targets, temperature), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0, 300.0])
def test_entropies_of_a_large_vocabulary_in_float32(scale: float) -> None:
    """From uniform, ln V, to one token that has everything."""
    logits = draw(4, 50_000, scale=scale).float()
    targets = tokens(4, vocabulary=50_000)
    wide = logits.double()
    log_p = torch.log_softmax(wide, -1)
    truth = torch.special.entr(log_p.exp()).sum(-1)
    logits.requires_grad_()
    entropies = log_probs_and_entropies(logits, targets, 1.0)[1]
    (gradient,) = torch.autograd.grad(entropies.sum(), logits)
    torch.testing.assert_close(entropies.double(), truth, rtol=3e-6, atol=1e-5)
    exact = -torch.where(log_p.exp() == 0, 0.0, log_p.exp() * (log_p + truth[:, None]))
    assert float((gradient.double() - exact).norm()) <= 1e-5 * max(float(exact.norm()), 1.0)
    assert float(entropies.detach().min()) >= 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("frozen", [True, False])
def test_masked_logits_have_no_part_in_entropies_or_gradients(frozen: bool, dtype: torch.dtype) -> None:
    """Tokens whose logit is −∞ by the head's bias: as if the vocabulary were without them, with steep weights too."""
    masked = [2, 5, 10]
    kept = [v for v in range(V) if v not in masked]
    hidden, weight, bias = head_inputs(frozen, True, dtype)
    with torch.no_grad():
        bias[masked] = -torch.inf
    places = tokens(3, 5, vocabulary=len(kept))
    small = tuple(t.detach()[kept].double().requires_grad_(not frozen) for t in (weight, bias))
    expected = weighted_gradients(spelled_out, (hidden.detach().double().requires_grad_(), *small), places, TAU)
    found = weighted_gradients(chunked, (hidden, weight, bias), torch.tensor(kept)[places], TAU)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, truth in zip(found, expected, strict=True):
        if one.shape != truth.shape:
            assert not one[masked].any()
            one = one[kept]
        torch.testing.assert_close(one.double(), truth, rtol=tolerance, atol=tolerance)
    logits = nn.functional.linear(hidden, weight, bias).detach().flatten(0, 1).requires_grad_()
    log_probs, entropies = log_probs_and_entropies(logits, torch.full((15,), masked[0]), TAU)
    assert bool((log_probs == -torch.inf).all()), "a target without probability is still seen as one"
    (gradient,) = torch.autograd.grad(1e30 * entropies.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert not gradient[:, masked].any()


def test_what_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without entropies no entropy and one unit gradient; with them, a loss of log-probs alone never meets their formula."""
    inputs, targets = head_inputs(False, True), tokens(3, 5)
    hidden, weight, bias = inputs
    seen: list[Deltas] = []
    right = language_head.logit_gradient

    def spied(logits: Tensor, targets: Tensor, deltas: Deltas, temperature: float) -> Tensor:
        seen.append(deltas)
        return right(logits, targets, deltas, temperature)

    monkeypatch.setattr(language_head, "logit_gradient", spied)
    log_probs, _ = chunked(inputs, targets, TAU)
    log_probs.sum().backward()
    assert len(seen) == 3
    assert all(deltas.entropy is None for deltas in seen)
    monkeypatch.setattr(language_head, "entropy_of", lambda log_p: pytest.fail("an entropy that nobody asked for"))
    seen.clear()
    plain, none = chunked_values(hidden, weight.detach(), bias.detach(), targets, TAU, False)
    assert none is None
    assert torch.equal(plain, log_probs)
    assert len(seen) == 3
    plain.sum().backward()
    assert len(seen) == 3


class Widest(TorchDispatchMode):
    """The most elements of any tensor with a vocabulary as its last dimension that an operation gave."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dim() > 1 and found.shape[-1] == self.vocabulary:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("frozen", [True, False])
def test_no_more_than_a_chunk_of_anything_as_wide_as_the_vocabulary(frozen: bool) -> None:
    inputs, targets = head_inputs(frozen, True), tokens(3, 5)
    with Widest(V) as widest:
        weighted_gradients(chunked, inputs, targets, TAU)
    assert 0 < widest.elements <= 7 * V


def models() -> dict[str, Any]:
    made = {
        name: support.tiny_model(name, dtype=torch.float64) for name in ("llama-tied", "llama-untied", "phi", "gpt2")
    }
    return {**made, "frozen head": support.lora_model(support.tiny_model("llama-untied", dtype=torch.float64)).double()}


ROWS = support.random_batch(4, [2, 3, 2, 2]).responses


def alone(model: nn.Module, row: Rollout, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """log π, H and ∇ Σ_t (w_t log π_t + w'_t H_t) of one unpadded response, with nothing of the package's policy."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    with Float64Mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    log_probs, entropies = naive(logits[len(row.prompt_ids) - 1 : -1], torch.tensor(row.response_ids), TAU)
    loss = (weights[0] * log_probs + weights[1] * entropies).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return log_probs.detach(), entropies.detach(), whole


def token_weights() -> list[tuple[Tensor, Tensor]]:
    """w and w' of every row's response tokens."""
    return [
        (draw(len(row.response_ids), seed=2 * i), draw(len(row.response_ids), seed=2 * i + 1))
        for i, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("mode", list(HeadMode))
@pytest.mark.parametrize("name", list(models()))
def test_every_head_measures_what_one_response_alone_gives(name: str, mode: HeadMode) -> None:
    model = models()[name]
    truth = [alone(model, row, weights) for row, weights in zip(ROWS, token_weights(), strict=True)]
    policy = Policy(model, TAU, microbatch_size=4, head=mode)
    measured = policy.measure(ROWS)
    expected = torch.stack([t[0].sum() for t in truth])
    torch.testing.assert_close(measured.scores, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(measured.entropies, torch.cat([t[1] for t in truth]), rtol=1e-11, atol=1e-11)
    assert torch.equal(measured.scores, policy.scores(ROWS))
    batch = pad_right(ROWS, policy.device)
    weights = [torch.cat(column) for column in zip(*token_weights(), strict=True)]
    parameters = list(policy.trainable().values())
    with policy.arithmetic(), torch.enable_grad():
        values = policy.token_values(batch, entropies=True)
        outputs = [values.log_probs, values.entropies]
        gradients = torch.autograd.grad(outputs, parameters, weights, allow_unused=True)
        assert policy.token_values(batch, entropies=False).entropies is None
        assert torch.equal(policy.token_log_probs(batch), values.log_probs)
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        expected = torch.stack([t[2][i] for t in truth]).sum(0)
        found = torch.zeros_like(parameter) if gradient is None else gradient
        assert float((found - expected).norm()) <= 1e-10 * max(1.0, float(expected.norm()))


def captured(policy: Policy, weights: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """∇ Σ_t (w_t log π_t + w'_t H_t) of every row, [rows, elements] by name: one forward and one backward under the rules."""
    parameters = policy.trainable()
    treatments = prove_rules(policy, support.random_batch(4, [2, 3, 2, 2])).treatments
    strip = Strip(tuple(range(len(ROWS))), padded_length([row.length for row in ROWS]))
    padded = pad_right(ROWS, policy.device, strip.length)
    anchor = torch.zeros((), requires_grad=True)
    capture = Capture(parameters, RULES, anchor, float64=True)
    shapes = {name: p.shape for name, p in parameters.items()}
    vectors = UnitVectors(shapes, len(ROWS), torch.float64, policy.device, channels=1)
    vectors.open(strip.units)
    strip.mix(Mixing(torch.ones((1, len(ROWS)), dtype=torch.float64), slice(0, 1)))
    with ExitStack() as stack:
        for mode in (policy.arithmetic(), torch.enable_grad(), capture):
            stack.enter_context(mode)
        stack.enter_context(treated(capture, parameter_owners(policy.model, parameters), treatments))
        stack.enter_context(checkpointing(policy.model, capture.modes))
        with capture.over(strip):
            values = policy.token_values(padded, entropies=True)
        assert values.entropies is not None
        outputs = [values.log_probs, values.entropies]
        assert leaked(outputs, parameters) == []
        leaves = capture.take_leaves()
        wanted = [anchor, *(leaf for _, leaf, _ in leaves)]
        with capture.into(vectors):
            deltas = [torch.cat(column) for column in zip(*weights, strict=True)]
            found = torch.autograd.grad(outputs, wanted, deltas, allow_unused=True)
            for (name, _, of), gradient in zip(leaves, found[1:], strict=True):
                if gradient is not None:
                    vectors.add(name, gradient, of)
    vectors.settle(strip.units)
    return {name: vectors.of(name, strip.units)[:, 0] for name in parameters}


def assert_captured(name: str, mode: HeadMode) -> None:
    model = models()[name]
    found = captured(Policy(model, TAU, head=mode), token_weights())
    for i, (row, weights) in enumerate(zip(ROWS, token_weights(), strict=True)):
        expected = alone(model, row, weights)[2]
        whole = float(torch.cat([g.flatten() for g in expected]).norm())
        for (parameter, vectors), gradient in zip(found.items(), expected, strict=True):
            assert float((vectors[i] - gradient.flatten()).norm()) <= 1e-10 * whole, (parameter, i)


@pytest.mark.parametrize("mode", list(HeadMode))
@pytest.mark.parametrize("name", list(models()))
def test_captured_rules_give_each_sequence_its_own_gradient_of_both(name: str, mode: HeadMode) -> None:
    assert_captured(name, mode)


def without_entropy(logits: Tensor, targets: Tensor, deltas: Deltas, temperature: float) -> Tensor:
    """Planted: ∂H/∂z = −p log p / τ, without the H beside log p."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    gradient = torch.zeros_like(p)
    if deltas.entropy is not None:
        gradient -= deltas.entropy[..., None] * p * log_p / temperature
    if deltas.log_prob is not None:
        one_hot = nn.functional.one_hot(targets, p.shape[-1])
        gradient += deltas.log_prob[..., None] * (one_hot - p) / temperature
    return gradient


@pytest.mark.parametrize("mode", list(HeadMode))
@pytest.mark.parametrize("name", ["llama-tied", "frozen head"])
def test_planted_an_entropy_gradient_without_its_entropy_fails(
    name: str, mode: HeadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_head, "logit_gradient", without_entropy)
    with pytest.raises(AssertionError):
        assert_captured(name, mode)


def test_a_captured_head_keeps_no_unit_gradients_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(models()["llama-untied"], TAU, head=HeadMode.CHUNKED)
    rules = prove_rules(policy, support.random_batch(4, [2, 3, 2, 2]))
    assert rules.unproven == frozenset()
    parameters = policy.trainable()
    capture = Capture(parameters, RULES, torch.zeros((), requires_grad=True), float64=True)
    strip = Strip(tuple(range(len(ROWS))), padded_length([row.length for row in ROWS]))
    monkeypatch.setattr(language_head, "logit_gradient", lambda *_: pytest.fail("a gradient in the forward"))
    with policy.arithmetic(), torch.enable_grad(), capture, capture.over(strip):
        policy.token_values(pad_right(ROWS, policy.device, strip.length), entropies=True)


def test_chunks_whose_entropies_differ_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(support.tiny_model("llama-untied"), TAU)
    rows = (Rollout("a", (3,), (4, 5, 6), 0.0), Rollout("b", (7, 8), (9,), 0.0))
    assert choose_head(policy, rows, chunked=True).policy.head is HeadMode.CHUNKED
    right = language_head.entropy_of
    # Chunks alone: whole logits are [tokens, V], chunks [n, r, V].
    monkeypatch.setattr(language_head, "entropy_of", lambda p: right(p) * (1.01 if p.dim() == 3 else 1.0))
    assert choose_head(policy, rows, chunked=True).policy.head is HeadMode.RESPONSES


def test_low_precision_heads_agree_on_entropies() -> None:
    for dtype, autocast in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        policy = Policy(support.tiny_model("phi", dtype=dtype, std=0.1), TAU, microbatch_size=4, autocast=autocast)
        whole, parts = (replace(policy, head=mode).measure(ROWS) for mode in (HeadMode.WHOLE, HeadMode.CHUNKED))
        torch.testing.assert_close(parts.entropies, whole.entropies, rtol=1e-2, atol=1e-2)
        assert parts.entropies.dtype == torch.float64
