"""N ranks report what one process does, to rounding in float64: the whole report, number by number, and the kernel.

The oracle is one process. A group of N gloo ranks is started once and goes through all its cases; a test looks up what became
of its case.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_probe.checkpoints import sharding_of
from entropy_probe.checkpoints.sharded import shard_model
from entropy_probe.data.rollouts import group_rollouts, write_rollouts
from entropy_probe.data.units import Mode, exact_units
from entropy_probe.errors import InputError
from entropy_probe.gradients import unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.treatments import prove_rules
from entropy_probe.gradients.vectors import exchange
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.state import AdamGroup, AdamMoments, AdamState
from entropy_probe.pipeline.run import ProbeResult, probe, probe_checkpoint
from entropy_probe.pipeline.settings import Settings, ShardingChoice
from entropy_probe.ranks.collectives import ALONE, Kind, Payload, Ranks
from entropy_probe.ranks.sharding import even_spans, row_spans
from entropy_probe.report import Report
from entropy_probe.targets.choices import EntropyUnit, Estimator, SamplerWeights
from entropy_probe.targets.entropy import EntropyTarget
from rank_processes import on_ranks
from support import (
    VOCABULARY,
    lora_model,
    make_checkpoint,
    random_batch,
    random_rollouts,
    run_command,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)

TOLERANCE = 1e-9
NOT_COMPARED = ("timing", "versions", "config", "engine", "ranks")
NOISE = ("noise_floor", "self_test_residual")
"""Fields that are rounding, or say how it was computed."""

STREAMED = 2e5
"""Bytes over all ranks in which no vectors of the tiny models fit."""

EXACT = Settings(dtype=torch.float64, learning_rate=1e-3, microbatch_size=8)
PLAIN = replace(EXACT, noise=False)
SETTINGS = {
    "exact": EXACT,
    "exact-streamed": replace(PLAIN, memory_bytes=STREAMED, targets=True),
    "exact-score": replace(PLAIN, estimator=Estimator.SCORE, what_if_no_negatives=True, microbatch_size=2),
    "block": replace(PLAIN, mode=Mode.BLOCK, blocks=3, entropy=EntropyUnit.PER_TOKEN),
    "block-streamed-score": replace(
        PLAIN,
        mode=Mode.BLOCK,
        blocks=3,
        memory_bytes=STREAMED,
        targets=True,
        estimator=Estimator.SCORE,
        entropy=EntropyUnit.PER_TOKEN,
    ),
    "folds": replace(PLAIN, split=3, max_grad_norm=0.1),
    "evaluation": replace(PLAIN, gradient_checkpointing=True),
    "resample": replace(PLAIN, resample=True, max_completion_length=8),
    "prefix": replace(EXACT, sampler_weights=SamplerWeights.PREFIX),
}
COLLECTIVES = {
    "all_reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_to_all_single": 1,
    "all_to_all": 1,
    "gather": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "reduce": 0,
    "broadcast": 0,
    "scatter": 0,
    "all_gather_object": 1,
    "broadcast_object_list": 0,
}
"""Which argument is what a rank hands over."""

FRESH = ("fresh/exact", "fresh/exact-streamed")
"""Rows of embeddings have v = 0."""

EVERYWHERE = ("full/exact", "full/exact-streamed", "lora/block", "lora/block-streamed-score")
CASES: Mapping[tuple[int, ShardingChoice], Sequence[str]] = {
    (1, ShardingChoice.FSDP2): ("full/exact",),
    (2, ShardingChoice.REPLICATED): (
        *EVERYWHERE,
        *FRESH,
        "full/exact-score",
        "full/folds",
        "full/evaluation",
        "full/resample",
        "full/prefix",
    ),
    (2, ShardingChoice.FSDP2): (
        *EVERYWHERE,
        *FRESH,
        "full/exact-score",
        "full/folds",
        "full/evaluation",
        "full/resample",
        "full/prefix",
    ),
    (3, ShardingChoice.REPLICATED): ("full/exact", "lora/block-streamed-score"),
    (4, ShardingChoice.REPLICATED): EVERYWHERE,
    (4, ShardingChoice.FSDP2): EVERYWHERE,
}


@dataclass(frozen=True)
class Found:
    """What one rank has of a case: report and kernel, what it counted as handed over, and what torch was called with."""

    report: Report
    kernel: np.ndarray[Any, np.dtype[np.float64]] | None
    sent: list[Payload]
    called: list[tuple[str, int]]

    def elements(self, kind: Kind) -> int:
        """Handed over in all."""
        return sum(payload.elements for payload in self.sent if payload.kind is kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_checkpoint(root / "full")
    make_checkpoint(root / "fresh", "llama-untied", vocabulary=10)
    base = tiny_model("llama-untied")
    base.save_pretrained(root / "base")
    adapted = lora_model(base)
    save_checkpoint(adapted, trained_optimizer(adapted), root / "lora")
    # Seven prompts, of which one has no advantage.
    rows = random_rollouts(7, [3, 2, 4, 3, 3, 2, 3])
    rows = [replace(row, reward=1.0) if row.prompt_id == "p3" else row for row in rows]
    write_rollouts(rows, root / "rollouts.jsonl")
    other = [replace(row, logprobs=(-2.5,) * len(row.response_ids)) for row in rows]
    write_rollouts(other, root / "off-policy.jsonl")
    write_rollouts(random_rollouts(3, 2, seed=5), root / "evaluation.jsonl")
    return root


def probed(
    root: Path, case: str, ranks: Ranks = ALONE, sharding: ShardingChoice = ShardingChoice.REPLICATED
) -> ProbeResult:
    model, name = case.split("/")
    settings = SETTINGS[name]
    if settings.memory_bytes is not None:
        settings = replace(settings, memory_bytes=settings.memory_bytes / ranks.count)
    return probe_checkpoint(
        root / model,
        root / ("off-policy.jsonl" if name == "prefix" else "rollouts.jsonl"),
        settings,
        evaluation_rollouts=root / "evaluation.jsonl" if name == "evaluation" else None,
        base=root / "base" if model == "lora" else None,
        ranks=ranks,
        sharding=sharding,
    )


@functools.cache
def alone(root: Path, case: str) -> ProbeResult:
    return probed(root, case)


@functools.cache
def together(root: Path, count: int, sharding: ShardingChoice) -> list[dict[str, Found]]:
    """By rank, every case of the group."""

    def work(ranks: Ranks) -> dict[str, Found]:
        found = {}
        for case in CASES[count, sharding]:
            before = list(ranks.sent)
            with collectives_called() as called:
                result = probed(root, case, ranks, sharding)
            assert ranks.sent[: len(before)] == before, "the caller's record was cleared"
            found[case] = Found(result.report, result.kernel, ranks.sent[len(before) :], called)
        return found

    return on_ranks(count, work)


@contextmanager
def collectives_called() -> Iterator[list[tuple[str, int]]]:
    """Name and elements handed over of every collective that Python code calls; FSDP2's own are not among them."""
    found: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            given = arguments[COLLECTIVES[name]]
            inside = sys._getframe(1).f_globals["__name__"].startswith("entropy_probe")
            if inside:
                found.append(
                    (name, sum(t.numel() * t.element_size() for t in ([given] if torch.is_tensor(given) else given)))
                )
            return originals[name](*arguments, **named)

        return call

    try:
        for name in COLLECTIVES:
            setattr(dist, name, counting(name))
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of the report by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not (path == "" and key in NOT_COMPARED) and key not in NOISE:
                yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{place}]")
    else:
        yield path, value


def differences(found: Report, expected: Report) -> list[str]:
    mine, theirs = dict(numbers(asdict(found))), dict(numbers(asdict(expected)))
    if mine.keys() != theirs.keys():
        return sorted(mine.keys() ^ theirs.keys())
    return [
        f"{path}: {mine[path]} for {value}"
        for path, value in theirs.items()
        if (
            mine[path] != pytest.approx(value, rel=TOLERANCE, abs=1e-14)
            if isinstance(value, float)
            else mine[path] != value
        )
    ]


MANY = [pytest.param(count, marks=pytest.mark.long) for count in (3, 4)]
EVERY_CASE = [
    pytest.param(count, sharding, case, marks=[pytest.mark.long] if count > 2 else [])
    for (count, sharding), cases in CASES.items()
    for case in cases
]


@pytest.mark.parametrize(("count", "sharding", "case"), EVERY_CASE)
def test_every_rank_reports_what_one_process_does(
    folder: Path, count: int, sharding: ShardingChoice, case: str
) -> None:
    expected = alone(folder, case)
    for of_rank in together(folder, count, sharding):
        found = of_rank[case]
        assert differences(found.report, expected.report) == []
        if expected.kernel is None:
            assert found.kernel is None
        else:
            scale = np.abs(expected.kernel).max()
            np.testing.assert_allclose(found.kernel, expected.kernel, rtol=0, atol=TOLERANCE * scale)


def test_ranks_agree_on_elements_without_v(folder: Path) -> None:
    assert all(alone(folder, case).report.first_order.zero_v.elements > 0 for case in FRESH)
    assert not alone(folder, "full/exact").report.first_order.zero_v.elements


def test_a_number_that_is_off_is_a_difference(folder: Path) -> None:
    report = alone(folder, "full/exact").report
    spoiled = replace(report.first_order, u_cross=report.first_order.u_cross * (1 + 1e-8))
    assert differences(replace(report, first_order=spoiled), report) != []


def test_a_report_counts_what_its_own_probe_handed_over(folder: Path) -> None:
    """The ranks' record goes on over several probes."""
    found = together(folder, 2, ShardingChoice.REPLICATED)
    for case in CASES[2, ShardingChoice.REPLICATED]:
        of_ranks = [of_rank[case] for of_rank in found]
        for kind in Kind:
            most = max(of_rank.elements(kind) for of_rank in of_ranks)
            assert [of_rank.report.ranks.sent[kind].elements for of_rank in of_ranks] == [most, most]


ALLOWED = {
    ShardingChoice.REPLICATED: {"all_reduce", "all_to_all_single"},
    ShardingChoice.FSDP2: {"all_reduce", "all_to_all_single", "all_gather"},
}


def trained_elements(folder: Path, case: str) -> int:
    return alone(folder, case).report.checkpoint.parameters


def gathers_of_parameter_length(found: Found, sharding: ShardingChoice, length: int) -> list[tuple[str, int]]:
    """What torch was called with beside the collectives that are to be, or beyond what was counted; numbers that are many."""
    unknown = [call for call in found.called if call[0] not in ALLOWED[sharding]]
    counted = sum(payload.bytes for payload in found.sent)
    called = sum(size for name, size in found.called if name != "all_to_all_single")
    shards = [payload.bytes for payload in found.sent if payload.kind is Kind.SHARDS]
    exchanged = [size for name, size in found.called if name == "all_to_all_single"]
    if len(shards) != len(exchanged) or any(own > size for own, size in zip(shards, exchanged, strict=True)):
        unknown.append(("all_to_all_single", sum(exchanged)))
    if called > counted - sum(shards) + NOT_COUNTED:
        unknown.append(("not counted", called))
    if found.elements(Kind.NUMBERS) >= length:
        unknown.append(("numbers", found.elements(Kind.NUMBERS)))
    return unknown


NOT_COUNTED = 1 << 10
"""Bytes of what the counts themselves are compared by; a gradient of these models is 34 kB."""


@pytest.mark.parametrize(
    ("count", "sharding", "case"),
    EVERY_CASE,
)
def test_no_gradient_is_gathered(folder: Path, count: int, sharding: ShardingChoice, case: str) -> None:
    for of_rank in together(folder, count, sharding):
        # An adapter of these is no longer than what the report itself needs.
        length = trained_elements(folder, case) if case.startswith("full") else 4096
        assert gathers_of_parameter_length(of_rank[case], sharding, length) == []


def of_other_ranks(cut: Callable[..., Mapping[str, tuple[slice, ...]]], count: int, rank: int) -> int:
    """Elements of all parameters that are not in this rank's spans."""
    shapes = {name: p.shape for name, p in tiny_model().named_parameters()}
    own = sum(spans[rank].stop - spans[rank].start for spans in cut(shapes, count).values())
    return sum(shape.numel() for shape in shapes.values()) - own


@pytest.mark.parametrize("count", [2, *MANY])
def test_replicated_ranks_hand_over_shards_and_one_sum(folder: Path, count: int) -> None:
    n = trained_elements(folder, "full/exact")
    for rank, of_rank in enumerate(together(folder, count, ShardingChoice.REPLICATED)):
        found = of_rank["full/exact"]
        # X, Y, and Z of reward and length of every unit of this rank; ΣX and ΣY once, and for the noise's thirds six sums more.
        units = found.report.ranks.prompts[rank]
        assert found.elements(Kind.SHARDS) == 4 * units * of_other_ranks(even_spans, count, rank)
        assert found.elements(Kind.SUMS) == 8 * n
        assert found.elements(Kind.DIRECTIONS) == 0


@pytest.mark.parametrize("count", [2, MANY[-1]])
def test_streamed_replicated_ranks_hand_over_a_sum_a_vector(folder: Path, count: int) -> None:
    n = trained_elements(folder, "full/exact-streamed")
    for of_rank in together(folder, count, ShardingChoice.REPLICATED):
        found = of_rank["full/exact-streamed"]
        assert [target.delta is not None for target in found.report.targets] == [True, True]
        assert found.elements(Kind.SUMS) == 4 * n
        assert found.elements(Kind.SHARDS) == found.elements(Kind.DIRECTIONS) == 0


@pytest.mark.parametrize("count", [2, MANY[-1]])
def test_sharded_ranks_hand_over_shards_once_and_their_part_of_directions(folder: Path, count: int) -> None:
    n = trained_elements(folder, "full/exact")
    for rank, of_rank in enumerate(together(folder, count, ShardingChoice.FSDP2)):
        found = of_rank["full/exact"]
        # X, Y, and Z of reward and length of every unit of this rank; and the first gives away one gradient, with which the
        # rules are proved.
        vectors = 4 * found.report.ranks.prompts[rank] + (rank == 0)
        assert found.elements(Kind.SHARDS) == vectors * of_other_ranks(row_spans, count, rank)
        assert found.elements(Kind.SUMS) == 0
        # One layer at a time, or what is in none: never all parameters.
        longest = max(payload.elements for payload in found.sent if payload.kind is Kind.DIRECTIONS)
        assert longest < 6 * n / count


PLANTED = """
def gather(vector, count):
    dist.all_gather([torch.empty_like(vector) for _ in range(count)], vector)
"""


def test_a_gather_of_a_gradient_is_seen() -> None:
    """The planted bug: a vector of every rank's goes to all, as guide E forbids."""
    planted: dict[str, Any] = {"__name__": "entropy_probe.planted", "dist": dist, "torch": torch}
    exec(PLANTED, planted)

    def work(ranks: Ranks) -> list[tuple[str, int]]:
        with collectives_called() as called:
            planted["gather"](torch.zeros(NOT_COUNTED), ranks.count)
            ranks.sum_vectors([torch.zeros(4)])
        return called

    for called in on_ranks(2, work):
        sums = [Payload(Kind.SUMS, 4, 16)]
        numbers = Payload(Kind.NUMBERS, 8, 64)
        found = functools.partial(Found, None, None)  # type: ignore[arg-type]
        assert gathers_of_parameter_length(found(sums, called), ShardingChoice.REPLICATED, 8) != []
        assert gathers_of_parameter_length(found(sums, called), ShardingChoice.FSDP2, 8) != []
        assert gathers_of_parameter_length(found(sums, called[1:]), ShardingChoice.REPLICATED, 8) == []
        assert gathers_of_parameter_length(found([*sums, numbers], called[1:]), ShardingChoice.REPLICATED, 8) != []


def peak_of_gradients(ranks: Ranks, sharding: ShardingChoice) -> int:
    """Bytes that unit vectors, shards and sums take at most, all of which NumPy allocates on a CPU."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    ).double()
    names = {name: p.shape for name, p in model.named_parameters()}
    group = AdamGroup(tuple(names), 1e-3, 0.9, 0.999, 1e-8, 0.0, False, False, True)
    if sharding is ShardingChoice.FSDP2:
        shard_model(Path("model"), model, init_device_mesh("cpu", (ranks.count,)))
    policy = Policy(model, microbatch_size=8, sharding=sharding_of(model, ranks))
    held = policy.held()
    moments = {name: AdamMoments(3, torch.zeros_like(p), torch.ones_like(p)) for name, p in held.items()}
    batch = random_batch(16, 2)
    advantage = torch.ones(len(batch.responses), dtype=torch.float64)
    target = EntropyTarget(Estimator.SCORE, EntropyUnit.PER_RESPONSE)
    geometry = Geometry.of(Adam(AdamState((group,), moments)))
    rules = prove_rules(policy, batch)
    tracemalloc.start()
    unit_gradients(policy, batch, exact_units(16), Sides(target, advantage), geometry, rules=rules)
    return tracemalloc.get_traced_memory()[1]


@pytest.mark.parametrize("sharding", list(ShardingChoice))
def test_memory_of_a_rank_falls_as_units_are_divided(sharding: ShardingChoice, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an exchange needs besides is a constant, of the size of these small vectors.
    monkeypatch.setattr(exchange, "BUCKET", 1 << 20)
    peaks = [max(on_ranks(count, lambda ranks: peak_of_gradients(ranks, sharding))) for count in (1, 4)]
    assert peaks[1] < 0.4 * peaks[0], peaks


class Impossible(nn.Module):
    """A model that gives the token 22 no probability."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **named: Any) -> Any:
        found = self.inner(**named)
        found.logits = found.logits.index_fill(-1, torch.tensor([22]), -torch.inf)
        return found


def test_what_one_rank_finds_wrong_all_ranks_refuse() -> None:
    """In a job that nobody watches the others would wait for it."""
    rows = [replace(row, response_ids=(5, 6, 7, 8, 9, 10, 1)) for row in random_rollouts(4, 2)]
    # Late in the response: the beginnings that rules are proved on, by all ranks alike, do not show it.
    batch = group_rollouts([*rows[:-1], replace(rows[-1], response_ids=(5, 6, 7, 8, 9, 22, 1))])

    def work(ranks: Ranks) -> str:
        model = tiny_model(dtype=torch.float64)
        adam = state_of_optimizer(trained_optimizer(model), model)
        named = {f"inner.{name}": moments for name, moments in adam.moments.items()}
        groups = tuple(replace(g, names=tuple(f"inner.{name}" for name in g.names)) for g in adam.groups)
        with pytest.raises(InputError) as refused:
            probe(Impossible(model), AdamState(groups, named), batch, Settings(noise=False), ranks=ranks)
        return str(refused.value)

    first, second = on_ranks(2, work)
    assert first == second
    assert "prompt_id 'p3': a response has log-probability -inf" in first


def test_torchrun_starts_it_as_readme_says(folder: Path, tmp_path: Path) -> None:
    options = [
        "run",
        str(folder / "full"),
        "--rollouts",
        str(folder / "rollouts.jsonl"),
        "--dtype",
        "float64",
        "--no-noise",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = subprocess.run(
        [*torchrun, "-m", "entropy_probe", *options, "--sharding", "fsdp2", "--json", str(tmp_path / "two.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("report written to") == 1
    assert "gloo, fsdp2" in started.stdout
    assert run_command(*options, "--json", tmp_path / "one.json").code == 0
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert two["first_order"]["u_cross"] == pytest.approx(one["first_order"]["u_cross"], rel=TOLERANCE)
    assert two["ranks"]["count"] == 2


@pytest.mark.parametrize("sharding", list(ShardingChoice))
def test_ranks_with_different_rollouts_are_told_so(folder: Path, sharding: ShardingChoice) -> None:
    def work(ranks: Ranks) -> str:
        other = folder / ("evaluation.jsonl" if ranks.rank else "rollouts.jsonl")
        with pytest.raises(InputError) as refused:
            probe_checkpoint(folder / "full", other, PLAIN, ranks=ranks, sharding=sharding)
        return str(refused.value)

    assert (
        on_ranks(2, work)
        == ["rank 1 was given other rollouts than rank 0: all ranks must be given the same files and options"] * 2
    )
