"""Two updates compared: what rounding explains is told apart from what it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.stored_precision import spacing, storage_type
from entropy_probe.replay_check.update_comparison import (
    compare_gradients,
    compare_updates,
    fitted_factor,
    micro_batch_entropy,
    recovered_gradient,
)

SHAPES = {"a": (200, 50), "b": (3000,)}


def drawn(scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def norm(values: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((v**2).sum()) for v in values.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [0.0, 1e-3, 0.1])
def test_the_net_error_is_the_planted_one_whatever_the_storage(dtype: torch.dtype, wrong: float) -> None:
    theta = {name: t.to(dtype).double() for name, t in drawn().items()}
    delta = drawn(1e-5 if dtype is torch.float32 else 1e-2, seed=1)
    after = {name: (theta[name] + d).to(dtype).float() for name, d in delta.items()}
    fault = drawn(wrong * 1e-5 if dtype is torch.float32 else wrong * 1e-2, seed=2)
    found = compare_updates(theta, {name: d + fault[name] for name, d in delta.items()}, after)
    real = norm({name: after[name].double() - theta[name] for name in theta})
    # The cross term of the fault and the rounding has mean zero, and 2·3/√13000 of their product as spread.
    unsure = math.sqrt(0.06 * (norm(fault) / real) * found.rounding_expected)
    assert found.error_net == pytest.approx(norm(fault) / real, rel=0.02, abs=unsure + 1e-12)
    assert found.rounding_expected < found.rounding_floor
    if wrong == 0.0:
        assert found.relative_error == pytest.approx(found.rounding_expected, rel=1e-12)
        assert found.rounding_expected == pytest.approx(found.rounding_floor / math.sqrt(3), rel=0.1)
    if wrong == 1e-3:  # it would drown in the rounding
        assert found.relative_error > 1.5 * norm(fault) / real


def test_the_second_rounding_of_weight_decay_is_the_optimizers_own() -> None:
    """Against torch.optim.AdamW in float32: with the decay's rounding nothing is left, without it most of it is."""
    parameters = {name: torch.nn.Parameter(t.float()) for name, t in drawn().items()}
    before = {name: p.detach().double() for name, p in parameters.items()}
    rate, decay = 1e-4, 0.1
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=rate, weight_decay=decay, eps=0.0)
    gradients = drawn(seed=3)
    for name, p in parameters.items():
        p.grad = gradients[name].float()
    optimizer.step()
    step = {name: -rate * (gradients[name].sign() + decay * before[name]) for name in before}
    with_it = compare_updates(before, step, parameters, dict.fromkeys(before, rate * decay))
    without = compare_updates(before, step, parameters)
    assert with_it.error_net < 1e-5
    assert without.error_net > 10 * with_it.error_net


def test_parameters_that_stay_have_no_rounding_and_no_relative_error() -> None:
    theta = {name: t.bfloat16().double() for name, t in drawn().items()}
    after = {"a": theta["a"] + 2.0**-20, "b": theta["b"]}
    found = compare_updates(theta, {"a": torch.full(SHAPES["a"], 2.0**-20, dtype=torch.float64)}, after)
    assert found.relative_error == 0.0
    alone = compare_updates({"a": theta["a"]}, {}, {"a": after["a"]})
    assert found.rounding_floor == alone.rounding_floor
    assert alone.cosine is None
    assert alone.relative_error == 1.0
    assert {p.name: p.relative_error for p in found.parameters} == {"a": 0.0, "b": None}


def test_the_worst_parameter_comes_first_with_its_share() -> None:
    theta, delta = drawn(), drawn(1e-2, seed=1)
    after = {name: theta[name] + d for name, d in delta.items()}
    found = compare_updates(theta, {"a": delta["a"], "b": 1.5 * delta["b"]}, after)
    assert [p.name for p in found.parameters] == ["b", "a"]
    assert found.parameters[0].relative_error == pytest.approx(0.5)
    assert found.parameters[0].share == pytest.approx(1.0)
    flat = [
        torch.cat([d[name].flatten() for name in SHAPES]) for d in ({"a": delta["a"], "b": 1.5 * delta["b"]}, delta)
    ]
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(*flat, dim=0)))
    assert found.norm_ratio == pytest.approx(float(flat[0].norm() / flat[1].norm()))
    with pytest.raises(ValueError, match="did not move"):
        compare_updates(theta, delta, theta)


@pytest.mark.parametrize(("dtype", "numpy_type"), [(torch.float32, np.float32), (torch.float64, np.float64)])
def test_ulp_is_numpys_spacing(dtype: torch.dtype, numpy_type: type) -> None:
    values = torch.cat([torch.logspace(-30, 30, 601, dtype=torch.float64), 2.0 ** torch.arange(-20.0, 20.0)]).to(dtype)
    expected = np.spacing(values.numpy().astype(numpy_type)).astype(np.float64)
    np.testing.assert_array_equal(spacing(values.double(), dtype).numpy(), expected)
    np.testing.assert_array_equal(spacing(-values.double(), dtype).numpy(), expected)


def test_ulp_of_bfloat16_and_the_type_that_weights_were_stored_in() -> None:
    assert spacing(torch.tensor([1.0, 1.99, 2.0, 0.5]), torch.bfloat16).tolist() == [2**-7, 2**-7, 2**-6, 2**-8]
    values = drawn()["b"]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for loaded in (torch.float32, torch.float64):
            if torch.finfo(loaded).bits >= torch.finfo(dtype).bits:
                assert storage_type(values.to(dtype).to(loaded)) is dtype


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_gradient_is_recovered_from_the_moments(decoupled: bool) -> None:
    model = torch.nn.Linear(7, 5, dtype=torch.float64)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.3, betas=(0.8, 0.99))
    states, gradients, parameters = [], [], []
    for step in range(3):
        for p, g in zip(model.parameters(), torch.split(torch.randn(40, dtype=torch.float64), [35, 5]), strict=True):
            p.grad = g.view(p.shape)
        parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        found = state_of_optimizer(optimizer, model)
        moments = {n: type(m)(step + 1, m.exp_avg.clone(), m.exp_avg_sq.clone()) for n, m in found.moments.items()}
        states.append(type(found)(found.groups, moments))
    recovered = recovered_gradient(states[0], states[1], parameters[1])
    assert recovered is not None
    for name, expected in gradients[1].items():
        torch.testing.assert_close(recovered[name], expected, rtol=1e-12, atol=1e-13)
    found_scale = compare_gradients({name: 4.0 * g for name, g in recovered.items()}, gradients[1])
    assert found_scale is not None
    assert (found_scale.scale, found_scale.norm_ratio) == (pytest.approx(0.25), pytest.approx(4.0))
    assert found_scale.relative_error == pytest.approx(3.0)
    assert found_scale.cosine == pytest.approx(1.0)
    assert recovered_gradient(states[0], states[2], parameters[1]) is None
    assert compare_gradients({}, gradients[1]) is None


def test_the_fitted_factor_is_least_squares() -> None:
    computed, noise = drawn(), drawn(seed=5)
    assert fitted_factor(computed, {name: 0.3 * v for name, v in computed.items()}) == pytest.approx(0.3)
    flat = [torch.cat([d[name].flatten() for name in SHAPES]) for d in (computed, noise)]
    expected = float(torch.linalg.lstsq(flat[0][:, None], flat[1][:, None]).solution)
    assert fitted_factor(computed, noise) == pytest.approx(expected)
    assert fitted_factor({"a": torch.zeros(3)}, {"a": torch.ones(3)}) is None


def test_the_logged_entropy_is_a_mean_of_micro_batch_means() -> None:
    entropies = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    # Micro-batch 0 holds the tokens of the first and third response, 4 has the second's alone.
    assert micro_batch_entropy(entropies, [2, 1, 2], [0, 4, 0]) == pytest.approx(((1 + 2 + 10 + 20) / 4 + 3) / 2)
    masked = torch.tensor([1, 0, 0, 1, 1])
    assert micro_batch_entropy(entropies, [2, 1, 2], [0, 4, 0], masked) == pytest.approx((1 + 10 + 20) / 3 / 2)
