"""TRL's ``completions/completions_{step:05d}.parquet`` (with ``log_completions``): text without special tokens.

Each reward function has a column of its own and weights that the dump does not hold, so that the advantage alone is taken.
Source: ``GRPOTrainer.log`` (TRL 1.10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entropy_probe.data.rollouts.formats.base import DumpFile, DumpOptions, Text
from entropy_probe.data.rollouts.formats.parts import column, of_one_step

COLUMNS = {"step", "prompt", "completion", "advantage"}


class Trl:
    """Rows have no name of their prompt: equal text is one prompt."""

    name = "trl"
    title = "TRL's completions"
    takes = frozenset({"step", "reward_key"})
    special_tokens = False

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns."""
        return row.keys() >= COLUMNS

    def texts(self, files: Sequence[DumpFile], options: DumpOptions) -> Iterator[Text]:
        """The rows of one step.

        Raises:
            InputError: several steps and none asked for, or a reward asked for that is not there.
        """
        for where, row in of_one_step(files, "step", options):
            columns = {"advantage": column(row, "advantage", where), "step": row["step"]}
            if options.reward_key is not None:
                columns["reward"] = column(row, options.reward_key, where)
            yield Text(where, column(row, "prompt", where), column(row, "completion", where), columns)
