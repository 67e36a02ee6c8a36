"""What was asked for, as it was resolved. The pipeline fills it, which alone knows the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section
from entropy_probe.report.sections.loss import LossConfig


@dataclass(frozen=True)
class ConfigSection(LossConfig, Section):
    """What was asked for, as it was resolved; the same settings give the same numbers.

    A None is a default: by memory, from the rollouts, or from the checkpoint. ``max_grad_norm`` is 0 where it is known that
    nothing is clipped, None where it is not known. ``freeze`` are the patterns of parameters that training left alone. Of the
    ``responses`` the step consumes ``update_responses``.
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
    responses: int
    sampler_weights: str

    def shown(self, context: Context) -> Sequence[Block]:
        """The loss, which rows the update is of where that can be asked, and the temperature."""
        rows = [Row("advantages", str(self.advantage), f"length weight {self.length_weight}"), *self.loss_rows()]
        if self.mini_batch is not None:
            of = f"{self.update_responses} of {self.responses} responses"
            rows.append(Row("update", f"of mini-batch {self.mini_batch}", of))
        elif self.importance_ratios:
            rows.append(Row("update", f"of all {self.responses} responses", "as one step: no row has a mini_batch"))
        rows.append(Row("temperature", f"{self.temperature:g}"))
        return (Rows(FACTS, rows),)
