"""What ranks hand over and hold, measured on this machine's gloo ranks and held against the formulas.

    python benchmarks/scaling.py --markdown FILE [--json FILE]     every row, about ten minutes on two cores
    python benchmarks/scaling.py --quick                           the smallest model, payloads alone

Llamas of 1 and 4 million parameters (four layers, vocabulary 512, tied, float32) after two steps of AdamW, 16 and 32 prompts
with two responses, probed from a checkpoint by N = 1 to 4 forked ranks of one thread each: replicated and FSDP2, stored and
streamed, Rao-Blackwell, the noise split where vectors are stored. It fails where a rank's shards, sums or directions are not,
element by element, what ``scaling_formulas.py`` says; where numbers are not its leading terms and a bounded rest that has
nothing to do with the number of parameters; or where the memory of unit vectors does not fall with N.

Peak memory is what a rank's resident set grows by from before the checkpoint is read, the mapped optimizer file included.
A bucket of 64 MB that an exchange hands over, and one that it receives, are much of it for small models, so it is the largest
that must fall. Seconds are of the gradients' stage; there are two cores, so that N = 2 is the most that can gain.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import scaling_formulas as formulas
import torch
import torch.distributed as dist
from rich.console import Console
from scaling_formulas import CHOICES, Asked, Choice, Share
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from entropy_probe.data.rollouts import Rollout, group_rollouts, write_rollouts
from entropy_probe.data.units import Mode, exact_units
from entropy_probe.gradients.batching import microbatches
from entropy_probe.optimizers.preconditioner import Preconditioners
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState
from entropy_probe.pipeline.run import probe_checkpoint
from entropy_probe.pipeline.settings import Settings
from entropy_probe.ranks.collectives import Kind, Ranks
from entropy_probe.ranks.sharding import even_spans, row_spans
from entropy_probe.statistics.noise import LEAST_UNITS
from entropy_probe.targets.choices import Estimator

VOCABULARY, RESPONSES, MICROBATCH = 512, 2, 4
SHORT, LONG = 12, 60
"""Tokens of a response: for payloads and memory, and for seconds."""

UNITS = 16
"""Of all choices; more are for stored vectors, whose memory they are."""

SHAPES = ((128, 16, (1, 2, 3, 4)), (256, 16, (1, 2)), (256, 32, (1, 2, 4)))
"""Width of the model, number of prompts, and of ranks."""

REPEATS = 2
ROOM = 1e12
"""Bytes in which every vector fits."""


@dataclass(frozen=True)
class Case:
    """One probe.

    Attributes:
        width: of the model.
        units: prompts.
        ranks: N.
        choice: sharding and storage.
        estimator: of the entropy.
        microbatch: responses in a forward.
        tokens: of a response.
    """

    width: int
    units: int
    ranks: int
    choice: Choice
    estimator: Estimator = Estimator.RAO_BLACKWELL
    microbatch: int = MICROBATCH
    tokens: int = SHORT

    @property
    def split(self) -> bool:
        """Whether a prompt's responses are in several microbatches."""
        return self.microbatch < RESPONSES

    @property
    def asked(self) -> Asked:
        """As the formulas want it: rewards differ, lengths do not."""
        return Asked(self.estimator is Estimator.RAO_BLACKWELL, noise=self.units >= LEAST_UNITS, targets=1)


@dataclass(frozen=True)
class Found:
    """What one rank of a probe found: elements and bytes by kind, growth of its resident set, seconds of the gradients."""

    elements: dict[Kind, int]
    bytes: dict[Kind, int]
    memory: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """A case, every rank's findings, and what the formulas say of each."""

    case: Case
    parameters: int
    found: list[Found]
    expected: list[dict[Kind, int]]
    rest: int

    @property
    def memory(self) -> int:
        """Of the rank that grew most."""
        return max(found.memory for found in self.found)

    @property
    def seconds(self) -> float:
        """Of the slowest rank."""
        return max(found.seconds for found in self.found)


def model_of(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


def write_checkpoint(folder: Path, width: int) -> None:
    """Weights, AdamW's state after two steps, and where a Trainer says so."""
    model = model_of(width).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids = torch.randint(3, VOCABULARY, (4, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": []}))


def rollouts_of(units: int, tokens: int) -> list[Rollout]:
    """Prompts of four tokens and responses of so many."""
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    prompts = [draw(4) for _ in range(units)]
    return [Rollout(n, prompts[n], draw(tokens), float(g)) for n in range(units) for g in range(RESPONSES)]


def on_ranks(count: int, work: Callable[[Ranks], Found]) -> list[Found]:
    """What ``work`` gives on every one of ``count`` forked gloo ranks; one that fails ends the benchmark with its traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes, ends = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, count, port, work, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        ends.append(here)
    found = []
    try:
        for connection in ends:
            result = connection.recv()
            if isinstance(result, str):
                raise RuntimeError(result)
            found.append(result)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    return found


def _rank(rank: int, count: int, port: int, work: Callable[[Ranks], Found], connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count, timeout=timedelta(seconds=300)
        )
        connection.send(work(Ranks.of_group()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        connection.send(traceback.format_exc())


def settings_of(case: Case, parameters: int) -> Settings:
    """Memory for all vectors, or for half of them."""
    half = 2 * formulas.FLOAT32 * parameters * case.units / case.ranks
    return Settings(
        mode=Mode.EXACT,
        estimator=case.estimator,
        microbatch_size=case.microbatch,
        memory_bytes=ROOM if case.choice.stored else half,
    )


def expected_of(case: Case, shapes: dict[str, torch.Size]) -> list[dict[Kind, int]]:
    """Elements by kind that the formulas give for every rank."""
    cut = row_spans if case.choice.sharded else even_spans
    held = [sum(s[rank].stop - s[rank].start for s in cut(shapes, case.ranks).values()) for rank in range(case.ranks)]
    batch = group_rollouts(rollouts_of(case.units, case.tokens))
    dealt = exact_units(case.units).deal(batch.positions, case.ranks)
    unit_of_row = [n for n, size in enumerate(batch.group_sizes) for _ in range(size)]
    parts = [
        microbatches(batch.group_sizes, unit_of_row, case.microbatch, share, within_units=False) for share in dealt
    ]
    openings = [sum(len({unit_of_row[row] for row in part.rows}) for part in of_rank) for of_rank in parts]
    rounds = max(map(len, parts))
    found: list[dict[Kind, int]] = []
    for rank, share in enumerate(dealt):
        of_rank = Share(
            len(share), openings[rank], rounds, held[rank], sum(held) - held[rank], max(held), first=rank == 0
        )
        if case.ranks == 1:
            found.append(dict.fromkeys(Kind, 0))
            continue
        kinds = formulas.payload(case.choice, of_rank, case.asked)
        tokens = sum(len(response.response_ids) for response in batch.responses)
        leading = formulas.numbers(case.choice, case.asked, case.units, len(batch.responses), tokens)
        found.append({kind: int(count) for kind, count in kinds.items()} | {Kind.NUMBERS: leading})
    return found


def measure(case: Case, root: Path) -> Row:
    """Probe, and hold what every rank handed over against the formulas.

    Raises:
        AssertionError: they differ.
    """
    shapes = {name: p.shape for name, p in model_of(case.width).named_parameters()}
    parameters = sum(math.prod(shape) for shape in shapes.values())

    def work(ranks: Ranks) -> Found:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = probe_checkpoint(
            root / f"width-{case.width}",
            root / f"rollouts-{case.units}-{case.tokens}.jsonl",
            settings_of(case, parameters),
            ranks=ranks,
            sharding=case.choice.sharding,
        )
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        # The report knows what was chosen.
        assert (result.kernel is not None) is case.choice.stored
        sent = ranks.sent_by_kind()
        return Found(
            {kind: payload.elements for kind, payload in sent.items()},
            {kind: payload.bytes for kind, payload in sent.items()},
            grown * 1024,
            result.report.timing["gradients"],
        )

    found, expected = on_ranks(case.ranks, work), expected_of(case, shapes)
    rest = check(case, found, expected, len(shapes))
    return Row(case, parameters, found, expected, rest)


def check(case: Case, found: Sequence[Found], expected: Sequence[dict[Kind, int]], tensors: int) -> int:
    """Every rank against the formulas; the numbers beyond their leading terms.

    Raises:
        AssertionError: they differ, or there are more numbers than that.
    """
    rest = 0
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for kind in (Kind.SHARDS, Kind.SUMS, Kind.DIRECTIONS):
            if mine.elements[kind] != theirs[kind]:
                raise AssertionError(
                    f"{case}, rank {rank}: {mine.elements[kind]} elements of {kind} handed over, {theirs[kind]} by the formula"
                )
        rest = mine.elements[Kind.NUMBERS] - theirs[Kind.NUMBERS]
        rounds = math.ceil((case.units / case.ranks + 1) * RESPONSES / case.microbatch) if case.choice.sharded else 0
        most = 0 if case.ranks == 1 else formulas.few_numbers(case.ranks, tensors, rounds)
        if case.split:
            # Scores that a microbatch does not hold are taken by forwards of their own, at most once a run over the batch.
            most += 3 * case.units * RESPONSES * (1 + case.tokens)
        if not 0 <= rest <= most:
            raise AssertionError(f"{case}, rank {rank}: {rest} numbers beyond the leading terms; expected 0 to {most}")
    return rest


def preconditioner_rate() -> float:
    """Elements of P a second that one thread makes from Adam's moments, the best of three."""
    count, chunk = 1 << 24, 1 << 19
    generator = torch.Generator().manual_seed(3)
    moments = AdamMoments(5, torch.zeros(count), torch.rand(count, generator=generator))
    group = AdamGroup(("weight",), 1e-5, 0.9, 0.999, 1e-8, 0.0, False, False, True)
    p = Preconditioners(AdamState((group,), {"weight": moments}))
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for first in range(0, count, chunk):
            p.chunk("weight", slice(first, first + chunk))
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def cases(quick: bool) -> list[Case]:
    """Payloads and memory; then other estimators and split prompts, for payloads alone."""
    found = [
        Case(width, units, ranks, choice)
        for width, units, counts in (SHAPES[:1] if quick else SHAPES)
        for choice in CHOICES
        for ranks in counts
        if choice.stored or units == UNITS
    ]
    for choice in CHOICES:
        found.append(Case(128, 16, 2, choice, Estimator.SCORE))
        found.append(Case(128, 7, 3, choice, Estimator.SCORE, microbatch=1))
    return found


def timed_cases() -> list[Case]:
    """One rank and two, each choice, longer responses."""
    return [Case(128, 16, ranks, choice, tokens=LONG) for choice in CHOICES for ranks in (1, 2)]


def check_memory(rows: Sequence[Row]) -> None:
    """Of the largest, a rank holds less the more there are, and of the most by half of what its vectors are less at least.

    One process has no buckets, so that two ranks gain less than their vectors do.

    Raises:
        AssertionError: it does not.
    """
    width, units, counts = SHAPES[-1]
    of = {row.case: row for row in rows}
    for choice in CHOICES:
        found = [of[case] for n in counts if (case := Case(width, units, n, choice)) in of]
        if not found:
            continue
        vectors = 2 * formulas.FLOAT32 * found[0].parameters * units
        least = 0.5 * vectors * (1 / found[0].case.ranks - 1 / found[-1].case.ranks)
        memory = [row.memory for row in found]
        if memory != sorted(memory, reverse=True) or memory[0] - memory[-1] < least:
            raise AssertionError(f"{choice.name}, {counts} ranks: a rank grew by {memory} bytes")


def markdown(rows: Sequence[Row], timed: Sequence[Row], rate: float) -> str:
    """The measured tables."""
    lines = [
        "| sharding, vectors | n | U | N | shards / (2 n U / N) | sums / n | directions / n | numbers | bytes handed over | "
        "peak memory, MB |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        case, most = row.case, max(row.found, key=lambda found: sum(found.bytes.values()))
        n = row.parameters
        name = case.choice.name
        name += ", score" if case.estimator is Estimator.SCORE else ""
        name += ", prompts split" if case.split else ""
        lines.append(
            f"| {name} | {n / 1e6:.2f} M | {case.units} | {case.ranks} | "
            f"{most.elements[Kind.SHARDS] / (2 * n * case.units / case.ranks):.3f} | {most.elements[Kind.SUMS] / n:.0f} | "
            f"{most.elements[Kind.DIRECTIONS] / n:.2f} | {most.elements[Kind.NUMBERS]} | "
            f"{sum(most.bytes.values()) / 1e6:.1f} MB | {row.memory / 1e6:.0f} |"
        )
    if slopes := memory_slopes(rows):
        lines += ["", "Growth of one process for every parameter more, U = 16, bytes: " + ", ".join(slopes) + "."]
    if timed:
        lines += ["", f"Seconds of the gradients' stage, {REPEATS} repeats interleaved:", ""]
        lines += ["| sharding, vectors | N = 1 | N = 2 | N = 2 over N = 1, by repeat |", "|" + "---|" * 4]
        for choice in CHOICES:
            one, two = ([r.seconds for r in timed if r.case.choice == choice and r.case.ranks == n] for n in (1, 2))
            ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(one, two, strict=True))
            lines.append(
                f"| {choice.name} | {min(one):.1f} to {max(one):.1f} | {min(two):.1f} to {max(two):.1f} | {ratios} |"
            )
    lines += ["", f"P from Adam's moments: {rate / 1e9:.2f} billion elements a second on one thread."]
    return "\n".join(lines) + "\n"


def memory_slopes(rows: Sequence[Row]) -> list[str]:
    """Bytes by which one process, which exchanges nothing, grows for every parameter more at 16 units."""
    found = []
    for choice in CHOICES:
        both = [r for r in rows if r.case in (Case(128, 16, 1, choice), Case(256, 16, 1, choice))]
        if len(both) == 2:
            small, large = both
            found.append(f"{choice.name} {(large.memory - small.memory) / (large.parameters - small.parameters):.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--quick", action="store_true", help="the smallest model, payloads alone")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    console = Console()
    rows, timed = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for width in sorted({width for width, _, _ in SHAPES}):
            write_checkpoint(root / f"width-{width}", width)
        for units, tokens in ((7, SHORT), (16, SHORT), (32, SHORT), (16, LONG)):
            write_rollouts(rollouts_of(units, tokens), root / f"rollouts-{units}-{tokens}.jsonl")
        rate = preconditioner_rate()
        for case in cases(args.quick):
            rows.append(measure(case, root))
            console.print(markdown(rows[-1:], [], rate).splitlines()[2])
        for _ in range(0 if args.quick else REPEATS):
            for case in timed_cases():
                timed.append(measure(case, root))
                console.print(f"{case.choice.name}, N = {case.ranks}: {timed[-1].seconds:.1f} s")
    text = markdown(rows, timed, rate)
    console.print(text)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in [*rows, *timed]], indent=1))
    if args.markdown:
        args.markdown.write_text(text)
    check_memory(rows)


if __name__ == "__main__":
    main()
