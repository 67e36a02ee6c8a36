"""The losses that rows and settings name: which formula a token each has, and how its trainer averages it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from entropy_probe.losses.cispo import CISPO
from entropy_probe.losses.corrections import Correction
from entropy_probe.losses.dppo import DPPO
from entropy_probe.losses.gmpo import GMPO
from entropy_probe.losses.length_weights import Average, LengthWeight, LossAggregation
from entropy_probe.losses.ppo_clip import PPOClip
from entropy_probe.losses.rloo import RLOO
from entropy_probe.losses.sapo import SAPO
from entropy_probe.losses.token_loss import RatioLevel, TokenLoss
from entropy_probe.losses.vespo import VESPO


class LossName(StrEnum):
    """A published loss, by the name that rows have in ``loss_type``: TRL's, and beside them the names of the papers.

    ``grpo``, ``bnpo``, ``dr_grpo``, ``dapo``: PPO's clip, averaged as :class:`LengthWeight` says. ``luspo``: averaged over
    responses, tokens summed. ``gspo``: the ratio of whole responses. ``ppo``: with dual clip, averaged over tokens, as verl has
    it. ``ppo_clip``: the same without dual clip, as OpenRLHF, SkyRL and AReaL have it. ``reinforce_plus_plus``: again that (its
    advantages are the rows'). ``cispo``, ``sapo``, ``vespo``, ``gmpo``, ``dppo``, ``rloo``: see the files of those names in
    :mod:`entropy_probe.losses`.

    Example:
        >>> from entropy_probe import LossName, Settings
        >>> settings = Settings(loss_type=LossName.DAPO, epsilon_low=0.2, epsilon_high=0.28)
    """

    GRPO = "grpo"
    BNPO = "bnpo"
    DR_GRPO = "dr_grpo"
    DAPO = "dapo"
    CISPO = "cispo"
    SAPO = "sapo"
    LUSPO = "luspo"
    VESPO = "vespo"
    GSPO = "gspo"
    GMPO = "gmpo"
    RLOO = "rloo"
    REINFORCE_PLUS_PLUS = "reinforce_plus_plus"
    PPO = "ppo"
    PPO_CLIP = "ppo_clip"
    DPPO = "dppo"


@dataclass(frozen=True)
class LossConstants:
    """The numbers in a loss's formula; what a loss does not have it does not look at.

    Attributes:
        epsilon_low: of the clip.
        epsilon_high: of the clip; CISPO's is the largest ratio itself, DPPO's two are distances of probabilities. Infinite:
            nothing is clipped.
        delta: the largest ratio, beyond the clip; None for none.
        dual_clip: of negative advantages, DPPO's the largest ratio; None for none.
        level: whose ratio.
        correction: for the sampler, which VESPO has in its formula.
        sapo_temperatures: where A > 0, and elsewhere.
        vespo_positive: k and λ where A ≥ 0.
        vespo_negative: the same elsewhere.
        kl_tau: of DPPO's squared log-ratio.
    """

    epsilon_low: float = math.inf
    epsilon_high: float = math.inf
    delta: float | None = None
    dual_clip: float | None = None
    level: RatioLevel = RatioLevel.TOKEN
    correction: Correction | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)
    kl_tau: float = 0.0


@dataclass(frozen=True)
class NamedLoss:
    """What a name means.

    Attributes:
        make: the token loss, from its constants.
        average: how the trainer averages it.
        clips: whether ε decides where the ratio is not 1.
        of_trl: whether TRL has it: its entropy bonus is then TRL's mean over a micro-batch's tokens.
        corrects_itself: whether a correction for the sampler is in the formula, and not beside it.
        level: whose ratio it takes, where the name itself says so.
    """

    make: Callable[[LossConstants], TokenLoss]
    average: Average
    clips: bool = True
    of_trl: bool = True
    corrects_itself: bool = False
    level: RatioLevel | None = None


def _clipped(constants: LossConstants) -> TokenLoss:
    return PPOClip(
        constants.epsilon_low, constants.epsilon_high, constants.delta, constants.dual_clip, level=constants.level
    )


def _vespo(constants: LossConstants) -> TokenLoss:
    return VESPO(*constants.vespo_positive, *constants.vespo_negative, correction=constants.correction)


def _dppo(constants: LossConstants) -> TokenLoss:
    largest = math.inf if constants.dual_clip is None else constants.dual_clip
    return DPPO(constants.epsilon_low, constants.epsilon_high, constants.kl_tau, largest)


NAMED: Mapping[LossName, NamedLoss] = {
    LossName.GRPO: NamedLoss(_clipped, LengthWeight.GRPO),
    LossName.BNPO: NamedLoss(_clipped, LengthWeight.BNPO),
    LossName.DR_GRPO: NamedLoss(_clipped, LengthWeight.DR_GRPO),
    LossName.DAPO: NamedLoss(_clipped, LengthWeight.DAPO),
    LossName.CISPO: NamedLoss(lambda c: CISPO(c.epsilon_high, c.level), LengthWeight.DAPO),
    LossName.SAPO: NamedLoss(lambda c: SAPO(*c.sapo_temperatures, level=c.level), LengthWeight.GRPO, clips=False),
    LossName.LUSPO: NamedLoss(_clipped, LengthWeight.LUSPO),
    LossName.VESPO: NamedLoss(_vespo, LengthWeight.DAPO, clips=False, corrects_itself=True),
    LossName.GSPO: NamedLoss(_clipped, LengthWeight.GRPO, level=RatioLevel.SEQUENCE),
    LossName.GMPO: NamedLoss(
        lambda c: GMPO(c.epsilon_low, c.epsilon_high), LossAggregation.SEQ_MEAN_TOKEN_MEAN, of_trl=False
    ),
    LossName.RLOO: NamedLoss(lambda c: RLOO(c.epsilon_low, c.epsilon_high), LengthWeight.GRPO),
    LossName.REINFORCE_PLUS_PLUS: NamedLoss(_clipped, LossAggregation.TOKEN_MEAN, of_trl=False),
    LossName.PPO: NamedLoss(_clipped, LossAggregation.TOKEN_MEAN, of_trl=False),
    LossName.PPO_CLIP: NamedLoss(_clipped, LossAggregation.TOKEN_MEAN, of_trl=False),
    LossName.DPPO: NamedLoss(_dppo, LossAggregation.TOKEN_MEAN, of_trl=False),
}
"""By name. A new loss is its file, a member of :class:`LossName` and a line here."""

OTHER_NAMES: Mapping[str, LossName] = {
    "reinforce++": LossName.REINFORCE_PLUS_PLUS,
    "reinforce_pp": LossName.REINFORCE_PLUS_PLUS,
    "geo_mean": LossName.GMPO,
    "vanilla": LossName.PPO,
    "regular": LossName.PPO_CLIP,
    "dppo_tv": LossName.DPPO,
}
"""What trainers call the same loss."""


def named(loss_type: str | None) -> LossName | None:
    """The loss of this name; None where none has it."""
    if loss_type is None:
        return None
    return OTHER_NAMES.get(loss_type) or next((name for name in LossName if name == loss_type), None)


def average_of(loss_type: str | None) -> Average | None:
    """How the loss of this name is averaged; None where none has it."""
    name = named(loss_type)
    return None if name is None else NAMED[name].average
