"""A digest of an optimizer's state, by which ranks find out whether they hold the same."""

from __future__ import annotations

from collections.abc import Iterable

from entropy_probe.optimizers.state import AdamState
from entropy_probe.ranks.same_inputs import described, sha256


def digest_of_adam(adam: AdamState) -> bytes:
    """Of the groups, and of steps and moments by name."""

    def lines() -> Iterable[bytes]:
        for name, moments in adam.moments.items():
            yield f"{name} {moments.step}\n".encode()
            for tensor in (moments.exp_avg, moments.exp_avg_sq, moments.max_exp_avg_sq):
                yield b"none\n" if tensor is None else described(name, tensor)

    return sha256(repr(adam.groups).encode(), *lines())
