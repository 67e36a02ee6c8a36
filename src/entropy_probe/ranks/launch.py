"""One command on several ranks: what torchrun's environment says, the process group, and an end that all ranks share.

torchrun gives every process RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK, and hosts a key-value store. Without
them a process is alone, and nothing is initialised. Only rank 0 prints and writes.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from entropy_probe.compat.torch_stores import PrefixStore, Store, TCPStore
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.watch import BAD_INPUT, FAULT, INTERRUPTED, Board, Failure, Watch

CONNECT = timedelta(seconds=60)
ASSEMBLE = timedelta(minutes=5)
"""For every rank to come; on shared disks imports take minutes."""
COLLECTIVE = timedelta(days=7)
"""Ranks may wait long for the one with most work; that one failed, the watch says."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says in a plain RuntimeError where a peer is gone."""


@dataclass(frozen=True)
class Launch:
    """This process among those that one command was started on.

    Attributes:
        rank: from 0.
        count: N.
        local_rank: among those of this machine: which of its GPUs is this rank's.
        address: where the store is.
        port: of it.
        agent_hosts: whether torchrun hosts the store; rank 0 does otherwise.
        attempt: which restart by torchrun this is; its store lives on.
    """

    rank: int
    count: int
    local_rank: int
    address: str
    port: int
    agent_hosts: bool
    attempt: int

    @staticmethod
    def of_environment(environment: Mapping[str, str]) -> Launch | None:
        """What torchrun has set, or None where it did not start this process.

        Raises:
            InputError: a part is missing or is not a number: each process would take itself for the only one.
        """
        missing = [name for name in ENVIRONMENT if name not in environment]
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        if missing:
            raise InputError(
                f"RANK and WORLD_SIZE are set, {' and '.join(missing)} not; start several ranks by torchrun"
            )
        try:
            rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            launch = Launch(
                rank,
                count,
                int(environment.get("LOCAL_RANK", rank)),
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True),
                int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
            )
        except ValueError as error:
            raise InputError(f"torchrun's environment cannot be read ({one_line(error)}); expected numbers") from error
        if not 0 <= rank < count:
            raise InputError(f"RANK is {rank} of WORLD_SIZE {count}; expected 0 to {count - 1}")
        return launch

    @property
    def hosts(self) -> bool:
        """Whether the store lives in this process."""
        return self.rank == 0 and not self.agent_hosts

    def store(self, *, host: bool = False) -> Store:
        """A new connection to the job's store, or the store itself.

        Raises:
            torch.distributed.DistError: nobody is there.
        """
        found = TCPStore(self.address, self.port, None, host, CONNECT, wait_for_workers=False, multi_tenant=True)
        return PrefixStore(f"entropy-probe/{self.attempt}", found)


@dataclass(frozen=True)
class Job:
    """What a command knows of the others that run it; alone by default."""

    launch: Launch | None = None
    store: Store | None = None

    @property
    def count(self) -> int:
        """N."""
        return 1 if self.launch is None else self.launch.count

    def device(self, chosen: torch.device) -> torch.device:
        """This rank's: of several GPUs the one that LOCAL_RANK names.

        Raises:
            InputError: there are fewer GPUs than ranks on this machine.
        """
        if self.launch is None or chosen.type != "cuda":
            return chosen
        gpus = torch.cuda.device_count()
        if self.launch.local_rank >= gpus:
            raise InputError(
                f"LOCAL_RANK is {self.launch.local_rank} and torch sees {gpus} GPUs; start one rank a GPU, or "
                "set the device to cpu"
            )
        return torch.device("cuda", self.launch.local_rank)

    @contextmanager
    def ranks(self, device: torch.device) -> Iterator[Ranks]:
        """The ranks, joined by NCCL on GPUs and by gloo on CPUs; all leave together. ALONE where there are no others.

        Raises:
            LostRankError: a rank does not come.
        """
        if self.launch is None or self.store is None:
            yield ALONE
            return
        _assemble(Board(self.store, self.launch.rank, self.launch.count))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=self.store,
            rank=self.launch.rank,
            world_size=self.launch.count,
            timeout=COLLECTIVE,
        )
        ranks = Ranks.of_group()
        yield ranks
        # Together: a rank whose peers' threads have gone may abort at exit. On an exception the process is ended, not left.
        ranks.sum_numbers(np.zeros(1))
        dist.destroy_process_group()


class LostRankError(RuntimeError):
    """A rank does not come, or went without a word."""


def run(command: Callable[[Job], int], environment: Mapping[str, str]) -> NoReturn:
    """Run a command on this rank and exit: with its code, or all ranks with the code of the first to fail.

    2 with one line on stderr for an InputError, 130 when interrupted, 1 with one line where memory ran out and with a traceback
    for any other fault.
    """
    try:
        launch = Launch.of_environment(environment)
        if launch is None:
            sys.exit(command(Job()))
    except InputError as error:
        _quit(BAD_INPUT, f"entropy-probe: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        _quit(INTERRUPTED, "interrupted; nothing half-written\n")
    except Exception as error:
        if not out_of_memory(error):
            raise
        _quit(FAULT, f"entropy-probe: {_memory_ran_out(error)}\n")
    _run_rank(command, launch)


def _run_rank(command: Callable[[Job], int], launch: Launch) -> NoReturn:
    try:
        store = launch.store(host=launch.hosts)
        watch = Watch(Board(launch.store(), launch.rank, launch.count), hosts=launch.hosts)
    except dist.DistError as error:
        where = f"{launch.address}:{launch.port}"
        _quit(FAULT, f"entropy-probe: rank {launch.rank}: no store at {where}: {one_line(error)}\n")
    try:
        watch.start()
        code = _as_rank(command, Job(launch, store))
        watch.stop()
    except BaseException as error:
        failure, trace = failure_of(error, launch.rank)
        watch.end(failure, trace)
    sys.exit(code)


def _as_rank(command: Callable[[Job], int], job: Job) -> int:
    if job.launch is None or job.launch.rank == 0:
        return command(job)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return command(job)


def failure_of(error: BaseException, rank: int) -> tuple[Failure, str]:
    """What an exception means for all ranks, and the traceback that belongs to it: of faults alone."""
    # Before the group stands, a rank has seen nothing but the arguments.
    common = not dist.is_initialized()
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, InputError):
        return Failure(rank, BAD_INPUT, str(error), common), ""
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, INTERRUPTED, "interrupted; nothing half-written"), ""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else FAULT
        return Failure(rank, code, f"ended with {error.code}"), ""
    if isinstance(error, LostRankError):
        return Failure(rank, FAULT, str(error), common=True), ""
    if out_of_memory(error):
        return Failure(rank, FAULT, _memory_ran_out(error)), ""
    if isinstance(error, dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
    ):
        said = one_line(error)
        return Failure(rank, FAULT, f"another rank went without a word: killed, or out of memory? ({said})"), ""
    return Failure(rank, FAULT, f"{type(error).__name__}: {one_line(error)}"), trace


def _memory_ran_out(error: BaseException) -> str:
    """What was asked for, as far as the library says, and what needs less."""
    return (
        f"memory ran out ({type(error).__name__}: {one_line(error)}); a smaller memory or microbatch setting, "
        "gradient checkpointing, or ranks with fsdp2 sharding need less"
    )


def _assemble(board: Board) -> None:
    try:
        board.store.wait([f"arrived/{rank}" for rank in range(board.count)], ASSEMBLE)
    except dist.DistStoreError as error:
        absent = ", ".join(map(str, board.absent()))
        seconds = ASSEMBLE.total_seconds()
        raise LostRankError(f"rank {absent} of {board.count} did not come within {seconds:.0f} seconds") from error


def _quit(code: int, message: str) -> NoReturn:
    sys.stderr.write(message)
    sys.exit(code)
