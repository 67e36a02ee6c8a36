"""AReaL's ``rollout/{version}/{task}.jsonl``: text with its special tokens.

A task's file holds the responses to one prompt. Source: ``_dump_trajectory`` of ``areal/infra/workflow_executor.py``
(August 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entropy_probe.data.rollouts.formats.base import DumpFile, DumpOptions, Text
from entropy_probe.data.rollouts.formats.parts import column
from entropy_probe.errors import InputError

COLUMNS = {"prompt", "completion", "reward", "seqlen", "prompt_len"}


class Areal:
    """``task_id`` names the prompt where it is there."""

    name = "areal"
    title = "AReaL's rollouts"
    takes: frozenset[str] = frozenset()
    special_tokens = True

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns."""
        return row.keys() >= COLUMNS

    def texts(self, files: Sequence[DumpFile], options: DumpOptions) -> Iterator[Text]:
        """The rows of one version of the weights.

        Raises:
            InputError: a response of several versions, or rows of several.
        """
        versions: dict[Any, str] = {}
        for file in files:
            for where, row in file.rows:
                for version in {row.get("head_version"), row.get("tail_version")} - {None}:
                    versions.setdefault(version, where)
                if len(versions) > 1:
                    (_, first), (_, second) = list(versions.items())[:2]
                    raise InputError(
                        f"{second} was sampled with weight versions {', '.join(map(str, versions))} ({first} with the first): "
                        "rows of one batch are one policy's; give the files of one version"
                    )
                columns = {"reward": column(row, "reward", where)}
                if row.get("task_id") is not None:
                    columns["prompt_id"] = str(row["task_id"])
                yield Text(where, column(row, "prompt", where), column(row, "completion", where), columns)
