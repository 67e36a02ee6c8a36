"""Every objective's token weights against autograd through TRL's own loss functions, in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from entropy_probe.losses.cispo import CISPO
from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.kl import KLTerm
from entropy_probe.losses.objective import EntropyBonus, Objective, TokenWeights
from entropy_probe.losses.ppo_clip import PPOClip
from entropy_probe.losses.rloo import RLOO
from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.sapo import SAPO
from entropy_probe.losses.token_loss import RatioLevel
from entropy_probe.losses.vespo import VESPO
from loss_rows import LENGTHS, WIDTH, flat, padded, rows_of

MAX_LENGTH, STEPS = 12, 2
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """One of TRL's configurations, and ours."""

    name: str
    loss_type: str
    objective: Objective
    options: dict[str, Any] = field(default_factory=dict)
    vllm: bool = False


TOKEN_MASK = Correction(CorrectionMode.TOKEN_MASK, 0.5, 2.0)
CASES = [
    Case("grpo", "grpo", Objective(PPOClip())),
    Case("bnpo", "bnpo", Objective(PPOClip())),
    Case("dr_grpo", "dr_grpo", Objective(PPOClip())),
    Case("dapo", "dapo", Objective(PPOClip(0.2, 0.28)), {"epsilon_high": 0.28}),
    Case("delta", "dapo", Objective(PPOClip(delta=1.5)), {"delta": 1.5}),
    Case(
        "gspo",
        "grpo",
        Objective(PPOClip(3e-2, 4e-2, level=RatioLevel.SEQUENCE)),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-2, "epsilon_high": 4e-2},
    ),
    Case(
        "luspo",
        "luspo",
        Objective(PPOClip(level=RatioLevel.SEQUENCE)),
        {"importance_sampling_level": "sequence"},
    ),
    Case("luspo-token", "luspo", Objective(PPOClip())),
    Case("cispo", "cispo", Objective(CISPO(1.2)), {"epsilon_high": 1.2}),
    Case("sapo", "sapo", Objective(SAPO())),
    Case("vespo", "vespo", Objective(VESPO())),
    Case("vespo-vllm", "vespo", Objective(VESPO(correction=TOKEN_MASK)), vllm=True),
    Case("kl", "grpo", Objective(PPOClip(), kl=KLTerm(0.04)), {"beta": 0.04, "use_bias_correction_kl": False}),
    Case(
        "kl-corrected",
        "dapo",
        Objective(PPOClip(), kl=KLTerm(0.04, bias_correction=True)),
        {"beta": 0.04, "use_bias_correction_kl": True},
    ),
    Case(
        "kl-corrected-sequence",
        "grpo",
        Objective(PPOClip(level=RatioLevel.SEQUENCE), kl=KLTerm(0.04, bias_correction=True, level=RatioLevel.SEQUENCE)),
        {"beta": 0.04, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
    ),
    Case("entropy-quantile", "dapo", Objective(PPOClip(), top_entropy_quantile=0.3), {"top_entropy_quantile": 0.3}),
    Case("bonus", "grpo", Objective(PPOClip(), bonus=EntropyBonus(0.01)), {"entropy_coef": 0.01}),
    Case(
        "bonus-quantile",
        "dapo",
        Objective(PPOClip(), top_entropy_quantile=0.4, bonus=EntropyBonus(0.02)),
        {"entropy_coef": 0.02, "top_entropy_quantile": 0.4},
    ),
    Case(
        "off-policy-mask",
        "dapo",
        Objective(PPOClip(), off_policy_threshold=0.05),
        {"off_policy_mask_threshold": 0.05},
    ),
    *(
        Case(f"vllm-{mode}", "dapo", Objective(PPOClip(), correction=Correction(mode, 0.5, 1.6)), vllm=True)
        for mode in CorrectionMode
    ),
    Case(
        "all",
        "dapo",
        Objective(
            PPOClip(),
            correction=Correction(CorrectionMode.SEQUENCE_TRUNCATE, 0.5, 1.6),
            top_entropy_quantile=0.5,
            off_policy_threshold=0.05,
            kl=KLTerm(0.1, bias_correction=True),
            bonus=EntropyBonus(0.01),
        ),
        {
            "top_entropy_quantile": 0.5,
            "off_policy_mask_threshold": 0.05,
            "beta": 0.1,
            "use_bias_correction_kl": True,
            "entropy_coef": 0.01,
        },
        vllm=True,
    ),
]


def trls_gradients(case: Case, rows: LossRows) -> tuple[Tensor, Tensor]:
    """Minus the gradient of TRL's loss with respect to log π and H of every token, by its own code."""
    log_probs, entropies = (
        values.detach().clone().requires_grad_() for values in (padded(rows.log_probs), padded(rows.entropies))
    )
    ids = torch.zeros((len(LENGTHS), WIDTH), dtype=torch.long)
    completion = padded(torch.ones(sum(LENGTHS), dtype=torch.float64))
    options: dict[str, Any] = {
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "entropy_coef": 0.0,
        "delta": None,
        "use_bias_correction_kl": False,
    } | case.options
    arguments = SimpleNamespace(
        delta=options.pop("delta"),
        use_bias_correction_kl=options.pop("use_bias_correction_kl"),
        steps_per_generation=STEPS,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=False,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    trainer = SimpleNamespace(
        **options,
        args=arguments,
        accelerator=accelerator,
        loss_type=case.loss_type,
        use_vllm=case.vllm,
        vllm_importance_sampling_correction=case.vllm,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=options["entropy_coef"] != 0.0,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": completion,
        "tool_mask": padded(rows.mask),
        "advantages": torch.stack([part[0] for part in torch.split(rows.advantages, list(LENGTHS))]),
        "old_per_token_logps": padded(rows.old),
        "ref_per_token_logps": padded(rows.ref_log_probs),
        # A window of one step: the whole generation batch has as many times the tokens as steps.
        "num_items_in_batch": STEPS * rows.mask.sum(),
    }
    if not case.vllm and case.options.get("off_policy_mask_threshold") is not None:
        inputs["sampling_per_token_logps"] = padded(rows.sampler_log_probs)
    if case.vllm:
        inputs["sampling_per_token_logps"] = padded(rows.sampler_log_probs)
        inputs["importance_sampling_ratio"] = trls_ratio(case, rows)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    found = torch.autograd.grad(loss, (log_probs, entropies), allow_unused=True)
    return tuple(-flat(torch.zeros_like(log_probs) if g is None else g) for g in found)  # type: ignore[return-value]


def trls_ratio(case: Case, rows: LossRows) -> Tensor:
    """As GRPOTrainer._generate_and_score_completions computes it before the loss: [N, T], or [N, 1] of whole responses."""
    correction = case.objective.correction or TOKEN_MASK
    difference = padded((rows.old - rows.sampler_log_probs) * rows.mask)
    if correction.mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = torch.exp(difference)
    if correction.mode.endswith("truncate"):
        return torch.clamp(ratio, min=correction.low, max=correction.high)
    return ratio.masked_fill((ratio < correction.low) | (ratio > correction.high), value=0.0)


def average_of(loss_type: str, rows: LossRows) -> Tensor:
    """The weight of a token in TRL's mean: one accumulation step, one micro-batch."""
    if loss_type in ("grpo", "sapo"):
        return rows.at_tokens(1.0 / (rows.counts * len(LENGTHS)))
    if loss_type == "dr_grpo":
        return torch.full_like(rows.log_probs, 1.0 / (len(LENGTHS) * MAX_LENGTH))
    if loss_type == "luspo":
        return torch.full_like(rows.log_probs, 1.0 / len(LENGTHS))
    return torch.full_like(rows.log_probs, 1.0 / float(rows.mask.sum()))


def ours(case: Case, rows: LossRows) -> TokenWeights:
    return case.objective.token_weights(rows, average_of(case.loss_type, rows))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_token_weights_are_those_of_trls_own_loss(case: Case, seed: int) -> None:
    rows = rows_of(seed)
    on_log_probs, on_entropies = trls_gradients(case, rows)
    found = ours(case, rows)
    scale = float(on_log_probs.abs().max())
    assert scale > 0
    assert float((found.on_log_probs - on_log_probs).abs().max()) <= TOLERANCE * scale
    if found.bonus is None:
        assert not on_entropies.any()
    else:
        assert float((found.bonus - on_entropies).abs().max()) <= TOLERANCE * float(on_entropies.abs().max())


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("vespo", "luspo")], ids=lambda case: case.name)
def test_the_comparison_sees_a_loss_without_its_clip_or_its_term(case: Case) -> None:
    """A plain ratio in place of each objective's own formula is told apart from TRL's."""
    rows = rows_of(0)
    plain = replace(case, objective=Objective(PPOClip(1e9, 1e9)))
    on_log_probs, on_entropies = trls_gradients(case, rows)
    found = ours(plain, rows)
    gap = (found.on_log_probs - on_log_probs).abs().max() + on_entropies.abs().max()
    assert float(gap) > 1e-3 * float(on_log_probs.abs().max())


@pytest.mark.parametrize("seed", [0, 1])
def test_rloo_is_trls(seed: int) -> None:
    rows = rows_of(seed, spread=0.15, masked=False)
    log_probs = padded(rows.log_probs).requires_grad_()
    ids = torch.zeros((len(LENGTHS), WIDTH), dtype=torch.long)
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, padded(rows.entropies), None),
    )
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": padded(rows.mask),
        "advantages": torch.stack([part[0] for part in torch.split(rows.advantages, list(LENGTHS))]),
        "old_logps": padded(rows.old).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    found = Objective(RLOO()).token_weights(rows, average_of("grpo", rows)).reward
    assert float((found + flat(gradient)).abs().max()) <= TOLERANCE * float(gradient.abs().max())
