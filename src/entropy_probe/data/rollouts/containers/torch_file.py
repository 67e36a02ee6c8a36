"""``torch.save`` of samples, as slime writes them: ``{"rollout_id": …, "samples": [{…}, …]}``.

It is read with ``weights_only=True``: nothing pickled is ever executed.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from entropy_probe.errors import InputError, one_line, out_of_memory

NAMED_CODE = re.compile(r"GLOBAL ([\w.]+)")
"""In torch's refusal to unpickle with weights alone: what the file would import."""


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, sample)`` for each sample; ``where`` names the file and its place, from 0.

    Raises:
        InputError: it cannot be loaded without running code, or holds something else.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(_unreadable(path, error)) from error
    samples = saved.get("samples") if isinstance(saved, dict) else None
    if not isinstance(samples, list):
        found = sorted(map(str, saved))[:5] if isinstance(saved, dict) else type(saved).__name__
        raise InputError(f"{path} holds {found}; expected torch.save of a dictionary with a list 'samples'")
    for number, sample in enumerate(samples):
        where = f"{path} sample {number}"
        if not isinstance(sample, dict):
            raise InputError(f"{where} is a {type(sample).__name__}; expected a dictionary")
        yield where, sample


def _unreadable(path: Path, error: Exception) -> str:
    code = NAMED_CODE.search(str(error))
    if code is not None:
        return (
            f"{path} is not read: it names {code.group(1)}, and weights_only=True runs no code; save the samples as plain "
            "lists, numbers, text and tensors"
        )
    return f"{path} cannot be read with weights_only=True ({one_line(error, 160)}); expected torch.save of samples"
