"""`run --dtype float64` equals one-response-at-a-time autograd, family by family: 1e-9 first order, 1e-10 realised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import oracle
import support
from entropy_probe import Settings, probe_checkpoint
from entropy_probe.data.rollouts import read_batch, write_rollouts
from entropy_probe.targets.choices import Estimator

ETA = 1e-3


def _check(
    report: Any, model: Any, optimizer: torch.optim.AdamW, kernel: np.ndarray, p: np.ndarray, rollouts: Path
) -> None:
    batch = read_batch(rollouts)
    alone = oracle.one_at_a_time(model, batch)
    xs, ys = oracle.prompt_vectors(alone, batch)
    tilde_x, tilde_y = xs * np.sqrt(p), ys * np.sqrt(p)
    u_cross, r, _ = oracle.double_loop(tilde_x, tilde_y)
    first = report.first_order
    scale = abs(tilde_x @ tilde_y.T).max()
    assert first.u_cross == pytest.approx(u_cross, rel=1e-9)
    assert first.delta_h1 == pytest.approx(-ETA * u_cross, rel=1e-9)
    np.testing.assert_allclose(first.row_means, r, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(kernel, tilde_x @ tilde_y.T, rtol=1e-9, atol=1e-12 * scale)
    assert report.entropy.per_response == pytest.approx(
        -np.mean([s.mean() for s in np.split(alone.scores, 5)]), rel=1e-12
    )

    ascent = ys.mean(axis=0)
    preconditioned, adamw = report.realized
    delta = ETA * p * ascent
    expected, ess = oracle.snis_change(alone.scores, oracle.scores_alone(oracle.moved(model, delta), batch), [3] * 5)
    assert preconditioned.delta_h == pytest.approx(expected, abs=1e-10)
    assert preconditioned.ess == pytest.approx(ess, rel=1e-7)
    assert preconditioned.predicted == pytest.approx(oracle.linear_change(alone, delta, [3] * 5), rel=1e-9)

    clone = oracle.stepped_by_torch(model, optimizer, ascent)
    expected, ess = oracle.snis_change(alone.scores, oracle.scores_alone(clone, batch), [3] * 5)
    assert adamw.delta_h == pytest.approx(expected, abs=1e-10)
    assert adamw.ess == pytest.approx(ess, rel=1e-7)


def _rebind(optimizer: torch.optim.AdamW, model: Any) -> torch.optim.AdamW:
    """The saved state on the reloaded model's parameters, by torch's own load_state_dict."""
    fresh = torch.optim.AdamW(support.hf_groups(model), lr=ETA)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


@pytest.mark.parametrize("name", list(support.CONFIGS))
def test_full_checkpoint_equals_one_at_a_time_autograd(name: str, tmp_path: Path) -> None:
    # Gemma-2's attention softcap needs eager attention there and here; Mixtral's fused experts have no float64 kernel.
    source = support.tiny_model(name)
    optimizer = support.trained_optimizer(source, learning_rate=ETA)
    path = support.save_checkpoint(source, optimizer, tmp_path / "checkpoint-3")
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(support.random_rollouts(5, 3), rollouts)
    result = probe_checkpoint(
        path, rollouts, Settings(dtype=torch.float64, microbatch_size=4, estimator=Estimator.SCORE)
    )

    kernels = {"experts_implementation": "eager"} if name == "mixtral" else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **kernels).to(torch.float64)
    bound = _rebind(optimizer, model)
    assert result.kernel is not None
    _check(result.report, model, bound, result.kernel, oracle.flat_preconditioner(model, bound), rollouts)


def test_lora_checkpoint_equals_one_at_a_time_autograd(tmp_path: Path) -> None:
    from peft import PeftModel

    base = support.tiny_model("llama-tied")
    base.save_pretrained(tmp_path / "base")
    adapted = support.lora_model(base)
    optimizer = support.trained_optimizer(adapted, learning_rate=ETA)
    path = support.save_checkpoint(adapted, optimizer, tmp_path / "checkpoint-3")
    rollouts = tmp_path / "rollouts.jsonl"
    write_rollouts(support.random_rollouts(5, 3), rollouts)
    result = probe_checkpoint(
        path,
        rollouts,
        Settings(dtype=torch.float64, microbatch_size=4, estimator=Estimator.SCORE),
        base=tmp_path / "base",
    )
    assert result.report.checkpoint.kind == "lora"

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).to(torch.float64)
    model = PeftModel.from_pretrained(reloaded, path, is_trainable=True).to(torch.float64)
    bound = _rebind(optimizer, model)
    assert result.kernel is not None
    _check(result.report, model, bound, result.kernel, oracle.flat_preconditioner(model, bound), rollouts)
    assert result.report.checkpoint.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
