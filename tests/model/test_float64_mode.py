"""Float64 means float64 throughout: kernels and batching agree to rounding, which the casts in model code would prevent."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import support
from entropy_probe.model.float64_mode import Float64Mode
from entropy_probe.model.policy import Policy


def test_every_request_for_float32_is_answered_in_float64() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with Float64Mode():
        assert x.float().dtype == torch.float64
        assert x.to(torch.float32).dtype == torch.float64
        assert x.to(dtype=torch.float32).dtype == torch.float64
        assert torch.softmax(x, dim=0, dtype=torch.float32).dtype == torch.float64
        assert torch.arange(3).float().dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
        assert x.long().dtype == torch.int64
    assert x.float().dtype == torch.float32


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma2", "phi", "gpt2", "opt"])
def test_eager_and_sdpa_alone_and_batched_agree_to_1e_12(name: str) -> None:
    rows = support.random_rollouts(4, 3)
    found = []
    # Gemma-2's softcap has no SDPA form.
    for attention in ("eager",) if name == "gemma2" else ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_config(
            support.CONFIGS[name](), dtype=torch.float64, attn_implementation=attention
        )
        model.load_state_dict(support.tiny_model(name, dtype=torch.float64).state_dict())
        found.append(Policy(model, microbatch_size=12).scores(rows))
        found.append(torch.cat([Policy(model).scores([row]) for row in rows]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


def test_without_the_mode_the_casts_are_there() -> None:
    """Planted: float64 weights alone leave float32 noise of 1e-8 and more in S."""
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    rows = support.random_rollouts(4, 3)
    with torch.no_grad():
        model.eval()
        plain = Policy(model).forward_scores(rows)
    truth = Policy(model).scores(rows)
    assert plain.dtype == torch.float64
    assert 1e-9 < float((plain - truth).abs().max()) < 1e-4
