"""``entropy-probe demo | run | replay | sample | convert | inspect``: the commands, each its own file, and how they all end."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn

import typer
from transformers.utils import logging as transformers_logging

from entropy_probe.cli.convert import convert
from entropy_probe.cli.demo import demo
from entropy_probe.cli.inspect import inspect
from entropy_probe.cli.panels import Panelled
from entropy_probe.cli.replay import replay
from entropy_probe.cli.run import run
from entropy_probe.cli.sample import sample
from entropy_probe.errors import InputError
from entropy_probe.ranks.launch import Job
from entropy_probe.ranks.launch import run as run_on_ranks
from entropy_probe.ranks.watch import INTERRUPTED

app = typer.Typer(
    name="entropy-probe",
    help="What will the next optimizer step do to my policy's entropy, how sure are we, and what did it do?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Newer versions of typer carry their own copy of click; this reaches the class of either one.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
ON_SEVERAL_RANKS = {"run", "sample"}

for command in (demo, run, replay, sample, convert, inspect):
    app.command(cls=Panelled)(command)


@app.callback()
def check_ranks(context: typer.Context) -> None:
    """Refuse, before a command begins, one that several ranks would each do whole.

    Raises:
        InputError: torchrun started more than one rank.
    """
    job: Job = context.obj
    if job.count > 1 and context.invoked_subcommand not in ON_SEVERAL_RANKS:
        raise InputError(
            f"{context.invoked_subcommand} runs in one process, and torchrun started {job.count}; leave torchrun out, "
            "or use run or sample"
        )


def main() -> NoReturn:
    """Run the command line: 0, or 2 with one line on stderr for bad input, 130 when interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.warnoptions:
        # Other libraries' warnings are not for the user of a command; `python -W` brings them back.
        warnings.filterwarnings("ignore", module=r"(?!entropy_probe)")
    run_on_ranks(_command, os.environ)


def _command(job: Job) -> int:
    try:
        code = typer.main.get_command(app).main(args=sys.argv[1:] or ["--help"], standalone_mode=False, obj=job)
    except USAGE_ERROR as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        raise InputError(f"{error.format_message()}{where}") from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if code == INTERRUPTED:  # so does typer tell of an interrupt
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
