"""Versions that a report names."""

from __future__ import annotations

import platform
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a number may depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("entropy-probe", "transformers", "peft", "numpy", "arviz-stats"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
