"""Whether all ranks were given the same: a SHA-256 of each input, compared between ranks. A sum over ranks of other rollouts,
or under other settings, would be a number of nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from entropy_probe.errors import InputError
from entropy_probe.ranks.collectives import Ranks

CHUNK = 1 << 22
"""Elements whose bits stand as int64 at a time."""
SCATTER = 0x9E3779B97F4A7C15 - 2**64
"""2⁶⁴ over the golden ratio, as a signed integer."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_inputs(ranks: Ranks, parts: Mapping[str, bytes]) -> None:
    """Refuse inputs that differ between ranks; all ranks are told the same. Every rank must call it.

    Args:
        ranks: who compares.
        parts: SHA-256 of each input, 32 bytes, by a name that reads well after "other": rollouts, settings, weights.

    Raises:
        InputError: an input differs from rank 0's; which one, and on which ranks.
    """
    if ranks.count == 1:
        return
    # Names first, of one length on all ranks: an input that only some have would make the second gathering uneven.
    if _differing(ranks, [sha256(json.dumps(list(parts)).encode())])[0]:
        raise InputError("some ranks were given inputs that others were not; give all ranks the same files and options")
    differing = dict(zip(parts, _differing(ranks, list(parts.values())), strict=True))
    found = ", ".join(
        f"{_named(others)} {'was' if len(others) == 1 else 'were'} given other {name} than rank 0"
        for name, others in differing.items()
        if others
    )
    if found:
        raise InputError(f"{found}: all ranks must be given the same files and options")


def digest_of_settings(*settings: object) -> bytes:
    """Of everything that is chosen, which is numbers, names, types, and records of them."""
    return sha256(repr(settings).encode())


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Of weights, by their names, shapes, types and checksums of their bits."""
    return sha256(*(described(name, tensor) for name, tensor in tensors.items()))


def checksum(tensor: Tensor) -> int:
    """Σ wᵢ bᵢ modulo 2⁶⁴: bᵢ the bits of element i as an integer, wᵢ odd and scattered, so that the order counts.

    A sum of integers: no order of summation, of another number of threads or another device, changes it.
    """
    flat = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
    total = 0
    for start in range(0, flat.numel(), CHUNK):
        bits = flat[start : start + CHUNK].to(torch.int64)
        # Integers wrap around. Multiples of i alone are linear in it, and a mirrored tensor may look the same.
        weights = torch.arange(start + 1, start + 1 + bits.numel(), device=bits.device).mul_(SCATTER)
        weights.bitwise_xor_(weights >> 32).mul_(SCATTER).bitwise_or_(1)
        total += int((bits * weights).sum())
    return total % 2**64


def described(name: str, tensor: Tensor) -> bytes:
    """A tensor in one line: name, shape, type and checksum."""
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {checksum(tensor)}\n".encode()


def sha256(*parts: bytes) -> bytes:
    """Of the parts, one after another."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()


def _differing(ranks: Ranks, digests: list[bytes]) -> list[list[int]]:
    """By digest, the ranks whose own is not rank 0's."""
    own = np.array([list(digest) for digest in digests], dtype=np.float64)
    every = ranks.gather_numbers(own)
    unequal = (every != every[0]).any(axis=2)
    return [[int(rank) for rank in np.flatnonzero(unequal[:, part])] for part in range(len(digests))]


def _named(others: list[int]) -> str:
    *most, last = map(str, others)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
