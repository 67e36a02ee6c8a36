"""A replay for people: one sentence, the figures, then suspicions and warnings with evidence and advice."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_probe.report.replay_schema import ReplayReport, within_rounding
from entropy_probe.report.text import rows_of, section

WORST_SHOWN = 3


def print_replay(report: ReplayReport, console: Console) -> None:
    """Print the whole report."""
    console.print(Text(report.headline, style="bold"))
    console.print()
    console.print(section("The update, replayed against the real one", _update(report)))
    console.print(section("Recomputed, beside the trainer's log and moments", _beside(report)))
    console.print(section("Step and batch", _facts(report)))
    for suspicion in report.suspicions:
        left = "" if suspicion.error_net is None else f" (with it the error is {_net(report, suspicion.error_net)})"
        console.print(
            Text.assemble(("suspicion: ", "bold red"), f"{suspicion.seen}{left}. ", (suspicion.advice + ".", "italic"))
        )
    for warning in report.warnings:
        console.print(
            Text.assemble(("warning: ", "bold yellow"), f"{warning.seen}. ", (warning.advice + ".", "italic"))
        )


def _net(report: ReplayReport, error: float) -> str:
    return "within rounding" if within_rounding(error, report.update.rounding_expected) else f"{error:.1e}"


def _update(report: ReplayReport) -> Table:
    update = report.update
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.3g}" for name, size in update.part_norms.items())
    cosine = f"{update.cosine:.9f}" if update.cosine is not None else f"none: {update.null_reasons['cosine']}"
    net = _net(report, update.error_net)
    worst = [
        (
            "" if place else "most of it in",
            "did not move" if row.relative_error is None else f"{row.relative_error:.2e}",
            f"{row.name}, {100 * row.share:.2g} % of the squared error",
        )
        for place, row in enumerate(update.parameters[:WORST_SHOWN])
    ]
    return rows_of(
        ("relative L2 error", f"{update.relative_error:.2e}", f"over {report.parameters:,} trainable parameters"),
        (
            "rounding explains",
            f"{update.rounding_expected:.2e}",
            f"at most {update.rounding_floor:.2e}: half an ulp each",
        ),
        ("net of rounding", net, f"up to {update.tolerance:g} counts as the same step"),
        ("cosine", cosine, f"norm ratio {update.norm_ratio:.6g}"),
        ("‖Δθ‖", f"{update.update_norm:.4g}", f"parts, as shares of it: {parts}"),
        *worst,
    )


def _beside(report: ReplayReport) -> Table:
    gradient, logged = report.gradient, report.logged
    rates = logged.learning_rate
    rate = ", ".join(f"{r:g}" for r in rates) if isinstance(rates, list) else f"{rates:g}"
    clip = "not clipped" if gradient.max_grad_norm is None else f"clipped at {gradient.max_grad_norm:g}"
    moments = (
        f"none: {gradient.null_reasons['relative_error']}"
        if gradient.relative_error is None
        else f"{gradient.relative_error:.2e}"
    )
    return rows_of(
        ("entropy", f"{logged.entropy:.7g}", _logged(report, "entropy") + "; nats per token before the update"),
        ("gradient norm", f"{logged.grad_norm:.7g}", _logged(report, "grad_norm")),
        ("learning rate", rate, _logged(report, "learning_rate")),
        (
            "clipping",
            f"{gradient.clip_factor:.4g}",
            f"{clip} ({gradient.max_grad_norm_from})",
        ),
        (
            "gradient error",
            moments,
            f"against the one in Adam's moments at N+1; up to {gradient.tolerance:g} counts as the same",
        ),
    )


def _logged(report: ReplayReport, name: str) -> str:
    values = {
        "entropy": report.logged.entropy_logged,
        "grad_norm": report.logged.grad_norm_logged,
        "learning_rate": report.logged.learning_rate_logged,
    }
    value = values[name]
    return f"logged {value:.7g}" if value is not None else f"log: {report.logged.null_reasons[f'{name}_logged']}"


def _facts(report: ReplayReport) -> Table:
    config = report.config
    return rows_of(
        ("step", "unknown" if config.step is None else str(config.step), f"{report.kind} weights, {config.dtype}"),
        ("rollouts", str(report.responses), f"responses to {report.prompts} prompts"),
        ("loss", config.length_weight, f"advantages {config.advantage}, temperature {config.temperature:g}"),
        ("time", f"{report.timing['total']:.1f} s", ""),
    )
