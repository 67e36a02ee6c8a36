"""TRL's own loss functions on a stand-in trainer: what they make of log π and H of every token, by autograd in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.rows import LossRows
from loss_rows import flat, padded

MAX_LENGTH, STEPS = 12, 2
"""The constant of dr_grpo, and how many steps a generation batch serves."""


@dataclass(frozen=True)
class TRLCase:
    """One of TRL's configurations: the options that are not its defaults, and the correction for vLLM."""

    name: str
    loss_type: str
    options: dict[str, Any] = field(default_factory=dict)
    correction: Correction | None = None


TOKEN_MASK = Correction(CorrectionMode.TOKEN_MASK, 0.5, 2.0)
SEQUENCE = {"importance_sampling_level": "sequence"}
CASES = [
    TRLCase("grpo", "grpo"),
    TRLCase("bnpo", "bnpo"),
    TRLCase("dr_grpo", "dr_grpo"),
    TRLCase("dapo", "dapo", {"epsilon_high": 0.28}),
    TRLCase("delta", "dapo", {"delta": 1.5}),
    TRLCase("gspo", "grpo", SEQUENCE | {"epsilon_low": 3e-2, "epsilon_high": 4e-2}),
    TRLCase("luspo", "luspo", SEQUENCE),
    TRLCase("luspo-token", "luspo"),
    TRLCase("cispo", "cispo", {"epsilon_high": 1.2}),
    TRLCase("sapo", "sapo"),
    TRLCase("vespo", "vespo"),
    TRLCase("vespo-vllm", "vespo", correction=TOKEN_MASK),
    TRLCase("kl", "grpo", {"beta": 0.04, "use_bias_correction_kl": False}),
    TRLCase("kl-corrected", "dapo", {"beta": 0.04, "use_bias_correction_kl": True}),
    TRLCase("kl-corrected-sequence", "grpo", SEQUENCE | {"beta": 0.04, "use_bias_correction_kl": True}),
    TRLCase("entropy-quantile", "dapo", {"top_entropy_quantile": 0.3}),
    TRLCase("bonus", "grpo", {"entropy_coef": 0.01}),
    TRLCase("bonus-quantile", "dapo", {"entropy_coef": 0.02, "top_entropy_quantile": 0.4}),
    TRLCase("off-policy-mask", "dapo", {"off_policy_mask_threshold": 0.05}),
    *(TRLCase(f"vllm-{mode}", "dapo", correction=Correction(mode, 0.5, 1.6)) for mode in CorrectionMode),
    TRLCase(
        "all",
        "dapo",
        {
            "top_entropy_quantile": 0.5,
            "off_policy_mask_threshold": 0.05,
            "beta": 0.1,
            "use_bias_correction_kl": True,
            "entropy_coef": 0.01,
        },
        Correction(CorrectionMode.SEQUENCE_TRUNCATE, 0.5, 1.6),
    ),
]
BY_NAME = {case.name: case for case in CASES}
DEFAULTS: dict[str, Any] = {
    "beta": 0.0,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "delta": None,
    "use_bias_correction_kl": False,
}
OF_ITS_ARGUMENTS = ("delta", "use_bias_correction_kl")


def trls_gradients(
    case: TRLCase, rows: LossRows, *, accumulation: int = 1, processes: int = 1, items: float | None = None
) -> tuple[Tensor, Tensor]:
    """Minus the gradient of TRL's loss of one micro-batch with respect to log π and H of every token, by its own code.

    Args:
        case: the configuration.
        rows: of the micro-batch.
        accumulation: micro-batches of a step on a process.
        processes: over which gradients are averaged.
        items: tokens of the whole generation batch, of which a step consumes one in ``STEPS``; this micro-batch's by default.
    """
    lengths = rows.lengths
    assert rows.entropies is not None
    assert rows.ref_log_probs is not None
    log_probs, entropies = (
        padded(values, lengths).detach().clone().requires_grad_() for values in (rows.log_probs, rows.entropies)
    )
    inputs = {
        **_tokens(rows),
        "tool_mask": padded(rows.mask, lengths),
        "completion_mask": padded(torch.ones_like(rows.mask), lengths),
        "old_per_token_logps": padded(rows.old, lengths),
        "ref_per_token_logps": padded(rows.ref_log_probs, lengths),
        "num_items_in_batch": STEPS * rows.mask.sum() if items is None else torch.tensor(items, dtype=torch.float64),
    }
    if case.correction is not None or case.options.get("off_policy_mask_threshold") is not None:
        assert rows.sampler_log_probs is not None
        inputs["sampling_per_token_logps"] = padded(rows.sampler_log_probs, lengths)
    if case.correction is not None:
        inputs["importance_sampling_ratio"] = trls_ratio(case.correction, rows)
    trainer = _grpo_trainer(case, accumulation, processes, (log_probs, entropies, None))
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    found = torch.autograd.grad(loss, (log_probs, entropies), allow_unused=True)
    on_log_probs, on_entropies = (
        -flat(torch.zeros_like(log_probs) if g is None else g, lengths) / processes for g in found
    )
    return on_log_probs, on_entropies


def rloo_gradient(rows: LossRows, *, accumulation: int = 1) -> Tensor:
    """The same of RLOOTrainer's loss, by log π; transformers divides it by the accumulation steps."""
    assert rows.entropies is not None
    lengths = rows.lengths
    log_probs = padded(rows.log_probs, lengths).detach().clone().requires_grad_()
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, padded(rows.entropies, lengths), None),
    )
    mask = padded(rows.mask, lengths)
    old = (padded(rows.old, lengths) * mask).sum(1)
    loss = RLOOTrainer._compute_loss(trainer, None, {**_tokens(rows), "completion_mask": mask, "old_logps": old})
    (gradient,) = torch.autograd.grad(loss / accumulation, log_probs)
    return -flat(gradient, lengths)


def trls_ratio(correction: Correction, rows: LossRows) -> Tensor:
    """As GRPOTrainer._generate_and_score_completions computes it before the loss: [N, T], or [N, 1] of whole responses."""
    assert rows.sampler_log_probs is not None
    difference = padded((rows.old - rows.sampler_log_probs) * rows.mask, rows.lengths)
    if correction.mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = torch.exp(difference)
    if correction.mode.endswith("truncate"):
        return torch.clamp(ratio, min=correction.low, max=correction.high)
    return ratio.masked_fill((ratio < correction.low) | (ratio > correction.high), value=0.0)


def _tokens(rows: LossRows) -> dict[str, Tensor]:
    """What every loss is handed."""
    ids = torch.zeros((len(rows.lengths), max(rows.lengths)), dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "advantages": torch.stack([part[0] for part in torch.split(rows.advantages, list(rows.lengths))]),
    }


def _grpo_trainer(case: TRLCase, accumulation: int, processes: int, measured: tuple[Any, ...]) -> SimpleNamespace:
    options = DEFAULTS | case.options
    arguments = SimpleNamespace(
        **{name: options.pop(name) for name in OF_ITS_ARGUMENTS},
        steps_per_generation=STEPS * accumulation,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )
    accelerator = SimpleNamespace(
        num_processes=processes,
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
        use_vllm=case.correction is not None,
        vllm_importance_sampling_correction=case.correction is not None,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=accumulation,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=options["entropy_coef"] != 0.0,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: measured,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    return trainer
