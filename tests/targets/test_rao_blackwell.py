"""The Rao-Blackwell estimator and the entropy per token: unbiased by enumeration, and the engine against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import enumerable
import support
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.data.units import block_units, exact_units
from entropy_probe.gradients import Storage, Wanted, batching, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.language_head import HeadMode
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.targets.base import Ratio, Sample, TokenPair
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.per_token import entropy_ratio
from entropy_probe.targets.rao_blackwell import entropy_to_come
from entropy_probe.targets.registry import ESTIMATORS
from enumerable import EnumerablePolicy
from gradient_pairs import assert_same, both

LIMIT = 3
TARGETS = [EntropyTarget(estimator, unit) for estimator in Estimator for unit in EntropyUnit]


def name_of(target: EntropyTarget) -> str:
    return f"{target.estimator}, {target.unit}"


def true_length(policy: EnumerablePolicy, context: int) -> Tensor:
    scores = enumerable.response_scores(policy, context, LIMIT)
    lengths = torch.tensor([float(len(r)) for r in enumerable.all_responses(policy.tokens, LIMIT)])
    return (scores.exp() * lengths).sum()


Coefficients = Callable[[EntropyTarget, Sample, Ratio | None], TokenPair]


def expected_x(
    policy: EnumerablePolicy,
    context: int,
    target: EntropyTarget,
    ratio: Ratio | None,
    samples: int = 2,
    coefficients: Coefficients = EntropyTarget.coefficients,
) -> Tensor:
    """E[X_n] over every tuple of responses, from token-by-token gradients and the package's coefficients."""
    responses = enumerable.all_responses(policy.tokens, LIMIT)
    scores, _ = enumerable.score_gradients(policy, context, LIMIT)
    terms = enumerable.token_terms(policy, context, LIMIT)
    total = torch.zeros(terms[0].log_prob_gradients.shape[1], dtype=torch.float64)
    for chosen in itertools.product(range(len(responses)), repeat=samples):
        index = list(chosen)
        lengths = [len(responses[i]) for i in index]
        entropies = torch.cat([terms[i].entropies for i in index])
        found = coefficients(target, Sample([samples], lengths, scores[index], entropies), ratio)
        c = found.log_probs
        if len(c) == samples and target.estimator is Estimator.SCORE:
            c = torch.repeat_interleave(c, torch.tensor(lengths))
        x = c @ torch.cat([terms[i].log_prob_gradients for i in index])
        if found.entropies is not None:
            x = x + found.entropies @ torch.cat([terms[i].entropy_gradients for i in index])
        total += scores[index].sum().exp() * x
    return total


def truth_of(policy: EnumerablePolicy, target: EntropyTarget) -> tuple[Tensor, Ratio | None]:
    """Minus the gradient of H, or of H/T̄, of context 0; and the true ratio."""
    entropy = enumerable.exact_entropy(policy, 0, LIMIT)
    if target.unit is EntropyUnit.PER_RESPONSE:
        return -enumerable.flat_gradient(entropy, policy), None
    length = true_length(policy, 0)
    ratio = Ratio(float(entropy.detach() / length.detach()), float(length.detach()))
    return -enumerable.flat_gradient(entropy / length, policy), ratio


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_the_mean_of_x_is_minus_the_gradient_of_its_entropy(target: EntropyTarget, samples: int) -> None:
    policy = EnumerablePolicy(contexts=1, tokens=3 if samples == 2 else 2)
    truth, ratio = truth_of(policy, target)
    found = expected_x(policy, 0, target, ratio, samples)
    assert (found - truth).abs().max() < 1e-14 + 1e-13 * truth.abs().max()


def test_one_response_has_no_baseline_and_no_bias() -> None:
    policy = EnumerablePolicy(contexts=1, tokens=3)
    target = EntropyTarget(Estimator.RAO_BLACKWELL)
    truth, _ = truth_of(policy, target)
    assert (expected_x(policy, 0, target, None, samples=1) - truth).abs().max() < 1e-13


def planted(kind: str) -> Coefficients:
    def coefficients(target: EntropyTarget, sample: Sample, ratio: Ratio | None) -> TokenPair:
        right = target.coefficients(sample, ratio)
        if kind == "no gradient of H_t":
            return TokenPair(right.log_probs)
        if kind == "own response in the baseline":
            assert sample.token_entropies is not None
            lengths = list(sample.lengths)
            to_come = entropy_to_come(sample.token_entropies, lengths)
            padded = torch.nn.utils.rnn.pad_sequence(list(to_come.split(lengths)), batch_first=True).mean(0)
            mean = torch.cat([padded[:length] for length in lengths])
            return TokenPair(-(to_come - mean) / len(lengths), right.entropies)
        assert kind == "no length term"
        assert ratio is not None
        return target.coefficients(sample, Ratio(0.0, ratio.mean_length))

    return coefficients


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("no gradient of H_t", EntropyTarget(Estimator.RAO_BLACKWELL)),
        ("own response in the baseline", EntropyTarget(Estimator.RAO_BLACKWELL)),
        ("no length term", EntropyTarget(Estimator.RAO_BLACKWELL, EntropyUnit.PER_TOKEN)),
        ("no length term", EntropyTarget(Estimator.SCORE, EntropyUnit.PER_TOKEN)),
    ],
)
def test_planted_errors_are_biased(kind: str, target: EntropyTarget) -> None:
    policy = EnumerablePolicy(contexts=1, tokens=3)
    truth, ratio = truth_of(policy, target)
    found = expected_x(policy, 0, target, ratio, coefficients=planted(kind))
    assert (found - truth).abs().max() > 0.05 * truth.abs().max()


def test_the_coefficients_are_those_of_a_loop_over_positions() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths, sizes = [3, 1, 4, 2, 2, 5], [3, 2, 1]
    h = torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    ratio = Ratio(0.3, 2.5)
    target = EntropyTarget(Estimator.RAO_BLACKWELL, EntropyUnit.PER_TOKEN)
    found = target.coefficients(Sample(sizes, lengths, token_entropies=h), ratio)
    rows = [part.tolist() for part in h.split(lengths)]

    def f(row: int, t: int) -> float:
        if t >= lengths[row]:
            return 0.0
        return sum(rows[row][s] - ratio.per_token for s in range(t + 1, lengths[row]))

    expected, scale, first = [], [], 0
    for size in sizes:
        for row in range(first, first + size):
            for t in range(lengths[row]):
                others = [f(other, t) for other in range(first, first + size) if other != row]
                mean = sum(others) / len(others) if others else 0.0
                expected.append(-(f(row, t) - mean) / (size * ratio.mean_length))
                scale.append(-1.0 / (size * ratio.mean_length))
        first += size
    assert found.log_probs.tolist() == pytest.approx(expected, abs=1e-14)
    assert found.entropies is not None
    assert found.entropies.tolist() == pytest.approx(scale, abs=1e-14)


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "mixtral"])
def test_the_engine_agrees_with_the_reference(family: str, target: EntropyTarget, storage: Storage) -> None:
    model = support.tiny_model(family, dtype=torch.float64)
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    assert_same(*both(model, batch, exact_units(5), 7, target, wanted=Wanted(storage)))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_small_microbatches_look_ahead_for_what_their_coefficients_need(target: EntropyTarget, size: int) -> None:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    batch = support.random_batch(5, [3, 2, 4, 3, 3])
    assert_same(*both(model, batch, block_units(5, 2), size, target, wanted=Wanted(Storage.STREAMED)))


@pytest.mark.parametrize("mode", list(HeadMode))
def test_every_head_gives_the_same_rao_blackwell_vectors(mode: HeadMode) -> None:
    model = support.tiny_model("llama-untied", dtype=torch.float64)
    batch = support.random_batch(4, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: torch.ones_like(q) for name, q in model.named_parameters()}
    found, whole = (
        unit_gradients(
            Policy(model, 0.9, 5, head=head),
            batch,
            exact_units(4),
            Sides(EntropyTarget(Estimator.RAO_BLACKWELL), a),
            Geometry.fixed(p),
        )
        for head in (mode, HeadMode.WHOLE)
    )
    assert found.total.kernel is not None
    assert whole.total.kernel is not None
    assert abs(found.total.kernel - whole.total.kernel).max() < 1e-11 * abs(whole.total.kernel).max()
    assert found.token_entropies is not None
    torch.testing.assert_close(found.token_entropies, whole.token_entropies, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_delta_h1_per_token_is_the_derivative_of_the_ratio_along_the_step(estimator: Estimator) -> None:
    """Finite difference of the exact H/T̄ over two contexts along η P Ȳ, Ȳ from the engine, against −η E[X] · P Ȳ.

    The ratio is of means over prompts: −∇(H/T̄) needs h and T̄ of both contexts together.
    """
    policy = EnumerablePolicy(contexts=2, tokens=3, seed=5)
    responses = enumerable.all_responses(3, LIMIT)
    eta = 0.05
    rows = [
        enumerable.row(policy, context, responses[k], float(k % 2))
        for context, picks in enumerate([(0, 3, 7), (1, 2, 9)])
        for k in picks
    ]
    batch = group_rollouts(rows)
    p = {name: 0.5 + torch.rand_like(w) for name, w in policy.named_parameters()}
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    gradients = unit_gradients(Policy(policy), batch, exact_units(2), Sides(EntropyTarget(), a), Geometry.fixed(p, eta))
    deltas = Geometry.fixed(p, eta).step(gradients.ascent)

    def both_means() -> tuple[Tensor, Tensor]:
        entropy = sum(enumerable.exact_entropy(policy, n, LIMIT) for n in range(2)) / 2
        length = sum(true_length(policy, n) for n in range(2)) / 2
        assert isinstance(entropy, Tensor)
        assert isinstance(length, Tensor)
        return entropy.detach(), length.detach()

    def ratio_at(scale: float) -> float:
        with virtual_step(policy, deltas, scale):
            entropy, length = both_means()
            return float(entropy / length)

    finite_difference = (ratio_at(1e-4) - ratio_at(-1e-4)) / 2e-4
    entropy, length = both_means()
    ratio = Ratio(float(entropy / length), float(length))
    target = EntropyTarget(estimator, EntropyUnit.PER_TOKEN)
    x = torch.stack([expected_x(policy, n, target, ratio) for n in range(2)]).mean(0)
    predicted = -float(x @ torch.cat([deltas[name].flatten() for name in p]))
    assert finite_difference == pytest.approx(predicted, rel=1e-6)
    assert abs(predicted) > 1e-5


def test_the_ratio_is_of_means_over_prompts() -> None:
    lengths, sizes = [2, 4, 3], [2, 1]
    scores = torch.tensor([-1.0, -3.0, -6.0], dtype=torch.float64)
    h = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    sample = Sample(sizes, lengths, scores, h)
    by_score = entropy_ratio(ESTIMATORS[Estimator.SCORE].values(sample), lengths, sizes)
    assert by_score == Ratio(4.0 / 3.0, 3.0)
    by_tokens = entropy_ratio(ESTIMATORS[Estimator.RAO_BLACKWELL].values(sample), lengths, sizes)
    assert by_tokens.per_token == pytest.approx((0.5 * (1.0 + 2.0) + 4.0) / 2 / 3.0)


def test_coefficients_a_token_for_rows_of_one_token_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of one-token responses beside longer ones: a coefficient a token must not be taken for one a response."""
    rows = [
        Rollout(f"p{n}", (3 + n,), tuple([4] * length), float(g % 2))
        for n, lengths in enumerate([(1, 1), (1, 1), (6, 5), (4, 7)])
        for g, length in enumerate(lengths)
    ]
    batch = group_rollouts(rows)
    tokens = sum(len(r.response_ids) for r in batch.responses)
    c = torch.randn(tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    monkeypatch.setattr(batching, "STRIP_POSITIONS", 1)
    for size in (2, 4, 8):
        assert_same(*both(support.tiny_model("llama-tied", dtype=torch.float64), batch, exact_units(4), size, c))
