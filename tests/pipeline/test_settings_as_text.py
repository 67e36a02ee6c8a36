"""Settings from Python: names and torch types as text mean what they name, and nothing else is taken for something."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import entropy_probe
import support
from entropy_probe import InputError, ReplaySettings, Settings, ShardingChoice, probe, probe_checkpoint
from entropy_probe.common.fields import about
from entropy_probe.data.units import Mode
from entropy_probe.gradients.plan import make_plan
from entropy_probe.losses.advantages import AdvantageRule, advantages_from_rewards
from entropy_probe.losses.length_weights import LengthWeight, length_weights
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.rounding import RoundingRule
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.pipeline.inputs import resolve_advantages
from entropy_probe.pipeline.settings import PARTS, POSITIONS, Analyses, Compute, Loss
from entropy_probe.ranks.same_inputs import digest_of_settings
from entropy_probe.statistics.importance_sampling import Weighting, entropy_change, linear_term
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget

ENUMS: dict[str, Any] = {
    "mode": Mode,
    "estimator": Estimator,
    "entropy": EntropyUnit,
    "weighting": Weighting,
    "advantage": AdvantageRule,
    "length_weight": LengthWeight,
    "weight_rounding": Rounding,
}


@pytest.mark.parametrize("name", ENUMS)
def test_the_name_of_a_member_is_the_member_and_an_unknown_one_is_refused_with_all_that_are_known(name: str) -> None:
    records: list[Any] = [Settings, *([ReplaySettings] if name in ("advantage", "length_weight") else [])]
    for record in records:
        for member in ENUMS[name]:
            assert getattr(record(**{name: member.value}), name) is member
            assert digest_of_settings(record(**{name: member.value})) == digest_of_settings(record(**{name: member}))
        for wrong in ("token-mean", member.value.upper(), 1, True, ["score"], ShardingChoice.FSDP2):
            with pytest.raises(InputError) as refused:
                record(**{name: wrong})
            said = str(refused.value)
            assert said.startswith(f"{name} is ")
            assert said.endswith(f"known are {', '.join(known.value for known in ENUMS[name])}")
            assert "\n" not in said
    with pytest.raises(InputError, match=r"advantage is <LengthWeight\.GRPO"):
        Settings(advantage=LengthWeight.GRPO)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("dtype", "float32, float64, bfloat16, float16"),
        ("vector_dtype", "float32, float64, bfloat16"),
        ("autocast", "bfloat16, float16, off"),
    ],
)
def test_a_torch_type_may_be_named_and_another_one_is_refused_with_those_that_the_field_takes(
    name: str, known: str
) -> None:
    for text in known.split(", "):
        more = {"dtype": text} if name == "vector_dtype" else {}
        meant = text if text == "off" else getattr(torch, text)
        for given in (text, meant, *([] if text == "off" else [f"torch.{text}"])):
            assert getattr(Settings(**(more | {name: given})), name) == meant
    for wrong in ("bf16", "half", torch.int8, 32, False, "torch.off", *([None] if name == "dtype" else [])):
        with pytest.raises(InputError, match=f"^{name} is .*; known are {known}$"):
            Settings(**{name: wrong})


def test_a_replay_takes_only_types_that_do_not_round_what_it_compares() -> None:
    assert ReplaySettings(dtype="float64").dtype is torch.float64  # type: ignore[arg-type]
    assert ReplaySettings(autocast="float16").autocast is torch.float16  # type: ignore[arg-type]
    for wrong in ("bfloat16", torch.float16):
        with pytest.raises(InputError, match="known are float32, float64: a replay in fewer bits"):
            ReplaySettings(dtype=wrong)
    with pytest.raises(InputError, match="autocast to bfloat16 over float64 weights"):
        ReplaySettings(dtype="float64", autocast="bfloat16")  # type: ignore[arg-type]


NUMBERS = ["target_se", "learning_rate", "memory_bytes", "max_grad_norm", "what_if_learning_rate",
           "what_if_max_grad_norm", "what_if_fall"]  # fmt: skip
WHOLE = ["blocks", "split", "max_completion_length", "microbatch_size", "seed"]
TRUTHS = ["noise", "targets", "resample", "gradient_checkpointing", "what_if_no_negatives"]


def refused(record: Any, name: str, value: object) -> str:
    with pytest.raises(InputError) as error:
        record(**{name: value})
    said = str(error.value)
    assert said.startswith(f"{name} is ")
    assert "\n" not in said
    assert len(said) < 120
    return said


@pytest.mark.parametrize("record", [Settings, ReplaySettings])
def test_numbers_of_another_kind_are_refused_in_one_line(record: Any) -> None:
    fields = {field.name for field in dataclasses.fields(record)}
    long = "x\n" * 1000
    for name in fields & set(NUMBERS):
        for value in (
            True,
            "1e-5",
            float("nan"),
            float("inf"),
            -1.0,
            10**400,
            10**5000,
            [0.1],
            torch.tensor(0.1),
            long,
        ):
            refused(record, name, value)
    for name in fields & set(WHOLE):
        for value in (True, "8", 8.0, float("nan"), 1.5, long):
            assert "whole number" in refused(record, name, value)
    for name in fields & set(TRUTHS):
        for value in (None, 0, 1, "no", "false", []):
            assert "True or False" in refused(record, name, value)
    for name in fields - {"autocast", *(name for name in NUMBERS + WHOLE if name != "seed")}:
        if getattr(record(), name) is not None:
            refused(record, name, None)


def test_numbers_of_other_libraries_are_taken_as_pythons_own() -> None:
    found = Settings(learning_rate=np.float32(0.5), blocks=np.int64(8), max_grad_norm=0, memory_bytes=10**9)
    for value, kind in ((found.learning_rate, float), (found.blocks, int), (found.max_grad_norm, float)):
        assert type(value) is kind
    assert (found.learning_rate, found.blocks, found.max_grad_norm, found.memory_bytes) == (0.5, 8, 0.0, 1e9)


def test_every_field_of_both_settings_has_a_check_and_a_line_of_help() -> None:
    for record in (Settings, ReplaySettings):
        for field in dataclasses.fields(record):
            said = about(field)
            assert said.check(field.name, field.default) == field.default
            assert said.help.endswith(".")
            assert "\n" not in said.help
            assert f"    {field.name}: {said.help}" in (record.__doc__ or "").splitlines()


def test_every_field_of_the_settings_is_one_parts_own_and_the_parts_hold_what_was_given() -> None:
    names = [field.name for part in PARTS for field in dataclasses.fields(part)]
    assert sorted(names) == sorted({field.name for field in dataclasses.fields(Settings)})
    settings = Settings(length_weight="dapo", estimator="score", dtype="float64", sweep="0.1:10:9")  # type: ignore[arg-type]
    for part, record in zip(PARTS, (settings.loss, settings.target, settings.compute, settings.analyses), strict=True):
        assert type(record) is part
        assert record == part(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(part)})
    assert settings.loss.length_weight is LengthWeight.DAPO
    assert settings.target.estimator is Estimator.SCORE
    assert settings.compute.dtype is torch.float64
    assert settings.analyses.sweep == SweepRange(0.1, 10.0, 9)


def test_a_part_refuses_by_itself_what_the_settings_refuse() -> None:
    for part, wrong in (
        (Loss, {"max_grad_norm": -1.0}),
        (Compute, {"dtype": "float64", "vector_dtype": "float32"}),
        (Compute, {"dtype": "float64", "autocast": "float16"}),
        (Compute, {"seed": 2**63}),
        (Analyses, {"resample_batch": 3}),
    ):
        with pytest.raises(InputError) as alone:
            part(**wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError) as whole:
            Settings(**wrong)  # type: ignore[arg-type]
        assert str(alone.value) == str(whole.value)


def test_fields_keep_their_places_for_a_call_by_position_and_are_replaced_one_by_one() -> None:
    assert tuple(inspect.signature(Settings).parameters)[: len(POSITIONS)] == POSITIONS
    found = Settings(Mode.BLOCK, 3, Estimator.SCORE)
    assert (found.mode, found.blocks, found.estimator) == (Mode.BLOCK, 3, Estimator.SCORE)
    other = dataclasses.replace(found, dtype=torch.float64)
    assert type(other) is Settings
    assert other == Settings(mode=Mode.BLOCK, blocks=3, estimator=Estimator.SCORE, dtype=torch.float64)
    assert tuple(inspect.signature(ReplaySettings).parameters) == (
        "length_weight", "advantage", "max_completion_length", "max_grad_norm", "learning_rate", "dtype", "autocast",
        "microbatch_size", "memory_bytes", "loss_type", "loss_agg", "beta", "kl_estimator", "entropy_coef", "epsilon_low",
        "epsilon_high",
    )  # fmt: skip


def test_a_sweep_may_be_text_and_nothing_else() -> None:
    assert Settings(sweep="0.1:10:9").sweep == SweepRange(0.1, 10.0, 9)  # type: ignore[arg-type]
    for wrong in ("0.1:10", (0.1, 10, 9), 9):
        refused(Settings, "sweep", wrong)
    for low, count in (("0.1", 9), (True, 9), (0.1, 9.0), (0.1, "9")):
        with pytest.raises(InputError, match="sweep"):
            SweepRange(low, 10.0, count)  # type: ignore[arg-type]


def test_the_probe_computes_what_the_text_names() -> None:
    model = support.tiny_model()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    batch = support.random_batch(4, 3)

    def found(**settings: Any) -> tuple[Any, ...]:
        report = probe(model, adam, batch, Settings(noise=False, **settings)).report
        config = report.config
        return (
            (report.first_order.estimator, report.first_order.entropy, report.units.mode),
            (config.length_weight, config.advantage, config.importance_weights),
            report.first_order.u_cross,
        )

    text = found(
        estimator="score",
        entropy="per-token",
        mode="block",
        length_weight="dapo",
        advantage="grpo",
        weighting="per-prompt",
    )
    assert text[:2] == (("score", "per-token", "block"), ("dapo", "grpo", "per-prompt"))
    assert text == found(
        estimator=Estimator.SCORE,
        entropy=EntropyUnit.PER_TOKEN,
        mode=Mode.BLOCK,
        length_weight=LengthWeight.DAPO,
        advantage=AdvantageRule.GRPO,
        weighting=Weighting.PER_PROMPT,
    )


SCORES = np.array([-1.0, -2.0, -1.5, -0.5])
DIRECT: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "length weights": (lambda rule: length_weights([3, 4, 5, 6], [2, 2], rule), LengthWeight.DAPO, "length_weight"),
    "advantages": (
        lambda rule: advantages_from_rewards(torch.tensor([1.0, 0.0, 3.0, 0.5]), [2, 2], rule),
        AdvantageRule.RLOO,
        "advantage",
    ),
    "own advantages": (
        lambda rule: resolve_advantages(support.random_batch(2, 2, advantage=2.0), rule)[0],
        AdvantageRule.GIVEN,
        "advantage",
    ),
    "estimator": (lambda rule: EntropyTarget(rule), Estimator.RAO_BLACKWELL, "estimator"),
    "rounding": (lambda rule: RoundingRule(rule), Rounding.STOCHASTIC, "weight_rounding"),
    "unit": (lambda rule: EntropyTarget(unit=rule), EntropyUnit.PER_TOKEN, "entropy"),
    "plan": (
        lambda rule: make_plan(rule, None, prompts=8, parameters=9, bytes_per_value=4, memory_bytes=1e9),
        Mode.BLOCK,
        "mode",
    ),
    "change": (
        lambda rule: entropy_change(SCORES, SCORES + np.array([0.1, -0.1, 0.3, 0.2]), [2, 2], weighting=rule).delta_h,
        Weighting.PER_PROMPT,
        "weighting",
    ),
    "linear term": (
        lambda rule: linear_term(SCORES, [2, 2], weighting=rule).on_scores.tolist(),
        Weighting.PER_PROMPT,
        "weighting",
    ),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_function_called_with_text_computes_that_rule_or_none(name: str) -> None:
    call, member, what = DIRECT[name]
    text, meant = call(member.value), call(member)
    assert torch.equal(text, meant) if isinstance(text, torch.Tensor) else text == meant
    with pytest.raises(InputError, match=f"{what} is 'nonsense'; known are .*{member.value}"):
        call("nonsense")


def test_the_choice_of_what_ranks_hold_may_be_text_and_an_unknown_one_is_refused_before_loading(tmp_path: Any) -> None:
    rollouts = tmp_path / "rollouts.jsonl"
    entropy_probe.write_rollouts(support.random_rollouts(3, 2), rollouts)
    with pytest.raises(InputError, match="sharding is 'ddp'; known are replicated, fsdp2"):
        probe_checkpoint(tmp_path / "nowhere", rollouts, sharding="ddp")  # type: ignore[arg-type]
    checkpoint = support.make_checkpoint(tmp_path / "checkpoint")
    kept = probe_checkpoint(checkpoint, rollouts, Settings(noise=False), sharding="replicated").report  # type: ignore[arg-type]
    assert kept.units.prompts == 3


def test_what_settings_name_is_exported() -> None:
    for name in (
        "Estimator",
        "AdvantageRule",
        "LengthWeight",
        "EntropyUnit",
        "Mode",
        "Weighting",
        "ShardingChoice",
        "Rounding",
    ):
        assert name in entropy_probe.__all__
        assert getattr(entropy_probe, name).__name__ == name
