"""Work done by N gloo ranks on this machine, forked from a test that has imported everything."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from entropy_probe.ranks.collectives import Ranks

T = TypeVar("T")


def on_ranks(count: int, work: Callable[[Ranks], T], *, seconds: float = 100.0) -> list[T]:
    """What ``work`` gives on every rank; ranks that fail, or wait for each other, fail the test with their traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    processes, ends = [], []
    for rank in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, count, port, work, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        ends.append(here)
    end = time.monotonic() + seconds
    found: list[Any] = []
    try:
        for rank, connection in enumerate(ends):
            if not connection.poll(max(0.0, end - time.monotonic())):
                raise AssertionError(f"rank {rank} of {count} said nothing within {seconds} s: it waits for another")
            try:
                error, result = connection.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} of {count} went without a word") from None
            if error is not None:
                raise AssertionError(f"rank {rank} of {count}:\n{error}")
            found.append(result)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    return found


def failed_cases(count: int, cases: Mapping[str, Callable[[Ranks], None]]) -> list[dict[str, str]]:
    """By rank, the tracebacks of the cases that failed; N ranks started once go through all, each begun by all at once."""

    def work(ranks: Ranks) -> dict[str, str]:
        failed = {}
        for name, case in cases.items():
            # What a rank has drawn before must not matter.
            torch.manual_seed(ranks.rank)
            try:
                case(ranks)
            except Exception:
                failed[name] = traceback.format_exc()
            dist.barrier()
        return failed

    return on_ranks(count, work)


def _rank(rank: int, count: int, port: int, work: Callable[[Ranks], Any], connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
        found = (None, work(Ranks.of_group()))
        dist.barrier()
    except BaseException:
        found = (traceback.format_exc(), None)
    connection.send(found)
    connection.close()
    if found[0] is None:
        dist.destroy_process_group()
