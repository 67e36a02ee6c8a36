"""``entropy-probe convert``: a trainer's dump of rollouts as our rows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from entropy_probe.cli.options import FILES, OUTPUT
from entropy_probe.cli.output import make_console
from entropy_probe.common.files import check_writable
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.data.rollouts.formats.base import DumpOptions
from entropy_probe.data.rollouts.formats.registry import NAMES
from entropy_probe.data.rollouts.formats.retokenized import MARK
from entropy_probe.data.rollouts.reading import read_files
from entropy_probe.errors import InputError
from entropy_probe.sampling.tokenizer import load_tokenizer

DUMP = "Dump"
Layout = StrEnum("Layout", {name: name for name in NAMES})  # type: ignore[misc]


def convert(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Files of one dump, or a quoted pattern of their names: one batch."),
    ],
    *,
    layout: Annotated[
        Layout | None,
        typer.Option("--from", help="What wrote it; else it is told by its columns.", rich_help_panel=DUMP),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The step to take of a dump with several, as the dump counts.", rich_help_panel=DUMP
        ),
    ] = None,
    reward_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which of a response's rewards is the trainer's, if several.", rich_help_panel=DUMP
        ),
    ] = None,
    retokenize: Annotated[
        bool,
        typer.Option(
            "--retokenize",
            help="Make token ids of a dump of text. They need not be those that were sampled.",
            rich_help_panel=DUMP,
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the policy's tokenizer, to retokenize.", rich_help_panel=FILES),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Rollouts to write, .jsonl or .parquet.", rich_help_panel=OUTPUT)
    ],
) -> None:
    """Write a training library's dump of rollouts as rows that run and replay take."""
    if out.suffix not in {".jsonl", ".parquet"}:
        raise InputError(f"--out {out} ends in {out.suffix!r}; rollouts are written as .jsonl or .parquet")
    check_writable(out)
    if retokenize != (tokenizer is not None):
        raise InputError("--retokenize and --tokenizer go together: the tokenizer makes ids of a dump's text")
    own = None if tokenizer is None else load_tokenizer([tokenizer])
    if tokenizer is not None and own is None:
        raise InputError(f"--tokenizer {tokenizer} has no tokenizer_config.json; give the folder of the checkpoint")
    read = read_files(files, None if layout is None else layout.value, DumpOptions(step, reward_key), tokenizer=own)
    if read.layout is None:
        raise InputError(
            f"{read.told} holds rows of ours already; give them to run as they are, or say with --from what wrote them"
        )
    if retokenize and not any(note.code == MARK for note in read.notes):
        raise InputError(f"{read.told} holds exact token ids; leave --retokenize out")
    write_rollouts(read.rollouts, out)
    console = make_console()
    prompts = len({row.prompt_id for row in read.rollouts})
    count = f"{len(read.files)} files" if len(read.files) > 1 else "one file"
    console.print(
        f"{len(read.rollouts)} responses to {prompts} prompts written to {out}, from {count} of {read.layout}"
    )
    for note in read.notes:
        console.print(f"note: {note.seen}. {note.advice}")
