"""``inspect``: the files of a checkpoint, then every trainable parameter with the Adam state that was matched to it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Size

from entropy_probe.adam_preconditioner import AdamState, moments_problem, preconditioner
from entropy_probe.checkpoints import load_adam_state, load_model

FILES = (
    ("config.json", "architecture", True),
    ("adapter_config.json", "PEFT adapter", False),
    ("*.safetensors", "weights", True),
    ("optimizer.pt", "Adam state", True),
    ("trainer_state.json", "training log", False),
    ("tokenizer_config.json", "tokenizer", False),
)


def print_inspection(path: Path, base: Path | None, console: Console) -> bool:
    """Print both tables; whether the checkpoint can be probed.

    Raises:
        InputError: the weights or the optimizer file cannot be read at all.
    """
    if path.is_dir():
        console.print(_files(path))
    folder = load_model(path, base=base)
    console.print(
        f"{folder.kind} checkpoint of a {folder.architecture} model, vocabulary {folder.vocabulary:,}, "
        f"context {folder.context_length or 'unlimited'}" + (f", base {folder.base}" if folder.base is not None else "")
    )
    adam, mapping = load_adam_state(path / "optimizer.pt", folder.model)
    console.print(f"optimizer indices matched to names by: {mapping.rule}")
    for rival in mapping.rivals:
        console.print(f"also accepted, with another order among equal shapes: {rival}")
    if 0.0 in adam.learning_rates:
        console.print("the stored learning rate is 0.0 (end of a schedule?); run needs --learning-rate")
    shapes = {name: p.shape for name, p in folder.model.named_parameters() if p.requires_grad}
    table, sound = _parameters(adam, shapes)
    console.print(table)
    frozen = sum(not p.requires_grad for p in folder.model.parameters())
    console.print(
        f"{len(shapes)} trainable parameters, {frozen} frozen, {len(shapes) - sound} without a usable Adam state"
    )
    return sound == len(shapes)


def _files(path: Path) -> Table:
    adapter = (path / "adapter_config.json").is_file()
    table = Table("file", "for", "found", box=None, pad_edge=False)
    for pattern, purpose, needed in FILES:
        names = sorted(file.name for file in path.glob(pattern))
        required = needed and not (adapter and pattern == "config.json")
        table.add_row(pattern, purpose, ", ".join(names) or ("MISSING" if required else "none (optional)"))
    return table


def _parameters(adam: AdamState, shapes: dict[str, Size]) -> tuple[Table, int]:
    groups = adam.group_of()
    numbers = {name: number for number, group in enumerate(adam.groups) for name in group.names}
    table = Table(box=None, pad_edge=False)
    for column in ("parameter", "shape", "group", "lr", "decay", "step", "median P", "state"):
        table.add_column(column, overflow="fold")
    sound = 0
    for name, shape in shapes.items():
        moments = adam.moments.get(name)
        problem = moments_problem(moments, shape)
        group = groups[name]
        row = [
            name,
            "×".join(map(str, shape)),
            str(numbers[name]),
            f"{group.learning_rate:g}",
            f"{group.weight_decay:g}",
        ]
        if problem is None and moments is not None:
            sound += 1
            row += [str(moments.step), f"{float(preconditioner(moments, group).median()):.3g}", "ok"]
        else:
            row += ["", "", problem or ""]
        table.add_row(*row)
    return table, sound
