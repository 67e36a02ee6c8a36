"""Elements with v = 0: left out of P wherever P is, counted, and what they would add said; loops over pairs are the oracle."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
import support
from entropy_probe import AdamState, InputError, Settings, ZeroV, probe, state_of_optimizer
from entropy_probe.data.rollouts import RolloutBatch, write_rollouts
from entropy_probe.data.units import Units, block_units, exact_units
from entropy_probe.gradients import Storage, UnitGradients, Wanted, engine, reference
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.preconditioner import Preconditioners, preconditioner
from entropy_probe.optimizers.state import AdamGroup, AdamMoments
from entropy_probe.optimizers.validation import validate_preconditioner
from entropy_probe.report import Report
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget

RATE = 1e-5
BATCH = 6, 3


@functools.cache
def setting() -> tuple[Any, torch.optim.AdamW, RolloutBatch]:
    """An untied embedding that has met tokens 3 to 9 alone, and responses with tokens up to 22."""
    model = support.tiny_model("llama-untied", dtype=torch.float64)
    optimizer = support.trained_optimizer(model, learning_rate=RATE, vocabulary=10)
    return model, optimizer, support.random_batch(*BATCH)


@functools.cache
def truth() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """X_n and Y_n [B, parameters], one response at a time; P by the guide's text, and where v is 0."""
    model, optimizer, batch = setting()
    xs, ys = oracle.prompt_vectors(oracle.one_at_a_time(model, batch), batch)
    v = np.concatenate([optimizer.state[p]["exp_avg_sq"].flatten().numpy() for p in model.parameters()])
    return xs, ys, oracle.flat_preconditioner(model, optimizer), v == 0


def probed(**settings: Any) -> Report:
    model, optimizer, batch = setting()
    asked = Settings(estimator=Estimator.SCORE, noise=False, **settings)
    return probe(model, state_of_optimizer(optimizer, model), batch, asked).report


def test_the_statistic_and_what_is_left_out_are_those_of_a_loop_over_pairs() -> None:
    xs, ys, p, zeros = truth()
    report = probed()
    kept, left = np.where(zeros, 0.0, p), np.where(zeros, p, 0.0)
    assert left.max() == pytest.approx(1e8)
    expected, rows, _ = oracle.double_loop(xs * np.sqrt(kept), ys * np.sqrt(kept))
    first = report.first_order
    assert first.u_cross == pytest.approx(expected, rel=1e-10)
    assert first.row_means == pytest.approx(rows, rel=1e-9)
    added, _, _ = oracle.double_loop(xs * np.sqrt(left), ys * np.sqrt(left))
    assert first.zero_v.treatment == "leave-out"
    assert first.zero_v.elements == int((zeros & (ys.mean(0) != 0)).sum()) > 0
    assert first.zero_v.delta_h1_added == pytest.approx(-RATE * added, rel=1e-10)
    # The guide's text: those elements are all of it.
    guide = probed(zero_v="guide").first_order
    assert guide.delta_h1 == pytest.approx(first.delta_h1 - RATE * added, rel=1e-9)
    assert guide.zero_v.delta_h1_added == pytest.approx(first.zero_v.delta_h1_added, rel=1e-12)
    assert abs(guide.delta_h1) > 1e3 * abs(first.delta_h1)


def test_the_realised_step_leaves_out_the_same_elements() -> None:
    _, ys, p, zeros = truth()
    for report, of_p in ((probed(), np.where(zeros, 0.0, p)), (probed(zero_v=ZeroV.GUIDE), p)):
        assert report.realized[0].step == "preconditioned"
        assert report.realized[0].step_norm == pytest.approx(RATE * np.linalg.norm(of_p * ys.mean(0)), rel=1e-9)
    # Planted: were they left out of the statistic alone, the step would be another.
    assert RATE * np.linalg.norm(p * ys.mean(0)) > 1e3 * probed().realized[0].step_norm
    # The optimizer renews v before it steps: its own step is what it was.
    assert probed().realized[1].delta_h == probed(zero_v=ZeroV.GUIDE).realized[1].delta_h


def test_what_is_told_with_v_before_this_gradient_leaves_them_out_too() -> None:
    adamw = probed().adamw
    factor = (1 - 0.9) / (1 - 0.9**4)
    assert adamw.u_statistic == pytest.approx(factor * probed().first_order.delta_h1, rel=1e-10)
    assert adamw.parts["gradient"].v_at_t == pytest.approx(adamw.u_statistic, rel=1e-9)
    guide = probed(zero_v="guide").adamw
    assert guide.parts["gradient"].v_at_t == pytest.approx(guide.u_statistic, rel=1e-9)
    assert {name: (part.value, part.se) for name, part in guide.parts.items()} == {
        name: (part.value, part.se) for name, part in adamw.parts.items()
    }


def gradients(backend: Any, units: Units, storage: Storage, zero_v: ZeroV = ZeroV.LEAVE_OUT) -> UnitGradients:
    model, optimizer, batch = setting()
    state = state_of_optimizer(optimizer, model)
    rates = {name: 1.0 if "embed" in name else 0.5 for name in state.moments}
    geometry = replace(Geometry.fixed({}, rates), metric=Preconditioners(state, zero_v))
    a = torch.randn(len(batch.responses), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    policy = Policy(model, microbatch_size=4)
    found = backend.unit_gradients(
        policy, batch, units, Sides(EntropyTarget(Estimator.SCORE), a), geometry, wanted=Wanted(storage)
    )
    assert isinstance(found, UnitGradients)
    return found


@pytest.mark.parametrize("units", [exact_units(6), block_units(6, 4)], ids=["exact", "unequal-blocks"])
@pytest.mark.parametrize("zero_v", list(ZeroV))
def test_stored_streamed_and_the_slow_backend_agree(
    units: Units, zero_v: ZeroV, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropy_probe.gradients.products.CHUNK", 2 * 6 * 37)  # several chunks a parameter
    expected = gradients(reference, units, Storage.STORED, zero_v)
    assert {group.learning_rate for group, dot in expected.zero_v.items() if dot} >= {1.0}
    for backend in (engine, reference):
        for storage in Storage:
            found = gradients(backend, units, storage, zero_v)
            u_cross = cross_statistics(expected.total).u_cross
            assert cross_statistics(found.total).u_cross == pytest.approx(u_cross, rel=1e-9)
            assert found.zero_v == pytest.approx(expected.zero_v, rel=1e-9)
            assert found.delta_h1_of_zero_v == pytest.approx(expected.delta_h1_of_zero_v, rel=1e-9)
    # What they add to δH₁ is the difference between the two treatments.
    both = [-cross_statistics(gradients(engine, units, Storage.STORED, z).step_weighted).u_cross for z in ZeroV]
    assert both[1] - both[0] == pytest.approx(expected.delta_h1_of_zero_v, rel=1e-9)


def test_where_no_v_is_zero_both_treatments_are_the_same_to_the_last_bit() -> None:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    reports = []
    for zero_v in ZeroV:
        content = probe(model, adam, support.random_batch(4, 3), Settings(zero_v=zero_v)).report.to_dict()
        assert content["first_order"]["zero_v"] == {"treatment": zero_v, "elements": 0, "delta_h1_added": 0.0}
        for part in (content, content["config"], content["first_order"]):
            part.pop("zero_v", None)
        content.pop("timing")
        reports.append(content)
    assert reports[0] == reports[1]


def test_one_line_says_how_many_they_are_and_what_they_would_add() -> None:
    report = probed()
    (line,) = (w for w in report.warnings if w.code == "zero_second_moment")
    zero_v = report.first_order.zero_v
    assert f"{zero_v.elements} elements (model.embed_tokens.weight" in line.seen
    assert "left out of P" in line.seen
    assert f"{zero_v.delta_h1_added:+.3g} nats" in line.seen
    assert "guide" in line.advice
    assert "--" not in line.seen + line.advice
    (line,) = (w for w in probed(zero_v="guide").warnings if w.code == "zero_second_moment")
    assert "P is 1/ε there" in line.seen


def moments_of(v: Tensor, **more: Any) -> AdamMoments:
    return AdamMoments(2, torch.zeros_like(v), v, **more)


def state_of(moments: Mapping[str, AdamMoments], eps: float = 1e-8, *, amsgrad: bool = False) -> AdamState:
    return AdamState((AdamGroup(tuple(moments), 1e-3, 0.9, 0.99, eps, 0.0, amsgrad, False, True),), moments)


def test_the_v_that_counts_is_amsgrads_maximum_and_a_v_that_underflows_is_zero() -> None:
    v = torch.tensor([0.0, 1e-23, 4.0]) ** 2  # 1e-46 is none of float32's numbers
    largest = torch.tensor([0.0, 1.0, 9.0])
    state = state_of({"a": moments_of(v, max_exp_avg_sq=largest)})
    (plain,) = state.groups
    assert (preconditioner(state.moments["a"], plain) == 0).tolist() == [True, True, False]
    assert (preconditioner(state.moments["a"], replace(plain, amsgrad=True)) == 0).tolist() == [True, False, False]
    assert preconditioner(state.moments["a"], plain, ZeroV.GUIDE)[0] == pytest.approx(1e8)
    p = Preconditioners(state)
    assert p.with_zeros == {"a"}
    assert torch.equal(p.chunk("a", slice(1, 3)), p["a"][1:3])
    assert p.guides_zeros("a", slice(1, 3)).tolist() == [1e8, 0.0]
    assert not Preconditioners(state_of({"a": moments_of(v[2:])})).with_zeros


def test_all_zeros_are_refused_and_a_whole_parameter_of_them_is_not() -> None:
    some = {"a": moments_of(torch.zeros(2, 3)), "b": moments_of(torch.ones(4))}
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
    found = validate_preconditioner(state_of(some), shapes)
    assert found.preconditioned_dot != 0.0
    # The optimizer's own step would divide by zero, whatever P is.
    for zero_v in ZeroV:
        with pytest.raises(InputError, match=r"parameter a: v holds zeros and ε is 0.0"):
            validate_preconditioner(state_of(some, eps=0.0), shapes, zero_v=zero_v)
    none = state_of(some | {"b": moments_of(torch.zeros(4))})
    with pytest.raises(
        InputError, match=r"0 in every element of every trainable parameter.*expected.*zero_v"
    ) as caught:
        validate_preconditioner(none, shapes)
    assert "\n" not in str(caught.value)
    validate_preconditioner(none, shapes, zero_v=ZeroV.GUIDE)


def test_from_the_command_line_and_from_python(tmp_path: Path) -> None:
    model = support.tiny_model("llama-untied")
    optimizer = support.trained_optimizer(model, learning_rate=RATE, vocabulary=10)
    folder = support.save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    write_rollouts(support.random_rollouts(*BATCH), tmp_path / "rows.jsonl")
    found = {}
    for choice in (None, "guide"):
        asked = () if choice is None else ("--zero-v", choice)
        done = support.run_command(
            "run", folder, "--rollouts", tmp_path / "rows.jsonl", "--no-noise", "--json", tmp_path / "o.json", *asked
        )
        assert done.code == 0, done.err
        content = json.loads((tmp_path / "o.json").read_text())
        found[choice] = content["first_order"]["delta_h1"]
        assert content["config"]["zero_v"] == content["first_order"]["zero_v"]["treatment"] == (choice or "leave-out")
        said = "left out of P; what they would add" if choice is None else "P is 1/ε there; what they add"
        assert said in done.out
    assert abs(found["guide"]) > 100 * abs(found[None])
    with pytest.raises(InputError, match=r"zero_v is 'leave_out'; known are leave-out, guide"):
        Settings(zero_v="leave_out")  # type: ignore[arg-type]

    # Every v zero: refused before anything is written.
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()
    support.save_checkpoint(model, optimizer, tmp_path / "checkpoint-4")
    refused = support.run_command(
        "run", tmp_path / "checkpoint-4", "--rollouts", tmp_path / "rows.jsonl", "--json", tmp_path / "none.json"
    )
    assert (refused.code, len(refused.lines)) == (2, 1)
    assert "every element of every trainable parameter" in refused.err
    assert not (tmp_path / "none.json").exists()
