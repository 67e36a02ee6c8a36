"""Rollout files: what is written is what is read, rows group as the estimators need them, no half-written file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entropy_probe import InputError, Rollout, group_rollouts, read_batch, read_rollouts, write_rollouts
from entropy_probe.data.rollouts import rollout_from_row, row_from_rollout
from entropy_probe.data.rollouts.values import OF_TOKENS
from support import random_rollouts

FULL = Rollout(
    prompt_id="p", prompt_ids=(3, 4), response_ids=(5, 6, 1), reward=0.5, advantage=-1.25, logprobs=(-0.5, -1e-9, -30.0),
    temperature=0.7, top_k=0, top_p=1.0, cut=False, prompt="eine Frage", response="„ja“\n\u2028\x85 ✓", micro_batch=2,
    window_tokens=120.5, max_completion_length=64, loss_type="dapo", step=8, on_policy=True, eos_ids=(1, 9),
    padding_id=0, old_logprobs=(-0.5, -0.25, -29.0), ref_logprobs=(-1.0, -2.0, -3.0), loss_mask=(1, 0, 1),
    sampled=(True, True, False), token_weight=(1.0, 0.5, 2.0), mini_batch=1,
    extra={"answer": "102", "turn": 3, "tags": ["a", "b"]},
)  # fmt: skip
KINDS = ["jsonl", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_survives_a_round_trip_unknown_ones_included(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    shorter: dict[str, Any] = {name: getattr(FULL, name)[:1] for name in ("response_ids", *OF_TOKENS)}
    rows = [FULL, replace(FULL, **shorter | {"sampled": None, "extra": {**FULL.extra, "turn": 4}})]
    assert all(getattr(FULL, f.name) is not None for f in fields(FULL)), "the example leaves no column out"
    write_rollouts(rows, path)
    assert read_rollouts(path) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_optional_stay_absent(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    bare = [Rollout(1, (3,), (4,), 0.0), Rollout(2, (3,), (4, 5), 1.0)]
    write_rollouts(bare, path)
    assert read_rollouts(path) == bare
    required = {"prompt_id", "prompt_ids", "response_ids", "reward"}
    if kind == "jsonl":
        assert [set(json.loads(line)) for line in path.read_text().splitlines()] == [required, required]
    else:
        assert set(pyarrow.parquet.read_schema(path).names) == required


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_in_a_later_row_only_is_not_lost(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    rows = [
        Rollout("a", (3,), (4,), 0.0),
        Rollout("a", (3,), (4,), 1.0, cut=True, response="x", extra={"note": "late"}),
    ]
    write_rollouts(rows, path)
    found = read_rollouts(path)
    assert found[1] == rows[1]
    assert found[0].cut is None
    assert found[0].extra.get("note") is None


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson"])
def test_json_lines_are_read_under_each_of_their_names_and_blank_lines_skipped(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{suffix}"
    row = '{"prompt_id": "a", "prompt_ids": [3], "response_ids": [4], "reward": 1}'
    path.write_text(f"\n{row}\n\n  \n{row}")
    assert read_rollouts(path) == [Rollout("a", (3,), (4,), 1.0)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_in_either_format_are_the_same_batch(kind: str, tmp_path: Path) -> None:
    rows = random_rollouts(5, 3, temperature=0.8)
    write_rollouts(rows, tmp_path / f"rollouts.{kind}")
    assert read_batch(tmp_path / f"rollouts.{kind}") == group_rollouts(rows)


def test_interleaved_rows_group_by_prompt_in_the_order_of_first_rows() -> None:
    def row(prompt: str, token: int) -> Rollout:
        return Rollout(prompt, (ord(prompt),), (token,), 0.0)

    rows = [row("z", 10), row("a", 11), row("m", 12), row("a", 13), row("z", 14), row("m", 15), row("z", 16)]
    batch = group_rollouts(rows)
    assert [group.prompt_id for group in batch.groups] == ["z", "a", "m"]
    assert [[r.response_ids[0] for r in group.responses] for group in batch.groups] == [
        [10, 14, 16],
        [11, 13],
        [12, 15],
    ]
    assert [r.response_ids[0] for r in batch.responses] == [10, 14, 16, 11, 13, 12, 15]
    assert batch.group_sizes == (3, 2, 2)
    assert batch.tokens == 7
    assert [group.prompt_ids for group in batch.groups] == [(122,), (97,), (109,)]


def test_integer_and_text_ids_are_different_prompts() -> None:
    rows = [Rollout(key, (3,), (4,), 0.0) for key in (1, "1", 1, "1")]
    assert [group.prompt_id for group in group_rollouts(rows).groups] == [1, "1"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_keep_their_type_in_a_file(kind: str, tmp_path: Path) -> None:
    for key in (7, "7"):
        path = tmp_path / f"{type(key).__name__}.{kind}"
        write_rollouts([Rollout(key, (3,), (4,), 0.0)], path)
        (found,) = read_rollouts(path)
        assert found.prompt_id == key
        assert type(found.prompt_id) is type(key)


def test_mixed_ids_survive_json_lines_and_are_refused_for_parquet_which_has_one_type_a_column(tmp_path: Path) -> None:
    rows = [Rollout(1, (3,), (4,), 0.0), Rollout("1", (3,), (4,), 0.0)]
    write_rollouts(rows, tmp_path / "mixed.jsonl")
    assert read_rollouts(tmp_path / "mixed.jsonl") == rows
    with pytest.raises(InputError, match="Parquet"):
        write_rollouts(rows, tmp_path / "mixed.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.jsonl"]


def test_an_unknown_column_that_json_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="JSON"):
        write_rollouts([replace(FULL, extra={"when": object()})], tmp_path / "rollouts.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_temperature_is_the_rows_else_the_one_asked_for_else_1() -> None:
    undeclared, declared = random_rollouts(3, 2), random_rollouts(3, 2, temperature=0.6)
    assert group_rollouts(undeclared).temperature == 1.0
    assert group_rollouts(undeclared, 0.9).temperature == 0.9
    assert group_rollouts(declared).temperature == 0.6
    assert group_rollouts(declared, 0.6).temperature == 0.6
    with pytest.raises(InputError, match="temperature"):
        group_rollouts(declared, 0.9)
    with pytest.raises(InputError, match="disagree about temperature"):
        group_rollouts([*declared[:-1], replace(declared[-1], temperature=None)])


def test_a_temperature_that_float32_rounded_is_the_same_one() -> None:
    declared = random_rollouts(3, 2, temperature=0.7)
    rounded = float(np.float32(0.7))
    assert rounded != 0.7
    assert group_rollouts(declared, rounded).temperature == 0.7
    assert group_rollouts([*declared[:-1], replace(declared[-1], temperature=rounded)]).temperature == 0.7
    with pytest.raises(InputError, match=r"declare temperature 0.7, but 0.7001 was asked for"):
        group_rollouts(declared, 0.7001)
    with pytest.raises(InputError, match="disagree about temperature"):
        group_rollouts([*declared[:-1], replace(declared[-1], temperature=0.7001)])


@pytest.mark.parametrize("given", ["0.7", True, [0.7], 0.0, math.nan])
def test_a_temperature_that_is_no_number_above_0_is_refused_as_such(given: Any) -> None:
    with pytest.raises(InputError, match=r"^temperature is "):
        group_rollouts(random_rollouts(3, 2, temperature=0.7), given)


def test_a_batch_is_written_as_its_responses_and_read_with_its_temperature(tmp_path: Path) -> None:
    declared = group_rollouts(random_rollouts(3, 2, temperature=0.6))
    write_rollouts(declared, tmp_path / "declared.jsonl")
    assert read_batch(tmp_path / "declared.jsonl") == declared
    untold = group_rollouts(random_rollouts(3, 2))
    write_rollouts(untold, tmp_path / "untold.jsonl")
    assert read_batch(tmp_path / "untold.jsonl") == untold
    write_rollouts(group_rollouts(random_rollouts(3, 2), 0.9), tmp_path / "told.jsonl")
    assert read_batch(tmp_path / "told.jsonl") == group_rollouts(random_rollouts(3, 2, temperature=0.9))


def test_a_path_may_be_text_and_what_is_none_is_refused(tmp_path: Path) -> None:
    path, rows = str(tmp_path / "rows.jsonl"), random_rollouts(2, 2)
    write_rollouts(rows, path)
    assert read_rollouts(path) == rows
    assert read_batch(path) == group_rollouts(rows)
    for wrong in (None, 3, b"rows.jsonl", ""):
        for use in (read_rollouts, read_batch, lambda given: write_rollouts(rows, given)):
            with pytest.raises(InputError, match="expected a path"):
                use(wrong)  # type: ignore[arg-type]


def test_a_byte_order_mark_before_json_lines_is_skipped(tmp_path: Path) -> None:
    rows = random_rollouts(2, 2)
    write_rollouts(rows, tmp_path / "plain.jsonl")
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "plain.jsonl").read_bytes())
    assert read_rollouts(tmp_path / "marked.jsonl") == rows


def test_a_whole_distribution_may_be_declared_in_so_many_words() -> None:
    assert len(group_rollouts(random_rollouts(3, 2, top_k=0, top_p=1.0)).groups) == 3
    assert len(group_rollouts(random_rollouts(3, 2, top_k=-1)).groups) == 3


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        group_rollouts([])


# Round trips of anything

token = st.integers(0, 2**31 - 1)
number = st.floats(allow_nan=False, allow_infinity=False, width=64)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KNOWN = {f.name for f in fields(Rollout)}
COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "advantage": number,
    "temperature": st.floats(1e-3, 1e3),
    "top_k": st.integers(-1, 100),
    "top_p": st.floats(0.0, 1.0),
    "cut": st.booleans(),
    "prompt": text,
    "response": text,
    "micro_batch": st.integers(0, 9),
    "window_tokens": st.floats(1e-3, 1e9),
    "max_completion_length": st.integers(1, 2**20),
    "eos_ids": st.lists(token, max_size=3).map(tuple),
}
EXTRAS: list[st.SearchStrategy[Any]] = [
    text,
    st.integers(-(2**62), 2**62),
    number,
    st.booleans(),
    st.lists(text, min_size=1),
]


@st.composite
def some_rollouts(draw: st.DrawFn) -> list[Rollout]:
    """Rows with one type of id; each optional column is filled in some rows; unknown columns in all."""
    prompt_id = draw(st.sampled_from([st.integers(-(2**40), 2**40), text]))
    columns = draw(st.sets(st.sampled_from(sorted(COLUMNS))))
    extras = draw(st.dictionaries(text.filter(lambda name: bool(name) and name not in KNOWN), st.sampled_from(EXTRAS)))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        ids = tuple(draw(st.lists(token, min_size=1, max_size=5)))
        logprobs = tuple(draw(st.floats(-1e300, 0.0)) for _ in ids) if draw(st.booleans()) else None
        optional = {name: draw(COLUMNS[name]) for name in sorted(columns) if draw(st.booleans())}
        extra = {name: draw(value) for name, value in extras.items()}
        prompt = tuple(draw(st.lists(token, min_size=1, max_size=5)))
        rows.append(Rollout(draw(prompt_id), prompt, ids, draw(number), logprobs=logprobs, extra=extra, **optional))
    return rows


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=some_rollouts())
def test_any_rows_are_read_as_they_were_written(rows: list[Rollout], kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    write_rollouts(rows, path)
    assert read_rollouts(path) == rows


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(2, 4), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_grouping_any_interleaving_keeps_each_prompts_own_order(sizes: list[int], shuffler: random.Random) -> None:
    rows = random_rollouts(len(sizes), sizes)
    rows = [replace(row, extra={"number": number}) for number, row in enumerate(rows)]
    shuffler.shuffle(rows)
    batch = group_rollouts(rows)
    firsts = list(dict.fromkeys(row.prompt_id for row in rows))
    assert [group.prompt_id for group in batch.groups] == firsts
    for group in batch.groups:
        assert list(group.responses) == [row for row in rows if row.prompt_id == group.prompt_id]
    assert sorted(r.extra["number"] for r in batch.responses) == list(range(len(rows)))


# Whatever a file holds, it is read or refused in one line

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
GOOD_ROW = {"prompt_id": "a", "prompt_ids": [3, 4], "response_ids": [5, 1], "reward": 1.0}


def rollout_or_refusal(row: dict[str, Any]) -> Rollout | InputError:
    try:
        return rollout_from_row(row, "line 7")
    except InputError as error:
        return error


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(sorted(KNOWN | {"other"})), anything, max_size=4), st.sampled_from(sorted(GOOD_ROW))
)
def test_a_row_of_anything_is_a_rollout_or_is_refused_by_its_place(values: dict[str, Any], dropped: str) -> None:
    found = rollout_or_refusal(GOOD_ROW | values)
    if isinstance(found, InputError):
        assert str(found).startswith("line 7")
        assert len(str(found).splitlines()) == 1
    else:
        assert found.reward is not None or found.advantage is not None
        assert found.reward is None or math.isfinite(found.reward)
        assert found.prompt_ids
        assert found.response_ids
        assert min(found.prompt_ids + found.response_ids) >= 0
    missing = "line 8: .* neither a reward" if dropped == "reward" else f"line 8 has no {dropped}"
    with pytest.raises(InputError, match=missing):
        rollout_from_row({name: value for name, value in GOOD_ROW.items() if name != dropped}, "line 8")


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=60)
    | st.text('{}[]":,0123456789eE+-.truefalsn \n', max_size=60).map(str.encode)
    | st.binary(max_size=40).map(lambda inside: b"PAR1" + inside + b"PAR1")
)
def test_a_file_of_anything_is_refused(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rollouts.{kind}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rollouts\.") as caught:
        read_rollouts(path)
    assert len(str(caught.value).splitlines()) == 1


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=40))
def test_a_parquet_file_with_junk_in_it_is_read_or_refused(place: int, junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.parquet"
    write_rollouts([FULL, FULL], path)
    content = bytearray(path.read_bytes())
    start = place % len(content)
    content[start : start + len(junk)] = junk
    path.write_bytes(bytes(content))
    try:
        found: list[Rollout] | str = read_rollouts(path)
    except InputError as error:
        found = str(error)
    assert "rollouts.parquet" in found if isinstance(found, str) else len(found) > 0


# Writing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_earlier_file_whole_and_no_temporary_one(
    kind: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"rollouts.{kind}"
    write_rollouts(random_rollouts(3, 2), path)
    before = path.read_bytes()

    def half(write: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*arguments: Any, **options: Any) -> Any:
            write(*arguments, **options)
            raise error

        return broken

    for owner, name in ((Path, "write_text"), (pyarrow.parquet, "write_table"), (Path, "replace")):
        if (name, kind) in {("write_text", "parquet"), ("write_table", "jsonl")}:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, half(getattr(owner, name)) if name != "replace" else half(lambda *_: None))
            with pytest.raises(error):
                write_rollouts(random_rollouts(4, 2), path)
            with pytest.raises(error):
                write_rollouts(random_rollouts(4, 2), tmp_path / f"new.{kind}")
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    write_rollouts(random_rollouts(4, 2), path)
    assert path.read_bytes() != before


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rollouts.jsonl"
    seen = []
    write_text = Path.write_text

    def watched(self: Path, *arguments: Any, **options: Any) -> int:
        count = write_text(self, *arguments, **options)
        seen.append((self != path, self.parent == path.parent, path.exists()))
        return count

    monkeypatch.setattr(Path, "write_text", watched)
    write_rollouts(random_rollouts(3, 2), path)
    assert seen == [(True, True, False)]
    assert path.exists()


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_rollouts(random_rollouts(3, 2), tmp_path / "rollouts.jsonl")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "rollouts.jsonl").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["rollouts.csv", "rollouts", "rollouts.jsonl.gz", "missing/rollouts.jsonl"])
def test_a_name_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rollouts are written as|does not exist"):
        write_rollouts(random_rollouts(3, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_extra_column_cannot_shadow_a_declared_one() -> None:
    row = Rollout("a", (3,), (4, 1), 0.0, extra={"advantage": 7.0})
    with pytest.raises(InputError, match="advantage"):
        row_from_rollout(row)
