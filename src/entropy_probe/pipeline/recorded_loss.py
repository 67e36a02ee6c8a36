"""What the trainer's loss is: what the rows say of it is the default, what a caller says overrides it.

Every row carries the same value, in a column of :data:`~entropy_probe.data.rollouts.columns.OF_THE_LOSS` or in ``loss_type``.
A term or a correction that neither rows nor settings name is not in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TypeVar

from entropy_probe.common.choices import member, number, shown, truth
from entropy_probe.common.source import Source
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.kl import KLEstimator, KLTerm
from entropy_probe.losses.length_weights import Average, LengthWeight, LossAggregation
from entropy_probe.losses.named import NAMED, LossConstants, LossName, NamedLoss, named
from entropy_probe.losses.objective import BonusAverage, EntropyBonus, Objective
from entropy_probe.losses.token_loss import RatioLevel
from entropy_probe.pipeline.rows_say import recorded_value, said
from entropy_probe.pipeline.settings import StepSettings

TRLS_LARGEST_RATIO = 3.0
"""TRL's default of ``importance_sampling_clip_max``, taken where a correction is named without bounds."""
OF_TOKENS = (CorrectionMode.TOKEN_TRUNCATE, CorrectionMode.TOKEN_MASK)
OF_RESPONSES = (CorrectionMode.SEQUENCE_TRUNCATE, CorrectionMode.SEQUENCE_MASK)
FITTING: Mapping[LossName, tuple[CorrectionMode, ...]] = {
    LossName.VESPO: OF_TOKENS,
    LossName.GMPO: OF_RESPONSES,
    LossName.RLOO: OF_RESPONSES,
}
"""Corrections that a loss can take, where that is not all: VESPO multiplies tokens' ratios, others have one loss a response."""
VERLS_DUAL_CLIP = 3.0
"""verl's default of ``clip_ratio_c``, which its PPO loss has where the rows say nothing."""

OTHER_ESTIMATORS: Mapping[str, KLEstimator] = {
    "kl": KLEstimator.K1,
    "mse": KLEstimator.K2,
    "low_var_kl": KLEstimator.VERL_K3,
    "kl+": KLEstimator.K1_STRAIGHT_THROUGH,
    "low_var_kl+": KLEstimator.K3_STRAIGHT_THROUGH,
}
"""verl's names of the estimators (``kl_loss_type``)."""

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True)
class TrainersObjective:
    """The trainer's loss, as far as it is known, and from where.

    Attributes:
        name: of the loss; None where nothing names one: it is then PPO's clip.
        average: how it is averaged over tokens.
        source: of the average; ``unknown`` where it is assumed.
        constants: of its formula; ε is infinite where nothing gives it.
        objective: the loss with its terms, masks and corrections.
        scale: by which the whole update is multiplied.
        kl_average: how the KL term is averaged, where not as the loss.
    """

    name: LossName | None
    average: Average
    source: Source
    constants: LossConstants
    objective: Objective
    scale: float = 1.0
    kl_average: LossAggregation | None = None

    @property
    def lacks_epsilon(self) -> bool:
        """Whether the clip's ε is not known, on which the update depends where the ratio is not 1."""
        return self.clips and math.isinf(self.constants.epsilon_high)

    @property
    def clips(self) -> bool:
        """Whether ε decides where the ratio is not 1."""
        return self.name is None or NAMED[self.name].clips

    def made_of(self, constants: LossConstants, name: LossName | None) -> TrainersObjective:
        """The same with other constants, or with the formula of another name; the average stays."""
        known = NAMED[LossName.GRPO if name is None else name]
        kl = self.objective.kl
        objective = replace(
            self.objective,
            loss=known.make(constants),
            correction=None if known.corrects_itself else constants.correction,
            kl=None if kl is None else replace(kl, level=constants.level),
        )
        return replace(self, name=name, constants=constants, objective=objective)

    @property
    def by_micro_batch(self) -> tuple[str, ...]:
        """What of it is a mean over micro-batches, in words."""
        found = {
            str(self.average): self.average is LengthWeight.BNPO,
            "the entropy bonus": self.objective.bonus_of_micro_batches,
            "the quantile of entropies": self.objective.needs_entropies,
        }
        return tuple(words for words, present in found.items() if present)

    @property
    def other_terms(self) -> tuple[str, ...]:
        """The terms beside the reward's, in words."""
        found = {"the KL term": self.objective.kl is not None, "the entropy bonus": self.objective.bonus is not None}
        return tuple(words for words, present in found.items() if present)


def trainers_objective(batch: RolloutBatch, asked: StepSettings, *, assumed: LengthWeight | None) -> TrainersObjective:
    """What the rows say of the loss, under what a caller says.

    Args:
        batch: the rows that the step consumes.
        asked: what overrides them. What is given is not looked for in the rows.
        assumed: the average where neither says; None refuses.

    Raises:
        InputError: the rows disagree, or say what is not known or cannot be meant.
    """
    averaged = asked.length_weight is not None or asked.loss_agg is not None
    name = asked.loss_type or _name(batch, averaged)
    known = None if name is None else NAMED[name]
    agg = asked.loss_agg
    if agg is None and asked.length_weight is None:
        agg = _member(batch, "loss_agg", LossAggregation)
    average, source = _average(batch, asked, known, agg, assumed)
    constants = _constants(batch, asked, name)
    kl = _kl(batch, asked, constants.level)
    coefficient = _number(batch, "entropy_coef", asked.entropy_coef) or 0.0
    bonus = None
    if coefficient != 0.0:
        of_loss = agg is not None or (known is not None and not known.of_trl)
        bonus = EntropyBonus(coefficient, BonusAverage.LOSS if of_loss else BonusAverage.MICRO_BATCH)
    quantile, scale = _number(batch, "top_entropy_quantile"), _number(batch, "loss_scale")
    if quantile is not None and not 0.0 < quantile <= 1.0:
        raise InputError(f"{said('top_entropy_quantile')} is {quantile:g}; expected a share above 0, 1 at most")
    objective = Objective(
        (known or NAMED[LossName.GRPO]).make(constants),
        correction=None if known is not None and known.corrects_itself else constants.correction,
        top_entropy_quantile=1.0 if quantile is None else quantile,
        off_policy_threshold=_number(batch, "off_policy_mask_threshold"),
        kl=kl,
        bonus=bonus,
    )
    kl_average = _member(batch, "kl_agg", LossAggregation)
    return TrainersObjective(name, average, source, constants, objective, 1.0 if scale is None else scale, kl_average)


def _kl(batch: RolloutBatch, asked: StepSettings, level: RatioLevel) -> KLTerm | None:
    """The KL term; what the rows say of it is looked at where its coefficient is 0, too."""
    beta = _number(batch, "beta", asked.beta) or 0.0
    corrected = recorded_value(batch, "use_bias_correction_kl", partial(truth, said("use_bias_correction_kl")))
    estimator = asked.kl_estimator or recorded_value(batch, "kl_estimator", _estimator) or KLEstimator.K3
    if beta == 0.0:
        if asked.kl_estimator is not None:
            raise InputError(
                f"kl_estimator is {estimator}, and the loss has no KL term; give its coefficient, beta, or leave the "
                "estimator out"
            )
        return None
    return KLTerm(beta, estimator, bias_correction=bool(corrected), level=level)


def _name(batch: RolloutBatch, averaged: bool) -> LossName | None:
    """The rows' loss; one that is not known counts as PPO's clip where the caller says how it is ``averaged``."""
    loss_type = batch.responses[0].loss_type
    name = named(loss_type)
    if loss_type is not None and name is None and not averaged:
        raise InputError(
            f"the rows' loss_type is {shown(loss_type)}; known are {', '.join(sorted(LossName))}; if it is one of them by "
            "another name, set the loss, or the length weight alone if at ratio 1 it is a weight a response"
        )
    return name


def _average(
    batch: RolloutBatch,
    asked: StepSettings,
    known: NamedLoss | None,
    agg: LossAggregation | None,
    assumed: LengthWeight | None,
) -> tuple[Average, Source]:
    if asked.length_weight is not None:
        return asked.length_weight, Source.GIVEN
    if agg is not None:
        return agg, Source.RECORDED if asked.loss_agg is None else Source.GIVEN
    if known is not None:
        return known.average, Source.RECORDED if asked.loss_type is None else Source.GIVEN
    if assumed is None:
        raise InputError(
            "the rows name no loss_type; set the length weight to that of the trainer's loss: dapo (TRL's default), grpo, "
            "dr_grpo or bnpo"
        )
    return assumed, Source.UNKNOWN


def _constants(batch: RolloutBatch, asked: StepSettings, name: LossName | None) -> LossConstants:
    low, high = (
        _number(batch, column, given)
        for column, given in (("epsilon_low", asked.epsilon_low), ("epsilon_high", asked.epsilon_high))
    )
    # One alone is both, as in TRL, but that CISPO has no lower one.
    low, high = (high if low is None else low), (low if high is None and name is not LossName.CISPO else high)
    dual_clip = _number(batch, "clip_ratio_c")
    if dual_clip is None and name is LossName.PPO:
        dual_clip = VERLS_DUAL_CLIP
    defaults = LossConstants()

    def pair(columns: tuple[str, str], default: tuple[float, float]) -> tuple[float, float]:
        found = [_number(batch, column) for column in columns]
        first, second = (own if value is None else value for value, own in zip(found, default, strict=True))
        return first, second

    return LossConstants(
        epsilon_low=math.inf if low is None else low,
        epsilon_high=math.inf if high is None else high,
        delta=_number(batch, "delta"),
        dual_clip=dual_clip,
        level=_level(batch, name),
        correction=_correction(batch, name),
        sapo_temperatures=pair(("sapo_temperature_pos", "sapo_temperature_neg"), defaults.sapo_temperatures),
        vespo_positive=pair(("vespo_k_pos", "vespo_lambda_pos"), defaults.vespo_positive),
        vespo_negative=pair(("vespo_k_neg", "vespo_lambda_neg"), defaults.vespo_negative),
        kl_tau=_kl_tau(batch, name),
    )


def _kl_tau(batch: RolloutBatch, name: LossName | None) -> float:
    found = _number(batch, "kl_tau") or 0.0
    if found != 0.0 and name is not LossName.DPPO:
        raise InputError(
            f"{said('kl_tau')} is {found:g}, the coefficient of a squared log-ratio that the loss {name or 'of PPO'} has no "
            f"place for; expected loss_type {LossName.DPPO}, or beta with ref_logprobs for a KL term to a reference"
        )
    return found


def _level(batch: RolloutBatch, name: LossName | None) -> RatioLevel:
    recorded, own = _member(batch, "importance_sampling_level", RatioLevel), None
    if name is not None:
        own = NAMED[name].level
    if recorded is not None and own is not None and recorded is not own:
        raise InputError(
            f"{said('importance_sampling_level')} is {recorded}, and the loss {name} takes the ratio of the {own}; drop the "
            "column, or name the trainer's loss"
        )
    return recorded or own or RatioLevel.TOKEN


def _correction(batch: RolloutBatch, name: LossName | None) -> Correction | None:
    mode = _member(batch, "importance_sampling_mode", CorrectionMode)
    if mode is not None and name is not None and mode not in FITTING.get(name, (mode,)):
        raise InputError(
            f"{said('importance_sampling_mode')} is {mode}, which {name} has no place for; expected "
            f"{' or '.join(FITTING[name])}"
        )
    bounds = [_number(batch, f"importance_sampling_clip_{end}") for end in ("min", "max")]
    if mode is None:
        given = [end for end, value in zip(("min", "max"), bounds, strict=True) if value is not None]
        if given:
            raise InputError(
                f"{said(f'importance_sampling_clip_{given[0]}')}, and name no importance_sampling_mode "
                f"({', '.join(CorrectionMode)}); give it, or drop the bound"
            )
        return None
    low, high = bounds
    return Correction(mode, low, TRLS_LARGEST_RATIO if low is None and high is None else high)


def _estimator(value: object) -> KLEstimator:
    if isinstance(value, str) and value in OTHER_ESTIMATORS:
        return OTHER_ESTIMATORS[value]
    return member(said("kl_estimator"), value, KLEstimator)


def _member(batch: RolloutBatch, column: str, kind: type[E]) -> E | None:
    return recorded_value(batch, column, lambda value: member(said(column), value, kind))


def _number(batch: RolloutBatch, column: str, given: float | None = None) -> float | None:
    """What a caller gives, else what all rows say: a finite number, 0 or above."""
    return given if given is not None else recorded_value(batch, column, partial(number, said(column)))
