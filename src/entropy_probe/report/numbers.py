"""How numbers are written for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def quantity(value: float, se: float | None) -> str:
    """``value ± se`` with two digits of the error."""
    if se is None or se == 0.0:
        return f"{value:.4g}"
    exponent = int(f"{se:e}".split("e")[1])
    if -4 <= exponent <= 3:
        digits = max(0, 1 - exponent)
        return f"{value:.{digits}f} ± {se:.{digits}f}"
    leading = max(exponent, int(f"{value:e}".split("e")[1]))
    scale, digits = 10.0**leading, 1 + leading - exponent
    return f"({value / scale:.{digits}f} ± {se / scale:.{digits}f})e{leading}"


def signed(value: float, se: float | None) -> str:
    """:func:`quantity` with its sign."""
    return f"{'+' if value >= 0 else '−'}{quantity(abs(value), se)}"


def range_of(factors: float | list[float]) -> str:
    """One number, or from which to which."""
    return f"{min(factors):.3g} to {max(factors):.3g}" if isinstance(factors, list) else f"{factors:.3g}"


def listed(values: float | Sequence[float]) -> str:
    """One number, or all of them."""
    return ", ".join(f"{value:g}" for value in values) if isinstance(values, Sequence) else f"{values:g}"


def interval(ends: Sequence[float]) -> str:
    """``[low, high]`` with signs."""
    return f"[{ends[0]:+.4g}, {ends[1]:+.4g}]"


def none(reasons: Mapping[str, str], name: str) -> str:
    """What a null's place shows: why there is none."""
    return f"none: {reasons[name]}"


def number(value: float | None, reasons: Mapping[str, str], name: str) -> str:
    """A number of four digits, or why there is none."""
    return none(reasons, name) if value is None else f"{value:.4g}"
