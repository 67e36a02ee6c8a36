"""How to sample."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.errors import InputError


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample: G responses a prompt at temperature τ, at most ``max_new_tokens`` each.

    ``eos_ids`` end a response, and are written into its row. ``batch_size`` responses are generated at a time; it changes which
    random numbers go to which response, so the same seed gives the same rollouts only at the same batch size. Batch j, counted
    from 0 over all ranks, is drawn after ``torch.manual_seed`` of
    ``numpy.random.SeedSequence(seed, spawn_key=(j,)).generate_state(1, numpy.uint64)``:
    on any number of ranks the rollouts are the same.
    """

    responses: int
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    eos_ids: tuple[int, ...] = ()
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse values that no sampler could honour."""
        if self.responses < 2:
            raise InputError(f"{self.responses} responses a prompt; the leave-one-out mean needs at least 2")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; expected a finite number above 0")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; expected 0 to 2^63 - 1")
