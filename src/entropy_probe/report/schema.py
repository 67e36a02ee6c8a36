"""report.json, schema 1: the report, whose fields are its sections. Every number is finite, or null with its reason.

Entropies and their changes are in nats per response, or per token where ``entropy`` says so. Later versions of schema 1 only
add keys. A section is a file of :mod:`entropy_probe.report.sections`; sections are shown in the order of the fields here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.report.metrics import metrics
from entropy_probe.report.rows import FACTS, Block, Row, Rows
from entropy_probe.report.sections.adamw import AdamWSection
from entropy_probe.report.sections.base import Context, Sectioned, all_blocks, records
from entropy_probe.report.sections.checkpoint import CheckpointSection
from entropy_probe.report.sections.config import ConfigSection
from entropy_probe.report.sections.engine import EngineSection
from entropy_probe.report.sections.entropy import EntropySection
from entropy_probe.report.sections.first_order import FirstOrder
from entropy_probe.report.sections.folds import FoldSection
from entropy_probe.report.sections.needed import NeededSection
from entropy_probe.report.sections.noise import NoiseSection
from entropy_probe.report.sections.off_policy import OffPolicySection
from entropy_probe.report.sections.ranks import RanksSection
from entropy_probe.report.sections.realized import RealizedRow
from entropy_probe.report.sections.sweep import SweepSection
from entropy_probe.report.sections.targets import TargetSection
from entropy_probe.report.sections.two_batches import TwoBatchSection
from entropy_probe.report.sections.units import UnitsSection
from entropy_probe.report.sections.what_if import WhatIfSection

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The whole of report.json. ``headline`` is the sentence that a person reads first: of the optimizer's own step."""

    headline: str
    first_order: FirstOrder
    needed: NeededSection
    noise: NoiseSection
    two_batches: TwoBatchSection | None
    folds: FoldSection | None
    adamw: AdamWSection
    off_policy: OffPolicySection
    targets: list[TargetSection]
    what_if: WhatIfSection
    entropy: EntropySection
    realized: list[RealizedRow]
    sweep: list[SweepSection]
    units: UnitsSection
    engine: EngineSection
    checkpoint: CheckpointSection
    config: ConfigSection
    ranks: RanksSection
    warnings: list[Evidence]
    timing: Mapping[str, float]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object.

        Raises:
            AssertionError: a number is not finite, or a null has no reason: a fault of ours.
        """
        return content_of(self, SCHEMA)

    def blocks(self) -> list[Block]:
        """What is shown of it, for a renderer."""
        context = Context(
            nats=self.first_order.nats,
            prompts=self.units.prompts,
            parameters=self.checkpoint.parameters,
            dtype=self.config.dtype,
        )
        return [*all_blocks(self, context), Rows(FACTS, (Row("time", f"{self.timing['total']:.1f} s"),))]

    def metrics(self) -> dict[str, float]:
        """Flat figures for a tracker: see :func:`entropy_probe.report.metrics.metrics`."""
        return metrics(self)


def content_of(report: Sectioned, schema: int) -> dict[str, Any]:
    """The JSON object of a report: its schema's number, and its fields with all that they hold.

    Raises:
        AssertionError: see :func:`check_content`.
    """
    content = asdict(report)
    check_content(report, content)
    return {"schema": schema, **content}


def check_content(report: Sectioned, content: Mapping[str, Any]) -> None:
    """Every number of a report is finite, and every null of a record with ``null_reasons`` has its reason there.

    Records are looked for wherever they stand in the report.

    Args:
        report: whose records are looked at.
        content: the same as mappings and lists.

    Raises:
        AssertionError: not so: a fault of ours.
    """
    for record in records(report):
        values = {field.name: getattr(record, field.name) for field in fields(record)}
        if "null_reasons" not in values:
            continue
        for name, value in values.items():
            assert value is not None or name in values["null_reasons"], f"{name} is null without a reason"
    _assert_finite(content, "report")


def _assert_finite(value: Any, where: str) -> None:
    if isinstance(value, float):
        assert math.isfinite(value), f"{where} is {value}"
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _assert_finite(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _assert_finite(item, f"{where}[{index}]")
