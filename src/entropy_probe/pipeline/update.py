"""Y's coefficients: what the trainer's loss makes of every response token, in the update that the probe is asked about.

    Ȳ = (1/B) Σ_i Σ_t [ ω_it ∇log π(y_it) + β_it ∇H_it ]

Where no coefficient differs within a response and there is no β, it is one weight a response, Y_n = Σ_g a_ng ∇S_ng, which costs
no backward of its own. Source: docs/method.md, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import Average
from entropy_probe.losses.objective import TokenWeights
from entropy_probe.losses.rows import LossRows
from entropy_probe.model.measured import Measured
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.pipeline.recorded import TrainersStep, recorded_count
from entropy_probe.pipeline.recorded_loss import TrainersObjective
from entropy_probe.targets.base import TokenPair, at_tokens, of_rows

SAME_POLICY = 1e-4
"""Nats by which a token's log-prob may differ from the trainer's old one where nothing gives the clip's ε: rounding, of which
no clip in use takes notice."""


@dataclass(frozen=True)
class Update:
    """The coefficients of an update.

    Attributes:
        whole: of Y: one weight a response [N], or ω and β, [tokens] each.
        terms: by name (``kl``, ``bonus``), those of the loss's terms beside the reward's; none where it has the reward's alone.
    """

    whole: Tensor | TokenPair
    terms: Mapping[str, TokenPair]


@dataclass(frozen=True)
class UpdateRule:
    """The trainer's loss over the rows that its step consumes.

    Attributes:
        batch: the rollouts.
        consumed: whether the step consumes a row, [N].
        loss: the trainer's.
        advantages: A, [N], or [tokens] where a row has one a token.
        advantage_rule: that gave them.
        max_completion_length: the constant of averages that have one.
    """

    batch: RolloutBatch
    consumed: tuple[bool, ...]
    loss: TrainersObjective
    advantages: Tensor
    advantage_rule: AdvantageRule
    max_completion_length: int | None

    @staticmethod
    def of(batch: RolloutBatch, trainer: TrainersStep, advantage: AdvantageRule | None) -> UpdateRule:
        """The update that the rows and the settings describe.

        Raises:
            InputError: a row lacks what the loss needs of it.
        """
        advantages, rule = resolve_advantages(batch, advantage)
        stale = next((row for row in batch.responses if row.on_policy is False and row.old_logprobs is None), None)
        if stale is not None:
            raise InputError(
                f"prompt_id {stale.prompt_id!r} has a row that says on_policy false, so that the trainer's loss has a ratio, "
                "and no old_logprobs; give the trainer's log-probs of its tokens before the first step on them"
            )
        found = UpdateRule(batch, _consumed(batch), trainer.loss, advantages, rule, trainer.max_completion_length)
        if found.loss.objective.needs_entropies and (recorded_count(batch, "num_processes") or 1) > 1:
            raise InputError(
                "the loss keeps tokens by a quantile of entropies (top_entropy_quantile), which TRL takes over all its "
                "processes, and that is not computed for rows of several; train on one, or without the quantile"
            )
        for column, why in found.needed_columns():
            lacking = next((row for row in batch.responses if getattr(row, column) is None), None)
            if lacking is not None:
                raise InputError(
                    f"prompt_id {lacking.prompt_id!r} has a row without {column}, which {why} needs at every response token; "
                    "record them, or take the term out of the loss"
                )
        return found

    @property
    def needs_forward(self) -> bool:
        """Whether coefficients depend on log-probs or entropies at θ."""
        objective = self.loss.objective
        return (
            self.takes_ratios
            or objective.kl is not None
            or objective.needs_entropies
            or objective.off_policy_threshold is not None
            or objective.correction is not None
            or self.loss.constants.correction is not None
        )

    @property
    def takes_ratios(self) -> bool:
        """Whether the rows hold the log-probs to which the trainer takes its importance ratio."""
        return self.batch.responses[0].old_logprobs is not None

    @property
    def mini_batch(self) -> int | None:
        """The mini-batch that the step consumes; None where the rows say none, and all are consumed."""
        return _first_mini_batch(self.batch)

    @cached_property
    def part(self) -> RolloutBatch:
        """The rows that the step consumes."""
        if all(self.consumed):
            return self.batch
        taken = iter(self.consumed)
        groups = (
            replace(group, responses=tuple(row for row in group.responses if next(taken)))
            for group in self.batch.groups
        )
        return RolloutBatch(tuple(group for group in groups if group.responses), self.batch.temperature)

    @property
    def largest_advantages(self) -> Tensor:
        """Of the rows that the step consumes the largest |A| among their tokens in the loss, one a response of :attr:`part`."""
        part = self.part
        values = at_tokens(of_rows(self.advantages, self._kept, self.batch), part.lengths).abs()
        return torch.stack([v.max() for v in torch.split(values * _or_ones(part, "loss_mask"), list(part.lengths))])

    @property
    def _kept(self) -> list[int]:
        return [row for row, taken in enumerate(self.consumed) if taken]

    def without_negatives(self) -> UpdateRule:
        """The same with no advantage below zero."""
        return replace(self, advantages=self.advantages.clamp(min=0.0))

    def reward_alone(self) -> UpdateRule:
        """The same without the loss's other terms."""
        return replace(self, loss=replace(self.loss, objective=replace(self.loss.objective, kl=None, bonus=None)))

    def update(self, measured: Measured | None) -> Update:
        """The coefficients.

        Args:
            measured: log-probs, and entropies, of every response token at θ, where :attr:`needs_forward`.

        Raises:
            InputError: the ratio is not 1 and the clip is not known.
        """
        kept, part = self._kept, self.part
        rows = self.seen(measured)
        self._check_clip(rows)
        average = self._average(self.loss.average, rows)
        of_kl = None if self.loss.kl_average is None else self._average(self.loss.kl_average, rows)
        # Ȳ is a mean over all the prompts of the batch, of which the step may consume some alone.
        scale = self.loss.scale * len(self.batch.groups) / len(part.groups)
        found = self.loss.objective.token_weights(rows, average * scale, None if of_kl is None else of_kl * scale)
        bonus = found.bonus
        if bonus is not None and self.loss.objective.bonus_of_micro_batches:
            # It is a share of the trainer's mean, and ω is B times that.
            bonus = bonus * scale * len(part.groups)
        return self._laid_out(TokenWeights(found.reward, found.kl, bonus), kept)

    def _average(self, rule: Average, rows: LossRows) -> Tensor:
        """The weight of every token of the rows that the step consumes, in B times the trainer's average."""
        weights = resolve_length_weights(self.part, rule, self.max_completion_length, rows.tokens_in_loss)
        return at_tokens(weights, self.part.lengths)

    def needed_columns(self) -> list[tuple[str, str]]:
        """Columns without which the loss has no value, and what needs them."""
        objective = self.loss.objective
        needed = [("ref_logprobs", "the KL term")] if objective.kl is not None else []
        if self.loss.constants.correction is not None:
            needed.append(("logprobs", "the correction for the sampler"))
        # Without any of the sampler's, the drift is that from the trainer's old ones.
        if objective.off_policy_threshold is not None and any(row.logprobs for row in self.batch.responses):
            needed.append(("logprobs", "the off-policy mask"))
        return needed

    def seen(self, measured: Measured | None) -> LossRows:
        """What the loss sees of the rows that the step consumes."""
        kept, part = self._kept, self.part

        def column(name: str) -> Tensor | None:
            values = part.of_tokens(name)
            return None if values is None else torch.tensor(values, dtype=torch.float64)

        log_probs = entropies = None
        if measured is not None:
            log_probs = None if measured.log_probs is None else of_rows(measured.log_probs, kept, self.batch)
            entropies = None if measured.entropies is None else of_rows(measured.entropies, kept, self.batch)
        assert log_probs is not None or not self.needs_forward, "this loss depends on log-probs at θ"
        micro_batches = [row.micro_batch for row in part.responses if row.micro_batch is not None]
        return LossRows(
            part.lengths,
            # At ratio 1 no loss depends on them.
            torch.zeros(part.tokens, dtype=torch.float64) if log_probs is None else log_probs,
            at_tokens(of_rows(self.advantages, kept, self.batch), part.lengths),
            _or_ones(part, "loss_mask"),
            token_weights=_or_ones(part, "token_weight"),
            old_log_probs=column("old_logprobs"),
            sampler_log_probs=column("logprobs"),
            ref_log_probs=column("ref_logprobs"),
            entropies=entropies,
            micro_batches=tuple(micro_batches) if len(micro_batches) == len(part.responses) else None,
        )

    def _check_clip(self, rows: LossRows) -> None:
        """Refuse a ratio that is not 1 under a clip that nobody gives."""
        if rows.old_log_probs is None or not self.loss.lacks_epsilon:
            return
        gaps = ((rows.log_probs - rows.old_log_probs) * rows.mask).abs()
        if float(gaps.max()) > SAME_POLICY:
            farthest = self.part.responses[int(rows.row_of_token[gaps.argmax()])]
            raise InputError(
                f"old_logprobs differ from this checkpoint's by up to {float(gaps.max()):.3g} nats a token (prompt_id "
                f"{farthest.prompt_id!r}), so that the loss clips its importance ratio, and neither rows nor settings say "
                "where; give epsilon_low and epsilon_high"
            )

    def _laid_out(self, weights: TokenWeights, kept: Sequence[int]) -> Update:
        """Zeros at rows that the step does not consume; one weight a response where that says all."""
        batch = self.batch
        places = torch.cat([torch.arange(batch.first_token[row], batch.first_token[row + 1]) for row in kept])

        def everywhere(values: Tensor) -> Tensor:
            return torch.zeros(batch.tokens, dtype=torch.float64).index_copy(0, places, values)

        whole = TokenPair(
            everywhere(weights.on_log_probs), None if weights.bonus is None else everywhere(weights.bonus)
        )
        terms: dict[str, TokenPair] = {}
        if weights.kl is not None:
            terms["kl"] = TokenPair(everywhere(weights.kl))
        if whole.entropies is not None:
            terms["bonus"] = TokenPair(torch.zeros_like(whole.log_probs), whole.entropies)
        return Update(_one_a_response(whole, batch), terms)


def _one_a_response(pair: TokenPair, batch: RolloutBatch) -> Tensor | TokenPair:
    """One weight a response where none differs within one and nothing multiplies ∇H; else the pair."""
    first = pair.log_probs[list(batch.first_token[:-1])]
    if pair.entropies is None and torch.equal(at_tokens(first, batch.lengths), pair.log_probs):
        return first
    return pair


def _or_ones(batch: RolloutBatch, column: str) -> Tensor:
    """A column's values at the tokens that the policy drew, [tokens]; ones in rows that lack it."""
    return torch.tensor(batch.of_tokens(column, 1.0), dtype=torch.float64)


def _first_mini_batch(batch: RolloutBatch) -> int | None:
    return min((row.mini_batch for row in batch.responses if row.mini_batch is not None), default=None)


def _consumed(batch: RolloutBatch) -> tuple[bool, ...]:
    """Of rows that say which mini-batch they are in, those of the first: the step that comes next."""
    first = _first_mini_batch(batch)
    return tuple(row.mini_batch == first for row in batch.responses)
