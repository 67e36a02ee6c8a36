"""Log-probs at the edges: narrow models, the last token id, a full context, low ESS."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import support
from entropy_probe import InputError
from entropy_probe.importance_sampling import ImportanceWeights, base_weights, entropy_change
from entropy_probe.policy import Policy, check_fits, pad_right


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
