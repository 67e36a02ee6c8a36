"""Who shared the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entropy_probe.common.files import readable_size
from entropy_probe.ranks.collectives import Kind, Payload
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.base import Context, Section

FEW = 8
"""Ranks whose prompts are shown one by one."""


@dataclass(frozen=True)
class SentSection:
    """Elements and bytes handed to collectives."""

    elements: int
    bytes: int


@dataclass(frozen=True)
class RanksSection(Section):
    """Who shared the work: ``count`` ranks, each with its ``prompts`` and their response ``tokens``, in the order of ranks.

    ``sharding`` is what a rank holds of parameters and Adam's state: all (``replicated``), or its rows (``fsdp2``); null in one
    process, as ``backend`` is without a process group. ``sent`` is, by kind of collective, the most that any rank handed over.
    """

    count: int
    sharding: str | None
    backend: str | None
    prompts: list[int]
    tokens: list[int]
    sent: Mapping[str, SentSection]

    @classmethod
    def of(
        cls, sharding: Sharding, prompts: Sequence[int], tokens: Sequence[int], sent: Mapping[Kind, Payload]
    ) -> RanksSection:
        """The section.

        Args:
            sharding: of the model.
            prompts: dealt to each rank.
            tokens: of their responses.
            sent: by kind, the most that any rank handed over.
        """
        held = "fsdp2" if sharding.sharded else "replicated"
        return cls(
            count=sharding.ranks.count,
            sharding=held if sharding.ranks.count > 1 else None,
            backend=sharding.ranks.backend,
            prompts=list(prompts),
            tokens=list(tokens),
            sent={kind.value: SentSection(payload.elements, payload.bytes) for kind, payload in sent.items()},
        )

    def shown(self, context: Context) -> Sequence[Block]:
        """One row; nothing for one process."""
        if self.count == 1:
            return ()
        dealt = f"{min(self.prompts)} to {max(self.prompts)} prompts each"
        if self.count <= FEW:
            dealt = f"{', '.join(map(str, self.prompts))} prompts"
        sizes = sorted(((sent.bytes, kind) for kind, sent in self.sent.items() if sent.bytes), reverse=True)
        kinds = ", ".join(f"{kind} {readable_size(count)}" for count, kind in sizes)
        most = readable_size(sum(count for count, _ in sizes))
        handed = f"a rank handed over at most {most}{f' ({kinds})' if kinds else ''}"
        return (Rows(FACTS, (Row("ranks", f"{self.count}", f"{self.backend}, {self.sharding}: {dealt}; {handed}"),)),)
