"""Adam's elementwise preconditioner P = 1 / (√v̂ + ε), v̂ = v / (1 − β₂^t), by parameter name.

The step that Adam takes along an ascent direction Ȳ is Δθ = η P Ȳ, so every dot product of the probe is X P Y: ``sqrt``
gives P^½ for both sides, X̃ = P^½ X and Ỹ = P^½ Y. (P on both sides would give X P² Y.) With amsgrad the running
maximum of v takes v's place. An element with v = 0 has had no gradient yet, and P = 1/ε there, 10⁸ by default: such
elements are left out of P (P = 0) unless the guide's text is asked for. Source: docs/method.md, sections 1 and 6;
Kingma & Ba (2015); torch.optim.AdamW, whose ε stands outside the square root.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entropy_probe.compat.wrappers import held_part, named_parameters, reshard, unwrap
from entropy_probe.errors import InputError
from entropy_probe.ranks.collectives import WHOLE, Sharding

ACCELERATED = ("accelerate.optimizer", "AcceleratedOptimizer")
"""Module and name of accelerate's wrapper, which need not be there to be known."""

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class ZeroV(StrEnum):
    """P of an element whose v is exactly 0: 0 (``leave-out``), or 1/ε as the guide has it (``guide``)."""

    LEAVE_OUT = "leave-out"
    GUIDE = "guide"


@dataclass(frozen=True)
class AdamMoments:
    """Adam's state for one parameter, as torch.optim keeps it.

    ``step`` is t, the number of updates taken; ``max_exp_avg_sq`` is amsgrad's running maximum of v, or None.
    """

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None


@dataclass(frozen=True)
class AdamGroup:
    """Settings of one parameter group, and the parameters' names in the optimizer's order.

    ``decoupled_weight_decay`` tells AdamW (true) from Adam with L2 (false); ``fused`` torch's fused kernel, whose arithmetic is
    float32 whatever the weights are held in.
    """

    names: tuple[str, ...]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    fused: bool = False


@dataclass(frozen=True)
class AdamState:
    """The whole optimizer: its groups, and the moments of every trainable parameter by name."""

    groups: tuple[AdamGroup, ...]
    moments: Mapping[str, AdamMoments]

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The distinct learning rates of non-empty groups, in the order of the groups."""
        return tuple(dict.fromkeys(group.learning_rate for group in self.groups if group.names))

    def with_learning_rate(self, learning_rate: float) -> AdamState:
        """The same state with one learning rate for every group.

        Raises:
            InputError: not finite, or below 0.
        """
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise InputError(f"learning rate is {learning_rate}; expected a finite number, 0 or above")
        return AdamState(tuple(replace(group, learning_rate=learning_rate) for group in self.groups), self.moments)

    def group_of(self) -> dict[str, AdamGroup]:
        """The group of each parameter, by name."""
        return {name: group for group in self.groups for name in group.names}


def second_moment(moments: AdamMoments, group: AdamGroup) -> Tensor:
    """v of one parameter, as P has it: amsgrad's running maximum where there is one."""
    largest = moments.max_exp_avg_sq if group.amsgrad else None
    return moments.exp_avg_sq if largest is None else largest


def preconditioner(moments: AdamMoments, group: AdamGroup, zero_v: ZeroV = ZeroV.LEAVE_OUT) -> Tensor:
    """P of one parameter in float64, the shape of v.

    Raises:
        ValueError: t = 0, where v̂ is 0/0 and P undefined.
    """
    if moments.step < 1:
        raise ValueError(f"Adam has taken {moments.step} steps; its preconditioner is defined from the first step on")
    v = second_moment(moments, group)
    bias_correction = 1.0 - group.beta2**moments.step
    # In place on one copy: at the size of a model each temporary costs as much as the arithmetic.
    v_hat = v.to(torch.float64, copy=True).div_(bias_correction)
    p = v_hat.sqrt_().add_(group.eps).reciprocal_()
    return p if zero_v is ZeroV.GUIDE else p.masked_fill_(v == 0, 0.0)


@dataclass(frozen=True)
class Preconditioners(Mapping[str, Tensor]):
    """P of every parameter, by name, float64, computed when asked for: of a large model no copy stands in memory."""

    state: AdamState
    zero_v: ZeroV = ZeroV.LEAVE_OUT

    def __getitem__(self, name: str) -> Tensor:
        """P of one parameter."""
        return preconditioner(self.state.moments[name], self._groups[name], self.zero_v)

    def __iter__(self) -> Iterator[str]:
        """Names, in the state's order."""
        return iter(self.state.moments)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.state.moments)

    def chunk(self, name: str, part: slice) -> Tensor:
        """Elements ``part`` of P of one parameter laid flat: computed while they are in cache."""
        moments = self.state.moments[name]
        largest = moments.max_exp_avg_sq
        return preconditioner(
            replace(
                moments,
                exp_avg_sq=moments.exp_avg_sq.flatten()[part],
                max_exp_avg_sq=None if largest is None else largest.flatten()[part],
            ),
            self._groups[name],
            self.zero_v,
        )

    def zeros(self, name: str) -> Tensor:
        """Where v of one parameter is exactly 0, the shape of v."""
        return second_moment(self.state.moments[name], self._groups[name]) == 0

    def guides_zeros(self, name: str, part: slice) -> Tensor:
        """1/ε where v is 0, and 0 elsewhere: what the guide's P has there, float64; ε is above 0."""
        group = self._groups[name]
        zeros = second_moment(self.state.moments[name], group).flatten()[part] == 0
        return torch.zeros(zeros.shape, dtype=torch.float64, device=zeros.device).masked_fill_(zeros, 1.0 / group.eps)

    @cached_property
    def with_zeros(self) -> frozenset[str]:
        """Parameters some element of which has v = 0, of what this rank holds."""
        return frozenset(name for name in self.state.moments if bool(self.zeros(name).any()))

    @cached_property
    def _groups(self) -> Mapping[str, AdamGroup]:
        return self.state.group_of()


@dataclass(frozen=True)
class PreconditionerTest:
    """A test dot of two fixed random vectors over all parameters, without P and with it."""

    plain_dot: float
    preconditioned_dot: float


def validate_preconditioner(
    state: AdamState,
    shapes: Mapping[str, torch.Size],
    *,
    seed: int = 0,
    zero_v: ZeroV = ZeroV.LEAVE_OUT,
    sharding: Sharding = WHOLE,
) -> PreconditionerTest:
    """Every trainable parameter has a usable v, and a dot product through P is finite.

    Args:
        state: the optimizer's state by name.
        shapes: the whole shape of every trainable parameter, by name.
        seed: of the two test vectors; the global random state is not touched.
        zero_v: P where v is 0.
        sharding: where a rank holds rows of the moments alone, the dots are summed over ranks.

    Raises:
        InputError: names the first parameter whose state is missing, mis-shaped, NaN, infinite or negative, or at t = 0; of
            shards on all ranks, whichever's it is. Or every element of every parameter is left out of P.
    """
    preconditioners = Preconditioners(state, zero_v)
    if sharding.sharded:
        own = sharding.ranks.alike(lambda: _test_dots(preconditioners, shapes, seed, sharding))
        plain, weighted, kept = map(float, sharding.ranks.sum_numbers(np.array(own)))
    else:
        plain, weighted, kept = _test_dots(preconditioners, shapes, seed, sharding)
    if shapes and kept == 0:
        raise InputError(
            "Adam's v (exp_avg_sq) is 0 in every element of every trainable parameter, so there is no preconditioner; "
            "expected the state after a step with a gradient: train one, or set zero_v to guide, which takes 1/ε for all"
        )
    return PreconditionerTest(plain, weighted)


def _test_dots(
    preconditioners: Preconditioners, shapes: Mapping[str, torch.Size], seed: int, sharding: Sharding
) -> tuple[float, float, float]:
    """The dot without P and with it, and how many elements are in P, of what this rank holds."""
    state = preconditioners.state
    groups = state.group_of()
    plain = weighted = kept = 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        span = sharding.own(name) if sharding.sharded else slice(0, math.prod(shape))
        problem = moments_problem(state.moments.get(name) if name in groups else None, sharding.held(name, shape))
        if problem is not None:
            raise InputError(f"parameter {name}: {problem}")
        if groups[name].eps == 0.0 and bool(preconditioners.zeros(name).any()):
            raise InputError(
                f"parameter {name}: v holds zeros and ε is 0.0, so that the optimizer divides by zero there; expected an ε "
                "above 0"
            )
        dot = 0.0
        for chunk, part in _chunks(span):
            skipped, count = part.start - chunk * CHUNK, part.stop - chunk * CHUNK
            left, right = (normal_chunk(seed, number, vector, chunk, count)[skipped:] for vector in (0, 1))
            product = left * right
            p = preconditioners.chunk(name, slice(part.start - span.start, part.stop - span.start)).cpu()
            plain += float(product.sum())
            dot += float(product @ p)
            kept += float(torch.count_nonzero(p))
        if not math.isfinite(dot):
            raise InputError(
                f"parameter {name}: a dot product through 1/(√v̂ + ε) is {dot}; v is too near to zero for an ε of "
                f"{groups[name].eps}"
            )
        weighted += dot
    return plain, weighted, kept


CHUNK = 1 << 20
"""Elements of a test vector that come from one generator: part of what the vectors are, so not to be tuned."""


def normal_chunk(seed: int, parameter: int, vector: int, chunk: int, count: int) -> Tensor:
    """The first ``count`` standard normal numbers, float64, of one chunk of a test vector.

    Args:
        seed: of all test vectors.
        parameter: its number in the mapping.
        vector: 0 for the left one, 1 for the right one.
        chunk: elements from ``chunk`` · ``CHUNK`` on.
        count: how many, up to ``CHUNK``.
    """
    # A counter of four words, the lowest first, of which drawing moves the lower two: no two chunks share a number.
    generator = np.random.Generator(np.random.Philox(key=[seed, parameter], counter=[0, 0, vector, chunk]))
    return torch.from_numpy(generator.standard_normal(count))


def _chunks(span: slice) -> Iterator[tuple[int, slice]]:
    """Every chunk that a span overlaps, by its number, with the flat elements that both hold."""
    for chunk in range(span.start // CHUNK, -(-span.stop // CHUNK)):
        part = slice(max(span.start, chunk * CHUNK), min(span.stop, (chunk + 1) * CHUNK))
        if part.start < part.stop:
            yield chunk, part


def moments_problem(moments: AdamMoments | None, shape: torch.Size) -> str | None:
    """What is wrong with one parameter's Adam state, in words, or None."""
    if moments is None:
        return (
            "no Adam state (exp_avg_sq): it never received a gradient, or the optimizer did not train it; "
            "freeze it, or train a step that reaches it"
        )
    problem = misshapen(moments, shape)
    if problem is not None:
        return problem
    for field in MOMENTS:
        moment: Tensor | None = getattr(moments, field)
        if moment is None:
            continue
        for what, bad in (("NaN", moment.isnan()), ("an infinite value", moment.isinf())):
            if bool(bad.any()):
                return f"{field} holds {what}; the optimizer state is damaged"
        if field != "exp_avg" and bool((moment < 0).any()):
            return f"{field} holds a negative value, which a mean of squares cannot; the optimizer state is damaged"
    if moments.step < 1:
        return f"Adam's step is {moments.step}; the preconditioner needs at least one step"
    return None


def misshapen(moments: AdamMoments, shape: torch.Size) -> str | None:
    """Which moment is not of the parameter's shape, in words, or None."""
    for field in MOMENTS:
        moment: Tensor | None = getattr(moments, field)
        if moment is not None and moment.shape != shape:
            return (
                f"{field} has shape {tuple(moment.shape)}, the parameter {tuple(shape)}; "
                "is this the optimizer state of another model?"
            )
    return None


def state_of_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> AdamState:
    """The state of a live Adam or AdamW, mapped to the model's names by parameter identity.

    Of a model that FSDP2 has sharded, this rank's rows.

    Accelerate's wrapper will do: what is inside it counts. A trainable parameter without state is left out;
    :func:`validate_preconditioner` names it.

    Raises:
        InputError: the optimizer is not Adam or AdamW, is a subclass with a step of its own, or holds a trainable parameter
            that the model does not.
    """
    optimizer = _plain_adam(optimizer)
    model = unwrap(model)
    reshard(model)
    names = {id(p): name for name, p in named_parameters(model)}
    groups: list[AdamGroup] = []
    moments: dict[str, AdamMoments] = {}
    for group in optimizer.param_groups:
        members = []
        for p in group["params"]:
            if not p.requires_grad:
                continue
            if id(p) not in names:
                raise InputError(
                    f"the optimizer trains a parameter of shape {tuple(p.shape)} that the model does not have"
                )
            members.append(names[id(p)])
            entry = optimizer.state.get(p, {})
            if "exp_avg_sq" in entry:
                held = {key: held_part(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
                moments[names[id(p)]] = moments_from_entry(held)
        coupled = {"decoupled_weight_decay": isinstance(optimizer, torch.optim.AdamW)}
        groups.append(group_from_settings(coupled | dict(group), members))
    return AdamState(tuple(groups), moments)


def _plain_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Adam:
    """The torch.optim.Adam or AdamW in accelerate's wrappers.

    Raises:
        InputError: it is another optimizer, or steps otherwise.
    """
    while any((cls.__module__, cls.__name__) == ACCELERATED for cls in type(optimizer).__mro__):
        inner = vars(optimizer).get("optimizer")
        if not isinstance(inner, torch.optim.Optimizer):
            raise InputError(
                f"the optimizer is accelerate's {type(optimizer).__name__} without an optimizer inside; give the "
                "torch.optim.Adam or AdamW that it steps"
            )
        optimizer = inner
    kind = type(optimizer)
    # AdamW has been a subclass of Adam only since torch 2.7.
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise InputError(f"the optimizer is {kind.__name__}; the probe needs torch.optim.Adam or AdamW")
    # torch wraps the step of a class for its profiler, schedulers that of an object.
    own = inspect.unwrap(kind.step)
    if own not in {inspect.unwrap(torch.optim.Adam.step), inspect.unwrap(torch.optim.AdamW.step)}:
        raise InputError(
            f"the optimizer is {kind.__module__}.{kind.__qualname__}, a subclass of Adam with a step of its own "
            f"({own.__module__}.{own.__qualname__}), which the probe does not know; it needs torch.optim.Adam or AdamW"
        )
    return optimizer


def moments_from_entry(entry: Mapping[str, Any]) -> AdamMoments:
    """One parameter's entry of ``optimizer.state``; its step may be an int or a tensor."""
    return AdamMoments(int(entry["step"]), entry["exp_avg"], entry["exp_avg_sq"], entry.get("max_exp_avg_sq"))


def group_from_settings(group: Mapping[str, Any], names: Sequence[str]) -> AdamGroup:
    """One of ``optimizer.param_groups``, with its parameters' names.

    Raises:
        InputError: a setting that Adam has is missing or out of range.
    """
    missing = [key for key in ("lr", "betas", "eps") if key not in group]
    if missing:
        raise InputError(f"a parameter group has no {', '.join(missing)}; expected the groups of Adam or AdamW")
    try:
        learning_rate, eps = float(group["lr"]), float(group["eps"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        weight_decay = float(group.get("weight_decay", 0.0))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a parameter group's lr, eps, betas or weight_decay are not what Adam has ({error})"
        ) from error
    for what, value, limit in (
        ("learning rate", learning_rate, math.inf),
        ("beta1", beta1, 1.0),
        ("beta2", beta2, 1.0),
        ("eps", eps, math.inf),
        ("weight_decay", weight_decay, math.inf),
    ):
        if not 0.0 <= value < limit:
            upper = "finite" if limit == math.inf else "below 1"
            raise InputError(f"a parameter group's {what} is {value}; expected 0 or above, and {upper}")
    return AdamGroup(
        names=tuple(names),
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=bool(group.get("amsgrad", False)),
        maximize=bool(group.get("maximize", False)),
        # Written by torch from 2.7 on; the Trainer's default has always been AdamW.
        decoupled_weight_decay=bool(group.get("decoupled_weight_decay", True)),
        fused=bool(group.get("fused", False)),
    )
