"""What each trainer's loss is by default. docs/trainers.md names the version and the file of each value.

Rows carry a loss only where the caller passes one; these are passed like any other, or with what a run's settings change
(``dataclasses.replace``).
"""

from __future__ import annotations

from entropy_probe.integrations.rows.loss import TrainersLoss
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.length_weights import LossAggregation
from entropy_probe.losses.named import LossName

VERL_DEFAULTS = TrainersLoss(
    LossName.PPO, LossAggregation.TOKEN_MEAN, epsilon_low=0.2, epsilon_high=0.2, clip_ratio_c=3.0
)
"""verl 0.9: ``vanilla``, with dual clip; no KL term, no bonus, no correction for the sampler."""

OPENRLHF_DEFAULTS = TrainersLoss(LossName.PPO_CLIP, LossAggregation.TOKEN_MEAN, epsilon_low=0.2, epsilon_high=0.2)
"""OpenRLHF 0.11: PPO's clip; its KL term (k1, 0.01) is in the reward."""

SKYRL_DEFAULTS = TrainersLoss(
    LossName.PPO_CLIP,
    LossAggregation.TOKEN_MEAN,
    epsilon_low=0.2,
    epsilon_high=0.2,
    beta=0.001,
    kl_estimator=KLEstimator.VERL_K3,
    kl_agg=LossAggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""SkyRL 0.3: ``regular``, averaged over tokens, and a KL term (bounded k3) averaged over responses and their tokens."""

SLIME_DEFAULTS = TrainersLoss(LossName.PPO_CLIP, LossAggregation.SEQ_MEAN_TOKEN_MEAN, epsilon_low=0.2, epsilon_high=0.2)
"""slime 0.3: PPO's clip, averaged over responses and their tokens."""

AREAL_DEFAULTS = TrainersLoss(LossName.PPO_CLIP, LossAggregation.TOKEN_MEAN, epsilon_low=0.2, epsilon_high=0.2)
"""AReaL 1.0: PPO's clip of the ratio to the sampler; its KL term (k1, 0.1) is in the reward."""

PRIME_RL_DEFAULTS = TrainersLoss(
    LossName.DPPO, LossAggregation.TOKEN_MEAN, epsilon_low=0.2, epsilon_high=0.2, kl_tau=1e-3
)
"""prime-rl 0.8: ``default``, DPPO's mask and a squared log-ratio, both to the sampler."""
