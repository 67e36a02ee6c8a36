"""The computed tables of ``docs/scaling.md``, from ``scaling_formulas.py``; nothing is measured.

    python benchmarks/scaling_page.py docs/scaling.md

Fills what stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import scaling_formulas as formulas
from scaling_formulas import CHOICES, FLOAT32, Asked, Batch, Choice, Cost, Machine, Memory, Model

from entropy_probe.gradients import Storage
from entropy_probe.gradients.plan import LEAST_BLOCKS, VECTOR_SHARE
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks.collectives import Kind

BATCH = Batch()
NODE, CLUSTER = 8, 64
BFLOAT16 = 2
MACHINE = Machine()
ROW = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Way:
    """A choice, with a unit a prompt or with as many blocks as fit."""

    choice: Choice
    in_blocks: bool = False

    def batch(self, model: Model, ranks: int, vectors: int) -> Batch:
        """In its units: 16 blocks or more, as their vectors fill half of what weights leave, and at best a multiple of N."""
        if not self.in_blocks:
            return BATCH
        free = MACHINE.room - FLOAT32 * model.parameters / ranks
        fit = int(VECTOR_SHARE * free * ranks / (2 * vectors * model.trained))
        return replace(BATCH, units=min(BATCH.prompts, max(LEAST_BLOCKS, fit - fit % ranks if fit >= ranks else fit)))


EXACT_WAYS = [Way(choice) for choice in CHOICES]
WAYS = [*EXACT_WAYS, Way(Choice(ShardingChoice.FSDP2, Storage.STORED), in_blocks=True)]


@dataclass(frozen=True)
class Fitted:
    """A way with given options, and what it then takes."""

    name: str
    options: str
    memory: Memory
    cost: Cost

    @property
    def fits(self) -> bool:
        """Whether into a GPU's memory."""
        return self.memory.peak <= MACHINE.room


GAIN = 0.9
"""Vectors in bfloat16 must take less than this share of the time to be preferred where both fit."""


def with_options(way: Way, model: Model, ranks: int, *, noise: bool, vectors: int) -> Fitted:
    """With or without the noise, and so many bytes an element of a vector."""
    asked, batch = Asked(noise=noise), way.batch(model, ranks, vectors)
    said = [*(["bfloat16"] if vectors == BFLOAT16 else []), *([] if noise else ["`--no-noise`"])]
    return Fitted(
        f"{way.choice.name}, {batch.units} blocks" if way.in_blocks else way.choice.name,
        ", ".join(said) or "as it is",
        formulas.memory(way.choice, model, batch, ranks, asked, vectors),
        formulas.seconds(way.choice, model, batch, ranks, asked, vectors, MACHINE),
    )


def fitted(way: Way, model: Model, ranks: int) -> Fitted:
    """The options under which it fits, the noise kept if it can be; or the least that there is."""
    for noise in (True, False) if way.choice.stored else (True,):  # streamed, the noise is not split anyway
        wide, narrow = (with_options(way, model, ranks, noise=noise, vectors=v) for v in (FLOAT32, BFLOAT16))
        if wide.fits and not (narrow.fits and narrow.cost.total < GAIN * wide.cost.total):
            return wide
        if narrow.fits:
            return narrow
    return narrow


def models() -> str:
    """Elements by model."""
    lines = ["| model | parameters | n, trained | a layer | outside of layers |", "|---|---|---|---|---|"]
    lines += [
        f"| {m.name} | {m.parameters / 1e9:.2f} B | {m.trained / 1e9:.3g} B | {m.layer / 1e6:.0f} M | {m.root / 1e6:.0f} M |"
        for m in formulas.MODELS
    ]
    return "\n".join(lines)


def payloads() -> str:
    """Gigabytes that a rank hands over."""
    head = ["model", "sharding, vectors", "shards", "sums", "directions", "FSDP2's own"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in formulas.MODELS:
        for way in EXACT_WAYS:
            columns = []
            for ranks in NODE, CLUSTER:
                kinds = formulas.handed_over(way.choice, model, BATCH, ranks, Asked(), FLOAT32)
                gathered = formulas.gathers(way.choice, BATCH, ranks, Asked()) * FLOAT32 * model.parameters
                own = [kinds[kind] for kind in (Kind.SHARDS, Kind.SUMS, Kind.DIRECTIONS)]
                columns.append([gigabytes(v) for v in (*own, gathered * (ranks - 1) / ranks)])
            cells = [a if a == b else f"{a} / {b}" for a, b in zip(*columns, strict=True)]
            lines.append(f"| {model.name} | {way.choice.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(ranks: int) -> str:
    """Memory and seconds of every model and way."""
    head = [
        "model",
        "sharding, vectors",
        "vectors, GB",
        "gradients, GB",
        "after, GB",
        "fits",
        "gradients, s",
        "the rest, s",
        "handed over, s",
        "FSDP2's own, s",
        "P on the host, s",
        "in all, min",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in formulas.MODELS:
        # Where all prompts' vectors fit, blocks have no point.
        ways = EXACT_WAYS if fitted(WAYS[2], model, ranks).fits else WAYS
        found = [fitted(way, model, ranks) for way in ways]
        fastest = min((f.cost.total for f in found if f.fits), default=None)
        for f in found:
            m, c = f.memory, f.cost
            total = f"{c.total / 60:.1f}"
            if not f.fits:
                total = f"({total})"
            elif c.total == fastest:
                total = f"**{total}**"
            sizes = [short(value / 1e9) for value in (m.vectors, m.gradients, m.realised)]
            times = [short(value) for value in (c.gradients, c.rest, c.payload, c.gathers, c.host)]
            lines.append(
                "| " + " | ".join([model.name, f.name, *sizes, f.options if f.fits else "**no**", *times, total]) + " |"
            )
    return "\n".join(lines)


def short(value: float) -> str:
    """Two digits, or all before the point."""
    return "0" if value == 0 else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def gigabytes(value: float) -> str:
    """Of bytes."""
    return short(value / 1e9)


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "payloads": payloads,
    "node": lambda: costs(NODE),
    "cluster": lambda: costs(CLUSTER),
}


def filled(page: str) -> str:
    """The page with new tables.

    Raises:
        KeyError: it asks for a table that there is not.
    """
    return ROW.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    args.page.write_text(filled(args.page.read_text()))


if __name__ == "__main__":
    main()
