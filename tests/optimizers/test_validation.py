"""The validator names every defect of a state, and its test dots are those of its vectors, however they are sharded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entropy_probe import AdamState, InputError
from entropy_probe.common.arrays import FloatArray
from entropy_probe.optimizers import validation
from entropy_probe.optimizers.state import AdamMoments
from entropy_probe.optimizers.validation import normal_chunk, validate_preconditioner
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.sharding import Sharding, row_spans
from support import adam_state


def _with(value: float) -> torch.Tensor:
    moment = torch.ones(2, 3, dtype=torch.float64)
    moment[1, 2] = value
    return moment


DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan-v": ({"exp_avg_sq": _with(float("nan"))}, "exp_avg_sq holds NaN"),
    "inf-v": ({"exp_avg_sq": _with(float("inf"))}, "exp_avg_sq holds an infinite value"),
    "negative-v": ({"exp_avg_sq": _with(-1e-300)}, "exp_avg_sq holds a negative value"),
    "nan-m": ({"exp_avg": _with(float("nan"))}, "exp_avg holds NaN"),
    "inf-m": ({"exp_avg": _with(float("-inf"))}, "exp_avg holds an infinite value"),
    "nan-maximum": ({"max_exp_avg_sq": _with(float("nan"))}, "max_exp_avg_sq holds NaN"),
    "negative-maximum": ({"max_exp_avg_sq": _with(-1.0)}, "max_exp_avg_sq holds a negative value"),
    "mis-shaped-v": ({"exp_avg_sq": torch.ones(3, 2)}, "exp_avg_sq has shape"),
    "mis-shaped-m": ({"exp_avg": torch.ones(6)}, "exp_avg has shape"),
    "step-0": ({"step": 0}, "step is 0"),
    "step-negative": ({"step": -2}, "step is -2"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_validator_names_the_parameter_and_its_defect(name: str) -> None:
    changed, what = DEFECTS[name]
    with pytest.raises(InputError, match=f"parameter b.weight: .*{what}"):
        validate_preconditioner(*adam_state(**changed))


def test_the_validator_names_a_parameter_without_state_or_group_and_a_zero_v_without_eps() -> None:
    state, shapes = adam_state()
    validate_preconditioner(state, shapes)
    without = {name: moments for name, moments in state.moments.items() if name != "c.weight"}
    with pytest.raises(InputError, match=r"parameter c.weight: no Adam state"):
        validate_preconditioner(AdamState(state.groups, without), shapes)
    with pytest.raises(InputError, match=r"parameter d.weight: no Adam state"):
        validate_preconditioner(state, shapes | {"d.weight": torch.Size([2, 3])})
    zero, _ = adam_state(exp_avg_sq=torch.zeros(2, 3, dtype=torch.float64))
    validate_preconditioner(zero, shapes)
    (group,) = zero.groups
    with pytest.raises(InputError, match=r"parameter b.weight: .*v holds zeros"):
        validate_preconditioner(AdamState((replace(group, eps=0.0),), zero.moments), shapes)


def test_the_validators_dots_are_those_of_its_vectors_and_leave_the_random_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "CHUNK", 4)  # two chunks of 4 and 2 a parameter
    state, shapes = adam_state()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    test = validate_preconditioner(state, shapes, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]
    plain = weighted = 0.0
    for number, name in enumerate(shapes):
        left, right = (
            np.concatenate(
                [
                    np.random.Generator(np.random.Philox(key=[3, number], counter=[0, 0, vector, k])).standard_normal(n)
                    for k, n in enumerate((4, 2))
                ]
            )
            for vector in (0, 1)
        )
        p = 1.0 / (state.moments[name].exp_avg_sq.div(1 - 0.999).sqrt() + 1e-8).flatten().numpy()
        plain += float((left * right).sum())
        weighted += float((left * right * p).sum())
    assert test.plain_dot == pytest.approx(plain, rel=1e-12)
    assert test.preconditioned_dot == pytest.approx(weighted, rel=1e-12)


def test_no_two_chunks_of_the_test_vectors_are_alike_and_seeds_of_any_size_do() -> None:
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 - 1, 0, 0, 0)]
    drawn = [normal_chunk(*place, 50).tolist() for place in places]
    assert len({number for chunk in drawn for number in chunk}) == 50 * len(places)
    assert normal_chunk(*places[0], 20).tolist() == drawn[0][:20]


class OneOf(Ranks):
    """A rank whose sums are its own part."""

    def sum_numbers(self, values: FloatArray) -> FloatArray:
        return values


def test_ranks_draw_only_the_chunks_of_their_rows_and_sum_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "CHUNK", 4)
    state, _ = adam_state()
    shapes = {"a.weight": torch.Size([7, 3]), "b.weight": torch.Size([1, 2])}  # the last ranks of "b" have no row
    generator = torch.Generator().manual_seed(0)
    moments = {n: AdamMoments(2, *torch.rand(2, *s, generator=generator)) for n, s in shapes.items()}
    whole = validate_preconditioner(AdamState(state.groups, moments), shapes, seed=5)
    drawn: list[tuple[int, ...]] = []

    def noted(*place: int) -> torch.Tensor:
        drawn.append(place)
        return normal_chunk(*place)

    monkeypatch.setattr(validation, "normal_chunk", noted)
    spans, parts = row_spans(shapes, 3), []
    for rank in range(3):
        own = {
            n: replace(m, exp_avg=m.exp_avg.chunk(3)[rank], exp_avg_sq=m.exp_avg_sq.chunk(3)[rank])
            if rank < len(m.exp_avg.chunk(3))
            else replace(m, exp_avg=m.exp_avg[:0], exp_avg_sq=m.exp_avg_sq[:0])
            for n, m in moments.items()
        }
        sharding = Sharding(OneOf(rank, 3), spans, sharded=True)
        parts.append(validate_preconditioner(AdamState(state.groups, own), shapes, seed=5, sharding=sharding))
        first, last = spans["a.weight"][rank].start, spans["a.weight"][rank].stop - 1
        overlapped = {(0, chunk) for chunk in range(first // 4, last // 4 + 1)} | ({(1, 0)} if rank == 0 else set())
        assert {(number, chunk) for _, number, _, chunk, _ in drawn} == overlapped
        drawn.clear()
    for dot in ("plain_dot", "preconditioned_dot"):
        assert sum(getattr(part, dot) for part in parts) == pytest.approx(getattr(whole, dot), rel=1e-12)
