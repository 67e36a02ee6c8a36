"""Dots of every response's gradient with given directions: against autograd, one response at a time, in float64."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import support
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients import engine, response_dots, treatments
from entropy_probe.gradients.capture.modules import Treatment
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.vectors import outer_products as outer
from entropy_probe.gradients.vectors.contractions import Contractions
from entropy_probe.gradients.vectors.sharded_vectors import ShardedVectors
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.targets.entropy import EntropyTarget

RELATIVE = 1e-11


def directions(policy: Policy, count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in policy.trainable().items()}
        for _ in range(count)
    ]


def one_at_a_time(policy: Policy, batch: RolloutBatch, vectors: list[dict[str, Tensor]]) -> Tensor:
    rows = []
    for response in batch.responses:
        with policy.arithmetic(), torch.enable_grad():
            score = policy.forward_scores([response])[0]
            gradients = torch.autograd.grad(score, list(policy.trainable().values()), allow_unused=True)
        named = dict(zip(policy.trainable(), gradients, strict=True))
        rows.append([sum(float((g * v[n]).sum()) for n, g in named.items() if g is not None) for v in vectors])
    return torch.tensor(rows, dtype=torch.float64)


def gap(policy: Policy, batch: RolloutBatch) -> float:
    vectors = directions(policy)
    expected = one_at_a_time(policy, batch, vectors)
    found = response_dots(policy, batch, vectors)[:, 0]
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("family", list(support.CONFIGS))
def test_every_response_of_every_family(family: str, size: int) -> None:
    policy = Policy(support.tiny_model(family, dtype=torch.float64), 0.8, microbatch_size=size)
    assert gap(policy, support.random_batch(5, [3, 2, 4, 3, 3])) < RELATIVE


def test_long_responses_and_gradients_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer, "CACHED", 200)
    batch = support.random_batch(4, 3, longest=40)
    assert max(r.length for r in batch.responses) > outer.SHORT
    policy = Policy(support.tiny_model("llama-tied", dtype=torch.float64))
    assert gap(policy, batch) < RELATIVE


@pytest.mark.parametrize("treatment", [Treatment.FALLBACK, Treatment.RECOMPUTE])
def test_parameters_that_no_rule_serves(monkeypatch: pytest.MonkeyPatch, treatment: Treatment) -> None:
    original = treatments.first_treatment

    def slower(module: nn.Module, parameter: nn.Parameter) -> Treatment:
        return treatment if parameter.dim() == 1 else original(module, parameter)

    monkeypatch.setattr(treatments, "first_treatment", slower)
    policy = Policy(support.tiny_model("llama-untied", dtype=torch.float64))
    assert gap(policy, support.random_batch(4, 3)) < RELATIVE


def test_lora_and_a_direction_that_lacks_a_parameter() -> None:
    policy = Policy(support.lora_model(support.tiny_model("llama-untied", dtype=torch.float64)).double())
    batch = support.random_batch(4, 3)
    assert gap(policy, batch) < RELATIVE
    (whole,) = directions(policy, 1)
    first, *rest = whole
    part, other = {first: whole[first]}, {name: whole[name] for name in rest}
    found = response_dots(policy, batch, [whole, part, other])[:, 0]
    torch.testing.assert_close(found[:, 0], found[:, 1] + found[:, 2], rtol=1e-10, atol=1e-10)


def test_a_direction_contracted_with_its_neighbours_sequence_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Contractions.add_outer

    def swapped(self: Contractions, name: str, left: Tensor, *rest: object) -> None:
        right(self, name, left.roll(1, 0) if len(left) > 2 else left, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Contractions, "add_outer", swapped)
    policy = Policy(support.tiny_model("llama-tied", dtype=torch.float64))
    assert gap(policy, support.random_batch(4, 3)) > 1e-2


def test_a_pass_that_forgot_a_chunk_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """ΣX · P · ΣY is found in the first pass and Σ_u X_u · P · ΣY in the second: the residual compares the two."""
    from entropy_probe.data.units import exact_units
    from entropy_probe.gradients import Storage, Wanted
    from entropy_probe.statistics.u_statistics import cross_statistics

    policy = Policy(support.tiny_model("llama-tied", dtype=torch.float64))
    batch = support.random_batch(4, 3)
    a = torch.tensor([r.reward - 0.5 for r in batch.responses], dtype=torch.float64)
    p = {name: torch.ones_like(q) for name, q in policy.trainable().items()}

    def residual() -> float:
        found = engine.unit_gradients(
            policy, batch, exact_units(4), Sides(EntropyTarget(), a), Geometry.fixed(p), wanted=Wanted(Storage.STREAMED)
        )
        return cross_statistics(found.total).self_test_residual

    assert residual() < 1e-12
    right = Contractions.add

    def forgetful(self: Contractions, name: str, gradients: Tensor, *rest: object) -> None:
        if not name.endswith("model.norm.weight"):
            right(self, name, gradients, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Contractions, "add", forgetful)
    assert residual() > 1e-9


@pytest.mark.parametrize("kind", [Contractions, ShardedVectors])
def test_what_is_as_long_as_the_parameters_goes_with_who_holds_it(
    kind: type[Contractions] | type[ShardedVectors],
) -> None:
    """In a circle of references it would stay until garbage is next collected, beside what comes after."""
    cpu = torch.device("cpu")
    gc.disable()
    try:
        held: Contractions | ShardedVectors
        if kind is Contractions:
            held = Contractions({"weight": torch.zeros(2, 6)}, 3, torch.float32, cpu)
        else:
            sharding = Sharding(spans={"weight": (slice(0, 6),)}, sharded=True)
            held = ShardedVectors({"weight": torch.Size([3, 2])}, 2, torch.float32, cpu, sharding, [["weight"]])
        still = weakref.ref(held)
        del held
        assert still() is None
    finally:
        gc.enable()
