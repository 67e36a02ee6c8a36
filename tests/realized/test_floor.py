"""The numerical floor: from few responses what float32 does to a change over all of them."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

import support
from entropy_probe.common.progress import Silent
from entropy_probe.data.rollouts import group_rollouts
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.realized.floor import MULTIPLE, floor_of, noise_floors
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.targets.choices import EntropyUnit, Estimator
from entropy_probe.targets.entropy import EntropyTarget

MEASURES = [EntropyMeasure(EntropyTarget(estimator, unit)) for estimator in Estimator for unit in EntropyUnit]


def test_shared_and_own_parts_are_means_over_pairs_and_squares() -> None:
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(3, 5)) + rng.normal(size=(3, 1))
    pairs = [row[i] * row[j] for row in changes for i, j in itertools.permutations(range(5), 2)]
    shared = float(np.mean(pairs))
    own = float((changes**2).mean()) - shared
    assert shared > 0
    assert own > 0
    assert floor_of(changes, 40) == pytest.approx(1.78 * np.sqrt(shared + own / 40), rel=1e-12)
    # Planted: as if all of it were shared, which few responses overstate.
    assert np.sqrt((changes**2).mean()) * MULTIPLE > 1.2 * floor_of(changes, 40)


def test_what_is_negative_by_chance_counts_as_none() -> None:
    assert floor_of(np.array([[1.0, -1.0]]), 8) == pytest.approx(1.78 * np.sqrt(2.0 / 8), rel=1e-12)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen2"])
def test_it_is_within_a_factor_of_four_of_the_true_error(family: str) -> None:
    """Of changes under small steps in float32, against the same weights and steps in float64."""
    narrow = support.tiny_model(family).float()
    wide = copy.deepcopy(narrow).double()
    batch = group_rollouts(support.random_rollouts(16, 4, seed=3))
    generator = torch.Generator().manual_seed(0)
    before = [Policy(model).measure(batch.responses) for model in (narrow, wide)]
    errors = []
    for _ in range(12):
        step = {
            name: (1e-5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
            for name, p in narrow.named_parameters()
        }
        found = []
        for model, own in zip((narrow, wide), before, strict=True):
            with virtual_step(model, step):
                after = Policy(model).measure(batch.responses)
            found.append([measure.change(batch, own, after).delta_h for measure in MEASURES])
        errors.append(np.subtract(*found))
    true = np.sqrt((np.array(errors) ** 2).mean(0))
    floors = np.array(noise_floors(Policy(narrow), batch, before[0], MEASURES, Silent()))
    assert (floors / (MULTIPLE * true) > 1 / 4).all()
    assert (floors / (MULTIPLE * true) < 4).all()


def test_parts_of_responses_average_to_a_small_change() -> None:
    model = support.tiny_model("llama-tied").double()
    batch = group_rollouts(support.random_rollouts(5, [3, 2, 4, 3, 2]))
    policy = Policy(model)
    before = policy.measure(batch.responses)
    generator = torch.Generator().manual_seed(1)
    step = {n: 1e-7 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    with virtual_step(model, step):
        after = policy.measure(batch.responses)
    base = np.repeat([1.0 / (5 * size) for size in batch.group_sizes], batch.group_sizes)
    for measure in MEASURES:
        change = measure.change(batch, before, after).delta_h
        assert float(base @ measure.parts(batch, before, after)) == pytest.approx(change, rel=1e-4)
