"""The slow, obvious backend: one unit at a time, two autograd.grad calls a microbatch.

For each unit, L_X and L_Y are Σ_t (l_t log π(y_t) + e_t H_t) over its responses' tokens, coefficients detached; their gradients
times P^½ are XS_u and YS_u, and a further target's Z_u is made as they are. Every faster backend is compared with this one in
float64.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from entropy_probe.common.arrays import FloatArray
from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import Rollout, RolloutBatch
from entropy_probe.data.units import Units
from entropy_probe.errors import InputError
from entropy_probe.gradients.capture.checkpointing import checkpointing
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.interface import DOTS_ALONE, Storage, UnitGradients, Wanted
from entropy_probe.gradients.unreached import unexplained, watched
from entropy_probe.losses.surrogate import probe_loss
from entropy_probe.model.measured import Measured, TokenValues
from entropy_probe.model.padding import pad_right
from entropy_probe.model.policy import Policy, check_finite
from entropy_probe.optimizers.base import DotGroup
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.statistics.unit_dots import UnitDots
from entropy_probe.targets.base import Sample, Target, TokenPair, at_tokens

CHUNK = 1 << 20
"""Parameters a product is taken over at a time, in float64: 8 MiB a unit."""


def unit_gradients(
    policy: Policy,
    batch: RolloutBatch,
    units: Units,
    sides: Sides,
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
        sides: what X, Y and the vectors of further targets are made of.
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
    spans = [range(batch.first_row[unit.start], batch.first_row[unit.stop]) for unit in units.ranges]
    measured = policy.measure(responses, progress)
    scores = measured.scores
    check_finite(scores, responses)
    x = TokenPair(sides.target) if isinstance(sides.target, Tensor) else _coefficients(sides.target, measured, batch)
    every = (x, sides.of_update, *map(TokenPair, sides.of_targets(batch)))
    pairs = [pair.at_tokens(batch.lengths) for pair in every]
    prompts = len(batch.groups)
    sizes = units.sizes

    ascent_sum: dict[str, Tensor] = {}
    slope_sum: dict[str, Tensor] = {}
    reached: set[str] = set()
    zero_v = _ZeroV(geometry)

    def vectors(span: range, *, first_pass: bool) -> list[dict[DotGroup, Tensor]]:
        of_unit = [pair.of_rows(span, batch) for pair in pairs]
        grads = _gradients(policy, parameters, responses[span.start : span.stop], of_unit, dtype)
        if first_pass:
            x_grads, y_grads = grads[:2]
            reached.update(x_grads, y_grads)
            zero_v.add(x_grads, y_grads)
            for sums, of_side in ((slope_sum, x_grads), (ascent_sum, y_grads)):
                for name, grad in of_side.items():
                    # Sums over units are kept in float64: they are subtracted from and compared with dots of float64.
                    total = sums.setdefault(name, torch.zeros_like(grad, dtype=torch.float64))
                    total += grad
        return [_flat(of_side, roots, segments, parameters) for of_side in grads]

    def track(description: str) -> Iterable[range]:
        return progress.track(spans, description, len(spans))

    with watched(policy) as ran:
        if wanted.storage is Storage.STORED:
            dots, *also = _stored(
                lambda: (vectors(s, first_pass=True) for s in track("unit gradients")), segments, sizes
            )
        elif wanted.storage is Storage.STREAMED:
            dots, *also = _streamed(
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
        also={target.name: found for target, found in zip(sides.also, also, strict=True)},
        ascent={name: total / prompts for name, total in ascent_sum.items()},
        untouched=untouched,
        cut=unexplained(policy.model, untouched, ran),
        scores=scores,
        token_entropies=measured.entropies,
        token_log_probs=measured.log_probs,
        slope={name: total / prompts for name, total in slope_sum.items()},
        zero_v=zero_v.dots(),
    )


def loss_gradient(
    policy: Policy,
    responses: Sequence[Rollout],
    coefficients: Tensor | TokenPair,
    *,
    progress: Progress | None = None,
    description: str = "linear prediction",
) -> dict[str, Tensor]:
    """∇ Σ_i a_i S_i over all responses, or ∇ Σ_t (ω_t log π(y_t) + β_t H_t) over all their tokens.

    By parameter name, float64; parameters not reached are left out.

    Args:
        policy: the model at θ.
        responses: flat.
        coefficients: a, [N]; or ω and β, each one value a response [N] or one a response token [tokens].
        progress: told of every forward.
        description: of the work.
    """
    progress = progress if progress is not None else Silent()
    parameters = policy.trainable()
    totals: dict[str, Tensor] = {}
    parts = policy.forwards(responses)
    with policy.arithmetic(), checkpointing(policy.model, policy.modes), torch.enable_grad():
        for rows in progress.track(parts, description, len(parts)):
            together = [responses[row] for row in rows]
            if isinstance(coefficients, Tensor):
                loss = probe_loss(policy.forward_scores(together), coefficients[rows])
            else:
                batch = pad_right(together, policy.device)
                values = policy.token_values(batch, entropies=coefficients.entropies is not None)
                loss = _token_loss(values, _at_tokens_of(coefficients, responses, rows))
            _add(
                totals,
                torch.autograd.grad(loss, list(parameters.values()), allow_unused=True),
                parameters,
                torch.float64,
            )
    return totals


def _gradients(
    policy: Policy,
    parameters: Mapping[str, nn.Parameter],
    responses: Sequence[Rollout],
    pairs: Sequence[TokenPair],
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Σ_t (l_t ∇log π(y_t) + e_t ∇H_t) over the responses' tokens, of each of ``pairs``, by parameter name."""
    found: list[dict[str, Tensor]] = [{} for _ in pairs]
    tensors = list(parameters.values())
    starts = [0, *itertools.accumulate(r.tokens for r in responses)]
    needs_entropies = any(pair.entropies is not None for pair in pairs)
    with policy.arithmetic(), checkpointing(policy.model, policy.modes), torch.enable_grad():
        for part in policy.microbatches(len(responses)):
            values = policy.token_values(pad_right(responses[part], policy.device), entropies=needs_entropies)
            log_probs = values.log_probs
            if not log_probs.requires_grad:
                raise InputError(
                    "no trainable parameter receives a gradient from these responses; is the model frozen?"
                )
            tokens = slice(starts[part.start], starts[part.stop])
            for totals, pair in zip(found, pairs, strict=True):
                own = TokenPair(pair.log_probs[tokens], None if pair.entropies is None else pair.entropies[tokens])
                last = totals is found[-1]
                gradients = torch.autograd.grad(
                    _token_loss(values, own), tensors, retain_graph=not last, allow_unused=True
                )
                _add(totals, gradients, parameters, dtype)
    return found


def _token_loss(values: TokenValues, pair: TokenPair) -> Tensor:
    """Σ_t (l_t log π(y_t) + e_t H_t), coefficients [tokens]."""
    loss = probe_loss(values.log_probs.double(), pair.log_probs)
    if pair.entropies is None:
        return loss
    assert values.entropies is not None
    return loss + probe_loss(values.entropies.double(), pair.entropies)


def _at_tokens_of(pair: TokenPair, responses: Sequence[Rollout], rows: Sequence[int]) -> TokenPair:
    """The tokens of these responses, one response after the other."""
    lengths = [response.tokens for response in responses]

    def of_rows(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        parts = torch.split(at_tokens(values, lengths), lengths)
        return torch.cat([parts[row] for row in rows])

    log_probs = of_rows(pair.log_probs)
    assert log_probs is not None
    return TokenPair(log_probs, of_rows(pair.entropies))


def _coefficients(target: Target, measured: Measured, batch: RolloutBatch) -> TokenPair:
    sample = Sample.of(batch, measured)
    return target.coefficients(sample, target.ratio(sample))


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


PassOfVectors = Callable[[], Iterable[Sequence[dict[DotGroup, Tensor]]]]
"""Vectors of every unit in turn, P^½ in them: of X, of Y and of further targets, by dot group."""


def _stored(
    one_pass: PassOfVectors, segments: Mapping[DotGroup, Sequence[str]], sizes: Sequence[int]
) -> list[dict[DotGroup, UnitDots]]:
    """Dots with Y of X, and of every further target's vectors."""
    units = list(one_pass())
    sums = _Sums(segments)
    for of_unit in units:
        sums.add(of_unit)

    def kernel(left: int, group: DotGroup) -> FloatArray:
        found: FloatArray = _product(*([of_unit[side][group] for of_unit in units] for side in (left, 1))).cpu().numpy()
        return found

    return [
        {group: UnitDots.from_kernel(kernel(left, group), sizes, sums.dot(left, group)) for group in segments}
        for left in _lefts(units[0])
    ]


def _streamed(
    first_pass: PassOfVectors,
    second_pass: PassOfVectors,
    segments: Mapping[DotGroup, Sequence[str]],
    sizes: Sequence[int],
) -> list[dict[DotGroup, UnitDots]]:
    """The same, without the matrix."""
    sums = _Sums(segments)
    diagonal: dict[tuple[int, DotGroup], list[float]] = defaultdict(list)
    x_dot_sum: dict[tuple[int, DotGroup], list[float]] = defaultdict(list)
    y_dot_sum: dict[tuple[int, DotGroup], list[float]] = defaultdict(list)
    for of_unit in first_pass():
        sums.add(of_unit)
        for left, group in itertools.product(_lefts(of_unit), segments):
            diagonal[left, group].append(_dot(of_unit[left][group], of_unit[1][group]))
    for of_unit in second_pass():
        for left, group in diagonal:
            x_dot_sum[left, group].append(_dot(of_unit[left][group], sums.of[1, group]))
            y_dot_sum[left, group].append(_dot(of_unit[1][group], sums.of[left, group]))
    return [
        {
            group: UnitDots.streamed(
                sizes, x_dot_sum[left, group], y_dot_sum[left, group], diagonal[left, group], sums.dot(left, group)
            )
            for group in segments
        }
        for left in dict.fromkeys(left for left, _ in diagonal)
    ]


def _lefts(of_unit: Sequence[object]) -> list[int]:
    """All vectors of a unit but Y."""
    return [0, *range(2, len(of_unit))]


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
    """ΣXS, ΣYS and those of further targets in float64, apart from the unit vectors: the self-test's second road."""

    def __init__(self, segments: Mapping[DotGroup, Sequence[str]]) -> None:
        self.of: dict[tuple[int, DotGroup], Tensor] = {}
        self._segments = segments

    def add(self, of_unit: Sequence[Mapping[DotGroup, Tensor]]) -> None:
        for side, group in itertools.product(range(len(of_unit)), self._segments):
            if (side, group) in self.of:
                self.of[side, group] += of_unit[side][group]
            else:
                self.of[side, group] = of_unit[side][group].to(torch.float64, copy=True)

    def dot(self, left: int, group: DotGroup) -> float:
        return _dot(self.of[left, group], self.of[1, group])


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
