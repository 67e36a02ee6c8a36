"""Memory that is there: control groups of both versions, in made-up roots, limit it below what the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from entropy_probe.common.memory import Room, memory_there
from entropy_probe.pipeline import inputs
from entropy_probe.ranks.collectives import Ranks
from rank_processes import on_ranks

MB = 1_000_000
V2 = "26 22 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 31 0:29 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
NOT_OF_MEMORY = "32 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"


def rooted(root: Path, group: str, mounts: str, files: Mapping[str, str]) -> Room:
    """The room of a process in ``group``, files being given below ``sys/fs/cgroup``."""
    texts = {"proc/self/cgroup": group, "proc/self/mountinfo": mounts}
    texts |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    machine, *rooms = memory_there(root)
    assert machine.group is None
    return min(rooms, key=lambda room: room.bytes, default=machine)


def level(limit: object, used: int, inactive: int = 0, at: str = "", **more: object) -> dict[str, str]:
    """The files of a group of version 2."""
    files = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {inactive}"}
    return {f"{at}{name}": str(value) for name, value in (files | {f"memory.{k}": v for k, v in more.items()}).items()}


def old_level(limit: int, used: int, inactive: int = 0, at: str = "memory/", above: int = 2**62) -> dict[str, str]:
    """The files of a group of version 1."""
    stat = f"inactive_file 1\nhierarchical_memory_limit {above}\ntotal_inactive_file {inactive}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{at}{name}": str(value) for name, value in files.items()}


def test_a_container_of_version_2_leaves_its_limit_less_what_it_uses(tmp_path: Path) -> None:
    """Pages of files that were read once are given back, and are not in use."""
    found = rooted(tmp_path, "0::/", V2, level(80 * MB, 50 * MB, 20 * MB))
    assert found == Room(50.0 * MB, str(tmp_path / "sys/fs/cgroup"))


def test_a_limit_that_throttles_counts_as_one(tmp_path: Path) -> None:
    assert rooted(tmp_path, "0::/", V2, level("max", 50 * MB, high=70 * MB)).bytes == 20 * MB


@pytest.mark.parametrize(("job", "step", "expected"), [(90, 70, 20), (60, 70, 5), ("none", 70, 20), (90, "none", 35)])
def test_the_least_room_of_a_job_and_its_step_counts(
    tmp_path: Path, job: int | str, step: int | str, expected: int
) -> None:
    """A SLURM job's limit is above the step's that the process is in, and other steps use of it too."""
    files = level("max", 900 * MB)
    for folder, limit, used in (("slurm/job_7/", job, 55), ("slurm/job_7/step_0/", step, 50)):
        files |= level("max" if limit == "none" else int(limit) * MB, used * MB, at=folder)
    assert rooted(tmp_path, "0::/slurm/job_7/step_0", V2, files).bytes == expected * MB


def test_what_uses_more_than_its_limit_has_no_room(tmp_path: Path) -> None:
    assert rooted(tmp_path, "0::/", V2, level(80 * MB, 81 * MB)).bytes == 0.0


@pytest.mark.parametrize("path", ["/docker/abc", "/kubepods/pod1/../../other", "/../outside"])
def test_a_group_that_is_not_to_be_seen_is_the_mount(tmp_path: Path, path: str) -> None:
    assert rooted(tmp_path, f"0::{path}", V2, level(80 * MB, 50 * MB)).bytes == 30 * MB


@pytest.mark.parametrize(
    ("mounted", "group", "at"),
    [("/docker/abc", "/docker/abc", ""), ("/", "/docker/abc", "docker/abc/"), ("/docker/abc", "/docker/abc/in", "in/")],
)
def test_version_1_is_read_where_its_memory_hierarchy_is_mounted(
    tmp_path: Path, mounted: str, group: str, at: str
) -> None:
    mounts = "\n".join([NOT_OF_MEMORY, V1.format(mounted=mounted)])
    files = old_level(80 * MB, 50 * MB, 10 * MB, f"memory/{at}") | old_level(5 * MB, 5 * MB, at="cpu/")
    if at:
        files |= old_level(9223372036854771712, 70 * MB)
    found = rooted(tmp_path, f"12:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:{group}\n0::/x", mounts, files)
    assert found.bytes == 40 * MB


def test_version_1_knows_of_limits_around_what_a_container_sees(tmp_path: Path) -> None:
    files = old_level(2**63 - 4096, 50 * MB, above=60 * MB)
    assert rooted(tmp_path, "4:memory:/job/x", V1.format(mounted="/job/x"), files).bytes == 10 * MB


@pytest.mark.parametrize(
    ("group", "mounts", "files"),
    [
        ("0::/", V2, level("max", 50 * MB)),
        ("0::/", V2, {}),
        ("0::/user.slice", V2, level("max", 5, at="user.slice/")),
        ("4:memory:/", V1.format(mounted="/"), old_level(9223372036854771712, 50 * MB)),
        ("0::/", NOT_OF_MEMORY, level(80 * MB, 50 * MB)),
    ],
    ids=["v2-max", "v2-without-controller", "v2-nested", "v1-none", "not-mounted"],
)
def test_without_a_limit_the_machine_says_what_is_there(
    tmp_path: Path, group: str, mounts: str, files: Mapping[str, str]
) -> None:
    assert rooted(tmp_path, group, mounts, files).group is None


def test_where_there_is_no_proc_the_machine_says_what_is_there(tmp_path: Path) -> None:
    (machine,) = memory_there(tmp_path)
    assert 0 < machine.bytes <= psutil.virtual_memory().total


def test_a_mount_point_with_a_blank_in_its_name_is_found(tmp_path: Path) -> None:
    mounts = V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/my\\040groups")
    assert rooted(tmp_path, "0::/", mounts, level(80 * MB, 50 * MB, at="my groups/")).bytes == 30 * MB


def test_the_probe_takes_the_containers_memory_where_it_is_less_than_the_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "memory_there", lambda: (Room(9e9, None), Room(2e9, "/job")))
    assert inputs.free_memory(torch.device("cpu")) == 2e9
    monkeypatch.setattr(inputs, "memory_there", lambda: (Room(1e9, None), Room(2e9, "/job")))
    assert inputs.free_memory(torch.device("cpu")) == 1e9


def test_ranks_of_one_group_share_its_room_and_those_of_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(ranks: Ranks) -> list[float]:
        found = []
        for group in ("/job", f"/job/rank-{ranks.rank}"):
            rooms = Room(9e9, None), Room(3e9, group)
            monkeypatch.setattr(inputs, "memory_there", lambda rooms=rooms: rooms)
            found.append(inputs.free_memory(torch.device("cpu"), ranks))
        return found

    np.testing.assert_allclose(on_ranks(2, work), [[1.5e9, 3e9]] * 2)


def test_every_group_around_a_rank_is_parted_among_the_ranks_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's 100 GB are shared, though each task's own group has less; a rank may be in more groups than another."""

    def work(ranks: Ranks) -> list[float]:
        task = Room(60e9, f"/job/task-{ranks.rank}")
        deeper = Room(70e9, "/job/task-0/deeper")
        found = []
        for more in ((), (deeper,) if ranks.rank == 0 else ()):
            rooms = (Room(900e9, None), *more, task, Room(100e9, "/job"))
            monkeypatch.setattr(inputs, "memory_there", lambda rooms=rooms: rooms)
            found.append(inputs.free_memory(torch.device("cpu"), ranks))
        return found

    np.testing.assert_allclose(on_ranks(2, work), [[50e9, 50e9]] * 2)
