"""Plots: predicted against realised with error bars, row means by prompt, and realised changes along the step."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from entropy_probe.report.schema import Report
from entropy_probe.report.sections.sweep import SweepSection

PREDICTED, REALIZED, NEUTRAL = "#3b6fb5", "#c8553d", "#777777"


def plot_predicted_and_realized(report: Report, path: Path) -> None:
    """δH₁ with its 95 % interval, then each realised ΔH ± its error, as the text has them, beside its own linear prediction."""
    figure, axes = _figure(7.0, 1.6 + 0.7 * (1 + len(report.realized)))
    labels = ["δH₁, first order"]
    first = report.first_order
    _interval(axes, 0, first.delta_h1, first.delta_h1_ci95, PREDICTED, "δH₁ with its 95 % interval")
    for place, row in enumerate(report.realized, start=1):
        ends = [row.delta_h - row.se, row.delta_h + row.se]
        _interval(axes, place, row.delta_h, ends, REALIZED, "realised ΔH ± standard error" if place == 1 else None)
        axes.plot(
            [row.predicted], [place], "|", color=PREDICTED, markersize=16, markeredgewidth=2,
            label="that estimator's own linear term" if place == 1 else None,
        )  # fmt: skip
        batch = "fresh responses" if row.method == "resampled" else f"{row.batch} batch"
        rounded = row.title.removeprefix(row.step)
        labels.append(f"{row.step} step{rounded},\n{batch}, {row.estimator}")
    axes.axvline(0.0, color=NEUTRAL, linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(f"entropy change, {report.first_order.nats}")
    # Below the whole figure: long names of steps leave the axes too narrow for it.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def plot_row_means(report: Report, path: Path) -> None:
    """r_u by unit, sorted, with its halves x_u and y_u and U_cross: which prompts drive the change."""
    first = report.first_order
    order = sorted(range(len(first.row_means)), key=lambda u: first.row_means[u])
    places = range(len(order))
    figure, axes = _figure(max(6.0, min(16.0, 2.0 + 0.22 * len(order))), 4.2)
    axes.bar(places, [first.row_means[u] for u in order], color=PREDICTED, alpha=0.7, label="row mean r")
    axes.plot(
        places,
        [first.row_x[u] for u in order],
        "x",
        color=REALIZED,
        markersize=5,
        label="x: answers to the others' update",
    )
    axes.plot(
        places,
        [first.row_y[u] for u in order],
        ".",
        color="black",
        markersize=5,
        label="y: its update moves the others",
    )
    axes.axhline(first.u_cross, color=NEUTRAL, linestyle="--", linewidth=1, label="U_cross")
    axes.axhline(0.0, color="black", linewidth=0.6)
    if len(order) <= 64:
        axes.set_xticks(places, [_short(first.unit_ids[u]) for u in order], rotation=90, fontsize=7)
    axes.set_xlabel(f"{'prompts' if report.units.mode == 'exact' else 'blocks'}, sorted by r")
    axes.set_ylabel("nats per unit of learning rate\n(positive: lowers entropy)")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_sweep(report: Report, path: Path) -> None:
    """Sizes of ΔH(α), logarithmic, a panel a curve: realised, linear term, quadratic, noise floor; ESS on a second axis."""
    columns = min(2, len(report.sweep))
    rows = -(-len(report.sweep) // columns)
    figure = Figure(figsize=(6.4 * columns, 0.5 + 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, curve in zip(panels, report.sweep, strict=False):
        _sweep_panel(axes, curve)
    for axes in panels[len(report.sweep) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def _sweep_panel(axes: Axes, curve: SweepSection) -> None:
    alphas, sizes = curve.alphas, [abs(value) for value in curve.delta_h]
    axes.plot(alphas, [abs(value) for value in curve.predicted], color=PREDICTED, label="linear term")
    if curve.second_order is not None:
        both = [abs(one + two) for one, two in zip(curve.predicted, curve.second_order, strict=True)]
        axes.plot(alphas, both, "--", color=PREDICTED, label="with the second-order term")
    for falls, fill in ((True, REALIZED), (False, "white")):
        chosen = [k for k, value in enumerate(curve.delta_h) if (value < 0) is falls]
        axes.errorbar(
            [alphas[k] for k in chosen], [sizes[k] for k in chosen], yerr=[curve.se[k] for k in chosen],
            fmt="o", color=REALIZED, markerfacecolor=fill, markersize=5, capsize=3,
            label=f"realised ΔH, {'falls' if falls else 'rises'} ± standard error",
        )  # fmt: skip
    axes.plot(alphas, curve.noise_floor, ":", color=NEUTRAL, label="noise floor")
    if curve.linear_until is not None:
        axes.axvline(curve.linear_until, color=NEUTRAL, linewidth=0.8, label="linear until")
    ess = axes.twinx()
    ess.plot(alphas, curve.ess_fraction, ".-", color=NEUTRAL, linewidth=0.6, markersize=3)
    ess.set_ylim(0.0, 1.05)
    ess.set_ylabel("ESS/N (grey dots)", color=NEUTRAL, fontsize=8)
    # For the legend alone: a line of the second axis is not among the first's handles.
    axes.plot([], [], ".-", color=NEUTRAL, linewidth=0.6, markersize=3, label="ESS/N, right axis")
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    axes.set_title(f"{curve.step} step, {curve.batch} batch, {curve.estimator}", fontsize=9)
    axes.set_xlabel("α, factor of the learning rate")
    axes.set_ylabel(f"size of the change, nats\n{curve.entropy.replace('-', ' ')}")


def _interval(axes: Axes, place: int, centre: float, ends: list[float] | None, colour: str, label: str | None) -> None:
    errors = None if ends is None else [[max(0.0, centre - ends[0])], [max(0.0, ends[1] - centre)]]
    axes.errorbar([centre], [place], xerr=errors, fmt="o", color=colour, capsize=4, label=label)


def _short(unit_id: object) -> str:
    text = f"{unit_id[0]}…{unit_id[-1]}" if isinstance(unit_id, list) else str(unit_id)
    return text if len(text) <= 14 else text[:13] + "…"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    # No creation date or software tag: the same report gives the same file.
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
