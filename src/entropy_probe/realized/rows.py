"""Which steps are realised on which responses: the rows of the report, each beside its own linear term.

On the same responses as the update; on a separate evaluation batch; or held out by folds, where the step from all other folds'
prompts is realised on one fold's, and the rows are averaged over folds. Source: docs/method.md, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.progress import Progress
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients import Rules, response_dots, weighted_gradient
from entropy_probe.model.measured import Measured
from entropy_probe.model.policy import Policy, check_finite
from entropy_probe.optimizers.base import OptimizerState
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.rounding import NEAREST, RoundingRule
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.realized.changes import RealizedChange, average
from entropy_probe.realized.floor import noise_floors
from entropy_probe.realized.measure import EntropyMeasure, Predicted
from entropy_probe.realized.realize import realize
from entropy_probe.realized.steps import HELD_OUT, Step
from entropy_probe.targets.base import Sample, TokenPair


@dataclass(frozen=True)
class Realizer:
    """Realises steps of one model by given measures.

    Attributes:
        policy: the model at θ, weights in float32 or better, without autocast.
        geometry: P and η by name, of the preconditioned step.
        optimizer: whose own step is taken too.
        measures: which entropies are compared before and after.
        rules: of this very policy, or None.
        progress: told of long work.
        max_grad_norm: at which the adamw step clips its gradient; None does not.
        rounding: of weights that the optimizer holds in a narrow type.
    """

    policy: Policy
    geometry: Geometry
    optimizer: OptimizerState
    measures: Sequence[EntropyMeasure]
    rules: Rules | None
    progress: Progress
    max_grad_norm: float | None = None
    rounding: RoundingRule = NEAREST

    def measured(self, batch: RolloutBatch) -> Measured:
        """Scores (and entropies where a measure needs them) at θ.

        Raises:
            InputError: a response without a finite score; its prompt is named.
        """
        found = self.policy.measure(batch.responses, self.progress, entropies=self._needs_entropies)
        check_finite(found.scores, batch.responses)
        return found

    def steps(self, ascent: Mapping[str, Tensor]) -> list[Step]:
        """The preconditioned step and the optimizer's own, from Ȳ; the latter also rounded, where weights are of a narrow type.

        Raises:
            InputError: the rounded step leaves the range of the narrow type.
        """
        theta, sharding = self.policy.held(), self.policy.sharding
        adamw = self.optimizer.deltas(theta, ascent, max_grad_norm=self.max_grad_norm, sharding=sharding)
        steps = [
            Step("preconditioned", "virtual", self.geometry.step(ascent)),
            Step("adamw", "virtual", adamw),
        ]
        factor = clip_factor(gradient_norm(ascent, sharding), self.max_grad_norm)
        rounded = self.optimizer.stored(theta, ascent, adamw, clip_factor=factor, rule=self.rounding, sharding=sharding)
        if rounded is not None:
            steps.append(Step("adamw", "virtual", rounded.deltas, rounded.kept))
        return steps

    def changes(
        self,
        batch: RolloutBatch,
        steps: Sequence[Step],
        by_token: Sequence[TokenPair] = (),
        by_response: Sequence[EntropyMeasure] = (),
    ) -> FloatArray:
        """Of every response along every step, [N, M, steps]: dS, and d Σ_t H_t where a measure needs it; then of ``by_token``.

        Args:
            batch: the responses.
            steps: directions.
            by_token: what multiplies ∇log π and ∇H_t.
            by_response: measures whose linear terms are of whole responses' changes.
        """
        ones = torch.ones(len(batch.responses), dtype=torch.float64)
        combinations = [TokenPair(ones)] if by_response or not by_token else []
        if any(measure.target.needs_token_entropies for measure in by_response):
            combinations.append(TokenPair(torch.zeros_like(ones), ones))
        combinations += by_token
        found: FloatArray = response_dots(
            self.policy,
            batch,
            [step.deltas for step in steps],
            combinations,
            rules=self.rules,
            progress=self.progress,
        ).numpy()
        return found

    def slope(self, batch: RolloutBatch, before: Measured, measure: EntropyMeasure) -> dict[str, Tensor]:
        """X̄ of these responses by parameter name, by a backward of its own."""
        sample = Sample.of(batch, before)
        pair = measure.target.coefficients(sample, measure.target.ratio(sample)).scaled(1.0 / len(batch.groups))
        return weighted_gradient(self.policy, batch, pair, rules=self.rules, progress=self.progress)

    def realized(
        self,
        batch: RolloutBatch,
        before: Measured,
        steps: Sequence[Step],
        batch_name: str,
        slope: Mapping[str, Tensor] | None = None,
    ) -> list[RealizedChange]:
        """Every step by every measure, the first measure's steps first.

        Args:
            batch: the responses that are scored again.
            before: their scores, log-probs and entropies at θ.
            steps: from the same responses or from others, as ``batch_name`` says.
            batch_name: ``SAME`` or ``HELD_OUT``.
            slope: X̄ of these responses, where it is known; None computes it where a measure needs it.
        """
        by_token = {m: pair for m in self.measures if (pair := m.derivative(batch, before)) is not None}
        by_response = [m for m in self.measures if not m.by_decision(batch) and m not in by_token]
        linear = dict[EntropyMeasure, list[float]]()
        if by_token or by_response:
            changes = self.changes(batch, steps, list(by_token.values()), by_response)
            more = changes.shape[1] - len(by_token)
            linear |= {m: changes[:, more + place].sum(0).tolist() for place, m in enumerate(by_token)}
            for measure in by_response:
                term = measure.linear_term(batch, before)
                found = term.on_scores @ changes[:, 0]
                of_entropies = 0.0 if term.on_entropies is None else term.on_entropies @ changes[:, 1]
                linear[measure] = (found + of_entropies).tolist()
        for measure in self.measures:
            if measure.by_decision(batch):
                known = slope if slope is not None else self.slope(batch, before, measure)
                linear[measure] = [-_dot(known, step.deltas, self.policy.sharding) for step in steps]
        floors = noise_floors(self.policy, batch, before, self.measures, self.progress)
        by_step = []
        for k, step in enumerate(steps):
            predictions = [Predicted(measure, linear[measure][k]) for measure in self.measures]
            by_step.append(realize(self.policy, batch, before, step, predictions, floors=floors, batch_name=batch_name))
        return [rows[m] for m in range(len(self.measures)) for rows in by_step]

    def by_folds(
        self, batch: RolloutBatch, folds: Sequence[int], ascent: Mapping[str, Tensor], update: Tensor | TokenPair
    ) -> list[RealizedChange]:
        """The step from the other folds' prompts realised on each fold's, averaged over folds.

        Args:
            batch: the rollouts.
            folds: of every prompt.
            ascent: Ȳ of the whole batch, from which a fold's own part is taken out.
            update: Y's coefficients, as :class:`~entropy_probe.gradients.coefficients.Sides` has them.
        """
        prompts = len(batch.groups)
        of_row = np.repeat(np.asarray(folds), batch.group_sizes)
        found = []
        for fold in sorted(set(folds)):
            part = batch.of_prompts([n for n in range(prompts) if folds[n] == fold])
            own = weighted_gradient(
                self.policy,
                part,
                TokenPair.of(update).of_rows(np.flatnonzero(of_row == fold).tolist(), batch),
                rules=self.rules,
                progress=self.progress,
            )
            others = {
                name: (prompts * y.double() - own[name].to(y.device) if name in own else prompts * y.double())
                / (prompts - len(part.groups))
                for name, y in ascent.items()
            }
            found.append(self.realized(part, self.measured(part), self.steps(others), HELD_OUT))
        return [average(rows) for rows in zip(*found, strict=True)]

    @property
    def _needs_entropies(self) -> bool:
        return any(measure.target.needs_token_entropies for measure in self.measures)


def _dot(slope: Mapping[str, Tensor], deltas: Mapping[str, Tensor], sharding: Sharding) -> float:
    """X̄ · Δθ over the parameters that X̄ reaches; of shards, of all ranks."""
    own = sum(float((slope[name].double() * delta.double()).sum()) for name, delta in deltas.items() if name in slope)
    return sharding.total(own)
