"""Print the figures of the table of deviations from the guide (docs/method.md, section 9): `python benchmarks/deviations.py`.

Each row compares the guide's literal text with what the package does, on the bundled checkpoint or by Monte Carlo. The same
claims are tests in ``tests/pipeline/test_deviations.py``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from entropy_probe import (
    Rollout,
    Settings,
    ZeroV,
    group_rollouts,
    probe,
    probe_checkpoint,
    read_batch,
    state_of_optimizer,
)
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.data.groups import leave_one_out_mean
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.losses.surrogate import probe_loss
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.score import score_coefficients


def norm(gradients: tuple[torch.Tensor, ...]) -> float:
    return float(torch.sqrt(sum((g.double() ** 2).sum() for g in gradients)))


def detached_coefficient(batch: RolloutBatch) -> str:
    model = load_checkpoint(demo_files().checkpoint, dtype=torch.float64).model
    policy, responses, sizes = Policy(model), batch.responses[:64], batch.group_sizes[:4]
    with policy.arithmetic():
        scores = policy.forward_scores(responses)
        ours = torch.autograd.grad(
            probe_loss(scores, score_coefficients(scores, sizes)), list(model.parameters()), retain_graph=True
        )
        literal_loss = ((scores - leave_one_out_mean(scores, sizes)) * scores).sum() / sizes[0]
        literal = torch.autograd.grad(literal_loss, list(model.parameters()))
    return f"‖∇L_X‖ as written / with the coefficient detached: {norm(literal) / norm(ours):.6f}"


def one_geometry(batch: RolloutBatch) -> str:
    """The guide's text: P on both sides in the bars, on one side in the diagonal."""
    checkpoint = load_checkpoint(demo_files().checkpoint)
    policy, geometry = Policy(checkpoint.model), Geometry.of(Adam(checkpoint.adam))
    x = score_coefficients(policy.scores(batch.responses), batch.group_sizes)
    advantages, _ = resolve_advantages(batch, None)
    y = advantages * resolve_length_weights(batch, LengthWeight.GUIDE)
    units, p = exact_units(len(batch.groups)), geometry.metric
    one = unit_gradients(policy, batch, units, Sides(x, y), geometry).total
    both = unit_gradients(
        policy, batch, units, Sides(x, y), Geometry.fixed({name: p[name] ** 2 for name in geometry.groups})
    ).total
    count = len(batch.groups)
    ours = cross_statistics(one).u_cross
    literal = count / (count - 1) * both.sum_dot / count**2 - one.diagonal.sum() / (count * (count - 1))
    return f"U_cross {ours:.4g} under P (what Adam's step does to first order), {literal:.4g} by the guide's text"


def standard_errors() -> str:
    rng = np.random.default_rng(0)
    units, dim, mean = 128, 5, np.ones(5)
    found = [
        cross_statistics(UnitDots.from_kernel(xs @ ys.T, [1] * units))
        for xs, ys in (
            (mean + rng.normal(size=(units, dim)), mean + rng.normal(size=(units, dim))) for _ in range(2000)
        )
    ]
    sd = np.std([f.u_cross for f in found])
    parts = {
        name: np.mean([getattr(f, name) for f in found]) for name in ("se_plugin_guide", "se_plugin", "se_jackknife")
    }
    listed = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
    return f"true sd of U_cross at U = 128: {sd:.3f}; mean of {listed} (2000 draws)"


def two_steps() -> str:
    files = demo_files()
    settings = Settings(
        estimator=Estimator.SCORE,
        length_weight=LengthWeight.DR_GRPO,
        max_completion_length=files.max_completion_length,
    )
    rows = probe_checkpoint(files.checkpoint, files.rollouts, settings).report.realized
    return "; ".join(f"{r.step}: realised {r.delta_h:+.4f} ± {r.se:.4f}, linear {r.predicted:+.4f}" for r in rows)


def without_v() -> str:
    """An untied embedding of 400 tokens that three steps on 200 of them have trained."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, tie_word_embeddings=False, initializer_range=0.3, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(3):
        ids = torch.randint(4, 204, (32, 10))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts, responses = torch.randint(4, 400, (12, 4)).tolist(), torch.randint(4, 400, (12, 4, 6)).tolist()
    batch = group_rollouts(
        Rollout(n, tuple(prompts[n]), tuple(response), sum(token % 3 == 0 for token in response) / 6)
        for n, group in enumerate(responses)
        for response in group
    )
    adam = state_of_optimizer(optimizer, model)
    ours, guide = (
        probe(model, adam, batch, Settings(noise=False, length_weight=LengthWeight.GRPO, zero_v=zero_v)).report
        for zero_v in (ZeroV.LEAVE_OUT, ZeroV.GUIDE)
    )
    return (
        f"δH₁ {guide.first_order.delta_h1:+.2g} by the guide's text, {ours.first_order.delta_h1:+.2g} without the "
        f"{ours.first_order.zero_v.elements} elements that have v = 0; the gradient's part of AdamW's own step "
        f"{ours.adamw.parts['gradient'].value:+.2g}"
    )


def dropout() -> str:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=14, bos_token_id=0, eos_token_id=1, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    )
    model.train()
    batch = read_batch(demo_files().rollouts)
    policy, rows = Policy(model), [replace(r, logprobs=None) for r in batch.responses[:64]]
    with torch.no_grad():
        gap = (policy.forward_scores(rows) - policy.forward_scores(rows)).abs().mean()
    again = (policy.scores(rows) - policy.scores(rows)).abs().max()
    return f"mean |S − S′| of two passes in train mode (dropout 0.1): {float(gap):.3f} nats; ours: {float(again):.1f}"


def main() -> None:
    """Print one line a row."""
    torch.set_num_threads(2)
    batch = read_batch(demo_files().rollouts)
    for row, text in (
        ("1 coefficient", detached_coefficient(batch)),
        ("2 geometry", one_geometry(batch)),
        ("3 standard error", standard_errors()),
        ("5 two steps", two_steps()),
        ("6 elements without v", without_v()),
        ("8 dropout", dropout()),
    ):
        print(f"{row}: {text}")


if __name__ == "__main__":
    main()
