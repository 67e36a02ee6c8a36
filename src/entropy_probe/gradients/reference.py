"""The slow, obvious backend: one unit at a time, two autograd.grad calls a microbatch.

For each unit, L_X = Σ c_i S_i and L_Y = Σ a_i S_i over its responses, coefficients detached; their gradients times P^½ are XS_u
and YS_u. Every faster backend is compared with this one in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.data.units import Units
from entropy_probe.errors import InputError
from entropy_probe.gradients.capture.checkpointing import checkpointing
from entropy_probe.gradients.interface import DOTS_ALONE, Storage, UnitGradients, Wanted
from entropy_probe.gradients.unreached import unexplained, watched
from entropy_probe.losses.surrogate import probe_loss
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Measured, Policy, check_finite
from entropy_probe.optimizers.base import DotGroup
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.entropy import (
    EntropyCoefficients,
    EntropyTarget,
    entropy_coefficients,
    entropy_ratio,
    response_entropies,
)

CHUNK = 1 << 20
"""Parameters a product is taken over at a time, in float64: 8 MiB a unit."""


def unit_gradients(
    policy: Policy,
    batch: RolloutBatch,
    units: Units,
    entropy: EntropyTarget | Tensor,
    advantage_coefficients: Tensor,
    geometry: Geometry,
    *,
    wanted: Wanted = DOTS_ALONE,
    progress: Progress | None = None,
) -> UnitGradients:
    """XS_u and YS_u for every unit, and their dots under P.

    Args:
        policy: the model at θ; trainable parameters are those that require grad.
        batch: the rollouts, flat order as in ``batch.responses``.
        units: a partition of its prompts.
        entropy: what X estimates; or its coefficients, one a response [N] or one a response token [tokens], flat.
        advantage_coefficients: a_i, [N].
        geometry: P and η; dots are kept apart by its dot groups. Vectors are of the weights' type, float32 at least.
        wanted: its ``storage`` alone: keep all vectors (and get the kernel), or stream them in two passes.
        progress: told of every unit.

    Raises:
        InputError: no trainable parameter receives a gradient.
    """
    progress = progress if progress is not None else Silent()
    parameters = policy.trainable()
    segments = _segments(parameters, geometry)
    dtype = torch.promote_types(policy.dtype, torch.float32)
    roots = {name: geometry.metric[name].sqrt().to(policy.device, dtype) for name in parameters}
    responses = batch.responses
    starts = [0, *itertools.accumulate(batch.group_sizes)]
    spans = [slice(starts[unit.start], starts[unit.stop]) for unit in units.ranges]
    measured = policy.measure(responses, progress)
    scores = measured.scores
    check_finite(scores, responses)
    x = EntropyCoefficients(entropy) if isinstance(entropy, Tensor) else _coefficients(entropy, measured, batch)
    a = _by_token(advantage_coefficients, responses)
    c = _by_token(x.log_probs, responses)
    e = None if x.entropies is None else _by_token(x.entropies, responses)
    prompts = len(batch.groups)
    sizes = units.sizes

    ascent_sum: dict[str, Tensor] = {}
    reached: set[str] = set()
    zero_v = _ZeroV(geometry)

    def vectors(span: slice, *, first_pass: bool) -> tuple[dict[DotGroup, Tensor], dict[DotGroup, Tensor]]:
        x_grads, y_grads = _two_gradients(
            policy,
            parameters,
            responses[span],
            EntropyCoefficients(torch.cat(c[span]), None if e is None else torch.cat(e[span])),
            torch.cat(a[span]),
            dtype,
        )
        if first_pass:
            reached.update(x_grads, y_grads)
            zero_v.add(x_grads, y_grads)
            for name, grad in y_grads.items():
                # Sums over units are kept in float64: they are subtracted from and compared with dots of float64.
                total = ascent_sum.setdefault(name, torch.zeros_like(grad, dtype=torch.float64))
                total += grad
        return _flat(x_grads, roots, segments, parameters), _flat(y_grads, roots, segments, parameters)

    def track(description: str) -> Iterable[slice]:
        return progress.track(spans, description, len(spans))

    with watched(policy) as ran:
        if wanted.storage is Storage.STORED:
            dots = _stored(lambda: (vectors(s, first_pass=True) for s in track("unit gradients")), segments, sizes)
        elif wanted.storage is Storage.STREAMED:
            dots = _streamed(
                lambda: (vectors(s, first_pass=True) for s in track("unit gradients, first pass")),
                lambda: (vectors(s, first_pass=False) for s in track("unit gradients, second pass")),
                segments,
                sizes,
            )
        else:
            assert_never(wanted.storage)
    if not reached:
        raise InputError("no trainable parameter receives a gradient from these responses; is the model frozen?")
    untouched = tuple(name for name in parameters if name not in reached)
    return UnitGradients(
        dots=dots,
        ascent={name: total / prompts for name, total in ascent_sum.items()},
        untouched=untouched,
        cut=unexplained(policy.model, untouched, ran),
        scores=scores,
        token_entropies=measured.entropies,
        zero_v=zero_v.dots(),
    )


def loss_gradient(
    policy: Policy,
    responses: Sequence[Rollout],
    coefficients: Tensor,
    *,
    progress: Progress | None = None,
    description: str = "linear prediction",
) -> dict[str, Tensor]:
    """∇ Σ_i coefficients_i S_i over all responses, by parameter name, float64; parameters not reached are left out."""
    progress = progress if progress is not None else Silent()
    parameters = policy.trainable()
    totals: dict[str, Tensor] = {}
    parts = policy.forwards(responses)
    with policy.arithmetic(), checkpointing(policy.model, policy.modes), torch.enable_grad():
        for rows in progress.track(parts, description, len(parts)):
            loss = probe_loss(policy.forward_scores([responses[row] for row in rows]), coefficients[rows])
            _add(
                totals,
                torch.autograd.grad(loss, list(parameters.values()), allow_unused=True),
                parameters,
                torch.float64,
            )
    return totals


def _two_gradients(
    policy: Policy,
    parameters: Mapping[str, nn.Parameter],
    responses: Sequence[Rollout],
    entropy: EntropyCoefficients,
    advantage_coefficients: Tensor,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x_grads: dict[str, Tensor] = {}
    y_grads: dict[str, Tensor] = {}
    tensors = list(parameters.values())
    starts = [0, *itertools.accumulate(len(r.response_ids) for r in responses)]
    with policy.arithmetic(), checkpointing(policy.model, policy.modes), torch.enable_grad():
        for part in policy.microbatches(len(responses)):
            values = policy.token_values(
                pad_right(responses[part], policy.device), entropies=entropy.entropies is not None
            )
            log_probs = values.log_probs
            if not log_probs.requires_grad:
                raise InputError(
                    "no trainable parameter receives a gradient from these responses; is the model frozen?"
                )
            tokens = slice(starts[part.start], starts[part.stop])
            loss_x = probe_loss(log_probs.double(), entropy.log_probs[tokens])
            if entropy.entropies is not None:
                assert values.entropies is not None
                loss_x = loss_x + probe_loss(values.entropies.double(), entropy.entropies[tokens])
            loss_y = probe_loss(log_probs.double(), advantage_coefficients[tokens])
            _add(x_grads, torch.autograd.grad(loss_x, tensors, retain_graph=True, allow_unused=True), parameters, dtype)
            _add(y_grads, torch.autograd.grad(loss_y, tensors, allow_unused=True), parameters, dtype)
    return x_grads, y_grads


def _coefficients(target: EntropyTarget, measured: Measured, batch: RolloutBatch) -> EntropyCoefficients:
    lengths = [len(response.response_ids) for response in batch.responses]
    entropies = response_entropies(target.estimator, measured.scores, measured.entropies, lengths)
    ratio = entropy_ratio(entropies, lengths, batch.group_sizes)
    return entropy_coefficients(target, measured.scores, measured.entropies, lengths, batch.group_sizes, ratio)


def _by_token(coefficients: Tensor, responses: Sequence[Rollout]) -> tuple[Tensor, ...]:
    """One tensor a response, [its tokens], from coefficients a response or a token."""
    lengths = [len(response.response_ids) for response in responses]
    if len(coefficients) == len(responses):
        coefficients = torch.repeat_interleave(coefficients, torch.tensor(lengths))
    return torch.split(coefficients, lengths)


def _add(
    totals: dict[str, Tensor],
    grads: Iterable[Tensor | None],
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> None:
    for name, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if name in totals:
            totals[name] += grad
        else:
            # A copy: autograd may hand the same tensor to two parameters.
            totals[name] = grad.to(dtype, copy=True)


def _segments(parameters: Mapping[str, nn.Parameter], geometry: Geometry) -> dict[DotGroup, list[str]]:
    segments: dict[DotGroup, list[str]] = {}
    for name in parameters:
        segments.setdefault(geometry.groups[name], []).append(name)
    return segments


def _flat(
    grads: Mapping[str, Tensor],
    roots: Mapping[str, Tensor],
    segments: Mapping[DotGroup, Sequence[str]],
    parameters: Mapping[str, nn.Parameter],
) -> dict[DotGroup, Tensor]:
    """P^½ g laid end to end, one vector a dot group; zeros where autograd gave None."""
    return {
        group: torch.cat(
            [
                (grads[name] * roots[name]).flatten() if name in grads else torch.zeros_like(roots[name]).flatten()
                for name in names
            ]
        )
        for group, names in segments.items()
    }


PassOfVectors = Callable[[], Iterable[tuple[dict[DotGroup, Tensor], dict[DotGroup, Tensor]]]]


def _stored(
    one_pass: PassOfVectors, segments: Mapping[DotGroup, Sequence[str]], sizes: Sequence[int]
) -> dict[DotGroup, UnitDots]:
    xs: dict[DotGroup, list[Tensor]] = {group: [] for group in segments}
    ys: dict[DotGroup, list[Tensor]] = {group: [] for group in segments}
    sums = _Sums(segments)
    for x, y in one_pass():
        sums.add(x, y)
        for group in segments:
            xs[group].append(x[group])
            ys[group].append(y[group])
    return {
        group: UnitDots.from_kernel(_product(xs[group], ys[group]).cpu().numpy(), sizes, sums.dot(group))
        for group in segments
    }


def _streamed(
    first_pass: PassOfVectors,
    second_pass: PassOfVectors,
    segments: Mapping[DotGroup, Sequence[str]],
    sizes: Sequence[int],
) -> dict[DotGroup, UnitDots]:
    sums = _Sums(segments)
    diagonal: dict[DotGroup, list[float]] = {group: [] for group in segments}
    x_dot_sum: dict[DotGroup, list[float]] = {group: [] for group in segments}
    y_dot_sum: dict[DotGroup, list[float]] = {group: [] for group in segments}
    for x, y in first_pass():
        sums.add(x, y)
        for group in segments:
            diagonal[group].append(_dot(x[group], y[group]))
    for x, y in second_pass():
        for group in segments:
            x_dot_sum[group].append(_dot(x[group], sums.y[group]))
            y_dot_sum[group].append(_dot(y[group], sums.x[group]))
    return {
        group: UnitDots.streamed(sizes, x_dot_sum[group], y_dot_sum[group], diagonal[group], sums.dot(group))
        for group in segments
    }


class _ZeroV:
    """Σ_{u≠w} XS_u · (1/ε) YS_w over elements with v = 0, by dot group."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._weights = {
            name: geometry.metric.guides_zeros(name, slice(0, geometry.metric[name].numel()))
            for name in geometry.metric.with_zeros
        }
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
        for name, weights in self._weights.items():
            own = [g[name].flatten().double() if name in g else torch.zeros_like(weights) for g in (x, y)]
            found = (*own, own[0] * own[1])
            before = self._sums.get(name)
            self._sums[name] = found if before is None else tuple(a + b for a, b in zip(before, found, strict=True))  # type: ignore[assignment]

    def dots(self) -> dict[DotGroup, float]:
        found = dict.fromkeys(self._geometry.dot_groups, 0.0)
        for name, (x, y, diagonal) in self._sums.items():
            found[self._geometry.groups[name]] += float((self._weights[name] * (x * y - diagonal)).sum())
        return found


class _Sums:
    """ΣXS and ΣYS in float64, apart from the unit vectors: the self-test's second road."""

    def __init__(self, segments: Mapping[DotGroup, Sequence[str]]) -> None:
        self.x: dict[DotGroup, Tensor] = {}
        self.y: dict[DotGroup, Tensor] = {}
        self._segments = segments

    def add(self, x: Mapping[DotGroup, Tensor], y: Mapping[DotGroup, Tensor]) -> None:
        for group in self._segments:
            for sums, part in ((self.x, x[group]), (self.y, y[group])):
                if group in sums:
                    sums[group] += part
                else:
                    sums[group] = part.to(torch.float64, copy=True)

    def dot(self, group: DotGroup) -> float:
        return _dot(self.x[group], self.y[group])


def _dot(left: Tensor, right: Tensor) -> float:
    total = 0.0
    for start in range(0, len(left), CHUNK):
        part = slice(start, start + CHUNK)
        total += float(torch.dot(left[part].double(), right[part].double()))
    return total


def _product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """K_uw = XS_u · YS_w in float64, over chunks of parameters."""
    kernel = torch.zeros((len(xs), len(ys)), dtype=torch.float64, device=xs[0].device)
    for start in range(0, len(xs[0]), CHUNK):
        part = slice(start, start + CHUNK)
        kernel += torch.stack([x[part].double() for x in xs]) @ torch.stack([y[part].double() for y in ys]).T
    return kernel
