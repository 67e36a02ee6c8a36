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
    is None where nothing names one; ε is None where nothing gives it.
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
    sampler_weights: str

    def shown(self, context: Context) -> Sequence[Block]:
        """The loss and the temperature."""
        rows = (
            Row("advantages", str(self.advantage), f"length weight {self.length_weight}"),
            Row("temperature", f"{self.temperature:g}"),
        )
        return (Rows(FACTS, rows),)
