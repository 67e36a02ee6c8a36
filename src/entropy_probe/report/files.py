"""The report on disk: report.json, kernel.npy and its plots, each written beside and renamed."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.files import check_writable, replacing
from entropy_probe.errors import InputError
from entropy_probe.report.replay_schema import ReplayReport
from entropy_probe.report.schema import Report


def check_report_folder(folder: Path) -> None:
    """Refuse, before the work, a folder that cannot be made or written.

    Raises:
        InputError: the path is a file, its parent is missing, or it is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder for the report")
    check_writable(folder / "report.json" if folder.is_dir() else folder)


def write_report_folder(report: Report, kernel: FloatArray | None, folder: Path) -> list[Path]:
    """Write report.json, kernel.npy (K_uw = XS_u · YS_w) and sweep.png where there is one, and two plots; returns the paths.

    All are written beside before the first is renamed: an exception leaves the folder as it was, or no folder if it is new.

    Raises:
        InputError: see :func:`check_report_folder`.
    """
    # Plots are the one use of matplotlib, which is slow to import.
    from entropy_probe.report.plots import plot_predicted_and_realized, plot_row_means, plot_sweep

    check_report_folder(folder)
    paths = [folder / name for name in ("report.json", "row_means.png", "predicted_and_realized.png")]
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with ExitStack() as outputs:
            # They are renamed last to first, report.json at the end.
            report_json, row_means, predicted = (outputs.enter_context(replacing(path)) for path in paths)
            report_json.write_text(_to_json(report), encoding="utf-8")
            plot_row_means(report, row_means)
            plot_predicted_and_realized(report, predicted)
            if kernel is not None:
                paths.append(folder / "kernel.npy")
                with outputs.enter_context(replacing(paths[-1])).open("wb") as file:
                    np.save(file, kernel)
            if report.sweep:
                paths.append(folder / "sweep.png")
                plot_sweep(report, outputs.enter_context(replacing(paths[-1])))
        # What an earlier run left would be taken for this one's.
        for name in ("kernel.npy", "sweep.png"):
            if folder / name not in paths:
                (folder / name).unlink(missing_ok=True)
    except BaseException:
        if made:
            for path in paths:
                path.unlink(missing_ok=True)
            folder.rmdir()
        raise
    return paths


def write_json(report: Report | ReplayReport, path: Path) -> None:
    """Write a report's JSON to ``path``.

    Raises:
        InputError: the folder is missing or read-only.
    """
    text = _to_json(report)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _to_json(report: Report | ReplayReport) -> str:
    return json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
