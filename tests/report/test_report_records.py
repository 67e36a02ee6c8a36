"""What the report shows and plots is what the record of that name holds, and the records are what was found."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import support
from entropy_probe import ProbeResult, Settings, probe, state_of_optimizer
from entropy_probe.pipeline.assemble import Found, assemble_report
from entropy_probe.ranks.collectives import Kind, Payload, Ranks
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.report import RanksSection, Report, plots
from entropy_probe.report.text import print_report
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.choices import Estimator


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    model = support.tiny_model()
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    return probe(model, adam, support.random_batch(12, 4), Settings(estimator=Estimator.SCORE))


def distinct(report: Report) -> Report:
    """The same report with a number of its own in every field that is shown."""
    first = dataclasses.replace(
        report.first_order, u_cross=11.5, delta_h1=-0.125, delta_h1_se=0.0415, delta_h1_ci95=[-0.25, -0.0625], se_plugin=1.25,
        se_jackknife=1.5, se_this_step=1.75, delta_h1_se_this_step=0.0225,
        se_plugin_guide=2.25, learning_rate=[3e-3, 5e-4], self_test_residual=3e-15,
        row_means=[3.0, 1.0, 2.0], row_x=[30.0, 10.0, 20.0], row_y=[-24.0, -8.0, -16.0], unit_ids=["c", "a", "b"],
    )  # fmt: skip
    rows = [
        dataclasses.replace(
            row, delta_h=sign * 0.375, se=0.0125, predicted=sign * 0.4375, ess=17.0, ess_fraction=0.8125, pareto_k=k,
            pareto_k_limit=0.625,
            noise_floor=3e-9, step_norm=0.6875, null_reasons=dict.fromkeys(("pareto_k", "delta_h_psis"), "no tail"),
        )
        for row, sign, k in zip(report.realized, (-1, 1), (0.34, None), strict=True)
    ]  # fmt: skip
    entropy = dataclasses.replace(report.entropy, per_response=6.25, se=0.55, per_token=1.875, per_token_se=0.025)
    return dataclasses.replace(report, first_order=first, realized=rows, entropy=entropy, warnings=[])


def test_every_line_of_the_terminal_report_shows_the_number_of_its_name(
    result: ProbeResult,
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(distinct(result.report), Console(width=160))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "δH₁ = −η U_cross -0.125 nats per response",
        "standard error of δH₁ 0.0415 over fresh batches",
        "the same, this step 0.0225 given this update: without the noise that another batch's Y would add",
        f"95 % interval of δH₁ [-0.25, -0.0625] {result.report.first_order.interval_method}",
        "entropy now 6.25 ± 0.55 nats per response",
        "1.875 ± 0.025 nats per token",
        "U_cross 11.5 nats per unit of learning rate",
        "SE of it, plug-in 1.25 from row means",
        "SE of it, jackknife 1.5 delete-one",
        "SE of it, this step 1.75 given this update",
        "SE of it, guide's text 2.25 sd of r; kept to compare",
        "learning rate 0.003, 0.0005",
        "self-test residual 3.0e-15 relative",
        "preconditioned (same), score −0.375 ± 0.013 -0.4375 0.812 0.34 3e-09",
        "adamw (same), score +0.375 ± 0.013 +0.4375 0.812 none 3e-09",
        "k̂ is too large above 0.62, the limit for this number of responses",
        "no warnings",
    ):
        assert line in lines, line
    assert not any(line.startswith("ranks") for line in lines)


class Group(Ranks):
    """Ranks with a backend and no group."""

    @property
    def backend(self) -> str:
        return "gloo"


SENT = {
    Kind.NUMBERS: Payload(Kind.NUMBERS, 500, 4000),
    Kind.SUMS: Payload(Kind.SUMS, 0, 0),
    Kind.SHARDS: Payload(Kind.SHARDS, 275_000, 1_100_000),
    Kind.DIRECTIONS: Payload(Kind.DIRECTIONS, 9, 36),
}


def test_who_shared_the_work_is_in_the_report(result: ProbeResult) -> None:
    batch = support.random_batch(12, 4)
    content = result.report.to_dict()["ranks"]
    assert content == {
        "count": 1, "sharding": None, "backend": None, "prompts": [12], "tokens": [batch.tokens], "sent": {},
    }  # fmt: skip
    for sharded, named in ((False, "replicated"), (True, "fsdp2")):
        ranks = RanksSection.of(Sharding(Group(1, 4), sharded=sharded), [2, 2, 2, 1], [9, 8, 7, 6], SENT)
        content = json.loads(json.dumps(dataclasses.replace(result.report, ranks=ranks).to_dict()))["ranks"]
        assert content == {
            "count": 4, "sharding": named, "backend": "gloo", "prompts": [2, 2, 2, 1], "tokens": [9, 8, 7, 6],
            "sent": {
                "numbers": {"elements": 500, "bytes": 4000}, "sums": {"elements": 0, "bytes": 0},
                "shards": {"elements": 275_000, "bytes": 1_100_000}, "directions": {"elements": 9, "bytes": 36},
            },
        }  # fmt: skip
    # A group of one shares nothing out, whatever holds its weights.
    assert RanksSection.of(Sharding(Group(0, 1), sharded=True), [3], [9], {}).sharding is None


@pytest.mark.parametrize(
    ("count", "sent", "said"),
    [
        (4, SENT, "2, 2, 2, 1 prompts; a rank handed over at most 1.1 MB (shards 1.1 MB, numbers 4 kB, directions 36 bytes)"),
        (9, {}, "1 to 2 prompts each; a rank handed over at most 0 bytes"),
    ],
)  # fmt: skip
def test_several_ranks_have_a_line_with_their_prompts_and_what_crossed(
    result: ProbeResult, capsys: pytest.CaptureFixture[str], count: int, sent: dict[Kind, Payload], said: str
) -> None:
    prompts = [2] * (count - 1) + [1]
    ranks = RanksSection.of(Sharding(Group(0, count)), prompts, prompts, sent)
    print_report(dataclasses.replace(result.report, ranks=ranks), Console(width=240))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"ranks {count} gloo, replicated: {said}" in lines


def figure_of(monkeypatch: pytest.MonkeyPatch, plot: Any, report: Report) -> Any:
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    plot(report, Path("unused"))
    (axes,) = kept[0].axes
    return axes


def test_row_means_are_plotted_in_order_each_with_its_own_halves_and_name(
    result: ProbeResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes = figure_of(monkeypatch, plots.plot_row_means, distinct(result.report))
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 3.0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["x: answers to the others' update"] == [10.0, 20.0, 30.0]
    assert lines["y: its update moves the others"] == [-8.0, -16.0, -24.0]
    assert set(lines["U_cross"]) == {11.5}


def test_the_prediction_and_each_realised_change_are_plotted_with_their_intervals(
    result: ProbeResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes = figure_of(monkeypatch, plots.plot_predicted_and_realized, distinct(result.report))
    spans = []
    for container in axes.containers:
        (ends,) = container.lines[2][0].get_segments()
        spans.append((container.lines[0].get_xdata()[0], *ends[:, 0]))
    # What the terminal's lines say: an interval of δH₁, a standard error beside a realised change.
    expected = [(-0.125, -0.25, -0.0625)] + [(c, c - 0.0125, c + 0.0125) for c in (-0.375, 0.375)]
    np.testing.assert_allclose(spans, expected)
    named = {container.get_label() for container in axes.containers}
    assert {"δH₁ with its 95 % interval", "realised ΔH ± standard error"} <= named
    assert "95 %" not in axes.get_xlabel()
    marks = [
        list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "|" and len(line.get_xdata()) == 1
    ]
    assert [-0.4375] in marks
    assert [0.4375] in marks


def test_the_first_order_section_is_the_statistics_of_its_kernel(result: ProbeResult) -> None:
    first, expected = result.report.first_order, cross_statistics(UnitDots.from_kernel(result.kernel, [1] * 12))
    for name in (
        "u_cross", "bars_dot", "diag_sum", "se_plugin", "se_jackknife", "se_this_step", "se_plugin_guide", "zeta1_plugin",
        "zeta1_jackknife",
    ):  # fmt: skip
        assert getattr(first, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    for name in ("row_means", "row_x", "row_y"):
        assert getattr(first, name) == pytest.approx(getattr(expected, name).tolist(), rel=1e-6), name
    assert first.delta_h1 == pytest.approx(-1e-4 * expected.u_cross, rel=1e-6)
    assert first.delta_h1_se == pytest.approx(1e-4 * expected.se, rel=1e-6)
    assert expected.ci95 is not None
    assert first.delta_h1_ci95 == pytest.approx([-1e-4 * expected.ci95[1], -1e-4 * expected.ci95[0]], rel=1e-6)
    assert len({first.se_plugin, first.se_jackknife, first.se_this_step, first.se_plugin_guide}) == 4


def test_units_entropy_and_realised_rows_are_those_of_the_batch_and_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Found] = []

    def keep(found: Found, timing: Mapping[str, float]) -> Report:
        seen.append(found)
        return assemble_report(found, timing)

    monkeypatch.setattr(importlib.import_module("entropy_probe.pipeline.run"), "assemble_report", keep)
    model = support.tiny_model()
    model.model.norm.weight.requires_grad_(False)
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-2), model)
    sizes = [4, 9, 6, 5, 7]
    batch = support.random_batch(5, sizes)
    report = probe(model, adam, batch, Settings(blocks=2, estimator=Estimator.SCORE)).report
    tokens = [[len(r.response_ids) for r in group.responses] for group in batch.groups]
    assert (report.units.mode, report.units.count, report.units.sizes) == ("block", 2, [3, 2])
    assert (report.units.prompts, report.units.responses) == (5, 31)
    assert report.units.tokens == sum(map(sum, tokens))
    assert report.first_order.unit_ids == [["p0", "p1", "p2"], ["p3", "p4"]]
    scores = torch.split(seen[0].measured.scores, sizes)
    entropy = -float(torch.stack([part.mean() for part in scores]).mean())
    length = sum(sum(part) / len(part) for part in tokens) / 5
    assert report.entropy.per_response == pytest.approx(entropy, rel=1e-12)
    assert report.entropy.mean_length == pytest.approx(length, rel=1e-12)
    assert report.entropy.per_token == pytest.approx(entropy / length, rel=1e-12)
    spread = sum(float(-part.sum() / size - entropy) ** 2 for part, size in zip(scores, sizes, strict=True))
    assert report.entropy.se == pytest.approx((spread / 5 / 4) ** 0.5, rel=1e-9)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (report.checkpoint.parameters, report.checkpoint.frozen_parameters) == (trainable, 16)
    for row, change in zip(report.realized, seen[0].realizations.rows, strict=True):
        weights = change.change.weights
        assert weights.pareto_k is not None
        expected = {
            "delta_h": change.change.delta_h, "se": change.change.se, "predicted": change.predicted,
            "entropy_before": change.change.entropy_before, "entropy_after": change.change.entropy_after,
            "ess": weights.ess, "ess_fraction": weights.ess_fraction, "pareto_k": weights.pareto_k,
            "pareto_k_limit": weights.pareto_k_limit,
            "delta_h_psis": change.change.delta_h_smoothed, "noise_floor": change.noise_floor,
            "step_norm": change.step_norm,
        }  # fmt: skip
        assert len(set(expected.values())) == len(expected)
        for name, value in expected.items():
            assert getattr(row, name) == value, name


def test_numbers_are_checked_inside_lists_and_nulls_in_realised_rows_too(result: ProbeResult) -> None:
    first = dataclasses.replace(result.report.first_order, row_x=[1.0, float("inf")])
    with pytest.raises(AssertionError, match=r"row_x\[1\]"):
        dataclasses.replace(result.report, first_order=first).to_dict()
    row = dataclasses.replace(result.report.realized[1], pareto_k=None, null_reasons={})
    with pytest.raises(AssertionError, match="pareto_k is null without a reason"):
        dataclasses.replace(result.report, realized=[result.report.realized[0], row]).to_dict()


def test_each_plot_is_written_under_its_own_name(
    result: ProbeResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from entropy_probe.report import files

    monkeypatch.setattr(plots, "plot_row_means", lambda report, path: path.write_text("row means"))
    monkeypatch.setattr(plots, "plot_predicted_and_realized", lambda report, path: path.write_text("predicted"))
    files.write_report_folder(result.report, None, tmp_path / "out")
    assert (tmp_path / "out" / "row_means.png").read_text() == "row means"
    assert (tmp_path / "out" / "predicted_and_realized.png").read_text() == "predicted"
