"""Warnings: each says what was seen, with its figures, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from entropy_probe.adam_preconditioner import AdamState
from entropy_probe.realized import RealizedChange
from entropy_probe.report import Evidence
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import by_group
from entropy_probe.u_statistics import CrossStatistics

FEW_UNITS = 10
OFF_POLICY_PER_TOKEN = 0.02
"""Mean |log-prob difference| a token above which rollouts do not count as this policy's: bfloat16 samplers stay below."""
PARETO_K_LIMIT = 0.7
RESIDUAL_LIMIT = 1e-6


def interval_warnings(statistics: CrossStatistics) -> list[Evidence]:
    """Too few units, or an interval that includes zero; a failed self-test."""
    found = []
    units = len(statistics.row_means)
    if units < FEW_UNITS:
        found.append(
            Evidence(
                "few_units",
                f"{units} units; an interval from fewer than {FEW_UNITS} rests on its t quantile more than on data",
                "Give more prompts, or more blocks",
            )
        )
    if statistics.ci95 is not None and statistics.ci95[0] <= 0.0 <= statistics.ci95[1]:
        found.append(
            Evidence(
                "interval_includes_zero",
                f"the 95 % interval of U_cross, [{statistics.ci95[0]:.3g}, {statistics.ci95[1]:.3g}], includes zero",
                "Give more prompts: the error falls as 1/√U at best, as 1/U while the degenerate part dominates",
            )
        )
    if statistics.self_test_residual > RESIDUAL_LIMIT:
        found.append(
            Evidence(
                "self_test",
                f"two roads to ΣX̃·ΣỸ differ by {statistics.self_test_residual:.1e} of its terms",
                "Run with --dtype float64; if it stays, report it",
            )
        )
    return found


def learning_rate_warnings(state: AdamState, overridden: bool) -> list[Evidence]:
    """A learning rate of zero: the prediction is zero whatever the entropy would do."""
    zero = [group for group in state.groups if group.names and group.learning_rate == 0.0]
    if not zero:
        return []
    source = "given" if overridden else "stored in optimizer.pt (the end of a schedule leaves 0.0 there)"
    return [
        Evidence(
            "learning_rate_zero",
            f"the learning rate is 0.0, as {source}, so this step changes nothing",
            "Give --learning-rate with the rate you want to know about",
        )
    ]


def advantage_warnings(advantages: Tensor, group_sizes: Sequence[int]) -> list[Evidence]:
    """Most prompts without any advantage: they say nothing about the update."""
    zero = sum(bool((part == 0).all()) for part in by_group(advantages, group_sizes))
    if 2 * zero <= len(group_sizes):
        return []
    return [
        Evidence(
            "zero_advantage_groups",
            f"{zero} of {len(group_sizes)} prompts have zero advantage in every response and give no update",
            "Give prompts of middling difficulty; error bars rest on the others",
        )
    ]


def on_policy_warnings(batch: RolloutBatch, scores: Tensor) -> list[Evidence]:
    """The sampler's log-probs, where given, disagree with the checkpoint's."""
    pairs = [(r, float(s)) for r, s in zip(batch.responses, scores, strict=True) if r.logprobs is not None]
    if not pairs:
        return []
    gap = sum(abs(sum(r.logprobs or ()) - s) for r, s in pairs)
    tokens = sum(len(r.response_ids) for r, _ in pairs)
    if gap / tokens <= OFF_POLICY_PER_TOKEN:
        return []
    return [
        Evidence(
            "off_policy",
            f"the sampler's log-probs differ from this checkpoint's by {gap / len(pairs):.3g} nats a response, "
            f"{gap / tokens:.3g} a token, over {len(pairs)} responses",
            "Pair checkpoint N with the rollouts of step N+1 and the right temperature, or sample anew with "
            "`entropy-probe sample`",
        )
    ]


def end_token_warnings(batch: RolloutBatch, end_tokens: Sequence[int]) -> list[Evidence]:
    """Responses that go on after an end token: padding kept by mistake would be scored as if it had been sampled."""
    going_on = sum(any(token in end_tokens for token in r.response_ids[:-1]) for r in batch.responses)
    if not going_on:
        return []
    return [
        Evidence(
            "tokens_after_end",
            f"{going_on} of {len(batch.responses)} responses go on after an end token of the model "
            f"({', '.join(map(str, end_tokens))}), and what follows is scored too",
            "Cut response_ids after the first end token, unless your sampler really went on",
        )
    ]


def parameter_warnings(
    untouched: Sequence[str], ascent: Mapping[str, Tensor], state: AdamState, rivals: Sequence[str]
) -> list[Evidence]:
    """Parameters out of reach, elements whose v is exactly zero, and a mapping that shapes alone could not settle."""
    found = []
    if untouched:
        found.append(
            Evidence(
                "untouched_parameters",
                f"{len(untouched)} trainable parameters are reached by no response: {_some(untouched)}",
                "They count as zero; if they should train, look for a frozen or unused module",
            )
        )
    fresh = {
        name: int(((state.moments[name].exp_avg_sq == 0).to(y.device) & (y != 0)).sum()) for name, y in ascent.items()
    }
    total = sum(fresh.values())
    if total:
        names = [name for name, count in fresh.items() if count]
        found.append(
            Evidence(
                "zero_second_moment",
                f"{total} elements ({_some(names)}) have v = 0 but a gradient in this batch, so P is 1/ε there and they "
                "can outweigh all others",
                "Trust the adamw row, whose step renews v first; a few more training steps fill v",
            )
        )
    if rivals:
        found.append(
            Evidence(
                "ambiguous_mapping",
                f"optimizer.pt also fits {_some(rivals)}, which maps some parameters of equal shape elsewhere",
                "Check with `entropy-probe inspect` that the version named there is the one that wrote it",
            )
        )
    return found


def realized_warnings(rows: Sequence[RealizedChange]) -> list[Evidence]:
    """Low ESS, a heavy tail of weights, or a change below the numerical floor."""
    found = []
    for row in rows:
        weights = row.change.weights
        if weights.is_low:
            found.append(
                Evidence(
                    "low_ess",
                    f"the {row.step} step leaves an effective sample of {weights.ess:.1f} of {len(weights.weights)} responses "
                    f"({100 * weights.ess_fraction:.0f} %)",
                    "Its ΔH rests on a few responses; look at delta_h_psis, or at a smaller --learning-rate",
                )
            )
        if weights.pareto_k is not None and weights.pareto_k > PARETO_K_LIMIT:
            found.append(
                Evidence(
                    "heavy_weights",
                    f"the {row.step} step's importance weights have Pareto k̂ = {weights.pareto_k:.2f}, above {PARETO_K_LIMIT}",
                    "Their mean converges too slowly to trust; use a smaller --learning-rate or more responses",
                )
            )
        if row.predicted != 0.0 and abs(row.change.delta_h) <= row.noise_floor:
            found.append(
                Evidence(
                    "below_noise_floor",
                    f"the {row.step} step's ΔH of {row.change.delta_h:.1e} is within its numerical floor of "
                    f"{row.noise_floor:.1e}",
                    "Run with --dtype float64",
                )
            )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
