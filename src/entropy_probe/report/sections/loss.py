"""The loss that an update is of, as rows and settings say it: a probe's report and a replay's hold it in ``config``."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.report.rows import Row


@dataclass(frozen=True)
class LossConfig:
    """The trainer's loss as it was resolved.

    ``loss`` is None where nothing names one; ε is None where nothing gives it. ``importance_ratios``: the rows hold the
    log-probs to which the trainer takes its ratio; without them it is 1. The step consumes ``update_responses`` of the rows:
    those of ``mini_batch``, or all where that is None.
    """

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

    def loss_rows(self) -> list[Row]:
        """What is in the loss beside the length weight times A ∇S, where there is something."""
        terms = self._terms()
        return [Row("loss", ", ".join([self.loss or "PPO's clip", *terms]))] if terms else []

    @property
    def consumed_words(self) -> str:
        """Which of the rows the update is of, where they say."""
        return (
            ""
            if self.mini_batch is None
            else f"; {self.update_responses} in mini-batch {self.mini_batch}, the update's"
        )

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
