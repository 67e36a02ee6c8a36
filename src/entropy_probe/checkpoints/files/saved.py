"""``torch.save`` files that hold tensors and plain records: mapped, and nothing pickled in them is ever executed.

Training libraries put a few objects of their own beside the tensors: a loss scaler, the place of a parameter in a flat vector,
a random state. Each name of the closed list :data:`PLAIN` is read as a :class:`Record`, which holds what the file says and does
nothing; the library need not be installed. Any other name is refused by torch's ``weights_only=True``.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # registers DTensor with weights_only
from torch import Tensor

from entropy_probe.errors import InputError, one_line, out_of_memory


class Record:
    """An object of a library that is read as what it holds: ``arguments`` it was made with, and ``state`` put into it."""

    def __init__(self, *arguments: object) -> None:
        """Keep what the object was made with."""
        self.arguments = arguments
        self.state: Mapping[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        """Keep what was put into the object."""
        self.arguments = getattr(self, "arguments", ())
        self.state = state if isinstance(state, dict) else {}


PLAIN = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    # Random states of numpy, which open-instruct saves beside DeepSpeed's.
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)
"""All names beyond torch's own that a file may hold."""

NAMED = re.compile(r"GLOBAL ([\w.]+)")
"""In torch's refusal: what the file would import."""


@dataclass(frozen=True)
class Saved:
    """What a file holds. ``mapped``: whether its tensors are pages of the file, which are read when they are looked at."""

    path: Path
    content: Any
    mapped: bool


def read_saved(path: Path, expected: str) -> Saved:
    """Map a file.

    Args:
        path: of the file.
        expected: what it should be, in words, for the refusal.

    Raises:
        InputError: no file, damaged, or with anything but tensors and plain records in it.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected {expected}")
    try:
        with torch.serialization.safe_globals([(Record, name) for name in PLAIN]), _without_advice():
            try:
                return Saved(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True), mapped=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                # The container before torch 1.6, which cannot be mapped.
                return Saved(path, torch.load(path, map_location="cpu", weights_only=True), mapped=False)
    except Exception as error:  # damaged pickles raise anything
        if out_of_memory(error):
            raise
        code = NAMED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is not None:
            raise InputError(
                f"{path} is not read: it names {code.group(1)}, which is neither a tensor nor a plain record; "
                f"weights_only=True ran no code of it; expected {expected}"
            ) from error
        raise InputError(f"{path} cannot be read ({one_line(error, 160)}); expected {expected}") from error


def dictionary(saved: Saved, *keys: str, of: str) -> Mapping[str, Any]:
    """The dictionary under these keys, one inside the other.

    Raises:
        InputError: something else is there.
    """
    found: Any = saved.content
    for number, key in enumerate((None, *keys)):
        found = found if key is None else found.get(key)
        if not isinstance(found, Mapping):
            where = f" under {'.'.join(keys[:number])}" if number else ""
            raise InputError(f"{saved.path} holds a {type(found).__name__}{where}; expected {of}")
    mapping: Mapping[str, Any] = found
    return mapping


def forget(tensor: Tensor) -> None:
    """Take a mapped file's pages out of this process's memory; they are read again where they are looked at again.

    Whoever reads the files of many ranks would hold all of them else. Only for contiguous tensors of a :class:`Saved` that is
    mapped, which nobody has written to: memory of another kind would be lost.
    """
    start, length = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE - first
    advise = _advise()
    if whole > 0 and advise is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(whole), ctypes.c_int(mmap.MADV_DONTNEED))


@cache
def _advise() -> Any:
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else None


@contextmanager
def _without_advice() -> Iterator[None]:
    """torch warns of meshes that are read without a process group, which is what is wanted here."""
    log = logging.getLogger("torch.distributed.device_mesh")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
