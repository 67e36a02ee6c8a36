"""What sections say in sentences: of the optimizer's own step, of δH₁, and of a step that is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from entropy_probe.report.numbers import quantity, range_of, signed
from entropy_probe.statistics.estimate import Estimate


def stored_sentence(said: str, delta_h: float, se: float, unit: str) -> str:
    """What is left of the optimizer's step where its weights are stored in fewer than 32 bits: it follows the headline.

    Args:
        said: which share of the weights moves.
        delta_h: the realised change by the step as it is stored, nats per ``unit``.
        se: its standard error.
        unit: response or token.
    """
    return (
        f"That is the step before its weights are rounded; {said}. As it is stored the step changes entropy by "
        f"{signed(delta_h, se)} nats per {unit} (realised)."
    )


def preconditioned_sentence(
    delta_h1: float, se: float | None, ci95: list[float] | None, entropy: float, unit: str = "response"
) -> str:
    """What the step of δH₁ does to the entropy, and how sure that is."""
    share = f", {100 * abs(delta_h1) / entropy:.2g} %" if entropy > 0 else ""
    if delta_h1 == 0.0 and (se is None or se == 0.0):
        return (
            "The preconditioned step (δH₁) changes nothing to first order: its learning rate is zero, no response has an "
            "advantage, or every element that it would move has v = 0."
        )
    which = "the preconditioned step along this batch's gradient alone (δH₁)"
    if se is None:
        return (
            f"To first order {which} changes entropy by {delta_h1:+.3g} nats per {unit}{share}; "
            "too few units for an error bar."
        )
    size = f"{quantity(abs(delta_h1), se)} nats per {unit}{share}"
    if ci95 is not None and ci95[0] <= 0.0 <= ci95[1]:
        return (
            f"This batch does not tell whether {which} raises or lowers entropy: "
            f"{'+' if delta_h1 >= 0 else '−'}{size} (95 % interval includes zero)."
        )
    return f"To first order {which} {'lowers' if delta_h1 < 0 else 'raises'} entropy by {size}."


def difference_sentence(spread_factor: float | list[float]) -> str:
    """How δH₁ differs from what the optimizer's own step does."""
    return (
        "Momentum spreads this gradient over the steps to come: in all they apply it "
        f"{range_of(spread_factor)} times (clip · Σ_k), as long as P and the policy hold still. "
        "The sentence before is about the next step alone."
    )


CAUSES = {
    "momentum": "momentum from earlier steps",
    "gradient": "this batch's gradient",
    "gradient_reward": "of it, by the reward term",
    "gradient_kl": "of it, by the KL term",
    "gradient_bonus": "of it, by the entropy bonus",
    "weight_decay": "weight decay",
}


TERMS = {"kl": "the KL term", "bonus": "the entropy bonus"}
"""Terms of a loss beside the reward's, by name."""


def term_sentences(terms: Mapping[str, Estimate]) -> list[str]:
    """What the loss's terms beside the reward's do within this batch's gradient, of those whose errors tell.

    Args:
        terms: by name, their shares of the gradient's part, nats, the reward's among them; none where the loss has one term.
    """
    found = []
    for name, said in TERMS.items():
        term, reward = terms.get(name), terms.get("reward")
        if term is None or reward is None or not term.excludes_zero:
            continue
        subject, own = said[0].upper() + said[1:], signed(term.value, term.se)
        if not reward.excludes_zero:
            effect = "lowers" if term.value < 0 else "raises"
            found.append(f"{subject} by itself {effect} entropy by {quantity(abs(term.value), term.se)} nats.")
            continue
        effect = "fall" if reward.value < 0 else "rise"
        figures = f"{own} nats beside {signed(reward.value, reward.se)}"
        share = abs(term.value / reward.value)
        if term.value * reward.value > 0:
            found.append(f"{subject} adds {100 * share:.2g} % to the {effect} by the reward term ({figures}).")
        elif share < 1:
            found.append(f"{subject} holds back {100 * share:.2g} % of the {effect} by the reward term ({figures}).")
        else:
            found.append(f"{subject} does more than undo the {effect} by the reward term ({figures}).")
    return found


def step_sentence(
    parts: Mapping[str, float],
    total: float,
    se: float | None,
    resolved: Sequence[str],
    *,
    total_resolved: bool,
    most: str | None,
) -> str:
    """Which part of the optimizer's own step moves the entropy, or that it cannot be told.

    Args:
        parts: their values, nats.
        total: their sum.
        se: its standard error.
        resolved: parts whose interval excludes zero.
        total_resolved: whether the total's does.
        most: the part that is more than half of the total, where the errors tell.
    """
    if total == 0.0 and not any(parts.values()):
        return "The optimizer's own step changes nothing to first order."
    if se is None:
        return (
            "Without an error of the whole it cannot be told which part of the optimizer's own step moves the entropy."
        )
    if most is not None:
        return f"Most of the {'fall' if total < 0 else 'rise'} by the optimizer's own step is {CAUSES[most]}."
    if total_resolved:
        effect = "lowers" if total < 0 else "raises"
        return (
            f"The optimizer's own step {effect} entropy; which part does most of it cannot be told within the errors."
        )
    if resolved:
        alone = ", ".join(f"{CAUSES[name]} alone {'lowers' if parts[name] < 0 else 'raises'} it" for name in resolved)
        return f"Whether the optimizer's own step lowers or raises entropy cannot be told within the errors; {alone}."
    return "Neither the optimizer's own step nor any part of it can be told from zero within the errors."
