"""Flat figures of a report for a tracker, such as TensorBoard or Weights & Biases: a name and a float each."""

from __future__ import annotations

from entropy_probe.report.sections.base import Sectioned, figures


def metrics(report: Sectioned) -> dict[str, float]:
    """Every section's figures by name, and ``seconds``, the time of the whole probe. What is null in the report is left out.

    Of the probe's own report, entropies and their changes in nats per response, or per token where that was asked for:

    - ``delta_h1``, ``delta_h1_se``, ``delta_h1_low``, ``delta_h1_high``: the preconditioned step to first order, with its
      standard error over fresh batches and the ends of its 95 % interval;
    - ``adamw``, ``adamw_se``, ``adamw_low``, ``adamw_high``: the optimizer's own step to first order, likewise, given this
      update; ``momentum``, ``gradient``, ``weight_decay`` are its parts; ``gradient_norm`` is the gradient's, before clipping;
    - ``delta_reward``, ``delta_length``, each with ``_low`` and ``_high``: what the preconditioned step does to the expected
      reward and to the expected tokens of a response;
    - ``realized``, ``realized_se``, ``realized_predicted``, ``ess_fraction``: the entropy's change after the optimizer's own
      step (before any rounding of the weights) on the responses that it is made from, its linear prediction, and the effective
      share of the responses;
    - ``entropy``, ``entropy_per_token``: as it is before the step, per response and per token.

    Raises:
        AssertionError: two sections give one name: a fault of ours.
    """
    found: dict[str, float] = {}
    for name, value in (*figures(report), ("seconds", report.timing["total"])):
        assert name not in found, f"two sections give the figure {name}"
        if value is not None:
            found[name] = float(value)
    return found
