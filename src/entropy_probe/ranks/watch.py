"""One rank's failure ends every rank: a notice in the job's store, and a thread on each rank that looks for one.

A rank that raises leaves the others waiting in a collective for what will not come. It writes {rank, code, line} where all look
several times a second; the first notice counts, its rank alone speaks, and every rank ends with its code. A rank that stands in
a collective runs no Python, so that the thread ends its process; what runs Python is interrupted, and cleans up behind itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from entropy_probe.compat.torch_stores import Store

PAUSE = 0.2
"""Seconds between two looks."""
GRACE = 0.5
"""Seconds in which a rank may end by itself: it may be failing alike, or be cleaning up after an interrupt."""
SPEAK = 2.0
"""Seconds after which the first rank to fail speaks, though not all others have gone."""
PATIENCE = 4.0
"""Seconds for which it, and whoever hosts the store, stays for the others to read the notice."""
ARRIVAL = 30.0
"""The same where a rank has yet to arrive: it may still be importing."""
FAULT, BAD_INPUT, INTERRUPTED = 1, 2, 130
Handler = Callable[[int, FrameType | None], object] | int | None
ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Failure:
    """Why a rank ends.

    Attributes:
        rank: whose failure it is.
        code: of every rank's exit.
        line: what to say.
        common: whether it follows from the arguments, which all ranks share, so that no rank needs naming.
    """

    rank: int
    code: int
    line: str
    common: bool = False

    def message(self, *, everyone: bool) -> str:
        """The line for stderr; a rank is named unless everyone failed so."""
        who = "" if everyone or self.common else f"rank {self.rank}: "
        return f"entropy-probe: {who}{' '.join(self.line.split())}\n"


@dataclass(frozen=True)
class Board:
    """Notices in a store, by key: who has arrived, who failed first, who said what, who has gone."""

    store: Store
    rank: int
    count: int

    def arrive(self) -> None:
        """Say that this rank is here."""
        self.store.set(f"arrived/{self.rank}", "")

    def absent(self) -> list[int]:
        """Ranks that have not arrived."""
        return [rank for rank in range(self.count) if not self.store.check([f"arrived/{rank}"])]

    def post(self, failure: Failure) -> Failure:
        """Say that this rank failed; returns the failure that came first."""
        self.store.set(f"said/{self.rank}", failure.line)
        return _read(self.store.compare_set("first", "", json.dumps(asdict(failure))))

    def first(self) -> Failure | None:
        """The failure that came first, if there is one."""
        return _read(self.store.get("first")) if self.store.check(["first"]) else None

    def everyone_says(self, line: str) -> bool:
        """Whether all ranks failed with one line."""
        keys = [f"said/{rank}" for rank in range(self.count)]
        return self.store.check(keys) and all(self.store.get(key) == line.encode() for key in keys)

    def leave(self) -> None:
        """Say that this rank needs the store no more."""
        self.store.set(f"gone/{self.rank}", "")

    def others_left(self) -> bool:
        """Whether this rank is the last."""
        others = [f"gone/{rank}" for rank in range(self.count) if rank != self.rank]
        return not others or self.store.check(others)


class Watch:
    """Looks for failures while a command runs. It belongs to the main thread, because signals are the process's."""

    def __init__(self, board: Board, *, hosts: bool) -> None:
        """Bind to a board of its own connection (a wait of the process group's would hold another's).

        Args:
            board: the job's.
            hosts: whether the store lives in this process, which then leaves last.
        """
        self._board, self._hosts = board, hosts
        self._leaving, self._stopped = threading.Event(), threading.Event()
        self._last, self._interrupted = threading.Lock(), False
        self._earlier = dict[signal.Signals, Handler]()
        self._main = threading.get_ident()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._thread = threading.Thread(target=self._look, name="entropy-probe-watch", daemon=True)

    def start(self) -> None:
        """Begin to look. SIGTERM, which torchrun sends, interrupts as SIGINT does."""
        # Written to by the signal itself: the thread hears of it though the main thread stands in a collective.
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._earlier = {number: signal.signal(number, self._interrupt) for number in ENDING}
        self._board.arrive()
        self._thread.start()

    def stop(self) -> None:
        """Look no more, on the good path; whoever hosts the store waits until all have stopped."""
        self._stopped.set()
        os.write(self._wake, b"\0")
        self._thread.join()
        self._board.leave()
        if self._hosts:
            _wait(self._board.others_left, ARRIVAL)
        signal.set_wakeup_fd(-1)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def end(self, failure: Failure | None, trace: str = "") -> NoReturn:
        """End this process for a failure: its own, or None for the one that the board shows.

        No exit handlers run: they would abort a process group whose other ranks have gone.

        Args:
            failure: this rank's.
            trace: printed above the line, where this rank's failure is the first.
        """
        self._leaving.set()
        if not self._last.acquire(blocking=False):
            threading.Event().wait()  # the other thread is at it
        try:
            code = self._agree(failure, trace)
        except dist.DistError:  # no store, nobody to agree with
            code = FAULT
            if failure is not None:
                code = failure.code
                _say(trace + failure.message(everyone=False))
        if self._board.rank == 0:
            from rich.console import Console

            with suppress(OSError):
                Console(stderr=True).show_cursor()  # a bar may have hidden it
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    def _agree(self, failure: Failure | None, trace: str) -> int:
        board, start = self._board, time.monotonic()
        first = board.post(failure) if failure is not None else board.first()
        if first is None:
            return FAULT
        if first.rank == board.rank:
            _wait(board.others_left, SPEAK)
            _say(trace + first.message(everyone=board.everyone_says(first.line)))
        late = bool(board.absent())
        board.leave()
        # Who hosts takes the notice along; and torchrun would kill a rank that still imports, before it could read it.
        if self._hosts or late:
            with suppress(dist.DistError):  # once this rank has left, the host may be gone
                _wait(board.others_left, (ARRIVAL if late else PATIENCE) - (time.monotonic() - start))
        return first.code

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Once: a terminal's SIGINT is followed by torchrun's SIGTERM, which must not break the cleaning up.
        if not (self._interrupted or self._leaving.is_set()):
            self._interrupted = True
            raise KeyboardInterrupt

    def _look(self) -> None:
        while True:
            woken = bool(select.select([self._woken], [], [], PAUSE)[0])
            signalled = woken and any(number in ENDING for number in os.read(self._woken, 64))
            if self._stopped.is_set():
                return
            if signalled:
                if not self._leaving.wait(2 * GRACE):
                    self.end(self._failure(INTERRUPTED, "interrupted; nothing half-written"))
                return
            try:
                failed = self._board.first() is not None
            except dist.DistError:
                if not self._leaving.wait(GRACE):
                    self.end(self._failure(FAULT, "the job's store is gone: torchrun or rank 0 died; see its output"))
                return
            if failed:
                if self._leaving.wait(GRACE):
                    return
                signal.pthread_kill(self._main, signal.SIGTERM)
                if not self._leaving.wait(GRACE):
                    self.end(None)
                return

    def _failure(self, code: int, line: str) -> Failure:
        return Failure(self._board.rank, code, line)


def _read(notice: bytes) -> Failure:
    return Failure(**json.loads(notice))


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _wait(done: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
