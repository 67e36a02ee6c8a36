"""verl's ``{step}.jsonl`` (with ``trainer.rollout_data_dir``): text without special tokens.

Source: ``_dump_generations`` of ``verl/trainer/ppo/ray_trainer.py`` (January 2026); 0.9.1 adds ``uid``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entropy_probe.data.rollouts.formats.base import DumpFile, DumpOptions, Text
from entropy_probe.data.rollouts.formats.parts import column, of_one_step

COLUMNS = {"input", "output", "score", "step"}


class Verl:
    """``uid`` names the prompt where it is there."""

    name = "verl"
    title = "verl's rollout data"
    takes = frozenset({"step"})
    special_tokens = False

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns."""
        return row.keys() >= COLUMNS

    def texts(self, files: Sequence[DumpFile], options: DumpOptions) -> Iterator[Text]:
        """The rows of one step.

        Raises:
            InputError: several steps and none asked for.
        """
        for where, row in of_one_step(files, "step", options):
            columns = {"reward": column(row, "score", where), "step": row["step"]}
            if row.get("uid") is not None:
                columns["prompt_id"] = str(row["uid"])
            yield Text(where, column(row, "input", where), column(row, "output", where), columns)
