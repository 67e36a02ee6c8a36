"""What was asked for, as it was resolved. The pipeline fills it, which alone knows the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section


@dataclass(frozen=True)
class ConfigSection(Section):
    """What was asked for, as it was resolved; the same settings give the same numbers.

    A None is a default: by memory, from the rollouts, or from the checkpoint. ``max_grad_norm`` is 0 where it is known that
    nothing is clipped, None where it is not known. ``freeze`` are the patterns of parameters that training left alone. ``loss``
    is None where nothing names one; ε is None where nothing gives it. ``importance_ratios``: the rows hold the log-probs to
    which the trainer takes its ratio; without them it is 1. The step consumes ``update_responses`` of the ``responses``:
    those of ``mini_batch``, or all where that is None.
    """

    mode: str
    blocks: int | None
    estimator: str
    entropy: str
    importance_weights: str
    evaluation_rollouts: str | None
    noise: bool
    interval: str | None
    split: int | None
    targets: bool
    sweep: list[float] | None
    resample: bool
    resample_batch: int | None
    rollouts: str | None
    freeze: list[str]
    advantage: str
    length_weight: str
    max_completion_length: int | None
    learning_rate: float | None
    temperature: float
    dtype: str
    autocast: str | None
    microbatch_size: int | None
    vector_dtype: str
    gradient_checkpointing: bool
    memory_bytes: float | None
    device: str
    seed: int
    max_grad_norm: float | None
    weight_rounding: str
    zero_v: str
    loss: str | None
    loss_agg: str | None
    beta: float
    kl_estimator: str | None
    entropy_coef: float
    epsilon_low: float | None
    epsilon_high: float | None
    importance_ratios: bool
    importance_sampling_level: str
    importance_sampling_mode: str | None
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None
    loss_scale: float
    mini_batch: int | None
    update_responses: int
    responses: int
    sampler_weights: str

    def shown(self, context: Context) -> Sequence[Block]:
        """The loss, which rows the update is of where that can be asked, and the temperature."""
        terms = self._terms()
        rows = [Row("advantages", str(self.advantage), f"length weight {self.length_weight}")]
        if terms:
            rows.append(Row("loss", ", ".join([self.loss or "PPO's clip", *terms])))
        if self.mini_batch is not None:
            of = f"{self.update_responses} of {self.responses} responses"
            rows.append(Row("update", f"of mini-batch {self.mini_batch}", of))
        elif self.importance_ratios:
            rows.append(Row("update", f"of all {self.responses} responses", "as one step: no row has a mini_batch"))
        rows.append(Row("temperature", f"{self.temperature:g}"))
        return (Rows(FACTS, rows),)

    def _terms(self) -> list[str]:
        """What is in the loss beside the length weight times A ∇S."""
        found = []
        if self.kl_estimator is not None:
            found.append(f"KL {self.beta:g} ({self.kl_estimator})")
        if self.entropy_coef:
            found.append(f"entropy bonus {self.entropy_coef:g}")
        if self.importance_ratios:
            found.append(self._ratio())
        if self.importance_sampling_mode is not None:
            found.append(f"corrected for the sampler ({self.importance_sampling_mode})")
        if self.top_entropy_quantile < 1.0:
            found.append(f"top {100 * self.top_entropy_quantile:g} % of tokens by entropy")
        if self.off_policy_mask_threshold is not None:
            found.append(f"off-policy mask at {self.off_policy_mask_threshold:g}")
        if self.loss_scale != 1.0:
            found.append(f"times {self.loss_scale:g}")
        return found

    def _ratio(self) -> str:
        of_tokens = self.importance_sampling_level == "token" and self.loss not in ("rloo", "gmpo", "vespo")
        ratio = "ratio" if of_tokens else "ratio of a response"
        if self.epsilon_high is None:
            return f"{ratio} not clipped"
        if self.loss == "cispo":
            return f"{ratio} at most {self.epsilon_high:g}"
        return f"{ratio} clipped at {self.epsilon_low:g}/{self.epsilon_high:g}"
