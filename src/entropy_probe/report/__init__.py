"""What the probe found: the records of schema 1, their terminal form, plots and files."""

from entropy_probe.report.files import write_json, write_report_folder
from entropy_probe.report.schema import (
    CheckpointSection,
    ConfigSection,
    EntropySection,
    FirstOrder,
    RealizedRow,
    Report,
    SweepSection,
    UnitsSection,
    ZeroVSection,
)

__all__ = [
    "CheckpointSection",
    "ConfigSection",
    "EntropySection",
    "FirstOrder",
    "RealizedRow",
    "Report",
    "SweepSection",
    "UnitsSection",
    "ZeroVSection",
    "write_json",
    "write_report_folder",
]
