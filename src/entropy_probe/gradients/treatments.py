"""Which rule serves which parameter, settled by trying: the beginnings of two sequences, the engine beside autograd.

A rule is believed where it gives sequence by sequence what autograd gives for one sequence alone. Where it does not, the next
slower one is tried, and the fallback in the end. A model's code, not its name, decides; who probes one model again and again
may hand the rules of the first call to the next ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_probe.compat.fsdp import reset_sharding
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.gradients.capture.backward_order import outside, sharded_layers
from entropy_probe.gradients.capture.checkpointing import checkpointed_layers, checkpointing, not_checkpointing
from entropy_probe.gradients.capture.layers import RULES
from entropy_probe.gradients.capture.modules import (
    Treatment,
    fall_back_around,
    first_treatment,
    next_treatment,
    parameter_owners,
    treated,
)
from entropy_probe.gradients.capture.sequences import Mixing, Strip, padded_length
from entropy_probe.gradients.capture.uses import Capture, leaked
from entropy_probe.gradients.vectors.sharded_vectors import ShardedVectors
from entropy_probe.gradients.vectors.unit_vectors import UnitVectors
from entropy_probe.model.padding import pad_right, sum_over_tokens
from entropy_probe.model.policy import Policy, check_finite

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Relative difference between a rule and autograd that is rounding; a wrong rule is off by a good part of the whole."""

LOW_PRECISION_TOLERANCE = 0.15
"""The same where arithmetic is in bfloat16 or float16, whose rounding differs between a batch and one sequence alone."""

NEGLIGIBLE = 1e-4
"""A parameter's gradient below this share of the whole gradient is compared with that share: a key's bias has gradient
exactly zero, and all of what is computed for it is rounding."""


@dataclass(frozen=True)
class Rules:
    """Which treatment serves which parameter of one model, as :func:`prove_rules` found it.

    Attributes:
        treatments: by parameter name.
        unproven: names that the short sequences did not reach: a rule is not believed where one of them is met.
        model: what they were proved for, module by module: rules of another model are refused.
    """

    treatments: Mapping[str, Treatment]
    unproven: frozenset[str]
    model: tuple[str, ...]

    def check(self, policy: Policy) -> None:
        """Refuse to serve another model.

        Raises:
            InputError: modules, trainable parameters or arithmetic are not those that the rules were proved for.
        """
        if self.model != _description(policy):
            raise InputError(
                "these rules were proved for another model, other trainable parameters or another arithmetic; leave them out, "
                "and they are proved again"
            )


def _description(policy: Policy) -> tuple[str, ...]:
    modules = (f"{name} {type(module).__qualname__}" for name, module in policy.model.named_modules())
    parameters = (f"{name} {tuple(p.shape)}" for name, p in policy.trainable().items())
    marks = len(checkpointed_layers(policy.model))
    return (*modules, *parameters, f"{policy.dtype} {policy.autocast} {policy.head} {marks} layers checkpointed")


def prove_rules(policy: Policy, batch: RolloutBatch) -> Rules:
    """The fastest exact treatment of every trainable parameter, on the beginnings of two of the batch's sequences.

    Raises:
        InputError: a sequence's score depends on the other sequences in its batch, or is not finite.
    """
    rows = short_rows(batch)
    parameters = policy.in_forwards()
    owners = parameter_owners(policy.model, policy.trainable())
    treatments = {
        name: first_treatment(module, parameters[name]) for module, names in owners.items() for name in names.values()
    }
    with policy.arithmetic(), torch.enable_grad():
        with not_checkpointing(policy.model):
            score, alone = _alone(policy, parameters, rows[1])
        if not bool(score.isfinite()):
            check_finite(policy.scores(batch.responses), batch.responses)  # names the prompt
        while True:
            active = {name: p for name, p in parameters.items() if treatments[name] is not Treatment.FALLBACK}
            try:
                # A rule that does not fit makes torch warn of what the model's own code never does.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    wrong = _wrong(policy, active, owners, treatments, rows, score, alone)
            except (RuntimeError, IndexError, TypeError, AssertionError) as error:
                if out_of_memory(error):
                    raise
                reset_sharding(policy.model)
                if not active:
                    raise InputError(
                        f"the model scores one sequence but not two of different lengths ({one_line(error, 120)}); "
                        "the probe needs a batch padded on the right"
                    ) from error
                # A rule broke the model's own code; the model by itself ran in _alone. Slower rules for all but functions,
                # and if only those are left, none.
                wrong = [name for name in active if treatments[name] is not Treatment.FUNCTION] or list(active)
                if all(treatments[name] is Treatment.FUNCTION for name in wrong):
                    treatments.update(dict.fromkeys(wrong, Treatment.FALLBACK))
                    continue
            if not wrong:
                unproven = frozenset(name for name, gradient in alone.items() if gradient is None)
                fall_back_around(owners, treatments, unproven)
                _refuse_fallback(policy, treatments)
                return Rules(treatments, unproven, _description(policy))
            for name in wrong:
                treatments[name] = next_treatment(treatments[name])


def _refuse_fallback(policy: Policy, treatments: Mapping[str, Treatment]) -> None:
    """Autograd's own gradient of a unit is whole, and so would be the vectors that it is kept in."""
    left = [name for name, treatment in treatments.items() if treatment is Treatment.FALLBACK]
    if left and policy.sharding.sharded:
        raise InputError(
            f"parameter {left[0]} ({len(left)} in all) is used in a way that no rule follows, and the exact fallback needs "
            "whole weights; use replicated sharding, or freeze it"
        )


def short_rows(batch: RolloutBatch) -> tuple[Rollout, Rollout]:
    """Four tokens of the longest response and three of the one that differs most from it early on, the prompt's last one first.

    Response tokens alone are scored: a model may give some tokens of a prompt (images, reserved ids) no probability at all.
    """
    sequences = [(r.prompt_ids[-1], *r.response_ids) for r in batch.responses]
    longest = max(sequences, key=len)[:4]
    other = max(sequences, key=lambda ids: sum(a != b for a, b in zip(ids[:3], longest, strict=False)))[:3]
    return Rollout("a", longest[:1], longest[1:], 0.0), Rollout("b", other[:1], other[1:], 0.0)


def check_real_rows(policy: Policy, batch: RolloutBatch) -> None:
    """The shortest response scores the same beside the longest as alone: what short rows cannot show.

    Rotary tables that follow the padded length, or experts whose capacity a few tokens never fill, couple real rows only.

    Raises:
        InputError: it does not.
    """
    rows = sorted(batch.responses, key=lambda r: r.length)
    if rows[0].length == rows[-1].length:
        rows = [rows[0], next((r for r in rows if r.response_ids != rows[0].response_ids), rows[-1])]
    pair = (rows[0], rows[-1])
    with torch.no_grad(), policy.arithmetic():
        alone, together = (float(policy.forward_scores(part)[0]) for part in (pair[:1], pair))
    if math.isfinite(alone) and not abs(together - alone) <= _tolerance(policy) * max(1.0, abs(alone)):
        raise InputError(_depend(alone, together))


def _depend(alone: float, together: float) -> str:
    return (
        f"a sequence scores {alone:.9g} nats alone and {together:.9g} beside another: in this model sequences of a batch "
        "depend on each other or on padding (expert capacity, batch statistics, rotary tables that follow the batch's length, "
        "attention that is not causal), so a response has no gradient of its own; switch that off"
    )


def _alone(
    policy: Policy, parameters: Mapping[str, nn.Parameter], row: Rollout
) -> tuple[Tensor, dict[str, Tensor | None]]:
    padded = pad_right([row], policy.device)
    score = sum_over_tokens(policy.token_log_probs(padded), padded)[0]
    if not score.requires_grad:
        return score, dict.fromkeys(parameters)
    if policy.sharding.sharded:
        return score.detach(), _rows_of_gradient(policy, parameters, score)
    gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
    return score.detach(), dict(zip(parameters, gradients, strict=True))


def _rows_of_gradient(
    policy: Policy, parameters: Mapping[str, nn.Parameter], score: Tensor
) -> dict[str, Tensor | None]:
    """This rank's rows of a gradient that all ranks take alike, layer by layer: no more than a layer's is ever whole.

    FSDP2's own backward would leave just these rows, scaled and summed as a trainer has set it, and take its gradients along.
    """
    layers = [layer.names for layer in sharded_layers(policy.model, dict.fromkeys(parameters, Treatment.FUNCTION))]
    found: dict[str, Tensor | None] = {}
    for names in filter(None, (*layers, outside(layers, parameters))):
        wanted = [parameters[name] for name in names]
        for name, whole in zip(
            names, torch.autograd.grad(score, wanted, retain_graph=True, allow_unused=True), strict=True
        ):
            found[name] = None if whole is None else whole.flatten()[policy.sharding.own(name)].clone()
    return found


def _wrong(
    policy: Policy,
    parameters: Mapping[str, nn.Parameter],
    owners: Mapping[nn.Module, Mapping[str, str]],
    treatments: Mapping[str, Treatment],
    rows: tuple[Rollout, Rollout],
    score: Tensor,
    alone: Mapping[str, Tensor | None],
) -> list[str]:
    """Names of parameters whose treatment does not capture them, or not as autograd has it for the second, padded row alone."""
    strip = Strip((0, 1), padded_length([row.length for row in rows]))
    padded = pad_right(rows, policy.device, strip.length)
    capture = Capture(
        parameters,
        RULES,
        torch.zeros((), device=policy.device, requires_grad=True),
        float64=policy.dtype == torch.float64,
        keeps_casts=not policy.sharding.sharded,
    )
    with capture, treated(capture, owners, treatments), checkpointing(policy.model, capture.modes):
        with capture.over(strip):
            log_probs = policy.token_log_probs(padded)
        together = sum_over_tokens(log_probs.detach(), padded)[1]
        tolerance = _tolerance(policy)
        if not abs(float(together - score)) <= tolerance * max(1.0, abs(float(score))):
            changing = (Treatment.BROADCAST, Treatment.RECOMPUTE)
            if suspects := [name for name in parameters if treatments[name] in changing]:
                return suspects  # a rule may have changed what the model computes
            raise InputError(_depend(float(score), float(together)))
        if not log_probs.requires_grad:
            return []
        escaped = leaked([log_probs], parameters)
        if escaped:
            return escaped
        dtype = torch.promote_types(policy.dtype, torch.float32)
        shapes = {n: p.shape for n, p in parameters.items()}
        vectors: UnitVectors | ShardedVectors = UnitVectors(shapes, 1, dtype, policy.device, channels=1)
        # Of sharded ranks, which all run these rows, the first gives its gradient away.
        units_of_rank = [[1], *([] for _ in range(policy.sharding.ranks.count - 1))]
        if policy.sharding.sharded:
            layers = sharded_layers(policy.model, treatments)
            names = [layer.names for layer in layers]
            vectors = ShardedVectors(shapes, 1, dtype, policy.device, policy.sharding, names, channels=1)
        vectors.open([1])
        strip.mix(Mixing(torch.ones((1, 2), device=policy.device, dtype=dtype), slice(0, 1)))
        leaves = capture.take_leaves()
        with torch.autocast(policy.device.type, enabled=False), capture.into(vectors):
            wanted = [capture.anchor, *[leaf for _, leaf, _ in leaves]]
            vectors.begin_backward(slice(0, 1), units_of_rank)
            found = torch.autograd.grad([log_probs], wanted, [torch.ones_like(log_probs)], allow_unused=True)
            for (name, _, of), gradient in zip(leaves, found[1:], strict=True):
                if gradient is not None:
                    vectors.add(name, gradient, of)
            vectors.end_backward()
    vectors.settle([1])
    norms = {name: policy.sharding.norm(0.0 if g is None else float(g.norm())) for name, g in alone.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    distances = {name: policy.sharding.norm(_distance(vectors.of(name, [1])[0, 0], alone[name])) for name in parameters}
    return [name for name in parameters if not distances[name] <= tolerance * max(norms[name], NEGLIGIBLE * whole)]


def _distance(found: Tensor, expected: Tensor | None) -> float:
    return float(found.norm()) if expected is None else float((found - expected.flatten().to(found)).norm())


def _tolerance(policy: Policy) -> float:
    return TOLERANCE.get(policy.arithmetic_dtype(), LOW_PRECISION_TOLERANCE)
