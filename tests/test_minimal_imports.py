"""The library needs torch, transformers, safetensors, numpy and scipy; the rest it imports where it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import entropy_probe
from entropy_probe.common import memory
from entropy_probe.errors import InputError
from entropy_probe.statistics.importance_sampling import pareto_smooth
from support import make_checkpoint, random_rollouts

HIDDEN = ["typer", "rich", "arviz_stats", "pyarrow", "matplotlib", "psutil", "trl", "peft", "accelerate", "datasets"]

SCRIPT = '''
import importlib.abc, json, sys

HIDDEN = set(sys.argv[1].split(","))


class Blind(importlib.abc.MetaPathFinder):
    """Finds what another finder does, unless it is hidden: then it is not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]

import torch
from transformers import AutoModelForCausalLM

import entropy_probe

folder, rows_file, parquet = sys.argv[2:]
rows = entropy_probe.read_rollouts(rows_file)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model(input_ids=torch.tensor([[3, 4, 5, 6]]), labels=torch.tensor([[3, 4, 5, 6]])).loss.backward()
optimizer.step()
optimizer.zero_grad()
live = entropy_probe.probe(model, entropy_probe.state_of_optimizer(optimizer, model), rows)
stored = entropy_probe.probe_checkpoint(folder, rows_file)
try:
    entropy_probe.read_rollouts(parquet)
    said = None
except entropy_probe.InputError as error:
    said = str(error)
print(json.dumps({
    "live": live.report.to_dict(),
    "stored": stored.report.to_dict(),
    "parquet": said,
    "loaded": sorted(HIDDEN & {name.partition(".")[0] for name in sys.modules}),
}))
'''


def test_the_library_reads_and_probes_without_what_the_command_needs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    rows, parquet = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    for path in (rows, parquet):
        entropy_probe.write_rollouts(random_rollouts(8, 4), path)
    source = str(Path(entropy_probe.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(HIDDEN), str(folder), str(rows), str(parquet)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loaded"] == []
    for name in ("live", "stored"):
        report = found[name]
        assert abs(report["first_order"]["u_cross"]) > 0.0
        for row in report["realized"]:
            assert row["pareto_k"] is None
            assert "arviz-stats, which fits the tail, is not installed" in row["null_reasons"]["pareto_k"]
    assert found["parquet"] is not None
    assert "\n" not in found["parquet"]
    assert found["parquet"].startswith(
        f"{parquet} is a Parquet file, which needs pyarrow, and pyarrow cannot be imported"
    )
    assert found["parquet"].endswith("install pyarrow, or use JSON Lines (.jsonl)")


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Importing ``name`` fails as where it is not installed."""
    for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)


def test_without_arviz_stats_no_tail_is_fitted_and_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).normal(size=100)
    assert pareto_smooth(weights)[0] is not None
    hide(monkeypatch, "arviz_stats")
    k_hat, smoothed, reason = pareto_smooth(weights)
    assert (k_hat, smoothed) == (None, None)
    assert reason is not None
    assert reason.startswith("arviz-stats, which fits the tail, is not installed")


def test_free_memory_is_found_without_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Linux's meminfo, which psutil reads too; elsewhere by free pages; and where nothing says it, it is asked for."""
    hide(monkeypatch, "psutil")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       2000 kB\nMemFree:        500 kB\nMemAvailable:   1000 kB\n")
    assert memory.memory_there(tmp_path)[0] == memory.Room(1_024_000.0, None)
    (tmp_path / "proc/meminfo").unlink()
    pages = {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert memory.memory_there(tmp_path)[0].bytes == 12288.0

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    with pytest.raises(
        InputError, match=r"^how much memory is free cannot be found .* without psutil; .*memory_bytes$"
    ):
        memory.memory_there(tmp_path)
