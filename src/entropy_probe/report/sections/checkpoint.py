"""What was probed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from entropy_probe.checkpoints import Checkpoint
from entropy_probe.common.evidence import Evidence
from entropy_probe.errors import some_of
from entropy_probe.optimizers.base import PreconditionerTest
from entropy_probe.optimizers.state import AdamState
from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section


@dataclass(frozen=True)
class PreconditionerDots:
    """The validator's test dot of two random vectors, without P and with it."""

    plain_dot: float
    preconditioned_dot: float


@dataclass(frozen=True)
class CheckpointSection(Section):
    """What was probed; None where a live model has no such thing. ``adam_step`` is a list where parameters differ; ``base`` is
    the model under an adapter, or with ``kind`` "full" the folder that the configuration came from."""

    path: str | None
    base: str | None
    kind: str | None
    architecture: str | None
    trainer_step: int | None
    stored_learning_rates: list[float]
    parameters: int
    frozen_parameters: int
    adam_step: int | list[int]
    mapping: str
    preconditioner_test: PreconditionerDots

    @classmethod
    def of_model(cls, model: nn.Module, adam: AdamState, test: PreconditionerTest) -> CheckpointSection:
        """The section of a live model."""
        steps = sorted({moments.step for moments in adam.moments.values()})
        return cls(
            path=None,
            base=None,
            kind=None,
            architecture=None,
            trainer_step=None,
            stored_learning_rates=list(adam.learning_rates),
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            frozen_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            adam_step=steps[0] if len(steps) == 1 else steps,
            mapping="live optimizer, by parameter identity",
            preconditioner_test=PreconditionerDots(test.plain_dot, test.preconditioned_dot),
        )

    @classmethod
    def of_folder(cls, checkpoint: Checkpoint) -> CheckpointSection:
        """The section of a folder."""
        folder = checkpoint.folder
        return replace(
            cls.of_model(checkpoint.model, checkpoint.adam, checkpoint.preconditioner_test),
            path=str(folder.path),
            base=None if folder.base is None else str(folder.base),
            kind=folder.kind,
            architecture=folder.architecture,
            trainer_step=checkpoint.trainer_step,
            mapping=checkpoint.mapping.rule,
        )

    def shown(self, context: Context) -> Sequence[Block]:
        """What trains, and by which names."""
        rows = (
            Row("trainable", f"{self.parameters:,}", f"parameters, {context.dtype}"),
            Row("Adam step", str(self.adam_step), f"names by: {self.mapping}"),
        )
        return (Rows(FACTS, rows),)


def parameter_warnings(untouched: Sequence[str], trained: Sequence[str], rivals: Sequence[str]) -> list[Evidence]:
    """Parameters out of reach, which Adam's moments show that training reached or not, and a mapping that shapes alone could
    not settle."""
    found = []
    if trained:
        found.append(
            Evidence(
                "untouched_parameters",
                f"{len(trained)} trainable parameters are reached by no response, though Adam's moments show that training "
                f"reached them: {some_of(trained)}",
                "No token of this batch was sent to these experts, and they count as zero; a larger batch may reach them",
            )
        )
    untouched = [name for name in untouched if name not in trained]
    if untouched:
        found.append(
            Evidence(
                "untouched_parameters",
                f"{len(untouched)} trainable parameters are reached by no response: {some_of(untouched)}",
                "They count as zero; if they should train, look for a frozen or unused module",
            )
        )
    if rivals:
        found.append(
            Evidence(
                "ambiguous_mapping",
                f"optimizer.pt also fits {some_of(rivals)}, which maps some parameters of equal shape elsewhere",
                "Check with `entropy-probe inspect` that the version named there is the one that wrote it",
            )
        )
    return found
