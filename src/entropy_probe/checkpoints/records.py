"""What loading gives: a model read from a folder, and with it the Adam state that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.common.evidence import Evidence
from entropy_probe.optimizers.base import PreconditionerTest
from entropy_probe.optimizers.state import AdamState


@dataclass(frozen=True)
class ModelFolder:
    """A causal language model read from a folder.

    ``kind`` is "full" or "lora" (any PEFT adapter); ``base`` is the base model's folder for an adapter, and for full weights
    without a configuration of their own the folder that has it, else None. ``context_length`` is None where the architecture
    sets no limit. ``notes`` is what loading gave cause to warn of. ``configuration`` is where config.json is, if it is neither
    in ``path`` nor in ``base``.
    """

    path: Path
    kind: str
    base: Path | None
    model: nn.Module
    architecture: str
    vocabulary: int | None
    context_length: int | None
    notes: tuple[Evidence, ...] = ()
    configuration: Path | None = None

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """Where a tokenizer may be, first choice first."""
        return tuple(folder for folder in (self.path, self.configuration, self.base) if folder is not None)

    def with_notes(self, notes: tuple[Evidence, ...]) -> ModelFolder:
        """The same with more to warn of."""
        return replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Checkpoint:
    """A model with the Adam state that belongs to it, mapped by name and validated."""

    folder: ModelFolder
    adam: AdamState
    mapping: OptimizerMapping
    preconditioner_test: PreconditionerTest
    trainer_step: int | None

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.folder.model
