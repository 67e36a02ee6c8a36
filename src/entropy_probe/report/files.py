"""The report on disk: report.json, kernel.npy and two plots, each written beside and renamed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from entropy_probe.errors import InputError
from entropy_probe.files import check_writable, replacing
from entropy_probe.report.plots import plot_predicted_and_realized, plot_row_means
from entropy_probe.report.schema import Report
from entropy_probe.u_statistics import FloatArray


def check_report_folder(folder: Path) -> None:
    """Refuse, before the work, a folder that cannot be made or written.

    Raises:
        InputError: the path is a file, its parent is missing, or it is read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out takes a folder")
    check_writable(folder / "report.json" if folder.is_dir() else folder)


def write_report_folder(report: Report, kernel: FloatArray | None, folder: Path) -> list[Path]:
    """Write report.json, kernel.npy (K_uw = XS_u · YS_w; only where the matrix exists) and the plots; returns the paths.

    Raises:
        InputError: see :func:`check_report_folder`.
    """
    check_report_folder(folder)
    folder.mkdir(exist_ok=True)
    written = []
    for name, plot in (("predicted_and_realized.png", plot_predicted_and_realized), ("row_means.png", plot_row_means)):
        with replacing(folder / name) as temporary:
            plot(report, temporary)
        written.append(folder / name)
    if kernel is None:
        # A matrix left by an earlier run would be taken for this one's.
        (folder / "kernel.npy").unlink(missing_ok=True)
    else:
        with replacing(folder / "kernel.npy") as temporary, temporary.open("wb") as file:
            np.save(file, kernel)
        written.append(folder / "kernel.npy")
    write_json(report, folder / "report.json")
    return [*written, folder / "report.json"]


def write_json(report: Report, path: Path) -> None:
    """Write report.json to ``path``.

    Raises:
        InputError: the folder is missing or read-only.
    """
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
