"""Two ranks of one command: they end together, with one voice, and only rank 0 prints and writes.

Ranks are forked from this process, which has imported everything and has run a command; it hosts the store, as torchrun does.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from entropy_probe import InputError, ProbeResult, cli, probe, state_of_optimizer
from entropy_probe.data.rollouts import read_rollouts
from entropy_probe.data.rollouts.digest import digest_of_batch
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks import watch
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.launch import Job, Launch, failure_of
from entropy_probe.ranks.same_inputs import check_same_inputs
from entropy_probe.report import plots
from spoiled import Place
from support import Outcome, fingerprint, random_batch, run_command, tiny_model, trained_optimizer

RUN = importlib.import_module("entropy_probe.cli.run")
SAMPLE = importlib.import_module("entropy_probe.cli.sample")
FORK = multiprocessing.get_context("fork")
PROMPTLY = 8.0
"""Seconds: the others look five times a second, and have one to end by themselves."""

REWARDS = """
def one(prompt, response, row):
    with open("calls", "a") as calls:
        calls.write(".")
    return 1.0
"""

pytestmark = pytest.mark.timeout(60)
Work = Callable[[Ranks], object]


def wait_in_a_collective(ranks: Ranks) -> None:
    ranks.sum_numbers(np.zeros(1))


@dataclass
class Pair:
    """Two ranks of one command line whose work is replaced."""

    place: Place
    monkeypatch: pytest.MonkeyPatch
    result: ProbeResult
    late: float = 0.0
    """Seconds after which rank 1 begins."""

    def run(
        self,
        work: Work,
        *arguments: str | Path,
        agent: bool = True,
        after: Callable[[Sequence[int]], object] = lambda _: None,
    ) -> tuple[Outcome, Outcome]:
        """Both ranks' exit code, standard output and standard error; that they took no longer than promptly.

        Args:
            work: what is called instead of the probe.
            arguments: of the command line; by default run's, with both outputs.
            agent: whether this process hosts the store, or rank 0.
            after: done once both ranks are up, to their process ids.
        """

        def probed(*_: Any, ranks: Ranks, sharding: ShardingChoice, **__: Any) -> ProbeResult:
            (self.place.root.parent / f"up-{ranks.rank}").touch()
            work(ranks)
            return self.result

        self.monkeypatch.setattr(RUN, "probe_checkpoint", probed)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
        if not agent:
            del store
        ranks = [FORK.Process(target=self._rank, args=(rank, port, agent, arguments)) for rank in (0, 1)]
        start = time.monotonic()
        for rank in ranks:
            rank.start()
        try:
            after([rank.pid or 0 for rank in ranks])
            for rank in ranks:
                rank.join(max(0.0, start + PROMPTLY - time.monotonic()))
            assert [rank.exitcode is None for rank in ranks] == [False, False], "a rank hangs"
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        first, second = (
            Outcome(process.exitcode or 0, *((self._file(rank, kind).read_text()) for kind in ("out", "err")))
            for rank, process in enumerate(ranks)
        )
        return first, second

    def hurry(self) -> None:
        """Shorter waits, for ranks that need none of them: one in a collective, or killed, does not end by itself."""
        for name, seconds in (("PAUSE", 0.05), ("GRACE", 0.1), ("SPEAK", 0.3)):
            self.monkeypatch.setattr(watch, name, seconds)

    def both_up(self) -> None:
        """Wait until both ranks are at work."""
        until = time.monotonic() + PROMPTLY
        while not all((self.place.root.parent / f"up-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until
            time.sleep(0.02)

    def _file(self, rank: int, kind: str) -> Path:
        return self.place.root.parent / f"rank-{rank}.{kind}"

    def _rank(self, rank: int, port: int, agent: bool, arguments: Sequence[str | Path]) -> None:
        time.sleep(self.late * rank)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(agent)
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(self._file(rank, kind), os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        whole: list[str | Path] = ["run", self.place.checkpoint, "--rollouts", self.place.rollouts, "--device", "cpu"]
        whole += ["--json", "report.json", "--out", "report"]
        sys.argv = ["entropy-probe", *map(str, arguments or whole)]
        cli.main()


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    model = tiny_model()
    found = probe(model, state_of_optimizer(trained_optimizer(model), model), random_batch(4, 2))
    # What a command imports late is not imported again by every rank.
    assert run_command("run", "--help").code == 0
    return found


@pytest.fixture
def pair(place: Place, monkeypatch: pytest.MonkeyPatch, result: ProbeResult) -> Pair:
    for plot in ("plot_row_means", "plot_predicted_and_realized"):
        monkeypatch.setattr(plots, plot, lambda report, path: path.touch())
    return Pair(place, monkeypatch, result)


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    return [line for outcome in outcomes for line in outcome.lines]


def codes(outcomes: Sequence[Outcome]) -> list[int]:
    return [outcome.code for outcome in outcomes]


@pytest.mark.parametrize("agent", [True, False])
def test_two_ranks_that_succeed_print_and_write_once(pair: Pair, agent: bool) -> None:
    def work(ranks: Ranks) -> None:
        time.sleep(0.25 * ranks.rank)  # rank 0 is ahead
        assert ranks.sum_numbers(np.ones(1)) == 2.0
        assert ranks.backend == "gloo"

    leave = dist.destroy_process_group

    def leave_slowly() -> None:
        time.sleep(0.25 * int(os.environ["RANK"]))
        leave()

    pair.monkeypatch.setattr(dist, "destroy_process_group", leave_slowly)
    first, second = pair.run(work, agent=agent)
    assert codes([first, second]) == [0, 0], first.err + second.err
    assert "report written to report.json" in first.out
    assert second.out == first.err == second.err == ""
    assert {"report.json", "report/report.json"} <= set(fingerprint(pair.place.root))


@pytest.mark.parametrize("agent", [True, False])
def test_bad_input_on_one_rank_ends_the_other_in_its_collective(pair: Pair, agent: bool) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise InputError("row 7 is\nbad")
        wait_in_a_collective(ranks)

    leave = watch.Board.leave

    def linger(board: watch.Board) -> None:
        leave(board)
        time.sleep(0.25 * board.rank)

    if not agent:
        # Once all have left, the store may go with the rank that hosts it: nobody asks it any more.
        pair.monkeypatch.setattr(watch.Board, "leave", linger)
        pair.hurry()
    before = fingerprint(pair.place.root)
    outcomes = pair.run(work, agent=agent)
    assert codes(outcomes) == [2, 2]
    assert lines(outcomes) == ["entropy-probe: rank 1: row 7 is bad"]
    assert fingerprint(pair.place.root) == before


def test_a_rank_that_no_closed_connection_wakes_is_ended_too(pair: Pair) -> None:
    """As one in an NCCL collective, which goes on waiting for a rank that has gone."""

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise InputError("row 7 is bad")
        dist.distributed_c10d._get_default_store().wait(["never"])

    pair.hurry()
    outcomes = pair.run(work)
    assert codes(outcomes) == [2, 2]
    assert lines(outcomes) == ["entropy-probe: rank 1: row 7 is bad"]


def test_a_rank_that_arrives_late_still_reads_why(pair: Pair) -> None:
    pair.monkeypatch.setattr(watch, "SPEAK", 0.1)
    pair.monkeypatch.setattr(watch, "PATIENCE", 0.2)
    pair.late = 0.7
    outcomes = pair.run(wait_in_a_collective, "run", "here", agent=False)
    assert codes(outcomes) == [2, 2]
    (line,) = lines(outcomes)
    assert "rank" not in line


def test_help_is_printed_once(pair: Pair) -> None:
    first, second = pair.run(wait_in_a_collective, "run", "--help")
    assert codes([first, second]) == [0, 0]
    assert "torchrun --nproc-per-node N -m entropy_probe run" in first.out
    assert second.out == ""


def test_a_rank_at_work_in_python_is_interrupted_and_cleans_up(pair: Pair) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 0:
            raise InputError("no such row")
        half = Path("half-written")
        half.touch()
        try:
            time.sleep(60)
        finally:
            half.unlink()

    before = fingerprint(pair.place.root)
    outcomes = pair.run(work)
    assert codes(outcomes) == [2, 2]
    assert lines(outcomes) == ["entropy-probe: rank 0: no such row"]
    assert fingerprint(pair.place.root) == before


def test_a_fault_on_one_rank_ends_both_with_its_traceback(pair: Pair) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ZeroDivisionError("no room")
        wait_in_a_collective(ranks)

    pair.hurry()
    first, second = pair.run(work)
    assert codes([first, second]) == [1, 1]
    assert first.err == ""
    assert second.err.startswith("Traceback")
    assert second.lines[-1] == "entropy-probe: rank 1: ZeroDivisionError: no room"


def test_a_killed_rank_ends_the_other_with_a_line(pair: Pair) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_in_a_collective(ranks)

    pair.hurry()
    outcomes = pair.run(work)
    assert codes(outcomes) == [1, -signal.SIGKILL]
    (line,) = lines(outcomes)
    assert line.startswith("entropy-probe: rank 0: another rank went without a word")


def test_ranks_that_fail_alike_say_it_once_and_name_no_rank(pair: Pair) -> None:
    def work(ranks: Ranks) -> None:
        time.sleep(0.1 * ranks.rank)
        raise InputError("no such checkpoint")

    outcomes = pair.run(work)
    assert codes(outcomes) == [2, 2]
    assert lines(outcomes) == ["entropy-probe: no such checkpoint"]


@pytest.mark.parametrize("sharding", list(ShardingChoice))
def test_two_ranks_sample_what_one_process_does(pair: Pair, sharding: ShardingChoice) -> None:
    prompts = [f'{{"prompt_id": "{n}", "prompt_ids": {[3 + n, 4, 5][: 2 + n % 2]}}}\n' for n in range(5)]
    (pair.place.root / "prompts.jsonl").write_text("".join(prompts))
    (pair.place.root / "even_rewards.py").write_text(REWARDS)
    command = ["sample", pair.place.checkpoint, "--prompts", "prompts.jsonl", "--reward", "even_rewards:one"]
    command += ["--responses", "3", "--max-new-tokens", "6", "--batch", "4", "--device", "cpu", "--dtype", "float64"]
    alone = run_command(*command, "--out", "one.jsonl")
    assert Path("calls").read_text() == "." * 15
    first, second = pair.run(wait_in_a_collective, *command, "--out", "two.jsonl", "--sharding", sharding.value)
    assert codes([first, second]) == [0, 0], first.err + second.err
    assert first.out == alone.out.replace("one.jsonl", "two.jsonl")
    assert second.out == first.err == second.err == ""
    # Once a response, on one of the ranks: they share the work, and do not both do all of it.
    assert Path("calls").read_text() == "." * 30
    for found, expected in zip(read_rollouts(Path("two.jsonl")), read_rollouts(Path("one.jsonl")), strict=True):
        assert found.logprobs == pytest.approx(expected.logprobs, rel=1e-10)
        assert replace(found, logprobs=expected.logprobs) == expected


def test_ranks_with_different_prompts_are_told_so(pair: Pair) -> None:
    (pair.place.root / "prompts.jsonl").write_text('{"prompt_ids": [3, 4]}\n')
    (pair.place.root / "even_rewards.py").write_text(REWARDS)
    read = SAMPLE.read_prompts

    def other(path: Path, tokenizer: Any) -> list[Any]:
        found = read(path, tokenizer)
        return found if os.environ["RANK"] == "0" else found * 2

    pair.monkeypatch.setattr(SAMPLE, "read_prompts", other)
    command = ["sample", pair.place.checkpoint, "--prompts", "prompts.jsonl", "--reward", "even_rewards:one"]
    outcomes = pair.run(wait_in_a_collective, *command, "--responses", "3", "--out", "two.jsonl", "--device", "cpu")
    assert codes(outcomes) == [2, 2]
    assert "rank 1 was given other prompts than rank 0" in "".join(lines(outcomes))
    assert not Path("two.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "here", "--rollouts", "r.jsonl", "--mode", "nonsense"], "nonsense"),
        (["replay", "here", "there", "--rollouts", "r.jsonl"], "replay runs in one process, and torchrun started 2"),
    ],
)
def test_what_the_arguments_forbid_is_said_once(pair: Pair, arguments: list[str], said: str) -> None:
    outcomes = pair.run(wait_in_a_collective, *arguments)
    assert codes(outcomes) == [2, 2]
    (line,) = lines(outcomes)
    assert said in line
    assert "rank" not in line


def test_an_interrupt_reaches_ranks_in_a_collective(pair: Pair) -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            time.sleep(60)
        wait_in_a_collective(ranks)

    def interrupt(pids: Sequence[int]) -> None:
        pair.both_up()
        time.sleep(0.2)
        for number in (signal.SIGINT, signal.SIGTERM):  # the terminal's, and torchrun's
            for pid in pids:
                os.kill(pid, number)

    pair.hurry()
    before = fingerprint(pair.place.root)
    outcomes = pair.run(work, after=interrupt)
    assert codes(outcomes) == [130, 130]
    (line,) = lines(outcomes)
    assert "interrupted; nothing half-written" in line
    assert fingerprint(pair.place.root) == before


def test_a_full_disk_on_rank_0_ends_the_others_which_are_done(pair: Pair) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    pair.monkeypatch.setattr("numpy.save", full)
    pair.hurry()
    before = fingerprint(pair.place.root)
    outcomes = pair.run(lambda _: None, agent=False)
    assert codes(outcomes) == [1, 1]
    assert lines(outcomes)[-1] == "entropy-probe: rank 0: OSError: [Errno 28] No space left on device"
    assert fingerprint(pair.place.root).keys() - before.keys() == {"report.json"}  # whole, written before


def test_different_inputs_are_told_on_both_ranks(pair: Pair) -> None:
    def work(ranks: Ranks) -> None:
        alike = {"settings": bytes(32)}
        check_same_inputs(ranks, alike | {"rollouts": digest_of_batch(random_batch(4, 2))})
        check_same_inputs(ranks, alike | {"rollouts": digest_of_batch(random_batch(4, 2, seed=ranks.rank))})

    outcomes = pair.run(work)
    assert codes(outcomes) == [2, 2]
    assert lines(outcomes) == [
        "entropy-probe: rank 1 was given other rollouts than rank 0: all ranks must be given the same files and options"
    ]


def test_out_of_gpu_memory_is_a_fault_and_not_a_lost_rank() -> None:
    failure, trace = failure_of(torch.OutOfMemoryError("CUDA out of memory"), 3)
    assert (failure.rank, failure.code, trace) == (3, 1, "")
    assert failure.line.startswith("memory ran out (OutOfMemoryError: CUDA out of memory); a smaller")


def test_one_process_starts_nothing(place: Place, monkeypatch: pytest.MonkeyPatch, result: ProbeResult) -> None:
    def work(*_: Any, **named: Any) -> ProbeResult:
        assert named["ranks"] is ALONE
        assert not dist.is_initialized()
        return result

    monkeypatch.setattr(RUN, "probe_checkpoint", work)
    handler = signal.getsignal(signal.SIGTERM)
    assert run_command("run", place.checkpoint, "--rollouts", place.rollouts).code == 0
    assert signal.getsignal(signal.SIGTERM) is handler


ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}


def test_torchruns_environment_is_read_or_refused() -> None:
    assert Launch.of_environment({}) is None
    assert Launch.of_environment({"RANK": "0", "MASTER_PORT": "1"}) is None
    assert Launch.of_environment(ENVIRONMENT) == Launch(1, 2, 1, "here", 1, agent_hosts=False, attempt=0)
    agents = ENVIRONMENT | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert Launch.of_environment(agents) == Launch(1, 2, 1, "here", 1, agent_hosts=True, attempt=3)
    for changed, culprit in (
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"MASTER_PORT": "x"}, "cannot be read"),
    ):
        with pytest.raises(InputError, match=culprit):
            Launch.of_environment(ENVIRONMENT | changed)
    with pytest.raises(InputError, match="MASTER_ADDR not"):
        Launch.of_environment({name: value for name, value in ENVIRONMENT.items() if name != "MASTER_ADDR"})


def test_a_rank_takes_its_own_gpu_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(Launch.of_environment(ENVIRONMENT))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert job.device(torch.device("cuda")) == torch.device("cuda", 1)
    assert job.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="LOCAL_RANK is 1 and torch sees 1 GPUs"):
        job.device(torch.device("cuda"))


def test_sharding_of_the_command_line_reaches_the_probe(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def work(*_: Any, **named: Any) -> None:
        seen.append(named["sharding"])
        raise InputError("reached")

    monkeypatch.setattr(RUN, "probe_checkpoint", work)
    run_command("run", place.checkpoint, "--rollouts", place.rollouts, "--sharding", "fsdp2")
    assert seen == [ShardingChoice.FSDP2]
