"""prime-rl's token exports, ``token_exports/step_N/rank_R.jsonl`` (with ``enable_token_export``): a sequence a line.

Its micro-batches, which its transport stores as msgpack, are not read. Source: ``TokenExporter`` of
``prime_rl/trainer/rl/token_export.py`` and ``compute_loss`` of ``loss.py`` beside it (August 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.data.rollouts.formats.base import Converted, DumpFile, DumpOptions
from entropy_probe.data.rollouts.formats.parts import (
    Numbers,
    Span,
    column,
    column_of,
    drawn_of,
    log_probs_at,
    masks_of,
    of_one_step,
    one_if_equal,
    span_of,
)
from entropy_probe.errors import InputError

COLUMNS = {"token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs", "advantages"}


class PrimeRL:
    """No reward and no prompt's name: advantages are given, and equal prompt ids are one prompt.

    Tokens that its trust region leaves out (``is_masked``) have ``token_weight`` 0: they stay in what the loss divides by.
    """

    name = "prime-rl"
    title = "prime-rl's token exports"
    takes = frozenset({"step"})

    def recognises(self, row: Mapping[str, Any]) -> bool:
        """By its columns."""
        return row.keys() >= COLUMNS

    def convert(self, files: Sequence[DumpFile], options: DumpOptions) -> Converted:
        """The sequences of all ranks as one batch, split where their own tokens begin.

        Raises:
            InputError: several steps and none asked for, or sequences with another loss than the policy's.
        """
        prompts = Numbers()
        rows = [(where, _row(where, row, prompts)) for where, row in of_one_step(files, "step", options)]
        return Converted(rows, [_RATIO])


_RATIO = Evidence(
    "dump_ratio",
    "prime-rl multiplies a token's loss by the ratio of its trainer's to its sampler's probability, which is in logprobs and "
    "old_logprobs and not in the loss of these rows",
    "Where it matters give the rows importance_sampling_mode token_truncate",
)


def _row(where: str, row: Mapping[str, Any], prompts: Numbers) -> dict[str, Any]:
    tokens = column(row, "token_ids", where)
    if not isinstance(tokens, list):
        raise InputError(f"{where}: token_ids is a {type(tokens).__name__}; expected a list")

    def whole(name: str) -> list[Any]:
        return column_of(row, name, len(tokens), where)

    _refuse_other_losses(row, where)
    weights = _optional(row, "rl_weights", len(tokens), where)
    sampler, mask = whole("inference_logprobs"), whole("loss_mask")
    drawn = drawn_of(mask, sampler)
    if weights is not None:
        mask = [bool(kept) and weight != 0 for kept, weight in zip(mask, weights, strict=True)]
    span = span_of(drawn, where)
    mask, drawn = span.of(mask), span.of(drawn)
    advantages = [0.0 if value is None else value for value in span.of(whole("advantages"))]
    if any(value is None and kept for value, kept in zip(span.of(whole("advantages")), mask, strict=True)):
        raise InputError(f"{where}: advantages is null at a token in the loss; is the file whole?")
    found: dict[str, Any] = {
        "prompt_id": prompts.of(tuple(tokens[: span.first])),
        "prompt_ids": tokens[: span.first],
        "response_ids": span.of(tokens),
        "advantage": one_if_equal(advantages, mask),
        "logprobs": log_probs_at(span.of(sampler), drawn),
        "old_logprobs": log_probs_at(span.of(whole("trainer_logprobs")), drawn),
        **masks_of(mask, drawn),
        **_weights(row, weights, span, len(tokens), where),
    }
    reward = {value for value in _optional(row, "rewards", len(tokens), where) or () if value is not None}
    if len(reward) == 1:
        found["reward"] = reward.pop()
    if "export_step" not in row:  # versions with it count steps of several runs
        found["step"] = row["step"]
    if row.get("env_name") is not None:
        found["env_name"] = row["env_name"]
    return found


def _optional(row: Mapping[str, Any], name: str, count: int, where: str) -> list[Any] | None:
    """A column of which every value may be null: then there is none."""
    if row.get(name) is None:
        return None
    found = column_of(row, name, count, where)
    return None if all(value is None for value in found) else found


def _weights(
    row: Mapping[str, Any], weights: list[Any] | None, span: Span, count: int, where: str
) -> dict[str, list[float]]:
    """What multiplies a token's loss, where it is not 1."""
    outside = _optional(row, "is_masked", count, where)
    own = [1.0] * count if weights is None else [1.0 if weight is None else float(weight) for weight in weights]
    if outside is not None:
        own = [0.0 if left_out else weight for weight, left_out in zip(own, outside, strict=True)]
    found = span.of(own)
    return {} if all(weight == 1.0 for weight in found) else {"token_weight": found}


def _refuse_other_losses(row: Mapping[str, Any], where: str) -> None:
    for name in ("ce_weights", "ref_kl_weights"):
        if any(row.get(name) or ()):
            raise InputError(
                f"{where} has {name}: a term of the loss that is not the policy's, and rows cannot say; probe a run without"
            )
    for token in row.get("losses") or ():
        others = [loss for loss, said in token.items() if loss != "rl" and said.get("mask")]
        if others:
            raise InputError(
                f"{where} has tokens in the loss {others[0]!r}, which is not the policy's, and rows cannot say; probe a run "
                "without"
            )
