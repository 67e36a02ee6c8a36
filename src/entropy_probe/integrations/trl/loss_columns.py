"""What of TRL's loss every row of a step says, and how its averages follow from the rows.

Columns are named as TRL's configuration names them; what changes nothing is left out.

What a loss divides by. Let K be the number of micro-batches (values of ``micro_batch``, over all processes), R_k the rows of
micro-batch k and m_it what of a row is in the loss: 1 at response tokens, 0 where ``sampled`` or ``loss_mask`` leaves them out.
Rows with m = 0 throughout are rows: they count in R_k and in the number of rows. A token's weight in the mean is, for

- grpo, sapo: 1 / (K R_k max(1, Σ_t m_it)), which is one over the number of rows where micro-batches are alike;
- bnpo: 1 / (K max(1, Σ_{i in k} Σ_t m_it));
- dr_grpo: 1 / (K R_k L), L of ``max_completion_length``;
- luspo: 1 / (K R_k);
- dapo, cispo, vespo: 1 / ``window_tokens``. That is what TRL divides by: Σ m over the whole generation batch, on all processes,
  times the window's share of it (micro-batches of a window / ``steps_per_generation``). It is Σ m over the rows themselves
  only where a generation batch serves one step;
- rloo: 1 / (K R_k) times the loss of the whole response, which has one ratio; RLOOTrainer's KL term is in its reward, so that
  it is in ``advantage`` and in no column of the loss;
- the entropy bonus, with each of them: 1 / (K max(1, Σ_{i in k} Σ_t m_it e_it)), e the mask of ``top_entropy_quantile``.

Read in TRL 1.10 to 1.16, GRPOTrainer._compute_loss and RLOOTrainer._compute_loss.
"""

from __future__ import annotations

from typing import Any

import trl

from entropy_probe.compat.trl import adds_entropy_bonus

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
"""Of the GRPOTrainer."""
DIVIDE_BY_THE_WINDOW = ("dapo", "cispo", "vespo")
"""Losses whose divisor is the token count of a generation batch."""
CONSTANTS = {
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
"""Numbers of its configuration that a loss is made with."""
RLOO = "rloo"


def is_grpo(trainer: Any) -> bool:
    """Whether a trainer is a GRPOTrainer, and no RLOOTrainer."""
    return isinstance(trainer, trl.GRPOTrainer)


def loss_type_of(trainer: Any) -> str:
    """TRL's name of a trainer's loss; RLOOTrainer has one."""
    return str(trainer.loss_type) if is_grpo(trainer) else RLOO


def corrects_for_vllm(trainer: Any) -> bool:
    """Whether the loss weights tokens by the policy's probability over vLLM's."""
    return bool(is_grpo(trainer) and trainer.use_vllm and trainer.vllm_importance_sampling_correction)


def reads_the_sampler(trainer: Any) -> bool:
    """Whether the loss is a function of the sampler's log-probs."""
    return corrects_for_vllm(trainer) or (is_grpo(trainer) and trainer.off_policy_mask_threshold is not None)


def loss_columns(trainer: Any, ratios: bool, entropy_coefficient: float) -> dict[str, Any]:
    """What every row of a step says of the loss, beside ``loss_type``.

    Args:
        trainer: with TRL's own loss.
        ratios: the batch has old log-probs; without them every ratio is 1, and what bounds it changes nothing.
        entropy_coefficient: λ of this step.
    """
    args = trainer.args
    bounds = {"epsilon_low": float(trainer.epsilon_low), "epsilon_high": float(trainer.epsilon_high)}
    if not is_grpo(trainer):
        return bounds if ratios else {}
    columns: dict[str, Any] = {}
    if trainer.loss_type == "cispo":
        columns["epsilon_high"] = bounds["epsilon_high"]  # it caps a ratio of 1 too
    elif ratios and trainer.loss_type not in ("sapo", "vespo"):
        columns |= bounds
    if args.delta is not None:
        columns["delta"] = float(args.delta)
    if trainer.importance_sampling_level != "token":
        columns["importance_sampling_level"] = trainer.importance_sampling_level
    columns |= {name: float(getattr(args, name)) for name in CONSTANTS.get(trainer.loss_type, ())}
    if trainer.beta != 0.0:
        columns |= {
            "beta": float(trainer.beta),
            "kl_estimator": "k3",
            "use_bias_correction_kl": bool(args.use_bias_correction_kl),
        }
    if adds_entropy_bonus(trainer):
        columns["entropy_coef"] = entropy_coefficient
    if trainer.top_entropy_quantile < 1.0:
        columns["top_entropy_quantile"] = float(trainer.top_entropy_quantile)
    if trainer.off_policy_mask_threshold is not None:
        columns["off_policy_mask_threshold"] = float(trainer.off_policy_mask_threshold)
    if corrects_for_vllm(trainer):
        low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
        columns |= {
            "importance_sampling_mode": trainer.vllm_importance_sampling_mode,
            # Without any bound 0 is one, below which no ratio is: rows that name none are taken to have TRL's default.
            "importance_sampling_clip_min": 0.0 if low is None and high is None else low,
            "importance_sampling_clip_max": high,
        }
    return columns
