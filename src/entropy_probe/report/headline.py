"""The first sentence of a report: what the optimizer's next step does to the entropy, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_probe.realized.changes import RealizedChange
from entropy_probe.report.numbers import quantity, signed
from entropy_probe.report.sections.adamw import AdamWSection
from entropy_probe.report.sentences import stored_sentence


def whole_headline(adamw: AdamWSection, realized: Sequence[RealizedChange], entropy: float, unit: str) -> str:
    """The headline, and what rounding leaves of the step where the optimizer rounds its weights as it stores them."""
    said = [headline(adamw, entropy, unit)]
    for row in realized:
        if row.kept is not None:
            said.append(stored_sentence(row.kept.said, row.change.delta_h, row.change.se, unit))
            break
    return " ".join(said)


def headline(adamw: AdamWSection, entropy: float, unit: str) -> str:
    """One sentence a person understands first: what the optimizer's next step does to the entropy, and how sure that is.

    Args:
        adamw: that step.
        entropy: as it is now, nats per ``unit``.
        unit: response or token.
    """
    clipping = clipping_words(adamw)
    if adamw.total == 0.0 and not any(part.value for part in adamw.parts.values()):
        return (
            "The optimizer's next step changes nothing to first order: its learning rate is zero, or there is neither "
            "momentum, nor an advantage, nor weight decay."
        )
    share = f" ({100 * abs(adamw.total) / entropy:.2g} % of {entropy:.3g})" if entropy > 0 else ""
    if adamw.ci95 is None:
        return (
            f"To first order the optimizer's next step changes entropy by {signed(adamw.total, None)} nats per {unit}{share}, "
            f"{clipping}; it has no error: {adamw.null_reasons['ci95']}."
        )
    low, high = adamw.ci95
    interval = f"95 % interval of the change [{low:+.3g}, {high:+.3g}], {clipping}"
    if low <= 0.0 <= high:
        return (
            "This batch does not tell whether the optimizer's next step raises or lowers entropy: "
            f"{signed(adamw.total, adamw.se)} nats per {unit}{share}, {interval}."
        )
    return (
        f"To first order the optimizer's next step {'lowers' if adamw.total < 0 else 'raises'} entropy by "
        f"{quantity(abs(adamw.total), adamw.se)} nats per {unit}{share}, {interval}."
    )


def clipping_words(adamw: AdamWSection) -> str:
    """What is assumed of clipping, and where the limit, or its absence, is known from: given, recorded or unknown."""
    source = adamw.max_grad_norm_source
    if adamw.max_grad_norm is None:
        return "no clipping assumed" if source == "unknown" else f"no clipping, as {source}"
    if adamw.clip_factor == 1.0:
        return f"gradient norm within the clip of {adamw.max_grad_norm:g}, as {source}"
    return f"gradient clipped at {adamw.max_grad_norm:g}, as {source}"
