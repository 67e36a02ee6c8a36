"""The five floors: imports run downward only."""

from __future__ import annotations

import ast
from pathlib import Path

import entropy_probe

ROOT = Path(entropy_probe.__file__).parent
FLOORS = {
    # 1: pure, torch or NumPy, plain records and their files
    "errors": 1, "files": 1, "progress": 1, "wrappers": 1, "rollouts": 1, "scores": 1, "u_statistics": 1, "units": 1,
    "adam_preconditioner": 1, "importance_sampling": 1, "float64_mode": 1, "virtual_step": 1, "report": 1, "demo": 1,
    "intervals": 1, "two_batches": 1, "noise": 1, "update_comparison": 1, "step_parts": 1, "what_if": 1, "linearity": 1,
    "settings": 1, "collectives": 1, "same_inputs": 1, "stored_precision": 1, "choices": 1, "recorded": 1, "dropout": 1,
    "memory": 1, "devices": 1,
    # 2: a model's log-probs, the optimizer's step, checkpoints
    "language_head": 2, "policy": 2, "adam_step": 2, "checkpoints": 2, "rounded_step": 2,
    # 3: what needs a model
    "gradients": 3, "realized": 3, "sampling": 3, "sweep": 3, "resampling": 3,
    # 4: the method and what it says
    "assemble": 4, "realized_rows": 4, "diagnostics": 4, "inputs": 4, "stages": 4, "pipeline": 4, "replay_check": 4,
    # 5: edges
    "cli": 5, "integrations": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip
FORBIDDEN_ON_THE_GROUND = {"transformers", "peft", "trl", "typer"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in ROOT.rglob("*.py")} == set(FLOORS)


def test_imports_run_downward_only() -> None:
    for path in ROOT.rglob("*.py"):
        for module in imports(path):
            parts = module.split(".")
            if parts[0] == "entropy_probe" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room(path):
                assert FLOORS[parts[1]] <= FLOORS[room(path)], f"{path.relative_to(ROOT)} imports {module}"


def test_the_ground_floor_knows_no_frameworks_and_no_room_imports_in_a_circle() -> None:
    edges: dict[str, set[str]] = {name: set() for name in FLOORS}
    for path in ROOT.rglob("*.py"):
        found = imports(path)
        if FLOORS[room(path)] == 1:
            assert not {module.split(".")[0] for module in found} & FORBIDDEN_ON_THE_GROUND, path
        edges[room(path)] |= {
            parts[1] for parts in (m.split(".") for m in found) if parts[0] == "entropy_probe" and len(parts) > 1
        } & set(FLOORS)
    resolved: set[str] = set()
    while len(resolved) < len(edges):
        ready = {name for name, needs in edges.items() if name not in resolved and needs - {name} <= resolved}
        assert ready, f"a circle among {sorted(set(edges) - resolved)}"
        resolved |= ready
