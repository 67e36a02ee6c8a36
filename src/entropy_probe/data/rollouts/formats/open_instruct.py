"""open-instruct's traces, ``{run}_rollouts_{shard:06d}.jsonl`` (with ``save_traces``): exact token ids, a shard of many steps.

Source: ``RolloutRecord`` and ``_save_rollouts`` of ``open_instruct/rl_utils.py`` (August 2026).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts.formats.base import Converted, DumpFile, DumpOptions
from entropy_probe.data.rollouts.formats.parts import column, of_one_step
from entropy_probe.errors import InputError

COLUMNS = {"step", "prompt_idx", "prompt_tokens", "response_tokens", "reward", "advantage", "finish_reason"}


class OpenInstruct:
    """``prompt_idx`` counts within a step, so that both name a prompt. Steps count from 0 there: dump step N starts from
    checkpoint N."""

    name = "open-instruct"
    title = "open-instruct's traces"
    takes = frozenset({"step"})

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns."""
        return row.keys() >= COLUMNS

    def convert(self, files: Sequence[DumpFile], options: DumpOptions) -> Converted:
        """The rows of one step.

        Raises:
            InputError: several steps and none asked for, or a row that called tools: the dump does not say which of its tokens
                the policy drew.
        """
        rows = [(where, _row(where, row)) for where, row in of_one_step(files, "step", options)]
        made = sum("logprobs" not in row for _, row in rows)
        notes = []
        if made:
            notes.append(
                Evidence(
                    "dump_without_log_probs",
                    f"{made} of {len(rows)} rows of the dump have no log-probs of their sampler",
                    "Nothing, where the sampler was this checkpoint; else they count as its own",
                )
            )
        return Converted(rows, notes)


def _row(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    info = row.get("request_info") or {}
    if not isinstance(info, Mapping):
        raise InputError(f"{where}: request_info is a {type(info).__name__}; expected a mapping or null")
    if info.get("num_calls") or info.get("tool_calleds"):
        raise InputError(
            f"{where} called tools, and open-instruct's traces do not say which of its tokens the tools wrote; record such "
            "rows at the step (entropy_probe.integrations.rows), or draw rows with `entropy-probe sample`"
        )
    found: dict[str, Any] = {
        "prompt_id": f"{row['step']}/{column(row, 'prompt_idx', where)}",
        "prompt_ids": column(row, "prompt_tokens", where),
        "response_ids": column(row, "response_tokens", where),
        "reward": row.get("reward"),
        "advantage": row.get("advantage"),
        "step": row["step"] + 1,
        "cut": row.get("finish_reason") == "length",
    }
    log_probs = row.get("logprobs")
    # An empty response gets an end token of the trainer's own, with NaN.
    if log_probs is not None and not any(isinstance(value, float) and math.isnan(value) for value in log_probs):
        found["logprobs"] = log_probs
    for name in ("dataset", "sample_idx"):
        if row.get(name) is not None:
            found[name] = row[name]
    return found
