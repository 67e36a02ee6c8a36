"""``entropy-probe inspect``: the files of a checkpoint, then every trainable parameter with its matched Adam state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from entropy_probe.checkpoints import Beside
from entropy_probe.checkpoints.inspection import (
    FolderFacts,
    Inspection,
    Listing,
    MatchedParameter,
    inspect_checkpoint,
    list_stored,
    look_into,
)
from entropy_probe.cli.options import (
    BaseOption,
    CheckpointArgument,
    FreezeOption,
    NamesOption,
    QuantizationOption,
    beside,
)
from entropy_probe.cli.output import make_console
from entropy_probe.errors import InputError


def inspect(
    checkpoint: CheckpointArgument,
    base: BaseOption = None,
    names: NamesOption = None,
    base_quantization: QuantizationOption = None,
    freeze: FreezeOption = None,
) -> None:
    """Say what a checkpoint holds and lacks, and map Adam's state parameter by parameter."""
    if not print_inspection(checkpoint, beside(base, names, base_quantization), tuple(freeze or ()), make_console()):
        raise InputError(f"{checkpoint} cannot be probed as it is; the table above says what is missing")


def print_inspection(path: Path, base: Path | Beside | None, freeze: Sequence[str], console: Console) -> bool:
    """Print both tables; whether the checkpoint can be probed, or could be with what is said to be missing.

    Raises:
        InputError: see :func:`entropy_probe.checkpoints.inspection.look_into` and ``inspect_checkpoint``.
    """
    facts = look_into(path, base)
    console.print(_described(facts))
    console.print(_files(facts))
    listing = list_stored(path, base)
    if listing is not None:
        console.print(_stored(listing))
        unnamed = f", {listing.unnamed} Adam states without a name" if listing.unnamed else ""
        console.print(f"{len(listing.parameters)} stored tensors{unnamed}; {listing.reason}")
        return True
    inspection = inspect_checkpoint(path, base, freeze)
    folder, mapping = inspection.folder, inspection.mapping
    console.print(
        f"{folder.kind} checkpoint of a {folder.architecture} model, vocabulary {folder.vocabulary or 'unknown'}, "
        f"context {folder.context_length or 'unlimited'}" + (f", base {folder.base}" if folder.base is not None else "")
    )
    console.print(f"optimizer indices matched to names by: {mapping.rule}")
    for rival in mapping.rivals:
        console.print(f"also accepted, with another order among equal shapes: {rival}")
    for note in folder.notes:
        console.print(f"warning: {note.seen}. {note.advice}")
    if 0.0 in inspection.learning_rates:
        console.print(
            "the stored learning rate is 0.0 (end of a schedule?); run takes the rate that the rows recorded, and needs "
            "--learning-rate where they recorded none"
        )
    console.print(_parameters(inspection))
    console.print(
        f"{len(inspection.parameters)} trainable parameters, {inspection.frozen} frozen, "
        f"{inspection.problems} without a usable Adam state"
    )
    return inspection.problems == 0


def _described(facts: FolderFacts) -> str:
    step = "" if facts.step is None else f", step {facts.step}"
    ranks = "" if facts.world_size is None else f", written by {facts.world_size} rank{'s' * (facts.world_size != 1)}"
    return f"format: {facts.format}{step}{ranks}"


def _files(facts: FolderFacts) -> Table:
    table = Table("file", "for", "found", box=None, pad_edge=False)
    for file in facts.files:
        table.add_row(
            file.pattern, file.purpose, ", ".join(file.names) or ("MISSING" if file.required else "none (optional)")
        )
    return table


def _parameters(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("parameter", "shape", "group", "lr", "decay", "step", "median P", "state"):
        table.add_column(column, overflow="fold")
    for parameter in inspection.parameters:
        table.add_row(*_cells(parameter))
    return table


def _stored(listing: Listing) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("parameter", "shape", "type", "Adam state", "step"):
        table.add_column(column, overflow="fold")
    for parameter in listing.parameters:
        step = "" if parameter.step is None else str(parameter.step)
        shape = "×".join(map(str, parameter.shape))
        table.add_row(parameter.name, shape, parameter.dtype, ", ".join(parameter.moments), step)
    return table


def _cells(parameter: MatchedParameter) -> list[str]:
    return [
        parameter.name,
        "×".join(map(str, parameter.shape)),
        str(parameter.group),
        f"{parameter.learning_rate:g}",
        f"{parameter.weight_decay:g}",
        "" if parameter.step is None else str(parameter.step),
        "" if parameter.median_p is None else f"{parameter.median_p:.3g}",
        parameter.problem or "ok",
    ]
