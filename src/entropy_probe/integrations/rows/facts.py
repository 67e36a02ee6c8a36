"""What the tensors of a step do not tell of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entropy_probe.data.rollouts import PromptId
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.loss import TrainersLoss


@dataclass(frozen=True)
class StepFacts:
    """What a caller says of a step beside its tensors. Sequences have one value a row, in the tensors' order.

    Attributes:
        prompts: the name of each row's prompt (verl's and SkyRL's ``uid``): rows of one name are responses to one prompt. None:
            rows whose prompts have the same ids are.
        rewards: of each row; None for those that the trainer keeps beside the tensors, where it does.
        temperature: at which all rows were sampled, and by which the trainer divides its logits. prime-rl's tensors hold it.
        loss: the trainer's; None leaves it to whoever reads the rows.
        mini_batches: the optimizer step of each row, among those that share a batch; None: one step consumes all.
        micro_batches: the micro-batch of each row.
        cut: whether the length limit ended the row; None for what the trainer says beside the tensors, where it does.
        step: the optimizer step that consumes the rows: N + 1 for checkpoint N.
        eos_ids: the ids at which the sampler stops; () for none.

    Example:
        >>> from entropy_probe.integrations.rows import StepFacts, VERL_DEFAULTS
        >>> facts = StepFacts(prompts=["a", "a", "b", "b"], temperature=1.0, loss=VERL_DEFAULTS)
    """

    prompts: Sequence[PromptId] | None = None
    rewards: Sequence[float] | None = None
    temperature: float | None = None
    loss: TrainersLoss | None = None
    mini_batches: Sequence[int] | None = None
    micro_batches: Sequence[int] | None = None
    cut: Sequence[bool] | None = None
    step: int | None = None
    eos_ids: Sequence[int] | None = None

    def check_rows(self, rows: int) -> None:
        """Refuse a sequence that has not one value a row.

        Raises:
            InputError: it has not; it is named.
        """
        for name in ("prompts", "rewards", "mini_batches", "micro_batches", "cut"):
            values = getattr(self, name)
            if values is not None and len(values) != rows:
                raise InputError(
                    f"{name} has {len(values)} values, and the tensors have {rows} rows; expected one each"
                )

    def of_row(self, row: int) -> dict[str, Any]:
        """The columns of a row that these facts say."""
        each = {
            "reward": self.rewards,
            "mini_batch": self.mini_batches,
            "micro_batch": self.micro_batches,
            "cut": self.cut,
        }
        found: dict[str, Any] = {name: values[row] for name, values in each.items() if values is not None}
        return found | {"temperature": self.temperature, "step": self.step, "eos_ids": self.eos_ids}
