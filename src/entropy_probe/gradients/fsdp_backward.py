"""A gradient of a sharded model by FSDP2's own backward, which leaves every rank its rows and nobody the whole."""

from __future__ import annotations

from torch import Tensor

from entropy_probe.policy import Policy
from entropy_probe.wrappers import held_part


def gradient_rows(policy: Policy, loss: Tensor) -> dict[str, Tensor | None]:
    """This rank's rows of the mean over ranks of each one's ∇ loss, by name; None where no rank's loss reaches the parameter.

    ``.grad`` is afterwards what it was before.
    """
    parameters = policy.trainable()
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        loss.backward()
        return {name: None if p.grad is None else held_part(p.grad) for name, p in parameters.items()}
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
