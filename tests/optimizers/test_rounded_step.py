"""Weights held in bfloat16 or float16: the optimizer's own step is also realised rounded as it is stored, and run says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.gradients import loss_gradient
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adamw_step import adamw_deltas
from entropy_probe.optimizers.clipping import clip_factor, gradient_norm
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.rounded_step import rounded_adamw
from entropy_probe.optimizers.rounding import RoundedStep, RoundingRule
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.stored_precision import Rounding, rounded_stochastically
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.pipeline.run import probe, probe_checkpoint
from entropy_probe.pipeline.settings import Settings
from entropy_probe.ranks.sharding import WHOLE
from entropy_probe.report.numbers import signed

RATE = 2e-4


def stepped(
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **adam: Any,
) -> tuple[nn.Linear, torch.optim.Optimizer, Tensor]:
    """A layer after three steps of an optimizer, and a gradient for the next."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return (0.1 * torch.randn(60, 50, generator=generator)).to(dtype)

    layer = nn.Linear(50, 60, bias=False, dtype=dtype)
    layer.weight.data = drawn()
    optimizer = kind(layer.parameters(), lr=RATE, **{"eps": 1e-4, **adam})  # type: ignore[call-arg]
    for _ in range(3):
        layer.weight.grad = drawn()
        optimizer.step()
    return layer, optimizer, drawn()


def rounded(
    layer: nn.Module,
    state: AdamState,
    gradient: Tensor,
    rule: RoundingRule | None = None,
    dtype: torch.dtype | None = None,
) -> RoundedStep | None:
    """The library's step from the weights as they are, or loaded in another type."""
    theta = {name: p.detach().to(dtype or p.dtype) for name, p in layer.named_parameters()}
    ascent = {"weight": -gradient.double()}
    return rounded_adamw(
        theta,
        state,
        ascent,
        adamw_deltas(theta, state, ascent),
        clip_factor=1.0,
        rule=rule or RoundingRule(),
        sharding=WHOLE,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "adam"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "foreach": True, "maximize": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    ],
)
@pytest.mark.parametrize("loaded", [None, torch.float32])
def test_rounded_to_nearest_the_step_is_the_one_that_torch_takes_in_the_type(
    dtype: torch.dtype, kind: type[torch.optim.Optimizer], adam: dict[str, Any], loaded: torch.dtype | None
) -> None:
    layer, optimizer, gradient = stepped(dtype=dtype, kind=kind, **adam)
    found = rounded(layer, state_of_optimizer(optimizer, layer), gradient, dtype=loaded)
    assert found is not None
    before = layer.weight.detach().double()
    layer.weight.grad = -gradient if adam.get("maximize") else gradient
    optimizer.step()
    real = layer.weight.detach().double() - before
    share = float((real != 0).double().mean())
    assert 0.1 < share < 0.95
    same = float((found.deltas["weight"] == real).double().mean())
    # The fused kernel's sums are float32, ours float64: a tie in thousands may fall the other way.
    assert same >= (0.999 if adam.get("fused") else 1.0)
    assert found.kept.moved == pytest.approx(share, abs=0.001 if adam.get("fused") else 1e-12)
    assert found.kept.moved_in_float32 > 0.99
    assert (found.kept.weights, found.kept.dtypes) == (3000, (dtype,))


def test_stochastic_rounding_takes_one_of_two_neighbours_and_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 4000
    before = torch.random.get_rng_state()
    for dtype, subnormal in ((torch.bfloat16, 2e-41), (torch.float16, 1e-8)):
        exact = torch.tensor([0.3, -0.3, 1.0 + 2**-12, -(2.0 - 2**-12), 1e-3, subnormal], dtype=torch.float64)
        drawn = rounded_stochastically(exact.repeat(count, 1), dtype, generator)
        assert torch.equal(drawn.to(dtype).double(), drawn)
        for k, value in enumerate(exact):
            found = drawn[:, k].unique()
            assert len(found) == 2, (dtype, value)
            assert found[0] < value < found[1], (dtype, value)
            p = float((value - found[0]) / (found[1] - found[0]))
            error = float(found[1] - found[0]) * (p * (1 - p) / count) ** 0.5
            assert abs(float(drawn[:, k].mean() - value)) < 4.5 * error, (dtype, value)
        held = torch.tensor([0.0, 1.0, -0.375, 2.0**-20], dtype=torch.float64).repeat(100, 1)
        assert torch.equal(rounded_stochastically(held, dtype, generator), held)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_stochastic_step_is_the_unrounded_one_on_average_and_repeats_with_its_seed() -> None:
    layer, optimizer, gradient = stepped(weight_decay=0.1)
    state = state_of_optimizer(optimizer, layer)
    expected = adamw_deltas({"weight": layer.weight}, state, {"weight": -gradient.double()})["weight"]

    def drawn(seed: int) -> Tensor:
        found = rounded(layer, state, gradient, RoundingRule(Rounding.STOCHASTIC, seed))
        assert found is not None
        assert found.kept.how is Rounding.STOCHASTIC
        return found.deltas["weight"]

    draws = torch.stack([drawn(seed) for seed in range(40)])
    assert torch.equal(draws[3], drawn(3))
    assert not torch.equal(draws[3], draws[4])
    errors = draws.std(0) / len(draws) ** 0.5
    noisy = errors > 0
    scaled = (draws.mean(0) - expected)[noisy] / errors[noisy]
    # Over 3000 elements: the mean of their deviations in errors is within 4 errors of zero, for a bias of all would show there.
    assert abs(float(scaled.clamp(-6, 6).mean())) < 4 / float(noisy.sum()) ** 0.5
    nearest = rounded(layer, state, gradient)
    assert nearest is not None
    lost = (nearest.deltas["weight"] - expected).norm()
    assert (draws.mean(0) - expected).norm() < 0.5 * lost


def test_only_moments_and_weights_of_one_narrow_type_say_that_no_wider_copy_is_kept() -> None:
    layer, optimizer, gradient = stepped()
    assert rounded(layer, state_of_optimizer(optimizer, layer), gradient) is not None
    for field in ("exp_avg", "exp_avg_sq"):
        other, its, _ = stepped()
        entry = its.state[other.weight]
        entry[field] = entry[field].float()
        assert rounded(other, state_of_optimizer(its, other), gradient) is None, field
    wide = layer.weight.detach().float() + 1e-6
    layer.weight.data = wide
    assert rounded(layer, state_of_optimizer(optimizer, layer), gradient) is None
    single, its, _ = stepped(dtype=torch.float32)
    assert rounded(single, state_of_optimizer(its, single), gradient) is None


def test_a_step_that_the_type_cannot_hold_is_refused_with_its_cause() -> None:
    layer, optimizer, gradient = stepped(dtype=torch.float16)
    optimizer.param_groups[0]["eps"] = 1e-8
    state = state_of_optimizer(optimizer, layer)
    state.moments["weight"].exp_avg_sq[0] = 0.0
    gradient[0] = 1e-4  # whose square is 0 in float16
    with pytest.raises(
        InputError, match=r"makes 50 of 3000 weights infinite or NaN \(Adam's ε of 1e-08 is 0 in float16\)"
    ):
        rounded(layer, state, gradient)


def narrow_checkpoint(folder: Path, **optimizer: Any) -> Path:
    model = support.tiny_model(dtype=torch.bfloat16)
    return support.save_checkpoint(model, support.trained_optimizer(model, **optimizer), folder)


def test_run_realises_the_step_that_the_optimizer_takes_in_bfloat16_and_says_what_share_moves(tmp_path: Path) -> None:
    rows = support.random_rollouts(6, 4)
    write_rollouts(rows, tmp_path / "rows.jsonl")
    model = support.tiny_model(dtype=torch.bfloat16)
    optimizer = support.trained_optimizer(model, learning_rate=1e-4)
    checkpoint = support.save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    outcome = support.run_command(
        "run", checkpoint, "--rollouts", tmp_path / "rows.jsonl", "--no-noise", "--max-grad-norm", "0.5", "--device", "cpu",
        "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["step"], row["rounded"]) for row in report["realized"]] == 2 * [
        ("preconditioned", None), ("adamw", None), ("adamw", "nearest"),
    ]  # fmt: skip
    for row in report["realized"]:
        assert (row["rounded"] is None) is ("rounded" in row["null_reasons"])

    # The truth: torch takes the step on the bfloat16 weights, from the gradient of their float32 copy.
    wide = support.tiny_model()
    wide.load_state_dict(model.state_dict())
    batch = support.random_batch(6, 4)
    policy = Policy(wide, batch.temperature)
    advantages, _ = resolve_advantages(batch, None)
    coefficients = advantages * resolve_length_weights(batch, LengthWeight.GUIDE) / len(batch.groups)
    ascent = loss_gradient(policy, batch.responses, coefficients)
    factor = clip_factor(gradient_norm(ascent), 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = (-factor * ascent[name]).to(p)
    optimizer.step()
    moved = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    total = sum(p.numel() for p in model.parameters())
    assert 0.02 < moved / total < 0.3

    s = policy.measure(batch.responses).scores
    wide.load_state_dict(model.state_dict())
    after = policy.measure(batch.responses).scores
    weights = (after - s).softmax(0)
    expected = float(-(weights * after).sum() + s.mean())
    plain, row = (row for row in report["realized"] if row["step"] == "adamw" and row["estimator"] == "score")
    # The gradients' sums are in another order: a tie or two of the rounding may fall the other way.
    assert row["delta_h"] == pytest.approx(expected, abs=0.02 * abs(expected) + row["noise_floor"])
    assert abs(plain["delta_h"] - expected) > 0.3 * abs(expected)
    said = next(w for w in report["warnings"] if w["code"] == "weights_stored_narrow")["seen"]
    share = float(said.split(": ")[1].split(" %")[0])
    assert share == pytest.approx(100 * moved / total, abs=0.06)
    assert f"{total} bfloat16 weights move" in said
    assert "rounded to nearest as its weights are stored" in row["note"]
    assert "rounded" not in plain["note"]
    assert "adamw rounded to nearest (same), score" in outcome.out.replace("\n", " ")
    # The first rounded row is by the report's own estimator: the headline ends with what it says.
    first = next(row for row in report["realized"] if row["rounded"])
    assert f"{total} bfloat16 weights move" in report["headline"]
    ends = f"As it is stored the step changes entropy by {signed(first['delta_h'], first['se'])} nats per response (realised)."
    assert report["headline"].endswith(ends)


def codes(report: Any) -> set[str]:
    return {warning.code for warning in report.warnings}


def test_the_same_checkpoint_in_bfloat16_or_saved_from_float32_copies_is_rounded_alike(tmp_path: Path) -> None:
    write_rollouts(support.random_rollouts(5, 3), tmp_path / "rows.jsonl")
    checkpoint = narrow_checkpoint(tmp_path / "checkpoint-3")

    def last(settings: Settings) -> Any:
        return probe_checkpoint(checkpoint, tmp_path / "rows.jsonl", settings).report.realized[2]

    plain, in_narrow = last(Settings(noise=False)), last(Settings(noise=False, dtype=torch.bfloat16))
    assert in_narrow.rounded == plain.rounded == "nearest"
    # Its gradient is of bfloat16 arithmetic.
    assert in_narrow.delta_h == pytest.approx(plain.delta_h, rel=0.1)
    model = support.tiny_model()
    model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())
    model.save_pretrained(checkpoint)
    assert last(Settings(noise=False)).delta_h == plain.delta_h


def test_float32_weights_and_adapters_are_not_rounded_and_a_rounding_of_none_is_said() -> None:
    batch = support.random_batch(5, 3)
    base = support.tiny_model(dtype=torch.bfloat16)
    adapted = support.lora_model(base)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    for model in (support.tiny_model(), adapted):
        adam = state_of_optimizer(support.trained_optimizer(model), model)
        report = probe(model, adam, batch, Settings(noise=False, weight_rounding=Rounding.STOCHASTIC)).report
        assert [row.rounded for row in report.realized] == [None] * 4
        assert "no_weights_rounded" in codes(report)
        assert "weights_stored_narrow" not in codes(report)
        assert "As it is stored" not in report.headline
        assert codes(probe(model, adam, batch, Settings(noise=False)).report) & {"no_weights_rounded"} == set()


def test_only_the_narrow_ones_of_mixed_parameters_are_rounded() -> None:
    model = support.tiny_model(dtype=torch.bfloat16)
    kept = [name for name, _ in model.named_parameters() if "norm" in name]
    optimizer = support.trained_optimizer(model)
    for name, p in model.named_parameters():
        if name in kept:
            p.data = p.data.float()
            for field in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][field] = optimizer.state[p][field].float()
    state = state_of_optimizer(optimizer, model)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    ascent = {name: torch.full_like(p, 1e-3, dtype=torch.float64) for name, p in theta.items()}
    plain = adamw_deltas(theta, state, ascent)
    found = rounded_adamw(theta, state, ascent, plain, clip_factor=1.0, rule=RoundingRule(), sharding=WHOLE)
    assert found is not None
    assert kept
    assert found.kept.weights == sum(p.numel() for name, p in theta.items() if name not in kept)
    for name in theta:
        assert torch.equal(found.deltas[name], plain[name]) is (name in kept), name


def test_a_live_model_is_rounded_held_out_too_swept_without_and_left_as_it_was() -> None:
    from entropy_probe.statistics.linearity import SweepRange

    model = support.tiny_model(dtype=torch.bfloat16)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drawn = torch.random.get_rng_state()
    settings = Settings(
        noise=False, split=2, sweep=SweepRange.parse("0.5:2:3"), weight_rounding=Rounding.STOCHASTIC, seed=5
    )
    report = probe(model, adam, support.random_batch(6, 3), settings).report
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(p.dtype is torch.bfloat16 and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [(row.batch, row.step, row.rounded) for row in report.realized] == [
        (batch, step, how)
        for batch in ("same", "held-out")
        for _ in range(2)
        for step, how in (("preconditioned", None), ("adamw", None), ("adamw", "stochastic"))
    ]
    assert [curve.step for curve in report.sweep] == ["preconditioned", "preconditioned", "adamw", "adamw"]
    assert report.config.weight_rounding == "stochastic"
    report.to_dict()
