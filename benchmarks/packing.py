"""Rows of similar length side by side with a little padding, as the engine runs them, against rows packed end to end.

    python benchmarks/packing.py

Forward and backward into ``.grad`` of the model of ``probe_cost.py``, on the same responses, legs interleaved. Packed rows stand
in one sequence with positions of their own and a mask that keeps them apart; no kernel here takes such a mask without computing
the masked products too.
"""

from __future__ import annotations

import statistics
import time

import torch
from probe_cost import Shape, make_case
from rich.console import Console

from entropy_probe.gradients.batching import strips
from entropy_probe.policy import pad_right

REPEATS = 7


def main() -> None:
    torch.set_num_threads(2)
    console = Console()
    for longest in (128, 512):
        case = make_case(Shape("full", longest))
        model = case.policy.model
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(longest // 4, longest + 1, (16,), generator=generator).sort().values.tolist()
        rows = [torch.randint(3, 2048, (length,), generator=generator) for length in lengths]

        def padded() -> None:
            for strip in strips(range(len(rows)), lengths, [0] * len(rows)):
                length = max(lengths[row] for row in strip)
                ids = torch.stack([torch.nn.functional.pad(rows[row], (0, length - lengths[row])) for row in strip])
                kept = torch.tensor([[t < lengths[row] for t in range(length)] for row in strip])
                backward(model(input_ids=ids, attention_mask=kept.long(), use_cache=False).logits[kept])

        def packed() -> None:
            owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
            positions = torch.cat([torch.arange(length) for length in lengths])
            seen = (owner[:, None] == owner[None, :]) & (positions[:, None] >= positions[None, :])
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            out = model(
                input_ids=torch.cat(rows)[None], position_ids=positions[None], attention_mask=mask, use_cache=False
            )
            backward(out.logits[0])

        def backward(logits: torch.Tensor) -> None:
            logits.logsumexp(-1).sum().backward()

        padding = (
            sum(len(s) * max(lengths[r] for r in s) for s in strips(range(len(rows)), lengths, [0] * len(rows)))
            / sum(lengths)
            - 1
        )
        seconds: dict[str, list[float]] = {"padded": [], "packed": []}
        for repeat in range(REPEATS + 1):
            for name, leg in (("padded", padded), ("packed", packed)):
                model.zero_grad()
                start = time.perf_counter()
                leg()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
        ratios = sorted(a / b for a, b in zip(seconds["packed"], seconds["padded"], strict=True))
        console.print(
            f"up to {longest} positions: padding {100 * padding:.1f} %, packed over padded "
            f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        )


if __name__ == "__main__":
    main()
