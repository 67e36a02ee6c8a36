"""Causes in the loss itself: ratios, formula, clip, corrections, the KL term's estimator.

Each is the recorded loss with one thing else. What the rows do not make different takes no pass: at ratio 1 a clip is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.named import NAMED, LossName
from entropy_probe.losses.token_loss import RatioLevel
from entropy_probe.pipeline.recorded_loss import FITTING
from entropy_probe.pipeline.update import UpdateRule
from entropy_probe.replay_check.case import Replayed
from entropy_probe.replay_check.variants import Variant, of_constants, with_objective, with_rows

UNCLIPPED = 1e9
"""An ε beyond every ratio."""
USUAL_CLIPS = ((0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4))
"""ε of PPO and GRPO, of DAPO, of GSPO."""
FORMULAS = (LossName.GRPO, LossName.CISPO, LossName.SAPO, LossName.VESPO, LossName.GMPO, LossName.RLOO)
"""One name for each formula a token."""


def loss_variants(case: Replayed) -> Iterator[Variant]:
    """All of them, those that rows say most plainly first."""
    yield from _ratios(case)
    yield from _clips(case.rule)
    yield from _formulas(case.rule)
    yield from _corrections(case)
    yield from _kl(case.rule)


def _ratios(case: Replayed) -> Iterator[Variant]:
    rule, rows = case.rule, case.batch.responses
    if rule.takes_ratios:
        yield Variant(
            "ratio",
            "the trainer's importance ratios were all 1; here they are taken to old_logprobs, which differ from this "
            f"checkpoint's by up to {float(_log_ratios(case).abs().max()):.3g} nats a token",
            "Drop old_logprobs where the trainer has none, and look for who changed that column",
            with_rows(rule, lambda row: replace(row, old_logprobs=None)),
        )
    if all(row.logprobs is not None for row in rows) and any(row.old_logprobs != row.logprobs for row in rows):
        here = "to old_logprobs" if rule.takes_ratios else "all 1"
        yield Variant(
            "old_logprobs",
            f"the trainer's importance ratios were taken to the sampler's logprobs; here they are {here}",
            "Give the trainer's own log-probs in old_logprobs",
            with_rows(_clipping(rule), lambda row: replace(row, old_logprobs=row.logprobs)),
        )


def _log_ratios(case: Replayed) -> Tensor:
    """log π_θ − log π_old at tokens in the loss, [tokens]."""
    assert case.measured.log_probs is not None
    old = torch.tensor(case.batch.of_tokens("old_logprobs"), dtype=torch.float64)
    return (case.measured.log_probs - old) * torch.tensor(case.batch.of_tokens("loss_mask", 1.0), dtype=torch.float64)


def _clipping(rule: UpdateRule) -> UpdateRule:
    """The same, with PPO's ε where nothing gives one."""
    if not rule.loss.lacks_epsilon:
        return rule
    low, high = USUAL_CLIPS[0]
    return of_constants(rule, replace(rule.loss.constants, epsilon_low=low, epsilon_high=high))


def _clips(rule: UpdateRule) -> Iterator[Variant]:
    constants, loss = rule.loss.constants, rule.loss
    if loss.clips:
        capped = loss.name is LossName.CISPO
        here = f"[{constants.epsilon_low:g}, {constants.epsilon_high:g}]"
        words = f"above {constants.epsilon_high:g}" if capped else f"by ε of {here}"
        yield Variant(
            "epsilon",
            f"the trainer's ratios were not clipped; here they are {words}",
            "Set epsilon_low and epsilon_high to the trainer's own",
            of_constants(rule, replace(constants, epsilon_low=UNCLIPPED, epsilon_high=UNCLIPPED)),
        )
        for low, high in () if capped else USUAL_CLIPS:
            yield Variant(
                "epsilon",
                f"the trainer's clip had ε of [{low:g}, {high:g}]; here it is {here}",
                f"Set epsilon_low to {low:g} and epsilon_high to {high:g}",
                of_constants(rule, replace(constants, epsilon_low=low, epsilon_high=high)),
            )
    bounds = {
        "delta": (constants.delta, replace(constants, delta=None)),
        "clip_ratio_c": (constants.dual_clip, replace(constants, dual_clip=None)),
    }
    for name, (bound, without) in bounds.items():
        if bound is not None:
            yield Variant(
                name,
                f"the trainer's loss had no bound {name}; here it is {bound:g}",
                f"Drop {name}",
                of_constants(rule, without),
            )


def _formulas(rule: UpdateRule) -> Iterator[Variant]:
    """Other ones of the ratio, and of whose it is. At ratio 1 most are one."""
    constants, name = rule.loss.constants, rule.loss.name
    level = RatioLevel.TOKEN if constants.level is RatioLevel.SEQUENCE else RatioLevel.SEQUENCE
    whose = {RatioLevel.TOKEN: "of each token", RatioLevel.SEQUENCE: "of whole responses"}
    plain = LossName.GRPO if name is LossName.GSPO else name
    yield Variant(
        "importance_sampling_level",
        f"the trainer's importance ratio was {whose[level]}; here it is {whose[constants.level]}",
        f"Set importance_sampling_level to {level}" + (", and loss_type to grpo" if plain is not name else ""),
        of_constants(rule, replace(constants, level=level), plain),
    )
    own, clipping = NAMED[LossName.GRPO if name is None else name].make, _clipping(rule)
    for other in FORMULAS:
        if NAMED[other].make is own:
            continue
        if constants.correction is not None and constants.correction.mode not in FITTING.get(
            other, tuple(CorrectionMode)
        ):
            continue
        yield Variant(
            "loss_type",
            f"the trainer's loss was {'of the clip of PPO, as grpo' if other is LossName.GRPO else other}; here it is "
            f"{'the clip of PPO' if name is None else name}, averaged as {rule.loss.average}",
            f"Set the loss to {other}, or look for who changed loss_type",
            of_constants(clipping, clipping.loss.constants, other),
        )


def _corrections(case: Replayed) -> Iterator[Variant]:
    """Of rows that hold the sampler's log-probs."""
    rule = case.rule
    if not any(row.logprobs for row in case.batch.responses):
        return
    constants, name = rule.loss.constants, rule.loss.name
    own = constants.correction
    if own is not None:
        yield Variant(
            "importance_sampling_mode",
            f"the trainer's loss was not corrected for the sampler; here it is, by {own.mode}",
            "Drop importance_sampling_mode",
            of_constants(rule, replace(constants, correction=None)),
        )
    bounds = own or Correction()
    fitting = tuple(CorrectionMode) if name is None else FITTING.get(name, tuple(CorrectionMode))
    for mode in fitting:
        if own is None or mode is not own.mode:
            yield Variant(
                "importance_sampling_mode",
                f"the trainer's loss was corrected for the sampler by {mode}{_within(bounds)}; here "
                + ("it is not" if own is None else f"it is by {own.mode}"),
                f"Set importance_sampling_mode to {mode}",
                of_constants(rule, replace(constants, correction=replace(bounds, mode=mode))),
            )


def _within(bounds: Correction) -> str:
    return f" up to {bounds.high:g}" if bounds.high is not None else ""


def _kl(rule: UpdateRule) -> Iterator[Variant]:
    objective, kl = rule.loss.objective, rule.loss.objective.kl
    if kl is None:
        return
    corrected = not kl.bias_correction
    yield Variant(
        "use_bias_correction_kl",
        f"the trainer's KL term was {'' if corrected else 'not '}multiplied by the importance ratio; here it is "
        f"{'not' if corrected else 'multiplied'}",
        f"Set use_bias_correction_kl to {str(corrected).lower()}",
        with_objective(rule, replace(objective, kl=replace(kl, bias_correction=corrected))),
    )
    for estimator in (KLEstimator.K3, KLEstimator.K2, KLEstimator.K1, KLEstimator.ABS):
        if estimator is not kl.estimator:
            yield Variant(
                "kl_estimator",
                f"the trainer's KL term was estimated by {estimator}; here it is by {kl.estimator}",
                f"Set kl_estimator to {estimator}",
                with_objective(rule, replace(objective, kl=replace(kl, estimator=estimator))),
            )
