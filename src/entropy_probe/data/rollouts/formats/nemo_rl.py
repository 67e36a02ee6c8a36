"""NeMo-RL's ``train_data_step{N}.jsonl``: exact token ids, padded on the right, with masks and log-probs over the sequence.

Source: ``log_batched_dict_as_jsonl`` of ``nemo_rl/utils/logger.py`` and its calls in ``nemo_rl/algorithms/grpo.py``
(August 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts.formats.base import Converted, DumpFile, DumpOptions
from entropy_probe.data.rollouts.formats.parts import (
    Numbers,
    column,
    column_of,
    drawn_of,
    log_probs_at,
    masks_of,
    one_if_equal,
    span_of,
)
from entropy_probe.errors import InputError

COLUMNS = {"token_ids", "token_loss_mask", "input_lengths"}
OF_TEXT = {"content", "rewards", "generation_logprobs", "input_lengths"}
"""What versions before token ids were written have."""
STEP = re.compile(r"train_data_step(\d+)")


class NemoRL:
    """Rows have no name of their prompt: equal prompt ids are one prompt. ``step`` is that of the file's name."""

    name = "nemo-rl"
    title = "NeMo-RL's train data"
    takes = frozenset({"step"})

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns; also of older versions, which are then refused."""
        return row.keys() >= COLUMNS or row.keys() >= OF_TEXT

    def convert(self, files: Sequence[DumpFile], options: DumpOptions) -> Converted:
        """Sequences cut at their lengths and split where their own tokens begin.

        Raises:
            InputError: files of several steps, or a version that wrote text alone.
        """
        steps = {_step(file.path) for file in files}
        if len(steps) > 1 or (options.step is not None and steps != {options.step}):
            listed = ", ".join(sorted(map(str, steps)))
            raise InputError(
                f"{files[0].path} and what was given with it are of steps {listed} by their names; one batch is what one "
                "step consumed: give the files of one"
            )
        prompts, (step,) = Numbers(), steps
        rows = [(where, _row(where, row, prompts, step)) for file in files for where, row in file.rows]
        # With force_on_policy_ratio the trainer computes none, and stores zeros.
        if all(not any(row["old_logprobs"]) for _, row in rows):
            for _, row in rows:
                del row["old_logprobs"]
        return Converted(rows, _notes(rows))


def _row(where: str, row: Mapping[str, Any], prompts: Numbers, step: int | None) -> dict[str, Any]:
    if "token_ids" not in row:
        raise InputError(
            f"{where} has text and no token_ids, as older versions of NeMo-RL wrote it, and not what was sampled; draw exact "
            "rows from the checkpoint itself (`entropy-probe sample`), or record them at the step "
            "(entropy_probe.integrations.rows)"
        )
    length = column(row, "input_lengths", where)
    padded = column(row, "token_ids", where)
    if isinstance(length, bool) or not isinstance(length, int) or not isinstance(padded, list) or length > len(padded):
        raise InputError(f"{where}: input_lengths is {length!r} for {len(padded)} token_ids; is the file whole?")

    def cut(name: str) -> list[Any]:
        return column_of(row, name, len(padded), where)[:length]

    mask, sampler = cut("token_loss_mask"), cut("generation_logprobs")
    drawn = drawn_of(mask, sampler)
    span = span_of(drawn, where)
    left_out = row.get("sample_loss_mask", 1) == 0
    mask, drawn = [0] * (span.last - span.first) if left_out else span.of(mask), span.of(drawn)
    found: dict[str, Any] = {
        "prompt_id": prompts.of(tuple(padded[: span.first])),
        "prompt_ids": padded[: span.first],
        "response_ids": span.of(padded),
        "reward": row.get("rewards"),
        "logprobs": log_probs_at(span.of(sampler), drawn),
        "old_logprobs": log_probs_at(span.of(cut("prev_logprobs")), drawn),
        **masks_of(mask, drawn),
    }
    advantages = row.get("advantages")
    if isinstance(advantages, list):
        found["advantage"] = one_if_equal(span.of(cut("advantages")), mask)
    elif advantages is not None:
        found["advantage"] = advantages
    if step is not None:
        found["step"] = step
    if row.get("idx") is not None:
        found["idx"] = row["idx"]
    return found


def _step(path: Path) -> int | None:
    found = STEP.search(path.name)
    return None if found is None else int(found.group(1))


def _notes(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Evidence]:
    if all("advantage" in row for _, row in rows):
        return []
    return [
        Evidence(
            "dump_without_advantages",
            "the dump has no advantages, which are then made of the rewards",
            "Set the advantage to your trainer's",
        )
    ]
