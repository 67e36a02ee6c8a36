"""Rollouts: prompts, their sampled responses, and the files that hold them (JSON Lines or Parquet, one row a response).

Exact token ids are the truth; text is for people. Rows of one prompt need not be adjacent: a prompt stands where its
first row stands, its responses in the order of their rows. Unknown columns are kept in ``Rollout.extra``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from entropy_probe.errors import InputError, first_line
from entropy_probe.files import replacing

PromptId = str | int


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt.

    ``prompt_ids`` and ``response_ids`` are token ids; the response holds its EOS if one was sampled. ``logprobs`` are the
    sampler's, one per response token, in nats. ``cut`` is true where the length limit ended the response.

    The last ones describe the trainer's accumulation window, where a recorder knows it: ``micro_batch`` is the index of
    the micro-batch that held the row, ``window_tokens`` the token count that the trainer divides by (dapo),
    ``max_completion_length`` the constant of Dr. GRPO, ``loss_type`` the trainer's name of its loss, ``step`` the optimizer
    step that consumed the row (N + 1 for checkpoint N), and ``on_policy`` whether the sampler was the policy at that step.
    """

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float
    advantage: float | None = None
    logprobs: tuple[float, ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cut: bool | None = None
    prompt: str | None = None
    response: str | None = None
    micro_batch: int | None = None
    window_tokens: float | None = None
    max_completion_length: int | None = None
    loss_type: str | None = None
    step: int | None = None
    on_policy: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and its responses, in the order of their rows."""

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    responses: tuple[Rollout, ...]


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts in the order of their first row. ``temperature`` is the one at which every response was sampled."""

    groups: tuple[PromptGroup, ...]
    temperature: float

    @property
    def responses(self) -> tuple[Rollout, ...]:
        """Every response, prompt by prompt: the order in which scores and coefficients are laid out."""
        return tuple(response for group in self.groups for response in group.responses)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """G_n, the number of responses of each prompt."""
        return tuple(len(group.responses) for group in self.groups)

    @property
    def mean_length(self) -> float:
        """T̄, the mean over prompts of the mean response length, in tokens."""
        means = [sum(len(r.response_ids) for r in group.responses) / len(group.responses) for group in self.groups]
        return sum(means) / len(means)

    @property
    def tokens(self) -> int:
        """Number of response tokens."""
        return sum(len(response.response_ids) for response in self.responses)


def read_batch(path: Path, temperature: float | None = None) -> RolloutBatch:
    """Read, check and group a rollouts file.

    Raises:
        InputError: see :func:`read_rollouts` and :func:`group_rollouts`.
    """
    return group_rollouts(read_rollouts(path), temperature)


def group_rollouts(rollouts: Iterable[Rollout], temperature: float | None = None) -> RolloutBatch:
    """Group rows by ``prompt_id`` and check what the estimators need: two prompts, two responses each, one temperature.

    Args:
        rollouts: the rows, in any order.
        temperature: sampling temperature of rows that declare none; 1 if neither says.

    Raises:
        InputError: fewer than two prompts, a prompt with one response, two prompts under one id, rows that disagree
            about the temperature or about a window column, or a truncated sampling distribution.
    """
    by_prompt: dict[PromptId, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    if not by_prompt:
        raise InputError("the rollouts are empty; at least two prompts with two responses each are needed")
    for prompt_id, rows in by_prompt.items():
        if any(row.prompt_ids != rows[0].prompt_ids for row in rows):
            raise InputError(
                f"prompt_id {prompt_id!r} names two different prompts (their prompt_ids differ); give each its own id"
            )
        if len(rows) < 2:
            raise InputError(
                f"prompt_id {prompt_id!r} has one response; the leave-one-out mean needs at least two responses a prompt"
            )
    if len(by_prompt) < 2:
        raise InputError("the rollouts hold one prompt; the cross-prompt estimator needs at least two")
    rows = [row for group in by_prompt.values() for row in group]
    for row in rows:
        _refuse_truncated_sampling(row)
    _refuse_mixed(rows)
    declared = {row.temperature for row in rows if row.temperature is not None}
    if temperature is not None and declared - {temperature}:
        raise InputError(f"the rows declare temperature {sorted(declared)}, but {temperature} was asked for; drop one")
    groups = tuple(PromptGroup(key, group[0].prompt_ids, tuple(group)) for key, group in by_prompt.items())
    tau = temperature if temperature is not None else next(iter(declared), 1.0)
    if not (math.isfinite(tau) and tau > 0):
        raise InputError(f"temperature is {tau}; entropy needs a finite temperature above 0")
    return RolloutBatch(groups, float(tau))


NEUTRAL = {
    "top_k": (None, 0, -1),
    "top_p": (None, 1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "repetition_penalty": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "no_repeat_ngram_size": (None, 0),
}
"""Sampling settings that leave the distribution whole; any other value makes S another policy's log-prob."""


def _refuse_truncated_sampling(row: Rollout) -> None:
    declared = {"top_k": row.top_k, "top_p": row.top_p, **row.extra}
    for name, neutral in NEUTRAL.items():
        if declared.get(name) not in neutral:
            raise InputError(
                f"prompt_id {row.prompt_id!r} was sampled with {name} = {declared[name]}: its log-probs are not the policy's; "
                "sample from the whole distribution (top_k = 0, top_p = 1, no other processors)"
            )


def _refuse_mixed(rows: Sequence[Rollout]) -> None:
    for name in ("temperature", "window_tokens", "max_completion_length", "loss_type", "step"):
        values = {getattr(row, name) for row in rows}
        if len(values) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise InputError(f"the rows disagree about {name} ({shown}); one probe takes one batch with one value")
    for name in ("advantage", "micro_batch"):
        missing = sum(getattr(row, name) is None for row in rows)
        if 0 < missing < len(rows):
            raise InputError(f"{missing} of {len(rows)} rows have no {name}; give it in every row or in none")


def read_rollouts(path: Path) -> list[Rollout]:
    """Read rows from ``.jsonl``/``.json``/``.ndjson`` (JSON Lines) or ``.parquet``.

    Raises:
        InputError: the file is missing, empty, not of a known kind, or a row breaks the schema (its number is named).
    """
    rollouts = [rollout_from_row(row, where) for where, row in read_rows(path)]
    if not rollouts:
        raise InputError(f"{path} holds no rollouts; expected one row a response")
    return rollouts


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` for each row of a JSON Lines or Parquet file; ``where`` names the place for messages.

    Raises:
        InputError: the file is missing or not what its name says.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; expected a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
        for number, row in enumerate(rows):
            yield f"{path} row {number}", row
    elif path.suffix in {".jsonl", ".json", ".ndjson"}:
        yield from _read_json_lines(path)
    else:
        raise InputError(f"{path} ends in {path.suffix!r}; expected .jsonl (JSON Lines) or .parquet")


def _read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{where} is not JSON ({error.msg}); expected one JSON object a line") from error
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless nesting
                    raise InputError(
                        f"{where} cannot be read ({first_line(error)}); expected one JSON object a line"
                    ) from error
                if not isinstance(row, dict):
                    raise InputError(f"{where} is a JSON {type(row).__name__}; expected one JSON object a line")
                yield where, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; expected JSON Lines") from error


def rollout_from_row(row: Mapping[str, Any], where: str) -> Rollout:
    """Check one row against the schema. ``where`` names it in messages.

    Raises:
        InputError: a required column is missing or a value has the wrong type, is not finite, or is empty.
    """
    required = ("prompt_id", "prompt_ids", "response_ids", "reward")
    for name in required:
        if row.get(name) is None:
            raise InputError(f"{where} has no {name}; required are {', '.join(required)}")
    prompt_id = row["prompt_id"]
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int):
        raise InputError(f"{where}: prompt_id is a {type(prompt_id).__name__}; expected a string or an integer")
    response_ids = _token_ids(row["response_ids"], "response_ids", where)
    logprobs = _optional(row, "logprobs", where, _floats)
    if logprobs is not None and len(logprobs) != len(response_ids):
        raise InputError(
            f"{where}: {len(logprobs)} logprobs for {len(response_ids)} response tokens; expected one each"
        )
    temperature = _optional(row, "temperature", where, _number)
    if temperature is not None and temperature <= 0:
        raise InputError(
            f"{where}: temperature is {temperature}; a greedy sampler has no entropy to predict, sample above 0"
        )
    known = {f.name for f in fields(Rollout)} - {"extra"}
    return Rollout(
        prompt_id=prompt_id,
        prompt_ids=_token_ids(row["prompt_ids"], "prompt_ids", where),
        response_ids=response_ids,
        reward=_number(row["reward"], "reward", where),
        advantage=_optional(row, "advantage", where, _number),
        logprobs=logprobs,
        temperature=temperature,
        top_k=_optional(row, "top_k", where, _integer),
        top_p=_optional(row, "top_p", where, _number),
        cut=_optional(row, "cut", where, _boolean),
        prompt=_optional(row, "prompt", where, _text),
        response=_optional(row, "response", where, _text),
        micro_batch=_optional(row, "micro_batch", where, _integer),
        window_tokens=_optional(row, "window_tokens", where, _positive),
        max_completion_length=_optional(row, "max_completion_length", where, _positive_integer),
        loss_type=_optional(row, "loss_type", where, _text),
        step=_optional(row, "step", where, _integer),
        on_policy=_optional(row, "on_policy", where, _boolean),
        extra={name: value for name, value in row.items() if name not in known},
    )


def row_from_rollout(rollout: Rollout) -> dict[str, Any]:
    """The row of the file: declared columns that have a value, then the kept unknown ones.

    Raises:
        InputError: ``extra`` uses the name of a declared column.
    """
    declared = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name != "extra"}
    clash = sorted(declared.keys() & rollout.extra.keys())
    if clash:
        raise InputError(
            f"prompt_id {rollout.prompt_id!r}: extra holds {', '.join(clash)}, a column of the schema itself"
        )
    row = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in declared.items()
        if value is not None
    }
    return row | dict(rollout.extra)


def count_cut(rollouts: Iterable[Rollout]) -> int:
    """How many responses the length limit ended."""
    return sum(rollout.cut is True for rollout in rollouts)


def write_rollouts(rollouts: Iterable[Rollout], path: Path) -> None:
    """Write rows as JSON Lines or Parquet, by the file's name; an interrupted write leaves no file.

    Raises:
        InputError: the name ends in neither ``.jsonl`` nor ``.parquet``, the folder cannot be written, or the format
            cannot hold a value.
    """
    rows = [row_from_rollout(rollout) for rollout in rollouts]
    if path.suffix not in {".jsonl", ".parquet"}:
        raise InputError(f"{path} ends in {path.suffix!r}; rollouts are written as .jsonl or .parquet")
    try:
        if path.suffix == ".parquet":
            table = pyarrow.Table.from_pylist(_same_columns(rows))
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        kind = "Parquet, which has one type a column" if path.suffix == ".parquet" else "JSON"
        raise InputError(f"{path}: a value cannot be written as {kind}: {first_line(error)}") from error
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, temporary)
        else:
            temporary.write_text(text, encoding="utf-8")


def _same_columns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # Table.from_pylist takes its columns from the first row alone.
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _optional(row: Mapping[str, Any], name: str, where: str, parse: Any) -> Any:
    value = row.get(name)
    return None if value is None else parse(value, name, where)


def _number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise InputError(f"{where}: {name} is too large; expected a number in the range of float64") from error
    if not math.isfinite(number):
        raise InputError(f"{where}: {name} is {number}; expected a finite number")
    return number


def _positive(value: object, name: str, where: str) -> float:
    number = _number(value, name, where)
    if number <= 0:
        raise InputError(f"{where}: {name} is {number}; expected a number above 0")
    return number


def _integer(value: object, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {name} is {value!r}; expected an integer")
    return value


def _positive_integer(value: object, name: str, where: str) -> int:
    number = _integer(value, name, where)
    if number < 1:
        raise InputError(f"{where}: {name} is {number}; expected a whole number above 0")
    return number


def _boolean(value: object, name: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} is {value!r}; expected true or false")
    return value


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected text")
    return value


def _token_ids(value: object, name: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected a list of token ids")
    if not value:
        raise InputError(f"{where}: {name} is empty; every prompt and response needs at least one token")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InputError(f"{where}: {name} holds {token!r}; expected token ids, integers from 0")
    return tuple(value)


def _floats(value: object, name: str, where: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected a list of numbers")
    return tuple(_number(item, name, where) for item in value)
