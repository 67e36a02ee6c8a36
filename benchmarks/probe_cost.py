"""What the probe costs beside one training forward and backward of the same batch, legs interleaved in one run.

    python benchmarks/probe_cost.py --json FILE [--markdown FILE]      the required rows, about ten minutes on two cores
    python benchmarks/probe_cost.py --quick                            fewer repeats, for a look
    python benchmarks/probe_cost.py --scaling                          rows in B, T, G, parameters, chunked head

A Llama (6 layers, hidden 384, MLP 1536, vocabulary 2048, tied, float32, SDPA, no checkpointing) and B = 4 prompts of 16
tokens with G = 4 responses, T positions a sequence in all. Legs:

    training      forward, loss a token, backward into .grad: what a step costs before the optimizer
    forward       the same forward alone
    preparation   what the first probe of a model does once: head, microbatch, rules (``entropy_probe.gradients.prepare``)
    probe         the engine: scores, both coefficients, X_u and Y_u of every prompt, P, the kernel and its statistics
    rao_blackwell the same with coefficients a token: two activation backwards
    streamed      the probe in two passes, no unit vectors kept (full training alone)
    two_backward  one forward and two backwards a prompt with retain_graph, X_u and Y_u stored, and the same products
    guide         the guide's recipe: bars (forward, backward of L_X; forward, backward of L_Y) over all rows, the diagonal
                  prompt by prompt (one forward, two backwards with retain_graph): 3 forwards, 4 backwards;
                  the guide's row means are not in it

Ratios are medians of ratios within a repeat, with the interval between their order statistics of 95 % coverage or more (or
all values, where there are too few: the two slowest legs run in every third repeat at T = 512).

On a CPU every leg runs with glibc told to keep freed memory (the process starts itself again with MALLOC_* set). By default it
hands blocks above 32 MiB back, and the training leg, whose microbatch is the whole batch, pages its activations in again at
every layer; the probe, which chooses smaller microbatches, does not. ``--default-malloc`` shows that; the limits are held
against the harder figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts
from entropy_probe.data.units import exact_units
from entropy_probe.gradients import Preparation, Storage, UnitGradients, Wanted, prepare, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.losses.surrogate import probe_loss
from entropy_probe.model.padding import PaddedResponses, pad_right
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.preconditioner import Preconditioners
from entropy_probe.optimizers.state import AdamState
from entropy_probe.statistics.u_statistics import cross_statistics
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.score import score_coefficients

LEGS = ("training", "forward", "preparation", "probe", "rao_blackwell", "streamed", "two_backward", "guide")
SLOW_LEGS = ("rao_blackwell", "two_backward", "guide")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "268435456"}
LONG = 512
"""Positions from which the slowest legs run in every third repeat only."""

TARGETS = {
    ("lora", 512): {"probe": 1.00},
    ("lora", 128): {"probe": 1.05},
    ("full", 512): {"probe": 1.10, "streamed": 2.10},
    ("full", 128): {"probe": 1.30, "streamed": 2.10},
}
"""Upper limits that issue and README name, by training and positions."""


@dataclass(frozen=True)
class Shape:
    """What is measured; ``memory_bytes`` is what the probe is told that it has, None what is free."""

    training: str
    tokens: int
    prompts: int = 4
    responses: int = 4
    prompt_tokens: int = 16
    layers: int = 6
    hidden: int = 384
    intermediate: int = 1536
    heads: int = 6
    key_value_heads: int = 6
    vocabulary: int = 2048
    dtype: str = "float32"
    device: str = "cpu"
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Row:
    """One shape's figures: ``seconds`` by leg in the order of repeats, ``ratio`` of each leg to training."""

    training: str
    tokens: int
    shape: Shape
    parameters: int
    trainable: int
    seconds: dict[str, list[float]]
    ratio: dict[str, dict[str, float]]
    flops_ratio: dict[str, float]
    peak_memory_ratio: float
    fallback_share: float
    head: str
    stored_vectors_bytes: int


@dataclass(frozen=True)
class Case:
    """A model, its Adam state and a batch."""

    policy: Policy
    adam: AdamState
    batch: RolloutBatch
    padded: PaddedResponses
    advantage: Tensor
    memory_bytes: float
    preparation: Preparation | None = None


def make_case(shape: Shape) -> Case:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    dtype = getattr(torch, shape.dtype)
    model: nn.Module = LlamaForCausalLM(config).to(shape.device, dtype)
    if shape.training == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
    model.eval()
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, shape.vocabulary, (count,), generator=generator).tolist())

    rows = []
    for n in range(shape.prompts):
        prompt = draw(shape.prompt_tokens)
        rows += [
            Rollout(n, prompt, draw(shape.tokens - shape.prompt_tokens), float(g % 2)) for g in range(shape.responses)
        ]
    batch = group_rollouts(rows)
    policy = Policy(model)
    padded = pad_right(batch.responses, policy.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    short = pad_right([replace(r, response_ids=r.response_ids[:16]) for r in batch.responses], policy.device)
    for _ in range(2):
        optimizer.zero_grad()
        (-policy.token_log_probs(short).mean()).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    advantage = torch.tensor([r.reward - 0.5 for r in rows], dtype=torch.float64) / shape.tokens
    adam = state_of_optimizer(optimizer, model)
    memory = float(psutil.virtual_memory().available) if shape.memory_bytes is None else shape.memory_bytes
    case = Case(policy, adam, batch, padded, advantage, memory)
    return replace(case, preparation=preparation(case))


def preparation(case: Case) -> Preparation:
    """What the first probe of a model finds out, and later ones are handed."""
    return prepare(case.policy, case.batch, memory_bytes=case.memory_bytes)


def log_probs(case: Case) -> Tensor:
    """The trainer's forward: logits of response positions only, log-softmax, the chosen tokens."""
    first = len(case.batch.responses[0].prompt_ids)
    ids = case.padded.input_ids
    logits = case.policy.model(
        input_ids=ids,
        attention_mask=case.padded.attention_mask,
        use_cache=False,
        logits_to_keep=ids.shape[1] - first + 1,
    ).logits
    return torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, ids[:, first:, None])[..., 0]


def training(case: Case) -> None:
    weights = case.advantage.to(case.policy.device, torch.float32)[:, None]
    (-(log_probs(case) * weights).sum()).backward()
    for parameter in case.policy.model.parameters():
        parameter.grad = None


def forward(case: Case) -> None:
    with torch.no_grad():
        log_probs(case)


def probe(case: Case) -> None:
    cross_statistics(gradients_of(case).total)


def gradients_of(
    case: Case, storage: Storage = Storage.STORED, estimator: Estimator = Estimator.SCORE
) -> UnitGradients:
    assert case.preparation is not None
    return unit_gradients(
        case.preparation.applied(case.policy),
        case.batch,
        exact_units(len(case.batch.groups)),
        Sides(EntropyTarget(estimator), case.advantage),
        Geometry.of(Adam(case.adam)),
        wanted=Wanted(storage),
        rules=case.preparation.rules,
    )


def streamed(case: Case) -> None:
    cross_statistics(gradients_of(case, Storage.STREAMED).total)


def rao_blackwell(case: Case) -> None:
    cross_statistics(gradients_of(case, estimator=Estimator.RAO_BLACKWELL).total)


def _prompts(case: Case) -> Iterable[slice]:
    size = len(case.batch.groups[0].responses)
    for n in range(len(case.batch.groups)):
        yield slice(n * size, (n + 1) * size)


def _scores(case: Case, rows: slice) -> Tensor:
    part = replace(case, padded=pad_right(case.batch.responses[rows], case.policy.device), batch=case.batch)
    return log_probs(part).sum(1).double()


def _both(case: Case, rows: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    parameters = [p for p in case.policy.model.parameters() if p.requires_grad]
    scores = _scores(case, rows)
    c = score_coefficients(scores.detach().cpu(), [len(scores)])
    x = torch.autograd.grad(probe_loss(scores, c.to(scores.device)), parameters, retain_graph=True)
    y = torch.autograd.grad(probe_loss(scores, case.advantage[rows].to(scores.device)), parameters)
    return x, y


def _flat_root(case: Case) -> Tensor:
    p = Preconditioners(case.adam)
    names = [name for name, q in case.policy.model.named_parameters() if q.requires_grad]
    return torch.cat([p[name].flatten() for name in names]).sqrt().to(case.policy.device, torch.float32)


def two_backward(case: Case) -> None:
    root = _flat_root(case)
    xs, ys = [], []
    for rows in _prompts(case):
        x, y = _both(case, rows)
        xs.append(torch.cat([g.flatten() for g in x]).float() * root)
        ys.append(torch.cat([g.flatten() for g in y]).float() * root)
    torch.stack(xs) @ torch.stack(ys).T


def guide(case: Case) -> None:
    parameters = [p for p in case.policy.model.parameters() if p.requires_grad]
    root = _flat_root(case)
    sizes = case.batch.group_sizes
    scores = _scores(case, slice(0, sum(sizes)))
    c = score_coefficients(scores.detach().cpu(), sizes).to(scores.device)
    x = torch.autograd.grad(probe_loss(scores, c), parameters)
    scores = _scores(case, slice(0, sum(sizes)))
    y = torch.autograd.grad(probe_loss(scores, case.advantage.to(scores.device)), parameters)
    bar_x, bar_y = (torch.cat([g.flatten() for g in v]).float() * root for v in (x, y))
    total = torch.dot(bar_x, bar_y)
    for rows in _prompts(case):
        x, y = _both(case, rows)
        x_n, y_n = (torch.cat([g.flatten() for g in v]).float() * root for v in (x, y))
        total = total - torch.dot(x_n, y_n)


def prepared_anew(case: Case) -> None:
    preparation(case)


RUN: dict[str, Callable[[Case], None]] = {
    "training": training,
    "forward": forward,
    "preparation": prepared_anew,
    "probe": probe,
    "rao_blackwell": rao_blackwell,
    "streamed": streamed,
    "two_backward": two_backward,
    "guide": guide,
}


def timed(leg: str, case: Case) -> float:
    if case.policy.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    RUN[leg](case)
    if case.policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interval(values: list[float]) -> dict[str, float]:
    """Median, and the order statistics around it that cover it with 95 % or more (all values, where there are too few)."""
    ordered, count = sorted(values), len(values)
    low = 0
    for k in range(count // 2):
        if 2 * sum(math.comb(count, j) for j in range(k + 1)) / 2**count <= 0.05:
            low = k
    middle = ordered[count // 2] if count % 2 else 0.5 * (ordered[count // 2 - 1] + ordered[count // 2])
    return {"median": middle, "low": ordered[low], "high": ordered[count - 1 - low]}


def flops(leg: str, case: Case) -> int:
    with FlopCounterMode(display=False) as counter:
        RUN[leg](case)
    return counter.get_total_flops()


def _peak(leg: str, shape: Shape, threads: int, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(threads)
    case = make_case(shape)
    tiny = make_case(replace(shape, tokens=shape.prompt_tokens + 4, layers=1, hidden=48, intermediate=48))
    RUN[leg](tiny)
    del tiny
    gc.collect()
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        RUN[leg](case)
        pipe.send(torch.cuda.max_memory_allocated() - resting)
        return
    # Linux: writing 5 sets the high-water mark of resident memory back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    resting = psutil.Process().memory_info().rss
    RUN[leg](case)
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    pipe.send(high - resting)


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


def peak_memory(leg: str, shape: Shape) -> int:
    """Bytes above the resting model and Adam state, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(leg, shape, torch.get_num_threads(), sender))
    with _environment(dict.fromkeys(KEEP_MEMORY)):  # resident memory is what is asked about: freed memory goes back
        process.start()
    found: int = receiver.recv()
    process.join()
    return found


def measure(shape: Shape, repeats: int, legs: Iterable[str], *, memory: bool = True) -> Row:
    case = make_case(shape)
    trainable = case.policy.trainable()
    found = gradients_of(case)
    count = sum(p.numel() for p in trainable.values())
    vectors = 2 * len(case.batch.groups) * count * 4
    if shape.training == "lora":
        legs = [leg for leg in legs if leg != "streamed"]
    counted = {leg: flops(leg, case) for leg in legs}  # warms up too
    seconds: dict[str, list[float]] = {leg: [] for leg in legs}
    ratios: dict[str, list[float]] = {leg: [] for leg in legs}
    for repeat in range(repeats):
        now = [leg for leg in seconds if repeat % 3 == 0 or shape.tokens < LONG or leg not in SLOW_LEGS]
        for leg in now if repeat % 2 == 0 else reversed(now):
            seconds[leg].append(timed(leg, case))
        for leg in now:
            ratios[leg].append(seconds[leg][-1] / seconds["training"][-1])
    ratio = {leg: interval(values) for leg, values in ratios.items() if leg != "training"}
    memory_ratio = math.nan
    if memory:
        memory_ratio = peak_memory("probe", shape) / (peak_memory("training", shape) + vectors)
    return Row(
        training=shape.training,
        tokens=shape.tokens,
        shape=shape,
        parameters=sum(p.numel() for p in case.policy.model.parameters()),
        trainable=count,
        seconds=seconds,
        ratio=ratio,
        flops_ratio={leg: counted[leg] / counted["training"] for leg in seconds if leg != "training"},
        peak_memory_ratio=memory_ratio,
        fallback_share=found.coverage.fallback_share,
        head=case.preparation.head.value if case.preparation is not None else "whole",
        stored_vectors_bytes=vectors,
    )


def scaling_shapes(device: str) -> list[Shape]:
    base = Shape("full", 128, device=device)
    return [
        replace(base, tokens=32),
        replace(base, tokens=256),
        replace(base, prompts=16),
        replace(base, responses=16),
        replace(base, hidden=192, intermediate=768, heads=3, key_value_heads=3),
        replace(base, hidden=768, intermediate=3072, heads=12, key_value_heads=12, prompts=2),
        replace(base, training="lora", vocabulary=50000),
        # Told of little memory, the head goes in chunks.
        replace(base, training="lora", vocabulary=50000, memory_bytes=4e9),
    ]


def large_shapes() -> list[Shape]:
    """0.5B and 1.5B in bfloat16, for a GPU."""
    half = Shape("full", 512, 8, 8, 64, 24, 896, 4864, 14, 2, 151936, "bfloat16", "cuda")
    more = replace(half, layers=28, hidden=1536, intermediate=8960, heads=12)
    return [half, replace(half, training="lora"), replace(more, prompts=4), replace(more, training="lora")]


def markdown(rows: list[Row], device: str, repeats: int) -> str:
    lines = [
        f"Device: {device}. Torch {torch.__version__}. {repeats} repeats, legs interleaved; ratios to one training "
        "forward and backward of the same batch: median [interval].",
        "",
        "| training | T | shape | "
        + " | ".join(leg for leg in LEGS[1:])
        + " | FLOPs, probe | peak memory | fallback |",
        "|" + "---|" * (len(LEGS) + 5),
    ]
    for row in rows:
        s = row.shape
        cells = []
        for leg in LEGS[1:]:
            r = row.ratio.get(leg)
            limit = TARGETS.get((row.training, row.tokens), {}).get(leg) if s == Shape(s.training, s.tokens) else None
            aim = "" if limit is None else f" (limit {limit:.2f})"
            cells.append("" if r is None else f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]{aim}")
        shape = f"{s.layers} × {s.hidden}, V = {s.vocabulary}, B = {s.prompts}, G = {s.responses}, {s.dtype}"
        shape += "" if row.head == "responses" else f", head {row.head}"
        memory = "" if math.isnan(row.peak_memory_ratio) else f"{row.peak_memory_ratio:.2f}"
        lines.append(
            f"| {row.training} | {row.tokens} | {shape} | "
            + " | ".join(cells)
            + f" | {row.flops_ratio['probe']:.3f} | {memory} | {100 * row.fallback_share:.0f} % |"
        )
    lines += [
        "",
        "Seconds of the training leg, by row: "
        + ", ".join(f"{min(r.seconds['training']):.2f} to {max(r.seconds['training']):.2f}" for r in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="three repeats, no memory figures")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--only", help="training and tokens, as in full-128")
    parser.add_argument("--legs", help="comma-separated; training is always there")
    parser.add_argument("--large", action="store_true", help="0.5B and 1.5B shapes in bfloat16, on a GPU")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's allocator as it is")
    args = parser.parse_args()
    if not (args.large or args.default_malloc) and any(name not in os.environ for name in KEEP_MEMORY):
        os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ) | KEEP_MEMORY)
    torch.set_num_threads(args.threads)
    repeats = 3 if args.quick else args.repeats
    shapes = [Shape(training, tokens) for tokens in (512, 128) for training in ("lora", "full")]
    if args.large:
        shapes = large_shapes()
    elif args.scaling:
        shapes = scaling_shapes("cpu")
    if args.only:
        shapes = [s for s in shapes if f"{s.training}-{s.tokens}" == args.only]
    legs = LEGS if not args.legs else ("training", *args.legs.split(","))
    rows = []
    console = Console()
    for shape in shapes:
        start = time.perf_counter()
        row = measure(shape, repeats, legs, memory=not args.quick)
        rows.append(row)
        table = Table(title=f"{shape.training}, T = {shape.tokens} ({time.perf_counter() - start:.0f} s)")
        for column in ("leg", "ratio", "interval", "FLOPs"):
            table.add_column(column)
        for leg, r in row.ratio.items():
            f = row.flops_ratio.get(leg)
            table.add_row(
                leg, f"{r['median']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", "" if f is None else f"{f:.3f}"
            )
        table.add_row(
            "peak memory", f"{row.peak_memory_ratio:.3f}", f"training {min(row.seconds['training']):.2f} s", ""
        )
        console.print(table)
    device = (
        torch.cuda.get_device_name()
        if shapes[0].device == "cuda"
        else f"CPU, {platform.machine()}, {args.threads} threads"
    )
    if args.json:
        args.json.write_text(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(rows, device, repeats))


if __name__ == "__main__":
    main()
