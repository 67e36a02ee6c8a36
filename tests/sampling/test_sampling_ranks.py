"""Two ranks sample what one process does, token for token: replicated, and with weights that FSDP2 has cut.

The two ranks are started once and go through all cases; a test looks up what became of its case on each rank.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.checkpoints.sharded import decoder_layers, load_sharded_checkpoint, sharding_of
from entropy_probe.common.progress import Silent
from entropy_probe.data.rollouts import Rollout, group_rollouts
from entropy_probe.model.policy import Policy
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.sharding import Sharding
from entropy_probe.realized.measure import EntropyMeasure, Predicted
from entropy_probe.realized.realize import realize
from entropy_probe.realized.resampling import plan_resampling, resample
from entropy_probe.realized.steps import Step
from entropy_probe.sampling import jobs
from entropy_probe.sampling.drawing import sample_rollouts
from entropy_probe.sampling.jobs import deal_jobs, make_jobs, put_together
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from rank_processes import failed_cases
from support import VOCABULARY, lora_model, make_checkpoint, save_checkpoint, tiny_model, trained_optimizer

COUNT = 2
ENDS = (1, 5, 9, 13)
"""Several, so that responses end early and calls of generate are of different lengths."""
SETTINGS = SamplingSettings(5, 0.8, 6, seed=7, eos_ids=ENDS, batch_size=4)
PROMPTS = (4, 2, 4, 7, 2)
"""Lengths: with batches of 4 of the 5 responses ten jobs."""

Item = TypeVar("Item")


def prompts_of_lengths(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(4)
    drawn = [tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]
    return [Prompt(f"p{n}", ids, f"text {n}", {}) for n, ids in enumerate(drawn)]


def no_reward(*_: object) -> float:
    return 0.0


@dataclass(frozen=True)
class Counted:
    """A progress that keeps what it is told of."""

    totals: list[int] = field(default_factory=list)

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        assert description == "sampling"
        self.totals.append(total)
        yield from items


def replicated(ranks: Ranks, **more: Any) -> Policy:
    model = tiny_model(dtype=torch.float64)
    return Policy(model, SETTINGS.temperature, sharding=sharding_of(model, ranks), **more)


def alone(policy: Policy) -> Policy:
    return replace(policy, sharding=Sharding(ALONE))


def assert_same_rollouts(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    """All but log-probs equal, and those to rounding."""
    assert [replace(r, logprobs=None) for r in found] == [replace(r, logprobs=None) for r in expected]
    for r, other in zip(found, expected, strict=True):
        assert r.logprobs is not None
        np.testing.assert_allclose(r.logprobs, other.logprobs or (), rtol=0, atol=1e-12)


# Replicated


def drawn_alike(lengths: Sequence[int], settings: SamplingSettings, root: Path, ranks: Ranks) -> None:
    policy, prompts = replicated(ranks), prompts_of_lengths(*lengths)
    mine, all_of_them = Counted(), Counted()
    found = sample_rollouts(policy, prompts, settings, no_reward, progress=mine)
    expected = sample_rollouts(alone(policy), prompts, settings, no_reward, progress=all_of_them)
    assert_same_rollouts(found, expected)
    assert len({r.response_ids for r in found}) > len(found) / 2
    own = ranks.gather_numbers(np.array(mine.totals, dtype=np.float64))
    assert own.sum() == all_of_them.totals[0]
    # More than one job are divided.
    assert max(own) < all_of_them.totals[0] or all_of_them.totals == [1]


def summed_in_pieces(root: Path, ranks: Ranks) -> None:
    policy, prompts = replicated(ranks), prompts_of_lengths(*PROMPTS)
    expected = sample_rollouts(alone(policy), prompts, SETTINGS, no_reward)
    before = len(ranks.sent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "TOKENS_TOGETHER", 20)
        assert_same_rollouts(sample_rollouts(policy, prompts, SETTINGS, no_reward), expected)
    pieces = [payload.elements for payload in ranks.sent[before + 1 : -1]]
    assert len(pieces) > 3
    assert max(pieces) <= 2 * 20
    assert sum(pieces) == 2 * sum(len(r.response_ids) for r in expected)


def rewarded_once(root: Path, ranks: Ranks) -> None:
    """A reward that gives another number at every call, on every rank."""
    policy, prompts = replicated(ranks), prompts_of_lengths(*PROMPTS)
    calls = []
    chance = random.Random(os.getpid())

    def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
        calls.append(prompt)
        return chance.random()

    rollouts = sample_rollouts(policy, prompts, replace(SETTINGS, max_new_tokens=2), reward)
    rewards = ranks.gather_numbers(np.array([r.reward for r in rollouts]))
    assert len(set(rewards[0])) == len(rollouts)
    assert np.array_equal(*rewards)
    assert list(ranks.gather_numbers(np.array([float(len(calls))]))[:, 0]) == [12.0, 13.0]
    assert calls == [r.prompt for r in rollouts][slice(12) if ranks.rank == 0 else slice(12, None)]


def resampled_alike(root: Path, ranks: Ranks) -> None:
    """Rows of fresh responses after a step."""
    policy, prompts = replicated(ranks, microbatch_size=8), prompts_of_lengths(*PROMPTS)
    batch = group_rollouts(
        sample_rollouts(alone(policy), prompts, replace(SETTINGS, responses=8, batch_size=64), no_reward)
    )
    generator = torch.Generator().manual_seed(5)
    deltas = {n: 0.1 * torch.randn(p.shape, generator=generator).double() for n, p in policy.model.named_parameters()}
    step = Step("adamw", "virtual", deltas)
    plan = plan_resampling(policy, batch, 6, 0)
    assert len(make_jobs(plan.prompts, plan.settings)) > 2
    found, state = [], torch.get_rng_state()
    for each in (policy, alone(policy)):
        before = each.measure(batch.responses)
        measures = [Predicted(EntropyMeasure(EntropyTarget(estimator)), 0.0) for estimator in Estimator]
        rows = realize(alone(policy), batch, before, step, measures, floors=[0.0] * len(measures))
        found.append(resample(each, batch, before, [step], rows, plan, Silent()))
    assert torch.equal(torch.get_rng_state(), state)
    for row, expected in zip(*found, strict=True):
        assert (row.method, row.note) == ("resampled", expected.note)
        assert row.change.delta_h == pytest.approx(expected.change.delta_h, rel=1e-10)
        assert row.change.se == pytest.approx(expected.change.se, rel=1e-10)
    values = ranks.gather_numbers(np.array([row.change.delta_h for row in found[0]]))
    assert np.array_equal(*values)


# FSDP2


def sharded_alike(name: str, root: Path, ranks: Ranks) -> None:
    base = root / "base" if name == "lora" else None
    loaded = load_sharded_checkpoint(root / name, ranks, base=base, dtype=torch.float64)
    whole = load_checkpoint(root / name, base=base, dtype=torch.float64)
    policy = Policy(loaded.model, SETTINGS.temperature, sharding=sharding_of(loaded.model, ranks))
    expected_of = Policy(whole.model, SETTINGS.temperature)
    assert policy.sharding.sharded
    forwards = 0

    def counted(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    next(decoder_layers(policy.model)).register_forward_pre_hook(counted)
    configs = {m: vars(m)["generation_config"] for m in policy.model.modules() if "generation_config" in vars(m)}
    attributes = set(vars(policy.model))
    state = torch.get_rng_state()
    for lengths, settings in (
        # Three jobs of different lengths, so that one rank has one less.
        (PROMPTS, replace(SETTINGS, batch_size=10)),
        # One that ends soon, so that a rank has none: an idle call would often be longer. And one up to the context's very end.
        *(((6,), replace(SETTINGS, responses=2, eos_ids=tuple(range(1, 15)), seed=seed)) for seed in range(3)),
        ((58,), replace(SETTINGS, responses=2, max_new_tokens=64 - 58, eos_ids=())),
    ):
        prompts = prompts_of_lengths(*lengths)
        forwards = 0
        found = sample_rollouts(policy, prompts, settings, no_reward)
        assert_same_rollouts(found, sample_rollouts(expected_of, prompts, settings, no_reward))
        every = ranks.gather_numbers(np.array([float(forwards)]))
        assert every[0] == every[1] > 0
        # In every round as many as its longest response has tokens: idle calls are not in the way.
        jobs = make_jobs(prompts, settings)
        longest = [max(len(found[row].response_ids) for row in job.rows(settings.responses)) for job in jobs]
        shares = [longest[share.start : share.stop] for share in deal_jobs(jobs, prompts, settings, policy.sharding)]
        assert forwards == sum(max(together) for together in itertools.zip_longest(*shares, fillvalue=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(policy.model)) == attributes
    assert all(vars(module)["generation_config"] is config for module, config in configs.items())
    assert all(isinstance(p, DTensor) for p in policy.model.parameters())
    # And it still scores: generate has left it as it was.
    scores = policy.scores(found)
    torch.testing.assert_close(scores, expected_of.scores(found), rtol=0, atol=1e-10)


def failing(name: str, root: Path, ranks: Ranks) -> None:
    """An exception in the middle of generate, on both ranks: nothing of ours stays behind."""
    base = root / "base" if name == "lora" else None
    loaded = load_sharded_checkpoint(root / name, ranks, base=base)
    policy = Policy(loaded.model, SETTINGS.temperature, sharding=sharding_of(loaded.model, ranks))
    calls = 0

    def third(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    head: Any = next(module for name, module in policy.model.named_modules() if name.endswith("lm_head"))
    head.register_forward_pre_hook(third)
    attributes, state = set(vars(policy.model)), torch.get_rng_state()
    configs = {m: vars(m)["generation_config"] for m in policy.model.modules() if "generation_config" in vars(m)}
    assert configs
    with pytest.raises(KeyboardInterrupt):
        sample_rollouts(policy, prompts_of_lengths(*PROMPTS), SETTINGS, no_reward)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(policy.model)) == attributes
    assert all(vars(module)["generation_config"] is config for module, config in configs.items())


def group_of_one(root: Path, ranks: Ranks) -> None:
    """Each rank for itself, sharded over one: generate must not ask the other, which may draw longer."""
    groups = [dist.new_group([rank]) for rank in range(COUNT)]
    one = Ranks.of_group(groups[ranks.rank])
    loaded = load_sharded_checkpoint(root / "llama-tied", one, dtype=torch.float64)
    policy = Policy(loaded.model, SETTINGS.temperature, sharding=sharding_of(loaded.model, one))
    if ranks.rank == 0:
        expected = Policy(load_checkpoint(root / "llama-tied", dtype=torch.float64).model, SETTINGS.temperature)
        prompts = prompts_of_lengths(2, 3)
        found = sample_rollouts(policy, prompts, SETTINGS, no_reward)
        assert_same_rollouts(found, sample_rollouts(expected, prompts, SETTINGS, no_reward))
    # Two ranks by their word in a group of another size would wait for whoever is not among them.
    more = replace(policy, sharding=replace(policy.sharding, ranks=replace(ranks, count=COUNT + 1)))
    with pytest.raises(ValueError, match="process group of as many"):
        sample_rollouts(more, prompts_of_lengths(2), SETTINGS, no_reward)


CASES: Mapping[str, Callable[[Path, Ranks], None]] = {
    "ten-jobs": partial(drawn_alike, PROMPTS, SETTINGS),
    "three-jobs": partial(drawn_alike, (3, 9, 5), replace(SETTINGS, responses=3, batch_size=64)),
    "one-job": partial(drawn_alike, (3,), replace(SETTINGS, responses=4, seed=2**62)),
    "one-prompt-in-parts": partial(drawn_alike, (3,), replace(SETTINGS, responses=7, batch_size=2)),
    "pieces": summed_in_pieces,
    "rewards": rewarded_once,
    "resampled": resampled_alike,
    **{f"sharded-{name}": partial(sharded_alike, name) for name in ("llama-tied", "gpt2", "lora")},
    **{f"failing-{name}": partial(failing, name) for name in ("gpt2", "lora")},
    "group-of-one": group_of_one,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank, the tracebacks of the cases that failed."""
    root = tmp_path_factory.mktemp("ranks")
    for name in ("llama-tied", "gpt2"):
        make_checkpoint(root / name, name)
    base = tiny_model()
    base.save_pretrained(root / "base")
    adapted = lora_model(base)
    save_checkpoint(adapted, trained_optimizer(adapted), root / "lora")
    return failed_cases(COUNT, {name: partial(case, root) for name, case in CASES.items()})


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, outcomes: list[dict[str, str]]) -> None:
    for rank, failures in enumerate(outcomes):
        assert case not in failures, f"rank {rank}:\n{failures[case]}"


# One process


def test_jobs_cover_every_row_once_and_have_seeds_of_their_own() -> None:
    prompts = prompts_of_lengths(*PROMPTS)
    for responses, batch_size in ((5, 4), (5, 1), (2, 64), (3, 7)):
        jobs = make_jobs(prompts, replace(SETTINGS, responses=responses, batch_size=batch_size))
        rows = [row for job in jobs for row in job.rows(responses)]
        assert sorted(rows) == list(range(responses * len(prompts)))
        assert [job.number for job in jobs] == list(range(len(jobs)))
        assert all(job.copies * len(job.prompts) <= batch_size for job in jobs)
    assert len({job.seed(seed) for job in make_jobs(prompts, SETTINGS) for seed in (0, 1, 2**32, 2**63 - 1)}) == 40
    # As the documentation of the settings says.
    assert jobs[1].seed(5) == int(np.random.SeedSequence(5, spawn_key=(1,)).generate_state(1, np.uint64)[0])


def test_jobs_are_level_in_tokens_and_where_weights_are_sharded_in_number() -> None:
    prompts = prompts_of_lengths(*[2] * 6, 36, 36)
    settings = SamplingSettings(4, max_new_tokens=4, batch_size=4)
    jobs, ranks = make_jobs(prompts, settings), Ranks(0, 2)
    # 24 tokens six times, 160 twice.
    assert deal_jobs(jobs, prompts, settings, Sharding(ranks)) == [range(7), range(7, 8)]
    assert deal_jobs(jobs, prompts, settings, Sharding(ranks, sharded=True)) == [range(4), range(4, 8)]


def test_a_job_does_not_depend_on_those_before_it() -> None:
    model, prompts = tiny_model(), prompts_of_lengths(2, 3, 4)
    settings = replace(SETTINGS, batch_size=5)
    whole = sample_rollouts(Policy(model), prompts, settings, no_reward)
    # The first job's prompt says other things, at other length; the second and third are drawn as they were.
    first = replace(prompts[0], prompt_ids=(7,))
    again = sample_rollouts(Policy(model), [first, *prompts[1:]], settings, no_reward)
    assert whole[:5] != again[:5]
    assert whole[5:] == again[5:]


def test_samples_come_through_bit_for_bit() -> None:
    own = {1: ((3, 2**31, 1), (-0.1, -1e-300, -700.3)), 0: ((4,), (-0.0,))}
    assert put_together(own, 2, ALONE) == [own[0], own[1]]
