"""Does a state fit the model: every trainable parameter has moments of its shape, and a test dot through P is finite.

The test vectors z and w are standard normal, the same for every run with a seed and however the parameters are sharded, and
the two dots are Σ z w and Σ z P w over all elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from entropy_probe.errors import InputError
from entropy_probe.optimizers.base import PreconditionerTest
from entropy_probe.optimizers.preconditioner import Preconditioners, ZeroV
from entropy_probe.optimizers.state import AdamState, moments_problem
from entropy_probe.ranks.sharding import WHOLE, Sharding


def validate_preconditioner(
    state: AdamState,
    shapes: Mapping[str, torch.Size],
    *,
    seed: int = 0,
    zero_v: ZeroV = ZeroV.LEAVE_OUT,
    sharding: Sharding = WHOLE,
) -> PreconditionerTest:
    """Every trainable parameter has a usable v, and a dot product through P is finite.

    Args:
        state: the optimizer's state by name.
        shapes: the whole shape of every trainable parameter, by name.
        seed: of the two test vectors; the global random state is not touched.
        zero_v: P where v is 0.
        sharding: where a rank holds rows of the moments alone, the dots are summed over ranks.

    Raises:
        InputError: names the first parameter whose state is missing, mis-shaped, NaN, infinite or negative, or at t = 0; of
            shards on all ranks, whichever's it is. Or every element of every parameter is left out of P.
    """
    preconditioners = Preconditioners(state, zero_v)
    if sharding.sharded:
        own = sharding.ranks.alike(lambda: _test_dots(preconditioners, shapes, seed, sharding))
        plain, weighted, kept = map(float, sharding.ranks.sum_numbers(np.array(own)))
    else:
        plain, weighted, kept = _test_dots(preconditioners, shapes, seed, sharding)
    if shapes and kept == 0:
        raise InputError(
            "Adam's v (exp_avg_sq) is 0 in every element of every trainable parameter, so there is no preconditioner; "
            "expected the state after a step with a gradient: train one, or set zero_v to guide, which takes 1/ε for all"
        )
    return PreconditionerTest(plain, weighted)


def _test_dots(
    preconditioners: Preconditioners, shapes: Mapping[str, torch.Size], seed: int, sharding: Sharding
) -> tuple[float, float, float]:
    """The dot without P and with it, and how many elements are in P, of what this rank holds."""
    state = preconditioners.state
    groups = state.group_of()
    plain = weighted = kept = 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        span = sharding.own(name) if sharding.sharded else slice(0, math.prod(shape))
        problem = moments_problem(state.moments.get(name) if name in groups else None, sharding.held(name, shape))
        if problem is not None:
            raise InputError(f"parameter {name}: {problem}")
        if groups[name].eps == 0.0 and bool(preconditioners.zeros(name).any()):
            raise InputError(
                f"parameter {name}: v holds zeros and ε is 0.0, so that the optimizer divides by zero there; expected an ε "
                "above 0"
            )
        dot = 0.0
        for chunk, part in _chunks(span):
            skipped, count = part.start - chunk * CHUNK, part.stop - chunk * CHUNK
            left, right = (normal_chunk(seed, number, vector, chunk, count)[skipped:] for vector in (0, 1))
            product = left * right
            p = preconditioners.chunk(name, slice(part.start - span.start, part.stop - span.start)).cpu()
            plain += float(product.sum())
            dot += float(product @ p)
            kept += float(torch.count_nonzero(p))
        if not math.isfinite(dot):
            raise InputError(
                f"parameter {name}: a dot product through 1/(√v̂ + ε) is {dot}; v is too near to zero for an ε of "
                f"{groups[name].eps}"
            )
        weighted += dot
    return plain, weighted, kept


CHUNK = 1 << 20
"""Elements of a test vector that come from one generator: part of what the vectors are, so not to be tuned."""


def normal_chunk(seed: int, parameter: int, vector: int, chunk: int, count: int) -> Tensor:
    """The first ``count`` standard normal numbers, float64, of one chunk of a test vector.

    Args:
        seed: of all test vectors.
        parameter: its number in the mapping.
        vector: 0 for the left one, 1 for the right one.
        chunk: elements from ``chunk`` · ``CHUNK`` on.
        count: how many, up to ``CHUNK``.
    """
    # A counter of four words, the lowest first, of which drawing moves the lower two: no two chunks share a number.
    generator = np.random.Generator(np.random.Philox(key=[seed, parameter], counter=[0, 0, vector, chunk]))
    return torch.from_numpy(generator.standard_normal(count))


def _chunks(span: slice) -> Iterator[tuple[int, slice]]:
    """Every chunk that a span overlaps, by its number, with the flat elements that both hold."""
    for chunk in range(span.start // CHUNK, -(-span.stop // CHUNK)):
        part = slice(max(span.start, chunk * CHUNK), min(span.stop, (chunk + 1) * CHUNK))
        if part.start < part.stop:
            yield chunk, part
