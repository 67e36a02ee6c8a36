"""The engine: every unit's X_u and Y_u from one forward and one activation backward, exactly.

Sequences do not interact, so one backward of Σ_i S_i with unit coefficients leaves at every use of a parameter each
sequence's own output gradient; its gradient g_i is one GEMM, and enters X_u += c_i g_i and Y_u += a_i g_i (design section
6). Coefficients a token need a backward for X and one for Y. Parameters without a rule get both gradients from autograd,
unit by unit, in two backwards. Compared in float64 with :mod:`~entropy_probe.gradients.reference`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from entropy_probe.errors import InputError
from entropy_probe.gradients.batching import Microbatch, microbatches, strips
from entropy_probe.gradients.capture import Capture, leaked
from entropy_probe.gradients.checkpointing import checkpointing
from entropy_probe.gradients.interface import Coverage, Storage, UnitGradients
from entropy_probe.gradients.layers import RULES
from entropy_probe.gradients.modules import Treatment, fall_back_around, parameter_owners, treated
from entropy_probe.gradients.products import StreamedDots, stored_dots
from entropy_probe.gradients.sequences import Mixing, Strip, padded_length
from entropy_probe.gradients.treatments import Rules, prove_rules
from entropy_probe.gradients.unit_vectors import UnitVectors
from entropy_probe.policy import PaddedResponses, Policy, check_finite, pad_right, sum_over_tokens
from entropy_probe.progress import Progress, Silent
from entropy_probe.rollouts import RolloutBatch
from entropy_probe.scores import entropy_coefficients as score_coefficients
from entropy_probe.units import Units


def unit_gradients(
    policy: Policy,
    batch: RolloutBatch,
    units: Units,
    entropy_coefficients: Tensor | None,
    advantage_coefficients: Tensor,
    preconditioners: Mapping[str, Tensor],
    learning_rates: Mapping[str, float],
    *,
    storage: Storage = Storage.STORED,
    vector_dtype: torch.dtype | None = None,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> UnitGradients:
    """XS_u and YS_u for every unit, and their dots under P.

    Args:
        policy: the model at θ; trainable parameters are those that require grad.
        batch: the rollouts, flat order as in ``batch.responses``.
        units: a partition of its prompts.
        entropy_coefficients: c, one a response [N] or one a response token [tokens], flat; None takes the score estimator's
            from the scores of this very forward.
        advantage_coefficients: a_i, [N].
        preconditioners: P by parameter name.
        learning_rates: η by parameter name; dots are kept apart by it.
        storage: keep all vectors (and get the kernel), or stream them in two passes.
        vector_dtype: of stored vectors; None takes the weights', float32 at least.
        rules: of an earlier call on this very model; None proves them first.
        progress: told of every microbatch.

    Raises:
        InputError: no trainable parameter receives a gradient, a score is not finite, sequences depend on each other, or the
            rules are another model's.
    """
    progress = progress if progress is not None else Silent()
    parameters = policy.trainable()
    if rules is None:
        rules = prove_rules(policy, batch)
    else:
        rules.check(policy)
    shapes = {name: p.shape for name, p in parameters.items()}
    dtype = vector_dtype if vector_dtype is not None else torch.promote_types(policy.dtype, torch.float32)
    run = _Run(
        policy, batch, units, entropy_coefficients, advantage_coefficients, dict(rules.treatments), rules.unproven
    )
    parts = run.parts()
    if storage is Storage.STORED:
        vectors = UnitVectors(shapes, len(units.ranges), dtype, policy.device)
        for part in progress.track(parts, "unit gradients", len(parts)):
            run.backward(part, vectors)
        vectors.settle(range(len(units.ranges)))
        dots = stored_dots(vectors, units.sizes, preconditioners, learning_rates)
    else:
        vectors = UnitVectors(shapes, run.most_open_units(parts), dtype, policy.device)
        streamed = StreamedDots(preconditioners, learning_rates)
        for name, use in (("first", streamed.add), ("second", streamed.contract)):
            for part in progress.track(parts, f"unit gradients, {name} pass", len(parts)):
                run.backward(part, vectors)
                if closed := run.closed_by(part, vectors):
                    use(vectors, closed)
                    vectors.close(closed)
        dots = streamed.finish(vectors, units.sizes)
    if not vectors.reached:
        raise InputError("no trainable parameter receives a gradient from these responses; is the model frozen?")
    prompts = len(batch.groups)
    return UnitGradients(
        dots=dots.dots,
        ascent={name: dots.y_sums[name].div_(prompts).view(shapes[name]) for name in shapes if name in dots.y_sums},
        untouched=tuple(name for name in parameters if name not in vectors.reached),
        scores=run.scores,
        coverage=run.coverage(),
        rules=replace(rules, treatments=run.treatments),
    )


@dataclass
class _Run:
    """The rows, units and coefficients of one call, and what its forwards have found so far."""

    policy: Policy
    batch: RolloutBatch
    units: Units
    entropy: Tensor | None
    advantage: Tensor
    treatments: dict[str, Treatment]
    unproven: frozenset[str]
    scores: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.responses = self.batch.responses
        self.scores = torch.full((len(self.responses),), torch.nan, dtype=torch.float64)
        self.unit_of_row = [
            unit
            for unit, prompts in enumerate(self.units.ranges)
            for prompt in prompts
            for _ in range(self.batch.group_sizes[prompt])
        ]
        self.last_row = {unit: row for row, unit in enumerate(self.unit_of_row)}
        self.lengths = [response.length for response in self.responses]
        self.first_token = [0, *itertools.accumulate(len(r.response_ids) for r in self.responses)]
        self.group_of_row = [n for n, size in enumerate(self.batch.group_sizes) for _ in range(size)]
        self.parameters = self.policy.trainable()
        self.owners = parameter_owners(self.policy.model, self.parameters)
        self.per_token = self.entropy is not None and len(self.entropy) != len(self.responses)
        assert self.entropy is None or len(self.entropy) in (len(self.responses), self.first_token[-1])

    def parts(self) -> list[Microbatch]:
        """The microbatches of one pass."""
        return microbatches(
            self.batch.group_sizes, self.unit_of_row, self.policy.microbatch_size, within_units=bool(self.fallback)
        )

    @property
    def fallback(self) -> dict[str, nn.Parameter]:
        """The parameters that autograd serves unit by unit."""
        return {name: p for name, p in self.parameters.items() if self.treatments[name] is Treatment.FALLBACK}

    def most_open_units(self, parts: Sequence[Microbatch]) -> int:
        """Units whose vectors stand in memory together when streamed."""
        return max(self.unit_of_row[part.rows[-1]] - self.unit_of_row[part.rows[0]] + 1 for part in parts)

    def closed_by(self, part: Microbatch, vectors: UnitVectors) -> list[int]:
        """The units whose last row ``part`` held, ready to be read."""
        closed = [
            unit for unit in sorted({self.unit_of_row[row] for row in part.rows}) if self.last_row[unit] in part.rows
        ]
        vectors.settle(closed)
        return closed

    def coverage(self) -> Coverage:
        """How the parameters were treated in the end."""
        total = sum(p.numel() for p in self.parameters.values())
        return Coverage(
            recomputed=tuple(name for name, how in self.treatments.items() if how is Treatment.RECOMPUTE),
            fallback=tuple(self.fallback),
            fallback_share=sum(p.numel() for p in self.fallback.values()) / total,
        )

    def backward(self, part: Microbatch, vectors: UnitVectors) -> None:
        """Add every sequence's gradient of these rows to its unit."""
        if not part.whole and self.entropy is None:
            self._score_ahead(part.rows)
        units = {self.unit_of_row[row] for row in part.rows}
        if (len(units) > 1 and self.fallback) or not self._captured_backward(part, vectors):
            # A parameter that the short rows did not show to be outside of the rules: from here on unit by unit.
            for _, rows in itertools.groupby(part.rows, key=self.unit_of_row.__getitem__):
                of_unit = list(rows)
                self._captured_backward(Microbatch(range(of_unit[0], of_unit[-1] + 1), part.whole), vectors)

    def _captured_backward(self, part: Microbatch, vectors: UnitVectors) -> bool:
        """False, with nothing added, where a parameter turned out to need the fallback and the rows are of several units."""
        policy, fallback = self.policy, self.fallback
        single_unit = len({self.unit_of_row[row] for row in part.rows}) == 1
        assert single_unit or not fallback
        vectors.open(sorted({self.unit_of_row[row] for row in part.rows}))
        with policy.arithmetic(), torch.enable_grad():
            captured = {name: p for name, p in self.parameters.items() if name not in fallback}
            anchor = torch.zeros((), device=policy.device, requires_grad=True)
            capture = Capture(captured, RULES, anchor, float64=policy.dtype == torch.float64)
            forwards: list[_Forward] = []
            # The backward is inside too: what it recomputes runs by the same rules.
            with (
                capture,
                treated(capture, self.owners, self.treatments),
                checkpointing(policy.model, capture.modes),
            ):
                for rows in strips(part.rows, self.lengths, self.unit_of_row):
                    lengths = [self.lengths[row] for row in rows]
                    strip = Strip(tuple(self.unit_of_row[row] for row in rows), padded_length(lengths))
                    padded = pad_right([self.responses[row] for row in rows], policy.device, strip.length)
                    with capture.over(strip):
                        forwards.append(_Forward(rows, strip, padded, policy.token_log_probs(padded)))
                escaped = {*leaked([forward.log_probs for forward in forwards], captured)}
                escaped |= capture.used & self.unproven - fallback.keys()
                if not escaped:
                    self._record_scores(part, forwards)
                    if not any(forward.log_probs.requires_grad for forward in forwards):
                        return True
                    with torch.autocast(policy.device.type, enabled=False), capture.into(vectors):
                        self._differentiate(forwards, capture, vectors, fallback)
        if not escaped:
            return True
        # Only now, with this capture and its activations gone, may the rows be tried again.
        del forwards, capture
        self.treatments.update(dict.fromkeys(escaped, Treatment.FALLBACK))
        fall_back_around(self.owners, self.treatments, self.unproven)
        return single_unit and self._captured_backward(part, vectors)

    def _score_ahead(self, rows: range) -> None:
        """S of every response to the prompts that these rows belong to, where a microbatch does not hold them all."""
        groups = {self.group_of_row[row] for row in rows}
        missing = [row for row, n in enumerate(self.group_of_row) if n in groups and bool(self.scores[row].isnan())]
        if missing:
            self.scores[missing] = self.policy.scores([self.responses[row] for row in missing])
            check_finite(self.scores[missing], [self.responses[row] for row in missing])

    def _record_scores(self, part: Microbatch, forwards: Sequence[_Forward]) -> None:
        for forward in forwards:
            found = sum_over_tokens(forward.log_probs.detach(), forward.padded).cpu()
            for row, score in zip(forward.rows, found, strict=True):
                # The first one found stays: a second pass, or a prompt in pieces, must not mix two roundings of one score.
                if bool(self.scores[row].isnan()):
                    self.scores[row] = score
        check_finite(self.scores[part.rows.start : part.rows.stop], self.responses[part.rows.start : part.rows.stop])

    def _entropy_of(self, rows: Sequence[int]) -> Tensor:
        """c of these rows, from the scores found so far where it was not given."""
        if self.entropy is not None:
            return self.entropy[list(rows)]
        groups = sorted({self.group_of_row[row] for row in rows})
        members = [row for row, n in enumerate(self.group_of_row) if n in set(groups)]
        sizes = [self.batch.group_sizes[n] for n in groups]
        by_row = dict(zip(members, score_coefficients(self.scores[members], sizes), strict=True))
        return torch.stack([by_row[row] for row in rows])

    def _differentiate(
        self, forwards: Sequence[_Forward], capture: Capture, vectors: UnitVectors, fallback: Mapping[str, nn.Parameter]
    ) -> None:
        log_probs = [forward.log_probs for forward in forwards]
        leaves = capture.take_leaves()
        wanted = [capture.anchor, *[leaf for _, leaf, _ in leaves], *fallback.values()]
        device, dtype = self.policy.device, vectors.arithmetic

        def run(outputs: Sequence[Tensor], unit: int, channels: slice, *, again: bool) -> None:
            found = torch.autograd.grad(log_probs, wanted, outputs, retain_graph=again, allow_unused=True)
            arrived = iter(found[1:])
            for name, _, strip in leaves:
                if (gradient := next(arrived)) is not None:
                    vectors.add(name, gradient, strip)
            together = Strip((unit,), 1)
            together.mix(Mixing(torch.ones((1, 1), device=device, dtype=dtype), channels))
            for name in fallback:
                if (gradient := next(arrived)) is not None:
                    vectors.add(name, gradient[None], together)

        unit = forwards[0].strip.units[0]
        if not fallback and not self.per_token:
            for forward in forwards:
                c, a = self._entropy_of(forward.rows), self.advantage[list(forward.rows)]
                forward.strip.mix(Mixing(torch.stack([c, a]).to(device, dtype), slice(0, 2)))
            run([torch.ones_like(values) for values in log_probs], unit, slice(0, 2), again=False)
            return
        for channel, again in ((0, True), (1, False)):
            outputs = []
            for forward in forwards:
                weights = torch.ones((1, forward.strip.count), device=device, dtype=dtype)
                forward.strip.mix(Mixing(weights, slice(channel, channel + 1)))
                outputs.append(self._per_token(forward, channel).to(forward.log_probs))
            run(outputs, unit, slice(channel, channel + 1), again=again)

    def _per_token(self, forward: _Forward, channel: int) -> Tensor:
        """The coefficient of each response token: X's in channel 0, Y's in channel 1."""
        rows = forward.rows
        if channel == 0 and self.per_token:
            assert self.entropy is not None
            return torch.cat([self.entropy[self.first_token[row] : self.first_token[row + 1]] for row in rows])
        by_row = self._entropy_of(rows) if channel == 0 else self.advantage[list(rows)]
        return by_row[forward.padded.rows.cpu()]


@dataclass(frozen=True)
class _Forward:
    """One strip's forward: its flat rows, and the log-probs of its response tokens with their graph."""

    rows: tuple[int, ...]
    strip: Strip
    padded: PaddedResponses
    log_probs: Tensor
