"""What the probe found: a report of sections, a file each, and its renderers: text, metrics, plots, files."""

from entropy_probe.report.files import write_json, write_report_folder
from entropy_probe.report.schema import Report
from entropy_probe.report.sections.adamw import AdamWPart, AdamWSection
from entropy_probe.report.sections.checkpoint import CheckpointSection, PreconditionerDots
from entropy_probe.report.sections.config import ConfigSection
from entropy_probe.report.sections.engine import EngineSection
from entropy_probe.report.sections.entropy import EntropySection
from entropy_probe.report.sections.first_order import FirstOrder
from entropy_probe.report.sections.folds import FoldSection
from entropy_probe.report.sections.needed import NeededSection
from entropy_probe.report.sections.noise import NoiseSection
from entropy_probe.report.sections.ranks import RanksSection, SentSection
from entropy_probe.report.sections.realized import RealizedRow
from entropy_probe.report.sections.sweep import SweepSection
from entropy_probe.report.sections.targets import TargetSection
from entropy_probe.report.sections.two_batches import TwoBatchSection
from entropy_probe.report.sections.units import UnitsSection
from entropy_probe.report.sections.what_if import FallSection, WhatIfRow, WhatIfSection
from entropy_probe.report.sections.zero_v import ZeroVSection

__all__ = [
    "AdamWPart",
    "AdamWSection",
    "CheckpointSection",
    "ConfigSection",
    "EngineSection",
    "EntropySection",
    "FallSection",
    "FirstOrder",
    "FoldSection",
    "NeededSection",
    "NoiseSection",
    "PreconditionerDots",
    "RanksSection",
    "RealizedRow",
    "Report",
    "SentSection",
    "SweepSection",
    "TargetSection",
    "TwoBatchSection",
    "UnitsSection",
    "WhatIfRow",
    "WhatIfSection",
    "ZeroVSection",
    "write_json",
    "write_report_folder",
]
