"""The main memory that a process may still take: the machine's, or less where control groups (a container, a job) say so.

Linux's cgroups of version 1 and 2. A group's room is its limit less what is used in it, plus file pages that the kernel gives
back unasked (``inactive_file``). Groups lie inside of each other, and none of those around a process may run full.
Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from entropy_probe.errors import InputError

NO_LIMIT = 1 << 60
"""Version 1 writes about 2⁶³ where nothing is limited."""


@dataclass(frozen=True)
class Room:
    """Bytes that may still be taken, and the folder of the control group that says so; None where the machine itself does."""

    bytes: float
    group: str | None


def memory_there(root: Path = Path("/")) -> tuple[Room, ...]:
    """What the machine has available, then the room of each of the process's control groups that has a limit.

    Args:
        root: where ``proc`` and the mounts are looked for.

    Raises:
        InputError: psutil is not there, and neither the kernel nor POSIX says what is free.
    """
    machine = Room(_of_machine(root), None)
    return (machine, *(room for hierarchy in _hierarchies(root) for room in hierarchy.rooms()))


def _of_machine(root: Path) -> float:
    """Bytes that the machine has available, by psutil; without it by Linux's meminfo, or by the pages that are free."""
    try:
        import psutil
    except ImportError:
        pass
    else:
        return float(psutil.virtual_memory().available)
    for line in _lines(root / "proc/meminfo"):
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return float(amount.split()[0]) * 1024.0
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError) as error:
        raise InputError(
            "how much memory is free cannot be found on this machine without psutil; install psutil, or give memory_bytes"
        ) from error


@dataclass(frozen=True)
class _Hierarchy:
    """Where a hierarchy of groups is mounted, the process's group in it, and the version's names."""

    mount: Path
    group: Path
    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    limit_above: str

    def rooms(self) -> Iterator[Room]:
        """Of the group and of those around it, as far up as they are to be seen."""
        folder = self.group
        while True:
            stat = _stat(folder / "memory.stat")
            limits = [_number(folder / name) for name in self.limits]
            # Groups around this one that a container does not see.
            limits.append(stat.get(self.limit_above))
            known = [limit for limit in limits if limit is not None and limit < NO_LIMIT]
            used = _number(folder / self.usage)
            if known and used is not None:
                yield Room(max(0.0, float(min(known) - used + stat.get(self.reclaimable, 0))), str(folder))
            if folder == self.mount:
                return
            folder = folder.parent


def _hierarchies(root: Path) -> Iterator[_Hierarchy]:
    """The mounted hierarchies that the process has a group in and that may limit its memory."""
    groups: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            groups["cgroup2"] = path
        elif "memory" in controllers.split(","):
            groups["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in groups or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        mounted, place = (_unescaped(field) for field in before.split(" ")[3:5])
        mount = root / place.lstrip("/")
        group = _inside(mount, PurePosixPath(groups[kind]), PurePosixPath(mounted))
        if kind == "cgroup2":
            yield _Hierarchy(mount, group, ("memory.max", "memory.high"), "memory.current", "inactive_file", "")
        else:
            names = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
            yield _Hierarchy(mount, group, *names, "hierarchical_memory_limit")


def _inside(mount: Path, group: PurePosixPath, mounted: PurePosixPath) -> Path:
    """The folder of ``group`` where ``mounted`` of its hierarchy is at ``mount``; the mount where it is not seen."""
    if ".." not in group.parts and group.is_relative_to(mounted):
        folder = mount / group.relative_to(mounted)
        if folder.is_dir():
            return folder
    return mount


def _unescaped(field: str) -> str:
    """A path of mountinfo, in which spaces and the like are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _lines(path: Path) -> list[str]:
    """Empty where there is no such file to be read, as on other systems."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """None where the file is not there, or says ``max``."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _stat(path: Path) -> dict[str, int]:
    pairs = [line.split() for line in _lines(path)]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
