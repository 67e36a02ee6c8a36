"""Rows of similar length side by side with a little padding, as the engine runs them, against rows packed end to end.

    python benchmarks/packing.py

Forward and backward into ``.grad`` of the model of ``probe_cost.py``, on the same responses, legs interleaved. Packed rows
stand in one sequence with positions of their own and a mask that keeps them apart; SDPA on a CPU computes what it masks.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from probe_cost import Shape, make_case
from rich.console import Console
from torch import Tensor, nn

from entropy_probe.gradients.batching import strips

REPEATS = 7


@dataclass(frozen=True)
class Batch:
    """Token ids of every row, and which rows the engine puts side by side."""

    model: nn.Module
    rows: list[Tensor]
    strips: list[tuple[int, ...]]

    @property
    def lengths(self) -> list[int]:
        """Positions of every row."""
        return [len(row) for row in self.rows]

    @property
    def padding(self) -> float:
        """Padded positions over real ones."""
        computed = sum(len(strip) * max(self.lengths[row] for row in strip) for strip in self.strips)
        return computed / sum(self.lengths) - 1

    def padded(self) -> None:
        """Strip by strip."""
        for strip in self.strips:
            rows = [self.rows[row] for row in strip]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            kept = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = self.model(input_ids=ids, attention_mask=kept, use_cache=False).logits
            logits.flatten(0, 1)[kept.flatten().nonzero().squeeze(1)].logsumexp(-1).sum().backward()

    def packed(self) -> None:
        """All rows in one sequence."""
        lengths = torch.tensor(self.lengths)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        seen = (owner[:, None] == owner[None, :]) & (positions[:, None] >= positions[None, :])
        logits = self.model(
            input_ids=torch.cat(self.rows)[None],
            position_ids=positions[None],
            attention_mask=seen[None, None],
            use_cache=False,
        ).logits
        logits[0].logsumexp(-1).sum().backward()


def make_batch(longest: int) -> Batch:
    """16 rows of a quarter of ``longest`` positions to all of it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 4, longest + 1, (16,), generator=generator).tolist()
    rows = [torch.randint(3, 2048, (length,), generator=generator) for length in lengths]
    model = make_case(Shape("full", longest)).policy.model
    return Batch(model, rows, strips(range(len(rows)), lengths, [0] * len(rows)))


def main() -> None:
    """Print the ratio for short and for long rows."""
    torch.set_num_threads(2)
    for longest in (128, 512):
        batch = make_batch(longest)
        seconds: dict[str, list[float]] = {"padded": [], "packed": []}
        for repeat in range(REPEATS + 1):
            for name, leg in (("padded", batch.padded), ("packed", batch.packed)):
                batch.model.zero_grad()
                start = time.perf_counter()
                leg()
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
        ratios = sorted(a / b for a, b in zip(seconds["packed"], seconds["padded"], strict=True))
        Console().print(
            f"up to {longest} positions: {len(batch.strips)} strips, padding {100 * batch.padding:.1f} %; packed over padded "
            f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        )


if __name__ == "__main__":
    main()
