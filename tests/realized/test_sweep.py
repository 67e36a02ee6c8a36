"""Realised changes along a step: each is what a probe at that learning rate would realise, and nothing is left moved."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import oracle
import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.common.progress import Silent
from entropy_probe.model.policy import Policy
from entropy_probe.realized.measure import EntropyMeasure, Predicted
from entropy_probe.realized.realize import realize
from entropy_probe.realized.steps import Step
from entropy_probe.realized.sweep import StepLine, _slope, sweep_step
from entropy_probe.report import Report, SweepSection, plots, write_report_folder
from entropy_probe.report.text import print_report
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from spoiled import Place
from support import run_command

SWEEP = SweepRange(0.25, 4.0, 5)
RATE = 2e-5


def live(dtype: torch.dtype = torch.float64, rate: float = RATE) -> tuple[Any, Any]:
    model = support.tiny_model("llama-tied", dtype=torch.float32)
    optimizer = support.trained_optimizer(model, learning_rate=rate)
    return model.to(dtype), state_of_optimizer(optimizer, model)


@pytest.fixture(scope="module")
def report() -> Report:
    model, adam = live()
    evaluation = support.random_batch(5, 3, seed=7)
    return probe(model, adam, support.random_batch(6, 4), Settings(sweep=SWEEP), evaluation=evaluation).report


def curve_of(report: Report, step: str, batch: str, estimator: str) -> SweepSection:
    (found,) = [c for c in report.sweep if (c.step, c.batch, c.estimator) == (step, batch, estimator)]
    return found


def test_there_is_a_curve_for_every_realised_row_and_at_one_it_is_that_row(report: Report) -> None:
    assert len(report.sweep) == len(report.realized) == 8
    assert report.config.sweep == [0.25, 4.0, 5]
    for row in report.realized:
        curve = curve_of(report, row.step, row.batch, row.estimator)
        assert curve.alphas == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0], rel=1e-12)
        for name in ("delta_h", "se", "ess", "ess_fraction", "predicted"):
            assert getattr(curve, name)[2] == pytest.approx(getattr(row, name), rel=1e-9), name
        assert min(curve.noise_floor) >= row.noise_floor > 0


@pytest.mark.parametrize("place", [0, 4])
def test_a_factor_of_the_step_is_a_factor_of_the_learning_rate(report: Report, place: int) -> None:
    """AdamW too: momentum, fresh gradient and weight decay are all proportional to it."""
    model, adam = live(rate=RATE)
    rate = SWEEP.factors[place] * RATE
    evaluation = support.random_batch(5, 3, seed=7)
    other = probe(model, adam, support.random_batch(6, 4), Settings(learning_rate=rate), evaluation=evaluation).report
    for row in other.realized:
        curve = curve_of(report, row.step, row.batch, row.estimator)
        for name in ("delta_h", "predicted", "se", "ess_fraction"):
            assert getattr(curve, name)[place] == pytest.approx(getattr(row, name), rel=1e-7), (row.step, name)


def test_the_curve_is_that_of_clones_moved_by_hand() -> None:
    model, _ = live()
    batch = support.random_batch(6, 4)
    policy = Policy(model)
    before = policy.measure(batch.responses, entropies=False)
    generator = torch.Generator().manual_seed(0)
    deltas = {n: 1e-3 * torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
    line = StepLine(policy, batch, before, Step("adamw", "virtual", deltas), [EntropyMeasure(EntropyTarget())])
    flat = torch.cat([delta.flatten() for delta in deltas.values()]).numpy()
    scores = oracle.scores_alone(model, batch)
    for alpha in (-1.0, 0.3, 2.0):
        moved = oracle.scores_alone(oracle.moved(model, alpha * flat), batch)
        truth, ess = oracle.snis_change(scores, moved, batch.group_sizes)
        (change,) = line.at(alpha)
        assert change.delta_h == pytest.approx(truth, rel=1e-9)
        assert change.weights.ess == pytest.approx(ess, rel=1e-9)
    assert line.at(0.0)[0].delta_h == pytest.approx(0.0, abs=1e-14)


def test_the_second_order_term_is_what_the_linear_one_leaves(report: Report) -> None:
    for curve in report.sweep:
        assert curve.second_order is not None
        assert curve.curvature is not None
        left = [d - p for d, p in zip(curve.delta_h, curve.predicted, strict=True)]
        third = abs(left[1] - curve.second_order[1])
        assert curve.second_order == pytest.approx([0.5 * a * a * curve.curvature for a in curve.alphas])
        # What is left after it falls as the cube: eight times less at half of the step.
        assert abs(left[0] - curve.second_order[0]) < 0.2 * third + 2 * curve.alphas[0] ** 2 * curve.curvature_error
        assert third < 0.2 * abs(left[1])


def test_the_end_of_the_linear_range_is_where_realised_and_linear_differ_by_a_tenth() -> None:
    model, adam = live()
    batch = support.random_batch(6, 4)
    curves = probe(model, adam, batch, Settings(sweep=SweepRange(0.1, 1000.0, 9))).report.sweep
    for curve in curves:
        assert curve.linear_until is not None
        assert not curve.linear_beyond
        settings = Settings(learning_rate=curve.linear_until * RATE)
        rows = probe(model, adam, batch, settings).report.realized
        (row,) = [r for r in rows if (r.step, r.estimator) == (curve.step, curve.estimator)]
        assert abs(row.delta_h / row.predicted - 1.0) == pytest.approx(0.1, rel=2e-3)
        inside = [abs(d / p - 1) for a, d, p in zip(curve.alphas, curve.delta_h, curve.predicted, strict=True)
                  if a <= curve.linear_until]  # fmt: skip
        assert max(inside) <= 0.1


def test_a_step_beyond_its_linear_range_is_said() -> None:
    model, adam = live()
    report = probe(model, adam, support.random_batch(6, 4), Settings(sweep=SWEEP, learning_rate=300 * RATE)).report
    said = {w.seen for w in report.warnings if w.code == "beyond_linear"}
    assert any(seen.startswith("the preconditioned step (same batch") for seen in said)


def test_a_learning_rate_of_zero_has_no_curve_to_speak_of_and_says_why() -> None:
    model, adam = live()
    report = probe(model, adam, support.random_batch(6, 4), Settings(sweep=SWEEP, learning_rate=0.0)).report
    for curve in report.to_dict()["sweep"]:
        assert curve["linear_until"] is None
        assert curve["null_reasons"]["linear_until"] == "the linear term is zero"
        assert curve["null_reasons"]["slope"] == "the linear term is zero"


def test_without_the_option_there_is_no_sweep() -> None:
    model, adam = live()
    report = probe(model, adam, support.random_batch(4, 2)).report
    assert report.sweep == []
    assert report.config.sweep is None


def test_a_bfloat16_checkpoint_is_swept_in_float32_and_is_itself_afterwards() -> None:
    model, adam = live(torch.bfloat16, rate=1e-6)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    report = probe(model, adam, support.random_batch(6, 4), Settings(sweep=SWEEP, resample=False)).report
    for n, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p.detach(), before[n][1])
    # A quarter of 1e-6 would vanish in bfloat16.
    for curve in report.sweep:
        gap = abs(curve.delta_h[0] - curve.predicted[0])
        assert gap < 0.05 * abs(curve.predicted[0]) + 3 * curve.noise_floor[0]
        assert curve.delta_h[0] != 0.0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_at_any_evaluation_leaves_the_weights_bitwise(error: type[BaseException]) -> None:
    model, _ = live(torch.float32)
    batch, policy = support.random_batch(4, 2), Policy(model)
    before = policy.measure(batch.responses)
    deltas = {n: 1e-3 * torch.ones_like(p) for n, p in model.named_parameters()}
    step = Step("preconditioned", "virtual", deltas)
    predictions = [Predicted(EntropyMeasure(EntropyTarget(Estimator.RAO_BLACKWELL)), 0.1)]
    rows = realize(policy, batch, before, step, predictions, floors=[0.0] * len(predictions))
    weights = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    calls = fail_at = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise error

    model.model.norm.register_forward_pre_hook(counted)
    sweep_step(policy, batch, before, step, rows, SWEEP.factors, Silent())
    for fail_at in [*range(1, calls + 1, 3), 0]:
        calls = 0
        if fail_at:
            with pytest.raises(error):
                sweep_step(policy, batch, before, step, rows, SWEEP.factors, Silent())
            assert calls == fail_at
        else:
            sweep_step(policy, batch, before, step, rows, SWEEP.factors, Silent())
        for n, p in model.named_parameters():
            assert p.data_ptr() == weights[n][0]
            assert torch.equal(p.detach(), weights[n][1])


def test_the_floor_at_a_factor_is_the_size_of_the_rounding_error_there() -> None:
    batch = support.random_batch(6, 4)
    narrow, wide = (
        probe(*live(dtype), batch, Settings(sweep=SWEEP)).report for dtype in (torch.float32, torch.float64)
    )
    for one, two in zip(narrow.sweep, wide.sweep, strict=True):
        # Less its linear term, since the float32 step itself may be another one.
        rest = [np.array(curve.delta_h) - np.array(curve.predicted) for curve in (one, two)]
        assert (np.abs(rest[0] - rest[1]) < 4 * np.array(one.noise_floor)).all()
        assert max(one.noise_floor) < 1e-5
        assert max(two.noise_floor) < 1e-12


def test_terminal_plot_and_json_show_the_sweep(
    report: Report, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    print_report(report, Console(width=160))
    shown = " ".join(capsys.readouterr().out.split())
    curve = report.sweep[0]
    assert "Along the step, α times the learning rate" in shown
    assert f"{curve.step} ({curve.batch}), {curve.estimator} {curve.linear_until:.3g}" in shown
    write_report_folder(report, None, tmp_path / "out")
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["sweep"][0]["delta_h"] == curve.delta_h
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    plots.plot_sweep(report, tmp_path / "unused")
    of_points = [line for c in kept[0].axes[0].containers for line in c.lines[2][0].get_segments()]
    bars = sorted((x, low, high) for (x, low), (_, high) in of_points)
    half = [(high - low) / 2 for _, low, high in bars]
    assert half == pytest.approx(curve.se), "a bar is ± the standard error"
    # A later run without a sweep leaves none behind.
    model, adam = live()
    monkeypatch.undo()
    write_report_folder(probe(model, adam, support.random_batch(4, 2)).report, None, tmp_path / "out")
    assert not (tmp_path / "out" / "sweep.png").exists()


def test_the_command_sweeps_and_resamples(place: Place) -> None:
    arguments = [
        "run",
        place.checkpoint,
        "--rollouts",
        place.rollouts,
        "--sweep",
        "0.5:2:3",
        "--resample",
        "--out",
        "out",
    ]
    outcome = run_command(*arguments)
    assert outcome.code == 0, outcome.err
    content = json.loads((place.root / "out" / "report.json").read_text())
    assert len(content["sweep"]) == 4
    assert sum(row["method"] == "resampled" for row in content["realized"]) == 4
    assert (place.root / "out" / "sweep.png").is_file()


def test_a_slope_is_of_changes_that_stand_clear_of_the_floor() -> None:
    """ΔH = 1e-4 α with a floor of 5e-6 under it: over the factors below the floor the slope would be flat."""
    factors = np.geomspace(1e-3, 10.0, 13).tolist()
    found = {alpha: (SimpleNamespace(delta_h=1e-4 * alpha + 3e-6),) for alpha in factors}
    line = SimpleNamespace(at=found.__getitem__)
    linear = SimpleNamespace(until=10.0, reason=None)
    slope, _ = _slope(line, 0, linear, factors, [5e-6] * 13)  # type: ignore[arg-type]
    assert slope is not None
    assert slope.exponent == pytest.approx(1.0, abs=0.03)
    none, reason = _slope(line, 0, linear, factors, [1e-3] * 13)  # type: ignore[arg-type]
    assert none is None
    assert reason is not None
    assert "0 of 13" in reason
