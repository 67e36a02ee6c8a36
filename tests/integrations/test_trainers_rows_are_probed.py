"""A probe of rows made of each trainer's tensors takes its default loss without a setting, and sees what is off-policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import trainer_tensors as made
from entropy_probe import Settings, group_rollouts, probe, state_of_optimizer
from entropy_probe.data.rollouts import Rollout
from entropy_probe.integrations.rows import (
    AREAL_DEFAULTS,
    OPENRLHF_DEFAULTS,
    PRIME_RL_DEFAULTS,
    SKYRL_DEFAULTS,
    SLIME_DEFAULTS,
    VERL_DEFAULTS,
    StepFacts,
    TrainersLoss,
    rows_of_areal,
    rows_of_openrlhf,
    rows_of_prime_rl,
    rows_of_skyrl,
    rows_of_slime,
    rows_of_verl,
)
from support import VOCABULARY, tiny_model, trained_optimizer

PROMPTS, RESPONSES, TAU = 4, 3, 0.5
BINS = ((0, 1, 2, 3, 4), (5, 6, 7), (8, 9, 10, 11))


def sampled(model: Any, seed: int = 0) -> list[made.Sample]:
    """Responses of random tokens, one with a tool's turn, and log-probs near to the model's: the trainer's, the sampler's and a
    reference's."""
    generator = torch.Generator().manual_seed(seed)

    def near(values: torch.Tensor, by: float) -> tuple[float, ...]:
        noise = by * torch.randn(len(values), generator=generator)
        return tuple((values + noise).clamp(max=-1e-3).tolist())

    samples = []
    for row in range(PROMPTS * RESPONSES):
        size = int(torch.randint(3, 7, (1,), generator=generator))
        body = torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()
        prompt, response = (5, 6 + row // RESPONSES), (*body, 1)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        fresh = torch.log_softmax(logits.double() / TAU, -1)[range(size + 1), list(response)]
        drawn = tuple(not (row == 4 and place == 1) for place in range(size + 1))
        advantage = float(torch.randn(1, generator=generator))
        samples.append(
            made.Sample(
                f"p{row // RESPONSES}", prompt, response, drawn, near(fresh, 0.02), near(fresh, 0.02), near(fresh, 0.3),
                (advantage,) * (size + 1), float(advantage > 0),
            )
        )  # fmt: skip
    return samples


Make = Callable[[Sequence[made.Sample], StepFacts], list[Rollout]]
F32 = torch.float32
MAKERS: dict[str, tuple[Make, TrainersLoss]] = {
    "verl": (lambda s, f: rows_of_verl(made.verl(F32, s), f), VERL_DEFAULTS),
    "OpenRLHF": (lambda s, f: rows_of_openrlhf(made.openrlhf(F32, s), f), OPENRLHF_DEFAULTS),
    "SkyRL": (lambda s, f: rows_of_skyrl(made.skyrl(F32, s), f), SKYRL_DEFAULTS),
    "slime": (lambda s, f: rows_of_slime(made.slime(F32, s), f), SLIME_DEFAULTS),
    "AReaL": (lambda s, f: rows_of_areal(made.areal_packed(F32, s), f), AREAL_DEFAULTS),
    "prime-rl": (lambda s, f: rows_of_prime_rl(made.prime_rl(F32, s, BINS), f), PRIME_RL_DEFAULTS),
}
PADDED = {"AReaL", "prime-rl"}
"""Whose tensors have a row of padding more."""


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_probe_takes_a_trainers_default_loss_from_its_rows(name: str) -> None:
    model = tiny_model()
    adam = state_of_optimizer(trained_optimizer(model), model)
    samples = sampled(model)
    make, loss = MAKERS[name]
    more = int(name in PADDED)
    facts = StepFacts(
        prompts=[s.name for s in samples] + ["none"] * more, rewards=[s.reward for s in samples] + [0.0] * more,
        temperature=TAU, loss=loss,
    )  # fmt: skip

    def report_of(said: TrainersLoss) -> Any:
        return probe(model, adam, group_rollouts(make(samples, replace(facts, loss=said))), Settings()).report

    report = report_of(loss)
    assert (report.config.loss, report.config.loss_agg) == (loss.loss_type, loss.loss_agg)
    assert (report.config.beta, report.config.epsilon_low) == (loss.beta or 0.0, loss.epsilon_low)
    assert report.config.importance_ratios
    assert not {warning.code for warning in report.warnings} & {"length_weight_assumed", "loss_assumed"}
    # A loss of twice the size is an update of twice the size.
    twice = report_of(replace(loss, loss_scale=2.0))
    assert twice.first_order.u_cross == pytest.approx(2.0 * report.first_order.u_cross, rel=1e-9)
