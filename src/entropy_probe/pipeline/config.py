"""The report's section of settings, as they were resolved."""

from __future__ import annotations

import math

from entropy_probe.common.source import Source
from entropy_probe.losses.length_weights import LossAggregation
from entropy_probe.pipeline.stages import Task
from entropy_probe.pipeline.torch_types import OFF, autocast_name, dtype_name
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.report import ConfigSection
from entropy_probe.report.sections.loss import LossConfig


def config_section(task: Task) -> ConfigSection:
    """The settings, with what the rollouts and the model decided of them."""
    subject, settings, trainer = task.subject, task.settings, task.subject.trainer
    rule = task.rule
    return ConfigSection(
        mode=settings.mode,
        blocks=settings.blocks,
        estimator=settings.estimator,
        entropy=settings.entropy,
        importance_weights=settings.weighting,
        sampler_weights=settings.sampler_weights,
        evaluation_rollouts=subject.evaluation_rollouts,
        noise=settings.noise,
        interval=settings.interval,
        split=settings.split,
        targets=settings.targets,
        sweep=None if settings.sweep is None else [settings.sweep.low, settings.sweep.high, settings.sweep.count],
        resample=settings.resample,
        resample_batch=settings.resample_batch,
        rollouts=subject.rollouts,
        freeze=list(subject.freeze),
        advantage=rule.advantage_rule,
        length_weight=trainer.length_weight,
        **vars(loss_config(rule)),
        responses=len(rule.batch.responses),
        max_completion_length=settings.max_completion_length,
        learning_rate=settings.learning_rate,
        temperature=subject.batch.temperature,
        dtype=dtype_name(settings.dtype),
        autocast=autocast_name(OFF if settings.autocast == OFF else trainer.autocast),
        microbatch_size=settings.microbatch_size,
        vector_dtype=dtype_name(task.vector_dtype),
        gradient_checkpointing=settings.gradient_checkpointing,
        memory_bytes=settings.memory_bytes,
        device=str(task.policy.device),
        seed=settings.seed,
        max_grad_norm=None if trainer.max_grad_norm_source is Source.UNKNOWN else trainer.max_grad_norm or 0.0,
        weight_rounding=settings.weight_rounding,
        zero_v=settings.zero_v,
    )


def loss_config(rule: UpdateRule) -> LossConfig:
    """The loss of an update, and which rows it is of."""
    loss, kl, bonus = rule.loss, rule.loss.objective.kl, rule.loss.objective.bonus
    correction = loss.constants.correction
    return LossConfig(
        loss=loss.name,
        loss_agg=loss.average if isinstance(loss.average, LossAggregation) else None,
        beta=0.0 if kl is None else kl.beta,
        kl_estimator=None if kl is None else kl.estimator,
        entropy_coef=0.0 if bonus is None else bonus.coefficient,
        epsilon_low=_or_none(loss.constants.epsilon_low) if loss.clips else None,
        epsilon_high=_or_none(loss.constants.epsilon_high) if loss.clips else None,
        importance_ratios=rule.takes_ratios,
        importance_sampling_level=loss.constants.level,
        importance_sampling_mode=None if correction is None else correction.mode,
        top_entropy_quantile=loss.objective.top_entropy_quantile,
        off_policy_mask_threshold=loss.objective.off_policy_threshold,
        loss_scale=loss.scale,
        mini_batch=rule.mini_batch,
        update_responses=len(rule.part.responses),
    )


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
