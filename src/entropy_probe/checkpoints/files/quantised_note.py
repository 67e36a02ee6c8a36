"""What to say of an optimizer that stores its moments in codes: which, and what that does to the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from entropy_probe.checkpoints.files.coded import CodedTensor
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.common.evidence import Evidence


def quantised_note(library: str, entries: Iterable[Mapping[str, Any]], second: str, more: str) -> Evidence:
    """The warning that moments are in codes.

    Args:
        library: who wrote them.
        entries: of all parameters; some hold a :class:`CodedTensor`.
        second: the key of v.
        more: a sentence about this library's step.
    """
    moments = [entry[second] for entry in entries if isinstance(entry.get(second), StoredTensor)]
    coded = [moment for moment in moments if isinstance(moment, CodedTensor)]
    share = sum(math.prod(m.shape) for m in coded) / max(1, sum(math.prod(m.shape) for m in moments))
    first = coded[0]
    bits = 4 if first.packed else 8
    small = f"stored as {'0' if first.has_zero else 'that share'}"
    # Rounding is to the nearer neighbour: below half of the least value there is only zero.
    limit = first.least / 2 if first.has_zero else first.least
    return Evidence(
        "quantised_moments",
        f"{library} stores Adam's moments of {len(coded)} of {len(moments)} tensors ({100 * share:.3g} % of the elements) in "
        f"{bits} bits, with a scale for every {first.block} elements; here they are the numbers that it dequantises. Its step "
        "is computed from these in float32, and m and v are quantised again after it, so this changes the adamw step by 0. "
        f"A v below {limit:.2g} of its block's largest is {small}. {more}",
        "Elements with v = 0 count as elements without a gradient so far, unless zero_v says otherwise; 32-bit moments have "
        "none that were rounded to 0",
    )
