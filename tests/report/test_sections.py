"""A section is one file: its record is in the JSON, its rows in the text and its figures among the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
from rich.console import Console

import support
from entropy_probe import Settings, probe, state_of_optimizer
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.report import RanksSection, Report
from entropy_probe.report.metrics import metrics
from entropy_probe.report.rows import FACTS, Block, Chapter, Grid, Lead, Row, Rows, in_chapters
from entropy_probe.report.sections.base import Context, Entry, Section
from entropy_probe.report.text import print_report
from entropy_probe.targets.choices import Estimator

WEATHER = Chapter(15, "Weather")


@dataclass(frozen=True)
class Rain:
    """A record inside a section."""

    millimetres: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Weather(Section):
    """A section as a newcomer would write it."""

    kelvin: float
    rain: Rain

    def shown(self, context: Context) -> Sequence[Block]:
        rows = (Row("temperature of the air", f"{self.kelvin:g}", f"kelvin, over {context.prompts} prompts"),)
        return Lead("It is a fine day."), Rows(WEATHER, rows, "Look out of the window.")

    def metrics(self) -> Mapping[str, float | None]:
        return {"kelvin": self.kelvin, "rain": self.rain.millimetres}


@dataclass(frozen=True)
class Gust(Entry):
    """One of a list."""

    knots: float

    @classmethod
    def shown_of(cls, entries: Sequence[Self], context: Context) -> Sequence[Block]:
        return (Grid(WEATHER, ("gust", "knots"), [(f"{n}", f"{gust.knots:g}") for n, gust in enumerate(entries)]),)

    @classmethod
    def metrics_of(cls, entries: Sequence[Self]) -> Mapping[str, float | None]:
        return {"knots": max(gust.knots for gust in entries)}


@dataclass(frozen=True)
class LongerReport(Report):
    """The report with a section and a list more."""

    weather: Weather
    gusts: list[Gust]


@pytest.fixture(scope="module")
def report() -> Report:
    model = support.tiny_model("llama-tied")
    adam = state_of_optimizer(support.trained_optimizer(model, learning_rate=1e-4), model)
    return probe(model, adam, support.random_batch(6, 3), Settings(estimator=Estimator.SCORE)).report


def longer(report: Report, rain: Rain, gusts: Sequence[float] = (3.0, 12.5)) -> LongerReport:
    own = {each.name: getattr(report, each.name) for each in dataclasses.fields(report)}
    return LongerReport(**own, weather=Weather(290.5, rain), gusts=[Gust(knots) for knots in gusts])


def lines_of(report: Report, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_report(report, Console(width=160))
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_new_section_is_in_the_json_the_text_and_the_metrics(
    report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    found = longer(report, Rain(2.5))
    content = found.to_dict()
    assert content["weather"] == {"kelvin": 290.5, "rain": {"millimetres": 2.5, "null_reasons": {}}}
    assert content["gusts"] == [{"knots": 3.0}, {"knots": 12.5}]
    assert {name: value for name, value in content.items() if name not in ("weather", "gusts")} == report.to_dict()

    lines = lines_of(found, capsys)
    assert lines[2] == "It is a fine day."  # after the headline and the sentence of δH₁
    own, weather = lines.index("The optimizer's own step, to first order"), lines.index("Weather")
    assert own < weather < lines.index("The preconditioned step, to first order: δH₁")
    assert lines[weather + 1 : weather + 6] == [
        "Look out of the window.", "temperature of the air 290.5 kelvin, over 6 prompts", "gust knots", "0 3", "1 12.5",
    ]  # fmt: skip

    figures = {"kelvin": 290.5, "rain": 2.5, "knots": 12.5}
    assert found.metrics() == metrics(found) == {**report.metrics(), **figures}


def test_a_null_without_a_reason_is_found_in_a_record_that_no_list_names(report: Report) -> None:
    with pytest.raises(AssertionError, match="millimetres is null without a reason"):
        longer(report, Rain(None)).to_dict()
    with pytest.raises(AssertionError, match=r"gusts\[1\]\.knots is inf"):
        longer(report, Rain(1.0), [1.0, float("inf")]).to_dict()
    dry = longer(report, Rain(None, {"millimetres": "no gauge"}))
    assert dry.to_dict()["weather"]["rain"]["millimetres"] is None
    assert "rain" not in dry.metrics()


def test_an_empty_list_is_not_told(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    found = longer(report, Rain(1.0), [])
    assert found.to_dict()["gusts"] == []
    assert "gust knots" not in lines_of(found, capsys)
    assert "knots" not in found.metrics()


def test_two_sections_that_give_one_figure_are_a_fault(report: Report) -> None:
    class Twice(Weather):
        def metrics(self) -> Mapping[str, float | None]:
            return {"delta_h1": 0.0}

    found = dataclasses.replace(longer(report, Rain(1.0)), weather=Twice(1.0, Rain(1.0)))
    with pytest.raises(AssertionError, match="two sections give the figure delta_h1"):
        found.metrics()


def test_chapters_stand_by_place_and_detail_comes_last() -> None:
    late, early = Chapter(20, "late"), Chapter(10, "early")
    blocks: list[Block] = [
        Rows(late, [Row("d", "4")], detail=True),
        Rows(late, [Row("c", "3")], "said"),
        Lead("first of all"),
        Rows(early, [Row("a", "1")]),
        Rows(FACTS, []),
        Grid(early, ("x",), []),
        Rows(early, [Row("b", "2")]),
    ]
    told = in_chapters(blocks)
    assert [(each.chapter.title, [row.label for row in each.rows]) for each in told] == [
        ("early", ["a", "b"]),
        ("late", ["c", "d"]),
    ]
    assert (told[0].grids, told[1].sentences) == ([], ["said"])


def test_what_ranks_hold_is_named_as_it_is_asked_for() -> None:
    for sharded, asked in ((False, ShardingChoice.REPLICATED), (True, ShardingChoice.FSDP2)):
        assert RanksSection.of(Sharding(Ranks(0, 2), sharded=sharded), [1, 1], [2, 2], {}).sharding == asked


def test_metrics_are_flat_floats_under_the_names_that_a_tracker_knows(report: Report) -> None:
    first, adamw = report.first_order, report.adamw
    (own,) = [row for row in report.realized if row.step == "adamw"]
    assert first.delta_h1_ci95 is not None
    assert adamw.ci95 is not None
    expected: dict[str, Any] = {
        "delta_h1": first.delta_h1, "delta_h1_se": first.delta_h1_se, "delta_h1_low": first.delta_h1_ci95[0],
        "delta_h1_high": first.delta_h1_ci95[1],
        "adamw": adamw.total, "adamw_se": adamw.se, "adamw_low": adamw.ci95[0], "adamw_high": adamw.ci95[1],
        "momentum": adamw.parts["momentum"].value, "gradient": adamw.parts["gradient"].value,
        "weight_decay": adamw.parts["weight_decay"].value, "gradient_norm": adamw.gradient_norm,
        "realized": own.delta_h, "realized_se": own.se, "realized_predicted": own.predicted, "ess_fraction": own.ess_fraction,
        "entropy": report.entropy.per_response, "entropy_per_token": report.entropy.per_token,
        "seconds": report.timing["total"],
    }  # fmt: skip
    for target in report.targets:
        low, high = target.ci95 or (None, None)
        expected |= {
            f"delta_{target.name}": target.delta, f"delta_{target.name}_se": target.se,
            f"delta_{target.name}_low": low, f"delta_{target.name}_high": high,
        }  # fmt: skip
    assert {"delta_reward", "delta_reward_low", "delta_length_high"} <= expected.keys()
    found = report.metrics()
    assert found == {name: value for name, value in expected.items() if value is not None}
    assert all(type(value) is float for value in found.values())
    assert len(set(found.values())) == len(found)


def test_the_realized_figure_is_the_unrounded_own_step_on_its_own_responses_by_the_asked_estimator(
    report: Report,
) -> None:
    (own,) = [row for row in report.realized if row.step == "adamw"]
    others = [
        dataclasses.replace(own, delta_h=1.0, step="preconditioned"),
        dataclasses.replace(own, delta_h=2.0, rounded="nearest"),
        dataclasses.replace(own, delta_h=3.0, batch="held-out"),
        dataclasses.replace(own, delta_h=4.0, method="resampled"),
    ]
    second = dataclasses.replace(own, delta_h=5.0)
    assert dataclasses.replace(report, realized=[*others, own, second]).metrics()["realized"] == own.delta_h
    none = dataclasses.replace(report, realized=others).metrics()
    assert not {"realized", "realized_se", "realized_predicted", "ess_fraction"} & none.keys()


def test_what_is_null_is_left_out_of_the_metrics(report: Report) -> None:
    first = dataclasses.replace(report.first_order, delta_h1_se=None, delta_h1_ci95=None)
    found = dataclasses.replace(report, first_order=first).metrics()
    assert report.metrics().keys() - found.keys() == {"delta_h1_se", "delta_h1_low", "delta_h1_high"}
