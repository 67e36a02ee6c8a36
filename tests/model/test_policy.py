"""Log-probs at the edges: narrow models, the last token id, a full context, low ESS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import support
from entropy_probe import InputError
from entropy_probe.data.rollouts import Rollout
from entropy_probe.gradients import loss_gradient
from entropy_probe.model.input_limits import check_fits
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Policy
from entropy_probe.statistics.importance_sampling import ImportanceWeights, base_weights, entropy_change


def test_the_smoothed_change_is_the_smoothed_mean_minus_the_entropy_before() -> None:
    rng = np.random.default_rng(3)
    scores = -rng.gamma(2.0, 1.0, size=60)
    after = scores + rng.normal(size=60)
    found = entropy_change(scores, after, [5] * 12)
    assert found.weights.smoothed is not None
    expected = -(found.weights.smoothed @ after) + base_weights([5] * 12) @ scores
    assert found.delta_h_smoothed == pytest.approx(expected, rel=1e-12)
    assert found.delta_h_smoothed != pytest.approx(found.delta_h, rel=1e-6)


def test_ess_is_low_below_the_guides_three_tenths() -> None:
    assert ImportanceWeights(np.full(10, 0.1), 2.9, 0.29, None, None, "", 0.7).is_low
    assert not ImportanceWeights(np.full(10, 0.1), 3.1, 0.31, None, None, "", 0.7).is_low


def test_log_softmax_of_a_bfloat16_model_runs_in_float32() -> None:
    model = support.tiny_model(dtype=torch.bfloat16)
    rows = support.random_rollouts(3, 2)
    found = Policy(model, 0.7, microbatch_size=1).scores(rows)
    model.eval()
    for row, score in zip(rows, found.tolist(), strict=True):
        batch = pad_right([row], torch.device("cpu"))
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0, batch.positions]
        log_probs = torch.log_softmax(logits.float() / 0.7, dim=-1)
        truth = sum(float(log_probs[t, token]) for t, token in enumerate(row.response_ids))
        assert score == pytest.approx(truth, rel=1e-6)


def mixed_lengths(count: int = 60) -> list[Rollout]:
    """Prompts and responses of 1 to 30 tokens, in no order."""
    generator = torch.Generator().manual_seed(8)

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return tuple(torch.randint(3, support.VOCABULARY, (length,), generator=generator).tolist())

    return [Rollout(f"p{n}", ids(31), ids(31), 0.0) for n in range(count)]


def padded_positions(work: Callable[[Policy], object]) -> int:
    """Positions that the forwards of ``work`` compute, with eight responses in each."""
    model, shapes = support.tiny_model(), list[torch.Size]()
    model.register_forward_pre_hook(lambda _, args, more: shapes.append(more["input_ids"].shape), with_kwargs=True)
    work(Policy(model, microbatch_size=8))
    assert sum(shape[0] for shape in shapes) == 60
    return sum(shape.numel() for shape in shapes)


def test_rows_of_similar_length_share_a_forward_so_that_little_is_padded() -> None:
    rows = mixed_lengths()
    needed, by_length = sum(row.length for row in rows), sorted(rows, key=lambda row: row.length)
    assert padded_positions(lambda policy: policy.measure(rows)) < 1.15 * needed
    assert padded_positions(lambda policy: loss_gradient(policy, rows, torch.ones(60))) < 1.15 * needed
    # Planted: rows as they come.
    assert (
        sum(len(rows[k : k + 8]) * max(row.length for row in rows[k : k + 8]) for k in range(0, 60, 8)) > 1.4 * needed
    )
    assert padded_positions(lambda policy: policy.measure(by_length)) < 1.15 * needed


def test_whatever_shares_a_forward_values_come_in_the_order_of_the_rows() -> None:
    rows, model = mixed_lengths(), support.tiny_model(dtype=torch.float64)
    found = Policy(model, 0.7, microbatch_size=8).measure(rows)
    assert found.entropies is not None
    alone = [Policy(model, 0.7).measure([row]) for row in rows]
    np.testing.assert_allclose(found.scores, torch.cat([one.scores for one in alone]), rtol=1e-12)
    entropies = torch.cat([one.entropies for one in alone if one.entropies is not None])
    np.testing.assert_allclose(found.entropies, entropies, rtol=1e-12)
    coefficients = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64)
    of_all = loss_gradient(Policy(model, microbatch_size=8), rows, coefficients)
    of_each = [loss_gradient(Policy(model), [row], coefficients[n : n + 1]) for n, row in enumerate(rows)]
    for name, gradient in of_all.items():
        total = sum(one[name] for one in of_each)
        torch.testing.assert_close(gradient, total, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


def test_no_rows_have_no_values() -> None:
    found = Policy(support.tiny_model()).measure_here([])
    assert found.entropies is not None
    assert found.scores.shape == found.entropies.shape == (0,)


def test_rollouts_may_use_the_last_token_id_and_fill_the_context() -> None:
    batch = support.random_batch(4, 2)
    sequences = [(*r.prompt_ids, *r.response_ids) for r in batch.responses]
    vocabulary, context = 1 + max(map(max, sequences)), max(map(len, sequences))
    check_fits(batch, vocabulary, context)
    check_fits(batch, None, None)
    with pytest.raises(InputError, match="vocabulary"):
        check_fits(batch, vocabulary - 1, context)
    with pytest.raises(InputError, match="context"):
        check_fits(batch, vocabulary, context - 1)
