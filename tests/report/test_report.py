"""The report: schema 1, the sentence, warnings with evidence, files that are whole or not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import enumerable
import support
from entropy_probe import ProbeResult, Settings, probe, state_of_optimizer
from entropy_probe.data.rollouts import RolloutBatch, group_rollouts
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.report import AdamWSection, Report, write_report_folder
from entropy_probe.report.headline import clipping_words, headline
from entropy_probe.report.numbers import quantity
from entropy_probe.report.sections.first_order import interval_warnings
from entropy_probe.report.sentences import preconditioned_sentence
from entropy_probe.report.text import print_report
from entropy_probe.statistics.intervals import interval
from entropy_probe.statistics.u_statistics import CrossStatistics, cross_statistics
from entropy_probe.statistics.variance import decompose, variance_at
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from enumerable import EnumerablePolicy

CONTRACT = {
    "first_order": {
        "u_cross", "delta_h1", "learning_rate", "bars_dot", "diag_sum", "row_means", "unit_ids", "row_x", "row_y", "se_plugin",
        "se_jackknife", "se_this_step", "se_plugin_guide", "zeta1_plugin", "zeta1_jackknife", "delta_h1_ci95",
        "self_test_residual",
    },
    "units": {"mode", "count", "sizes", "responses", "tokens"},
    "ranks": {"count", "sharding", "backend", "prompts", "tokens", "sent"},
    "realized": {
        "step", "batch", "delta_h", "se", "entropy_before", "entropy_after", "ess", "ess_fraction", "pareto_k", "noise_floor",
        "predicted", "method", "estimator",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    return probe(model, adam, support.random_batch(12, 4), Settings(estimator=Estimator.SCORE))


def test_schema_1_holds_every_field_of_the_contract(result: ProbeResult) -> None:
    content = json.loads(json.dumps(result.report.to_dict(), allow_nan=False))
    assert content["schema"] == 1
    assert {"config", "checkpoint", "timing", "versions", "first_order", "units", "ranks", "realized"} <= set(content)
    assert set(content["first_order"]) >= CONTRACT["first_order"]
    assert set(content["units"]) >= CONTRACT["units"]
    assert set(content["ranks"]) >= CONTRACT["ranks"]
    assert [(row["step"], row["batch"], row["method"]) for row in content["realized"]] == [
        ("preconditioned", "same", "virtual"),
        ("adamw", "same", "virtual"),
    ]
    for row in content["realized"]:
        assert set(row) >= CONTRACT["realized"]
    assert len(content["first_order"]["row_means"]) == content["units"]["count"] == 12


def test_a_number_that_is_not_finite_or_a_null_without_a_reason_is_a_fault(result: ProbeResult) -> None:
    broken = dataclasses.replace(result.report, timing={"total": float("nan")})
    with pytest.raises(AssertionError, match=r"timing\.total"):
        broken.to_dict()
    first = dataclasses.replace(result.report.first_order, se_plugin=None)
    with pytest.raises(AssertionError, match="se_plugin is null without a reason"):
        dataclasses.replace(result.report, first_order=first).to_dict()


def test_the_same_seed_gives_the_same_report_apart_from_timing() -> None:
    reports = []
    for _ in range(2):
        model = support.tiny_model("llama-tied")
        adam = state_of_optimizer(support.trained_optimizer(model), model)
        content = probe(model, adam, support.random_batch(6, 3)).report.to_dict()
        content.pop("timing")
        reports.append(content)
    assert reports[0] == reports[1]


def test_the_interval_and_the_error_are_of_delta_h1(result: ProbeResult) -> None:
    first = result.report.first_order
    assert first.delta_h1 == pytest.approx(-1e-4 * first.u_cross, rel=1e-12)
    assert first.delta_h1_ci95 is not None
    assert first.delta_h1_ci95[0] < first.delta_h1 < first.delta_h1_ci95[1]
    assert first.delta_h1_se is not None
    # The interval is −η U_cross's: the ends of U_cross's interval, which is not symmetric, change places.
    assert result.kernel is not None
    low, high = interval(result.kernel)
    assert first.delta_h1_ci95 == pytest.approx([-1e-4 * high, -1e-4 * low], rel=1e-9)
    assert first.delta_h1_se == pytest.approx(1e-4 * variance_at(12, *decompose(result.kernel).parts) ** 0.5)


@pytest.mark.parametrize(
    ("delta", "se", "interval", "said"),
    [
        (-0.031, 0.009, [-0.05, -0.01], "lowers entropy by 0.0310 ± 0.0090 nats per response, 2.1 %"),
        (0.031, 0.009, [0.01, 0.05], "raises entropy by 0.0310 ± 0.0090 nats per response, 2.1 %"),
        (
            -0.003,
            0.009,
            [-0.02, 0.01],
            "does not tell whether the preconditioned step along this batch's gradient alone (δH₁) raises or lowers entropy: "
            "−0.0030 ± 0.0090",
        ),
        (-0.003, None, None, "too few units for an error bar"),
        (0.0, 0.0, [0.0, 0.0], "changes nothing"),
    ],
)
def test_the_preconditioned_steps_sentence_says_what_happens_and_how_sure_that_is(
    delta: float, se: float | None, interval: list[float] | None, said: str
) -> None:
    assert said in preconditioned_sentence(delta, se, interval, 1.48)


def own_step(total: float, se: float | None, interval: list[float] | None, **more: Any) -> AdamWSection:
    facts: dict[str, Any] = {
        "parts": {}, "v_at_t": total, "spread_factor": 1.0, "gradient_factor": 0.1, "u_statistic": 0.0, "u_statistic_se": 0.0,
        "gradient_norm": 2.0, "clip_factor": 1.0, "max_grad_norm": None,
        "max_grad_norm_source": "unknown", "sentence": "",
        "null_reasons": {"se": "two units tell nothing", "ci95": "two units tell nothing"},
    }  # fmt: skip
    return AdamWSection(total=total, se=se, ci95=interval, **(facts | more))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            own_step(-0.021, 0.0015, [-0.024, -0.018]),
            "To first order the optimizer's next step lowers entropy by 0.0210 ± 0.0015 nats per response (0.69 % of 3.05), "
            "95 % interval of the change [-0.024, -0.018], no clipping assumed.",
        ),
        (own_step(0.021, 0.0015, [0.018, 0.024]), "step raises entropy by 0.0210 ± 0.0015 nats"),
        (
            own_step(-0.003, 0.009, [-0.021, 0.015]),
            "does not tell whether the optimizer's next step raises or lowers entropy: −0.0030 ± 0.0090 nats per response "
            "(0.098 % of 3.05), 95 % interval of the change [-0.021, +0.015], no clipping assumed.",
        ),
        (
            own_step(-0.003, None, None),
            "changes entropy by −0.003 nats per response (0.098 % of 3.05), no clipping assumed; it has no error: "
            "two units tell nothing.",
        ),
        (own_step(0.0, 0.0, [0.0, 0.0]), "The optimizer's next step changes nothing to first order"),
    ],
)
def test_the_first_sentence_is_about_the_optimizers_own_step(found: AdamWSection, said: str) -> None:
    assert said in headline(found, 3.05, "response")


@pytest.mark.parametrize(
    ("limit", "factor", "source", "said"),
    [
        (None, 1.0, "unknown", "no clipping assumed"),
        (None, 1.0, "recorded", "no clipping, as recorded"),
        (0.5, 0.25, "given", "gradient clipped at 0.5, as given"),
        (5.0, 1.0, "recorded", "gradient norm within the clip of 5, as recorded"),
    ],
)
def test_the_first_sentence_says_what_it_takes_clipping_to_be(
    limit: float | None, factor: float, source: str, said: str
) -> None:
    found = own_step(
        -0.021, 0.0015, [-0.024, -0.018], max_grad_norm=limit, clip_factor=factor, max_grad_norm_source=source
    )
    assert clipping_words(found) == said


def test_both_sentences_come_first_and_say_how_the_steps_differ(result: ProbeResult, capsys: Any) -> None:
    print_report(result.report, Console(width=80))
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == result.report.headline
    assert "the optimizer's next step" in first
    assert "no clipping assumed" in first
    adamw = result.report.adamw
    assert adamw.ci95 is not None
    assert f"[{adamw.ci95[0]:+.3g}, {adamw.ci95[1]:+.3g}]" in first
    assert second == result.report.first_order.sentence
    assert "(δH₁)" in second
    # At t = 3: Σ_k of 0.1 · 0.9^k / (1 − 0.9^{4+k}).
    assert adamw.spread_factor == pytest.approx(sum(0.1 * 0.9**k / (1 - 0.9 ** (4 + k)) for k in range(400)), rel=1e-12)
    assert f"in all they apply it {adamw.spread_factor:.3g} times (clip · Σ_k)" in second
    assert rest.index("The optimizer's own step, to first order") < rest.index(
        "The preconditioned step, to first order: δH₁"
    )


def test_errors_are_shown_with_two_digits() -> None:
    assert quantity(0.123456, 0.0123) == "0.123 ± 0.012"
    assert quantity(-64.27, 211.4) == "-64 ± 211"
    assert quantity(1.234e-7, 5.6e-9) == "(1.234 ± 0.056)e-7"


def test_the_terminal_report_shows_numbers_units_and_warnings(result: ProbeResult, capsys: Any) -> None:
    print_report(result.report, Console(width=80))
    shown = capsys.readouterr().out
    assert shown.startswith(result.report.headline[:40])
    for word in ("nats per response", "U_cross", "jackknife", "ESS", "learning rate", "floor", "[", "tokens"):
        assert word in shown, word
    for warning in result.report.warnings:
        assert warning.seen[:30] in " ".join(shown.split())


def test_out_writes_json_kernel_and_two_plots(result: ProbeResult, tmp_path: Path) -> None:
    write_report_folder(result.report, result.kernel, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "kernel.npy", "predicted_and_realized.png", "report.json", "row_means.png",
    ]  # fmt: skip
    kernel = np.load(tmp_path / "out" / "kernel.npy")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    off_diagonal = kernel.sum() - np.trace(kernel)
    assert report["first_order"]["u_cross"] == pytest.approx(off_diagonal / (12 * 11), rel=1e-12)
    for name in ("predicted_and_realized.png", "row_means.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    # A later run without a matrix leaves none behind.
    write_report_folder(result.report, None, tmp_path / "out")
    assert not (tmp_path / "out" / "kernel.npy").exists()


def test_an_interrupt_while_writing_leaves_no_half_file(
    result: ProbeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(report: Report, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("entropy_probe.report.plots.plot_row_means", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report_folder(result.report, result.kernel, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("kept")
    with pytest.raises(KeyboardInterrupt):
        write_report_folder(result.report, result.kernel, tmp_path / "old")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["report.json"]
    assert (tmp_path / "old" / "report.json").read_text() == "kept"


def warnings_of(batch: Any, **settings: Any) -> dict[str, str]:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-5), model)
    return {w.code: w.seen for w in probe(model, adam, batch, Settings(**settings)).report.warnings}


def test_zero_advantage_groups_are_counted_only_when_they_are_most() -> None:
    rows = support.random_rollouts(6, 3)

    def with_dead(count: int) -> Any:
        dead = {f"p{n}" for n in range(count)}
        return group_rollouts(
            dataclasses.replace(r, reward=1.0 if r.prompt_id in dead else float(i % 2)) for i, r in enumerate(rows)
        )

    assert "4 of 6" in warnings_of(with_dead(4))["zero_advantage_groups"]
    assert "zero_advantage_groups" not in warnings_of(with_dead(3))


def test_log_probs_of_another_policy_are_said_to_be_off() -> None:
    model = support.tiny_model("llama-tied")
    support.trained_optimizer(model, learning_rate=1e-5)
    rows = support.random_rollouts(6, 3)
    scores = Policy(model).scores(rows).tolist()

    def with_gap(gap: float) -> Any:
        return group_rollouts(
            dataclasses.replace(r, logprobs=tuple([s / len(r.response_ids) + gap] * len(r.response_ids)))
            for r, s in zip(rows, scores, strict=True)
        )

    assert "0.5 a token" in warnings_of(with_gap(0.5))["off_policy"]
    assert "off_policy" not in warnings_of(with_gap(0.001))
    assert "off_policy" not in warnings_of(group_rollouts(rows))


def test_elements_without_second_moment_that_receive_a_gradient_are_said() -> None:
    model = support.tiny_model("llama-untied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-5, vocabulary=10), model)
    warnings = {w.code: w.seen for w in probe(model, adam, support.random_batch(4, 3)).report.warnings}
    assert "model.embed_tokens.weight" in warnings["zero_second_moment"]


@dataclasses.dataclass(frozen=True)
class StrongSignal:
    """Rewarding likely responses lowers entropy; 32 prompts x 16 responses sampled from an enumerable policy."""

    policy: EnumerablePolicy
    adam: AdamState
    scores: list[torch.Tensor]

    def batch(self, seed: int) -> RolloutBatch:
        generator = torch.Generator().manual_seed(seed)
        responses = enumerable.all_responses(3, 3)
        rows = []
        for context, scores in enumerate(self.scores):
            for k in torch.multinomial(scores.exp(), 16, replacement=True, generator=generator).tolist():
                rows.append(enumerable.row(self.policy, context, responses[k], float(scores[k])))
        return group_rollouts(rows)

    def found(self, seed: int) -> tuple[CrossStatistics, set[str]]:
        """As the probe does up to its first row: the statistics, and the warnings about their interval."""
        batch = self.batch(seed)
        y = resolve_advantages(batch, None)[0] * resolve_length_weights(batch, LengthWeight.GUIDE)
        target = EntropyTarget(Settings().estimator, Settings().entropy)
        gradients = unit_gradients(
            Policy(self.policy), batch, exact_units(32), Sides(target, y), Geometry.of(Adam(self.adam))
        )
        statistics, step = cross_statistics(gradients.total), cross_statistics(gradients.step_weighted)
        return statistics, {w.code for w in interval_warnings(statistics, step.negated.ci95)}


@pytest.fixture(scope="module")
def strong_signal() -> StrongSignal:
    policy = EnumerablePolicy(contexts=32, tokens=3, seed=2)
    with torch.no_grad():
        policy.table *= 0.2  # prompts that are alike: what one learns moves the others
    names = tuple(n for n, _ in policy.named_parameters())
    group = AdamGroup(names, 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, True)
    moments = {n: AdamMoments(10, torch.zeros_like(p), torch.full_like(p, 1e-2)) for n, p in policy.named_parameters()}
    scores = [enumerable.response_scores(policy, context, 3).detach() for context in range(32)]
    return StrongSignal(policy, AdamState((group,), moments), scores)


@pytest.mark.long
def test_a_strong_signal_has_one_sign_in_at_least_19_of_20_seeds(strong_signal: StrongSignal) -> None:
    found = [strong_signal.found(seed) for seed in range(20)]
    assert sum(statistics.u_cross > 0 for statistics, _ in found) >= 19
    assert sum("interval_includes_zero" not in codes for _, codes in found) >= 19


def test_the_whole_probe_finds_the_same_strong_signal(strong_signal: StrongSignal) -> None:
    statistics, codes = strong_signal.found(0)
    report = probe(strong_signal.policy, strong_signal.adam, strong_signal.batch(0), Settings(noise=False)).report
    assert report.first_order.u_cross == pytest.approx(statistics.u_cross, rel=1e-12)
    assert report.first_order.row_means == pytest.approx(statistics.row_means.tolist(), rel=1e-12)
    assert codes <= {w.code for w in report.warnings}
    assert ("interval_includes_zero" in codes) is ("interval_includes_zero" in {w.code for w in report.warnings})
