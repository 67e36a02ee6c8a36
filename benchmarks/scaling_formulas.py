"""What a rank hands over, holds and computes, as formulas in units, ranks and parameters.

Payloads are exact: ``scaling.py`` measures them on this machine and fails where they differ. Memory and time are not measured
on any GPU: they are the same counts with the assumptions of :class:`Machine`. ``docs/scaling.md`` is made from this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from entropy_probe.gradients import Storage
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks.collectives import Kind

STEPS = 2
"""Steps that are realised: preconditioned and AdamW."""

FLOOR = 0.3
"""Forwards over the batch for the numerical floor, at most, of all steps."""
FLOOR_ROWS = 64
"""Responses that are scored for it, over all roundings, at most."""

THIRDS = 6
"""Directions of the noise: X and Y of three thirds."""

PARTS = 6
"""Numbers a unit of the step's parts."""

FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True)
class Choice:
    """What ranks hold of the model, and whether unit vectors are kept."""

    sharding: ShardingChoice
    storage: Storage

    @property
    def sharded(self) -> bool:
        """Whether by FSDP2."""
        return self.sharding is ShardingChoice.FSDP2

    @property
    def stored(self) -> bool:
        """Whether all unit vectors are kept."""
        return self.storage is Storage.STORED

    @property
    def name(self) -> str:
        """As in "fsdp2, stored"."""
        return f"{self.sharding}, {self.storage}"


CHOICES = tuple(Choice(sharding, storage) for sharding in ShardingChoice for storage in Storage)


@dataclass(frozen=True)
class Asked:
    """What the report is to hold, as far as it costs.

    Attributes:
        rao_blackwell: whether X is Rao-Blackwell's, with a backward of its own, or the score's.
        noise: whether the noise is split (stored vectors of equal units, six or more).
        targets: further targets that have vectors, unasked where those fit stored.
    """

    rao_blackwell: bool = True
    noise: bool = True
    targets: int = 0

    @property
    def backwards(self) -> int:
        """Of a pass over the batch."""
        return 2 if self.rao_blackwell else 1

    def of(self, choice: Choice) -> Asked:
        """Without the noise, and without targets, where vectors are streamed."""
        return Asked(self.rao_blackwell, self.noise and choice.stored, self.targets if choice.stored else 0)


@dataclass(frozen=True)
class Share:
    """One rank's part.

    Attributes:
        units: U_r, its own.
        openings: units of each of its microbatches, summed: U_r, more where a unit is split over several.
        rounds: microbatches of the rank that has the most.
        held: elements of its spans, about n / N.
        away: those of the others, n less ``held``.
        most: elements of the rank that holds most, to whose length the others fill their directions up.
        first: whether this is rank 0, whose gradient is the one that rules are proved on.
    """

    units: int
    openings: int
    rounds: int
    held: float
    away: float
    most: float
    first: bool = False


def payload(choice: Choice, share: Share, asked: Asked) -> dict[Kind, float]:
    """Elements that a rank hands over to collectives, by kind, numbers apart.

    Replicated, stored: shards 2 U_r n (N−1)/N; sums 2 n, and 6 n for the noise's thirds. Streamed: sums 2 n. FSDP2: every
    layer's gradients change hands once a pass that builds vectors, of which streaming has two; whole directions are gathered
    once a microbatch and backward, K n / N of a rank: of two steps (whose backward is the score's alone), of six thirds, of
    streaming's second pass two.
    """
    asked = asked.of(choice)
    n = share.held + share.away
    if not choice.sharded:
        sums = n * (2 + THIRDS * asked.noise) if choice.stored else 2 * n
        shards = (2 + asked.targets) * share.units * share.away if choice.stored else 0
        return {Kind.SHARDS: shards, Kind.SUMS: sums, Kind.DIRECTIONS: 0}
    passes = 1 if choice.stored else 2
    proof = share.away if share.first else 0
    directions = STEPS + (THIRDS * asked.noise + (0 if choice.stored else 2)) * asked.backwards
    return {
        Kind.SHARDS: (2 + asked.targets) * share.openings * share.away * passes + proof,
        Kind.SUMS: 0,
        Kind.DIRECTIONS: directions * share.most * share.rounds,
    }


def width(kind: Kind, choice: Choice, asked: Asked, vectors: int) -> float:
    """Bytes an element, on average, with ``vectors`` bytes an element of a unit vector."""
    if kind is Kind.SHARDS:
        return vectors
    if kind is Kind.SUMS and choice.stored and asked.of(choice).noise:
        return (2 * FLOAT64 + THIRDS * max(FLOAT32, vectors)) / (2 + THIRDS)
    return FLOAT64 if kind in (Kind.SUMS, Kind.NUMBERS) else max(FLOAT32, vectors)


def numbers(choice: Choice, asked: Asked, units: int, responses: int, tokens: int) -> int:
    """Leading terms of the numbers that ranks sum: the U × U matrices, and values of every response and token.

    Scores, log-probs (and entropies) come from the gradients' forward and from one a step; what is left is at most
    :func:`few_numbers`.
    """
    asked = asked.of(choice)
    of_units = (2 + asked.targets) * units**2 + PARTS * units if choice.stored else (3 + PARTS) * units
    measures = 1 + STEPS
    of_responses = measures + STEPS + THIRDS * asked.noise
    return of_units + responses * of_responses + tokens * measures * asked.backwards


def few_numbers(ranks: int, tensors: int, rounds: int) -> int:
    """A bound of the rest: 18 digests of inputs, 32 numbers of every rank each, flags and norms of parameter tensors.

    Sharded ranks have flags of every tensor in each of their ``rounds`` of at most five passes; ``rounds`` is 0 for replicated.
    """
    return 18 * 32 * ranks + (10 + 5 * rounds) * tensors + 64


@dataclass(frozen=True)
class Model:
    """A decoder as Llama and Qwen have it.

    Attributes:
        name: for tables.
        layers, hidden, intermediate, heads, key_value_heads, vocabulary, tied: its shape.
        rank: of LoRA on every projection; 0 for full training.
        biases: whether q, k and v have them.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    rank: int = 0
    biases: bool = False

    @property
    def _projections(self) -> list[tuple[int, int]]:
        narrow = self.hidden // self.heads * self.key_value_heads
        d, f = self.hidden, self.intermediate
        return [(d, d), (narrow, d), (narrow, d), (d, d), (f, d), (f, d), (d, f)]

    @property
    def layer(self) -> int:
        """Elements of one layer's weights."""
        narrow = self.hidden // self.heads * self.key_value_heads
        biases = self.hidden + 2 * narrow if self.biases else 0
        return sum(p * q for p, q in self._projections) + 2 * self.hidden + biases

    @property
    def root(self) -> int:
        """Elements outside of layers."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.layers * self.layer + self.root

    @property
    def trained_layer(self) -> int:
        """Trainable elements of one layer."""
        return self.layer if not self.rank else sum(self.rank * (p + q) for p, q in self._projections)

    @property
    def trained_root(self) -> int:
        """Trainable elements outside of layers."""
        return 0 if self.rank else self.root

    @property
    def trained(self) -> int:
        """n."""
        return self.layers * self.trained_layer + self.trained_root


MODELS = (
    Model("1.5B", 28, 1536, 8960, 12, 2, 151936, tied=True, biases=True),
    Model("7B", 28, 3584, 18944, 28, 4, 152064, tied=False, biases=True),
    Model("70B", 80, 8192, 28672, 64, 8, 128256, tied=False),
    Model("7B, LoRA 16", 28, 3584, 18944, 28, 4, 152064, tied=False, biases=True, rank=16),
    Model("70B, LoRA 16", 80, 8192, 28672, 64, 8, 128256, tied=False, rank=16),
)
"""The shapes of Qwen2.5-1.5B, Qwen2.5-7B and Llama-3-70B."""


@dataclass(frozen=True)
class Batch:
    """Prompts with G responses of T positions, all scored, in U units; a microbatch holds one prompt."""

    units: int = 512
    prompts: int = 512
    responses: int = 8
    positions: int = 1024

    @property
    def rows(self) -> int:
        """Responses."""
        return self.prompts * self.responses

    @property
    def tokens(self) -> int:
        """Positions in all."""
        return self.rows * self.positions

    def own(self, ranks: int) -> int:
        """Prompts of the rank that has the most: units are dealt whole, and fewer units than ranks leave ranks idle."""
        return math.ceil(self.units / ranks) * math.ceil(self.prompts / self.units)

    def share(self, ranks: int, model: Model) -> Share:
        """Of the rank that has the most."""
        held = model.trained / ranks
        rounds = self.own(ranks)
        return Share(math.ceil(self.units / ranks), rounds, rounds, held, model.trained - held, held, first=True)


@dataclass(frozen=True)
class Machine:
    """Assumptions, but one not measured: GPUs of a node, bytes a second of links, and what a GPU computes.

    Attributes:
        room: bytes of one that are left to this, of 80 GB, beside activations, logits and the allocator.
        gpus: of a node.
        inside: bytes a second that one GPU sends to others of its node, in each direction.
        between: the same to other nodes.
        fast: FLOP/s in bfloat16 at peak, and ``fast_share`` of it that is reached.
        slow: FLOP/s in float32 without TF32, and ``slow_share``.
        preconditioned: elements of P a second that one host thread makes from Adam's moments (0.15e9 measured where the
            other figures were: ``scaling.py``).
        host_link: bytes a second from the host to one GPU.
    """

    room: float = 70e9
    gpus: int = 8
    inside: float = 450e9
    between: float = 50e9
    fast: float = 989e12
    fast_share: float = 0.4
    slow: float = 67e12
    slow_share: float = 0.6
    preconditioned: float = 0.15e9
    host_link: float = 25e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's GPU, activations and logits left out.

    Attributes:
        gradients: at the peak of the gradients' stage.
        realised: at that of the stages after it: two steps in float64, and what they are contracted with.
        vectors: of ``gradients``, unit vectors.
    """

    gradients: float
    realised: float
    vectors: float

    @property
    def peak(self) -> float:
        """The larger."""
        return max(self.gradients, self.realised)


def memory(choice: Choice, model: Model, batch: Batch, ranks: int, asked: Asked, vectors: int) -> Memory:
    """Weights in float32, vectors of ``vectors`` bytes an element; Adam's moments stay on the host.

    In bytes a trainable element, of n or of n / N: X̄ and Ȳ 16, thirds 24, two steps 16, steps as directions 16 and again 8.
    """
    asked = asked.of(choice)
    parts = ranks if choice.sharded else 1
    n, weights = model.trained / parts, FLOAT32 * model.parameters / parts
    share = batch.share(ranks, model)
    thirds = THIRDS * FLOAT32 * n if asked.noise else 0.0
    if choice.stored:
        # Before they change hands: 2 n U_r of a rank; sharded from the start: 2 U n / N.
        kept = (
            (2.0 + asked.targets) * vectors * (share.units * model.trained if not choice.sharded else batch.units * n)
        )
        gradients = weights + kept + 2 * FLOAT64 * n + thirds
    else:
        opened = 1 if not choice.sharded else min(ranks, batch.units)
        kept = 2.0 * vectors * opened * n
        gradients = weights + 2 * FLOAT64 * n + max(kept, 2 * FLOAT32 * n)
    steps = STEPS * FLOAT64 * n
    directions = STEPS * (FLOAT64 + FLOAT32) * n
    realised = weights + 2 * FLOAT64 * n + thirds + steps + max(directions, thirds)
    if choice.sharded:
        # What FSDP2 gathers: the layers at hand and ahead, and the rest; whole gradients of the rank's unit, or directions.
        gathered = FLOAT32 * (model.root + 2 * model.layer)
        whole = model.trained_root + model.trained_layer
        gradients += gathered + 2.0 * vectors * whole
        # Twice while they are put together from every rank's spans.
        twice = max(2 * model.trained_root, model.trained_root + 2 * model.trained_layer)
        realised += gathered + FLOAT32 * (THIRDS if asked.noise else STEPS) * twice
    return Memory(gradients, realised, kept)


@dataclass(frozen=True)
class Cost:
    """Seconds of one rank's stages, as if nothing overlapped.

    Attributes:
        gradients: arithmetic of the passes that give δH₁ and its error bars.
        rest: arithmetic of the noise and of the realised steps.
        payload: what this tool hands over.
        gathers: FSDP2's own weight gathers.
        host: P from Adam's moments, on the host and over to the GPU.
    """

    gradients: float
    rest: float
    payload: float
    gathers: float
    host: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.rest + self.payload + self.gathers + self.host


def handed_over(
    choice: Choice, model: Model, batch: Batch, ranks: int, asked: Asked, vectors: int
) -> dict[Kind, float]:
    """Bytes by kind, of the rank that hands over most."""
    kinds = payload(choice, batch.share(ranks, model), asked)
    found = {kind: count * width(kind, choice, asked, vectors) for kind, count in kinds.items()}
    return found | {Kind.NUMBERS: float(FLOAT64 * numbers(choice, asked, batch.units, batch.rows, batch.tokens))}


def passes(choice: Choice) -> int:
    """Over the batch, for the gradients: streaming has one for sums, one for dots, one for the step's parts."""
    return 1 if choice.stored else 3


def seconds(
    choice: Choice, model: Model, batch: Batch, ranks: int, asked: Asked, vectors: int, machine: Machine
) -> Cost:
    """FLOPs a token: forward 2 N, a backward's activations 2 N, its weight gradients 2 n, these always in float32.

    The gradients and the noise run in bfloat16 by autocast, both steps' forwards and dots in float32.
    """
    asked = asked.of(choice)
    tokens = batch.own(ranks) * batch.responses * batch.positions
    fast, slow = machine.fast * machine.fast_share, machine.slow * machine.slow_share
    forward, weight_gradients = 2.0 * model.parameters, 2.0 * model.trained * asked.backwards
    through = forward * (1 + asked.backwards)
    one_pass = through / fast + weight_gradients / slow
    # K, and that of the parts of the step.
    kernels = 2 * 2.0 * batch.units**2 * model.trained / ranks / slow if choice.stored else 0.0
    # By score the steps' linear terms take a forward and a backward; by Rao-Blackwell nothing.
    linear = 2 * forward + 2.0 * model.trained
    realised = (linear + (STEPS + FLOOR) * forward) / slow
    handed = handed_over(choice, model, batch, ranks, asked, vectors)
    over = (
        exchange_seconds(handed[Kind.SHARDS], ranks, machine)
        + reduce_seconds(handed[Kind.SUMS] + handed[Kind.NUMBERS], ranks, machine)
        + gather_seconds(handed[Kind.DIRECTIONS] * ranks, ranks, machine)
    )
    gathered = gather_seconds(gathers(choice, batch, ranks, asked) * FLOAT32 * model.parameters, ranks, machine)
    elements = preconditioned(choice, model, batch, ranks, asked)
    return Cost(
        gradients=tokens * one_pass * passes(choice) + kernels,
        rest=tokens * (realised + (one_pass if asked.noise else 0.0)),
        payload=over,
        gathers=gathered,
        host=elements / machine.preconditioned + FLOAT64 * elements / machine.host_link,
    )


def gathers(choice: Choice, batch: Batch, ranks: int, asked: Asked) -> int:
    """How often FSDP2 gathers every weight: each forward and each backward of each round."""
    if not choice.sharded or ranks == 1:
        return 0
    asked = asked.of(choice)
    contracted = (passes(choice) + asked.noise) * (1 + asked.backwards)
    linear = 2
    return batch.own(ranks) * (contracted + linear + STEPS) + FLOOR_ROWS


def preconditioned(choice: Choice, model: Model, batch: Batch, ranks: int, asked: Asked) -> float:
    """Elements of P that a rank makes on the host.

    For dots over its span, the thirds, the preconditioned step; streamed, in place of dots, once a microbatch for the diagonal
    of what it holds, for the directions, and for ΣX · P ΣY.
    """
    parts = ranks if choice.sharded else 1
    n, span = model.trained / parts, model.trained / ranks
    once = n + (n if asked.of(choice).noise else 0.0)
    if choice.stored:
        return once + span
    return once + n * batch.own(ranks) + n + span


def exchange_seconds(sent: float, ranks: int, machine: Machine) -> float:
    """All-to-all: a rank's parts for its own node and for the others go at the same time."""
    if ranks == 1:
        return 0.0
    near = min(ranks, machine.gpus) - 1
    inside, outside = sent * near / (ranks - 1), sent * (ranks - 1 - near) / (ranks - 1)
    return max(inside / machine.inside, outside / machine.between)


def gather_seconds(whole: float, ranks: int, machine: Machine) -> float:
    """All-gather of ``whole`` bytes: what others have comes to every rank; into a node over all its links, once."""
    if ranks == 1:
        return 0.0
    inside = whole * (ranks - 1) / ranks / machine.inside
    if ranks <= machine.gpus:
        return inside
    return max(inside, whole * (ranks - machine.gpus) / ranks / (machine.between * machine.gpus))


def reduce_seconds(whole: float, ranks: int, machine: Machine) -> float:
    """All-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather_seconds(whole, ranks, machine)
