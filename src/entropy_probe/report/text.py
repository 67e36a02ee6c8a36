"""The report for people: two sentences, then the numbers with their units, then warnings with evidence and advice."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entropy_probe.common.files import readable_size
from entropy_probe.report.schema import Report
from entropy_probe.report.sentences import CAUSES, quantity, range_of, signed
from entropy_probe.targets.registry import ALSO_MOVED


def print_report(report: Report, console: Console) -> None:
    """Print the whole report."""
    # In a pipe or a log a sentence is one line.
    for sentence in (Text(report.headline, style="bold"), Text(report.first_order.sentence)):
        console.print(sentence, soft_wrap=not console.is_terminal)
    console.print()
    console.print(section("The optimizer's own step, to first order", _adamw(report)))
    console.print(section("The preconditioned step, to first order: δH₁", _first_order(report)))
    console.print(section("Also moved by this step, to first order", _targets(report)))
    console.print(section("Where the noise of δH₁ comes from, in shares of its variance", _noise(report)))
    console.print(section(f"Realised, after a step ({_nats(report)})", _realized(report)))
    if report.sweep:
        console.print(section("Along the step, α times the learning rate", _sweep(report)))
    console.print(section("Batch and checkpoint", _facts(report)))
    for warning in report.warnings:
        console.print(
            Text.assemble(("warning: ", "bold yellow"), f"{warning.seen}. ", (warning.advice + ".", "italic"))
        )
    if not report.warnings:
        console.print("no warnings")


def section(title: str, body: RenderableType) -> RenderableType:
    """A part of a report under its title."""
    return Group(Text(title, style="underline"), Padding(body, (0, 0, 1, 2)))


def rows_of(*rows: tuple[str, str, str]) -> Table:
    """Name, value and what is said of it."""
    table = Table.grid(padding=(0, 2))
    for name, value, unit in rows:
        table.add_row(Text(name), Text(value), Text(unit, style="dim"))
    return table


def _number(value: float | None, reasons: dict[str, str], name: str) -> str:
    return f"{value:.4g}" if value is not None else f"none: {reasons[name]}"


def _first_order(report: Report) -> Table:
    first = report.first_order
    reasons = dict(first.null_reasons)
    interval = (
        f"[{first.delta_h1_ci95[0]:+.4g}, {first.delta_h1_ci95[1]:+.4g}]"
        if first.delta_h1_ci95 is not None
        else f"none: {reasons['delta_h1_ci95']}"
    )
    return rows_of(
        ("δH₁ = −η U_cross", f"{first.delta_h1:+.4g}", _nats(report)),
        ("standard error of δH₁", _number(first.delta_h1_se, reasons, "delta_h1_se"), "over fresh batches"),
        (
            "the same, this step",
            _number(first.delta_h1_se_this_step, reasons, "delta_h1_se_this_step"),
            "given this update: without the noise that another batch's Y would add",
        ),
        ("95 % interval of δH₁", interval, first.interval_method or ""),
        ("prompts needed", *_needed(report)),
        *_other_batches(report),
        ("entropy now", quantity(report.entropy.per_response, report.entropy.se), "nats per response"),
        ("", quantity(report.entropy.per_token, report.entropy.per_token_se), "nats per token"),
        ("U_cross", f"{first.u_cross:.4g}", "nats per unit of learning rate"),
        ("SE of it, plug-in", _number(first.se_plugin, reasons, "se_plugin"), "from row means"),
        ("SE of it, jackknife", _number(first.se_jackknife, reasons, "se_jackknife"), "delete-one"),
        ("SE of it, this step", _number(first.se_this_step, reasons, "se_this_step"), "given this update"),
        (
            "SE of it, guide's text",
            _number(first.se_plugin_guide, reasons, "se_plugin_guide"),
            "sd of r; kept to compare",
        ),
        ("learning rate", _rates(first.learning_rate), ""),
        *_zero_v(report),
        ("self-test residual", f"{first.self_test_residual:.1e}", "relative"),
    )


def _zero_v(report: Report) -> list[tuple[str, str, str]]:
    """Nothing where no element has v = 0."""
    found = report.first_order.zero_v
    if not found.elements:
        return []
    added = f"{found.delta_h1_added:+.4g} {_nats(report)}"
    treated = (
        f"left out of P; what they would add with 1/ε: {added}"
        if found.treatment == "leave-out"
        else f"P is 1/ε there; what they add: {added}"
    )
    return [("elements with v = 0", f"{found.elements:,}", treated)]


def _targets(report: Report) -> Table:
    said = {target.name: target.description for target in ALSO_MOVED}
    rows = []
    for target in report.targets:
        what = said.get(target.name, "")
        if target.delta is None:
            rows.append((target.name, f"none: {target.null_reasons['delta']}", ""))
        else:
            interval = "" if target.ci95 is None else f"; 95 % [{target.ci95[0]:+.4g}, {target.ci95[1]:+.4g}]"
            rows.append((target.name, signed(target.delta, target.se), what + interval))
    return rows_of(*rows)


def _noise(report: Report) -> Table:
    noise = report.noise
    reasons = dict(noise.null_reasons)

    def share(value: float | None, name: str) -> str:
        return f"none: {reasons[name]}" if value is None else f"{100.0 * value:.0f} %".replace("-", "−")

    if noise.product is None:
        return rows_of(("all of it", share(None, "product"), ""))
    of_x = share(noise.product_with_entropy_gradient, "product_with_entropy_gradient")
    of_y = share(noise.product_with_update, "product_with_update")
    return rows_of(
        (
            "entropy gradient, X",
            share(noise.entropy_gradient, "entropy_gradient"),
            "sampling of responses: more of them, or a better estimator",
        ),
        ("update, Y", share(noise.update, "update"), "sampling of responses: more of them"),
        ("both together", share(noise.shared, "shared"), "through the responses that both are made of"),
        ("prompts", share(noise.prompts, "prompts"), "real differences: more prompts, nothing else"),
        (
            "X's times Y's",
            share(noise.product, "product"),
            f"falls as 1/prompts²; sampling of X is in {of_x} (of the whole), of Y in {of_y}",
        ),
    )


def _adamw(report: Report) -> RenderableType:
    adamw = report.adamw
    clipped = "not clipped" if adamw.max_grad_norm is None else f"clipped at {adamw.max_grad_norm:g}"
    rows = [
        (
            CAUSES[name],
            signed(part.value, part.se),
            "" if part.v_at_t == part.value else f"{part.v_at_t:+.4g} with v before this gradient",
        )
        for name, part in adamw.parts.items()
    ]
    rows.append(
        (
            "total",
            signed(adamw.total, adamw.se),
            f"{_nats(report)}; gradient norm {adamw.gradient_norm:.4g}, {clipped}",
        )
    )
    interval = (
        f"none: {adamw.null_reasons['ci95']}" if adamw.ci95 is None else f"[{adamw.ci95[0]:+.4g}, {adamw.ci95[1]:+.4g}]"
    )
    rows.append(("95 % interval of it", interval, "of what this step does, given the update"))
    rows.append(
        ("clip · Σ_k", range_of(adamw.spread_factor), "times δH₁: what this batch does in all, over the steps to come")
    )
    for row in report.what_if.rows:
        name = row.name.replace("_", " ") + ("" if row.asked is None else f" {row.asked:g}")
        said = [
            f"{what} {signed(value, se)}"
            for what, value, se in (("δH₁", row.delta_h1, row.delta_h1_se), ("this step", row.adamw, row.adamw_se))
            if value is not None
        ]
        rows.append((f"what if: {name}", "; ".join(said) or f"none: {row.null_reasons['delta_h1']}", ""))
    if (fall := report.what_if.fall) is not None:
        name = f"what if: a fall of {fall.nats:g}"
        if fall.learning_rate_multiple is None or fall.learning_rate_multiple_ci95 is None:
            rows.append((name, f"none: {fall.null_reasons['learning_rate_multiple']}", ""))
        else:
            low, high = fall.learning_rate_multiple_ci95
            rows.append(
                (name, f"{fall.learning_rate_multiple:.3g} × the learning rate", f"95 % {low:.3g} to {high:.3g}")
            )
    return Group(Text(adamw.sentence), rows_of(*rows))


def _nats(report: Report) -> str:
    return f"nats {report.first_order.entropy.replace('-', ' ')}"


def _needed(report: Report) -> tuple[str, str]:
    needed = report.needed
    if needed.exclude_zero is None:
        return f"none: {needed.null_reasons['exclude_zero']}", ""
    said = f"for an interval without zero, if they are like these {report.units.prompts}"
    if needed.target_se is None:
        return f"{needed.exclude_zero}", said
    reach = "none would do" if needed.reach_target_se is None else f"{needed.reach_target_se}"
    return f"{needed.exclude_zero}; {reach}", f"{said}; for a standard error of {needed.target_se:g}"


def _other_batches(report: Report) -> list[tuple[str, str, str]]:
    rows = []
    if (two := report.two_batches) is not None:
        interval = f"95 % interval [{two.delta_h1_ci95[0]:+.4g}, {two.delta_h1_ci95[1]:+.4g}]"
        said = f"{interval}, X from {two.evaluation_responses} responses to {two.evaluation_prompts} other prompts"
        rows.append(("δH₁, two batches", signed(two.delta_h1, two.delta_h1_se), said))
    if (folds := report.folds) is not None:
        value = (
            f"none: {folds.null_reasons['delta_h1']}"
            if folds.delta_h1 is None
            else signed(folds.delta_h1, folds.delta_h1_se)
        )
        rows.append((f"δH₁, {folds.folds} folds", value, "X of one fold against Y of the others"))
    return rows


def _rates(rates: float | list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) if isinstance(rates, list) else f"{rates:g}"


def _realized(report: Report) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("step (batch), estimator")
    for column in ("ΔH realised", "linear term", "ESS/N", "k̂", "floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.realized:
        table.add_row(
            f"{row.title} ({row.batch}{', resampled' if row.method == 'resampled' else ''}), {row.estimator}",
            signed(row.delta_h, row.se),
            f"{row.predicted:+.4g}",
            f"{row.ess_fraction:.3f}",
            "none" if row.pareto_k is None else f"{row.pareto_k:.2f}",
            f"{row.noise_floor:.0e}",
        )
    said = dict.fromkeys(f"{row.title} ({row.method}): {row.note}" for row in report.realized)
    notes = [Text(note, style="dim") for note in said]
    limits = sorted({f"{row.pareto_k_limit:.2f}" for row in report.realized if row.pareto_k is not None})
    if limits:
        notes.append(
            Text(f"k̂ is too large above {' or '.join(limits)}, the limit for this number of responses", style="dim")
        )
    missing = {row.null_reasons["pareto_k"] for row in report.realized if row.pareto_k is None}
    notes += [Text(f"k̂ none: {reason}", style="dim") for reason in sorted(missing)]
    return Group(table, *notes)


def _sweep(report: Report) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("step (batch), estimator")
    for column in ("linear until α", "d²ΔH/dα²", "log-log slope", "ESS/N", "at α"):
        table.add_column(column, justify="right", no_wrap=True)
    for curve in report.sweep:
        until = "none" if curve.linear_until is None else f"{curve.linear_until:.3g}"
        table.add_row(
            f"{curve.step} ({curve.batch}), {curve.estimator}",
            f"{until} or more" if curve.linear_beyond else until,
            "none" if curve.curvature is None else f"{curve.curvature:+.3g}",
            "none" if curve.slope is None else f"{curve.slope:.4f}",
            f"{curve.ess_fraction[0]:.3f} … {curve.ess_fraction[-1]:.3f}",
            f"{curve.alphas[0]:g} … {curve.alphas[-1]:g}",
        )
    said = Text("linear: realised within 10 % of its own linear term for all smaller α", style="dim")
    missing: dict[str, list[str]] = {}
    for curve in report.sweep:
        for name, why in curve.null_reasons.items():
            missing.setdefault(f"{curve.step} ({curve.batch}), {curve.estimator}: {why}", []).append(name)
    reasons = [f"{' and '.join(names)} none, {why}".replace("_", " ") for why, names in missing.items()]
    return Group(table, said, *(Text(reason, style="dim") for reason in reasons))


def _coverage(report: Report) -> str:
    share = report.engine.fallback_share
    return "by rules" if share == 0.0 else f"{100 * (1 - share):.3g} % by rules"


FEW = 8
"""Ranks whose prompts are shown one by one."""


def _ranks(report: Report) -> list[tuple[str, str, str]]:
    """Nothing for one process."""
    ranks = report.ranks
    if ranks.count == 1:
        return []
    dealt = f"{min(ranks.prompts)} to {max(ranks.prompts)} prompts each"
    if ranks.count <= FEW:
        dealt = f"{', '.join(map(str, ranks.prompts))} prompts"
    sizes = sorted(((sent.bytes, kind) for kind, sent in ranks.sent.items() if sent.bytes), reverse=True)
    kinds = ", ".join(f"{kind} {readable_size(count)}" for count, kind in sizes)
    handed = (
        f"a rank handed over at most {readable_size(sum(count for count, _ in sizes))}{f' ({kinds})' if kinds else ''}"
    )
    return [("ranks", f"{ranks.count}", f"{ranks.backend}, {ranks.sharding}: {dealt}; {handed}")]


def _facts(report: Report) -> Table:
    units, checkpoint = report.units, report.checkpoint
    return rows_of(
        ("units", f"{units.count}", units.reason),
        ("rollouts", f"{units.responses}", f"responses to {units.prompts} prompts, {units.tokens} tokens"),
        ("gradients", _coverage(report), report.engine.reason),
        ("trainable", f"{checkpoint.parameters:,}", f"parameters, {report.config.dtype}"),
        ("Adam step", str(checkpoint.adam_step), f"names by: {checkpoint.mapping}"),
        ("advantages", str(report.config.advantage), f"length weight {report.config.length_weight}"),
        ("temperature", f"{report.config.temperature:g}", ""),
        *_ranks(report),
        ("time", f"{report.timing['total']:.1f} s", ""),
    )
