"""The order of the rooms: a folder imports only folders that stand before it, and no files import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
from enum import Enum
from pathlib import Path

import pytest

import entropy_probe

ROOT = Path(entropy_probe.__file__).parent
ORDER = [
    {"errors"},
    {"compat"},
    {"common"},
    {"ranks", "statistics"},
    {"data"},
    {"optimizers", "model", "losses"},
    {"targets", "sampling", "checkpoints"},
    {"gradients"},
    {"realized"},
    {"report"},
    {"pipeline"},
    {"replay_check"},
    {"integrations", "cli"},
    {"__main__", "__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
FRAMEWORKS = {"torch", "transformers", "peft", "trl", "accelerate"}
"""What pure mathematics does not know."""
NOT_FOR_THE_LIBRARY = {"typer", "rich", "arviz_stats", "pyarrow", "matplotlib", "psutil", "trl", "peft", "accelerate"}
"""What the library imports where it is used, if at all."""


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(path): path for path in ROOT.rglob("*.py")}


def imported(path: Path, *, when_loaded: bool = False) -> set[str]:
    """Modules that a file imports, wherever in it, or only those that it imports when it is loaded itself."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A file of a package is meant, not the package's face.
            found |= {name for name in names if name in FILES} or {node.module}
    return found


def test_every_room_stands_somewhere_in_the_order() -> None:
    assert {room(path) for path in ROOT.rglob("*.py")} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    for path in FILES.values():
        if room(path) != name:
            continue
        for other in imported(path) & FILES.keys():
            there = room(FILES[other])
            assert there == name or FLOOR[there] < FLOOR[name], f"{path.relative_to(ROOT)} imports {other}"


def test_no_files_import_each_other_in_a_circle() -> None:
    # A package's face imports its files; whoever imports one of them runs the face first, which is no circle of ideas.
    needs = {
        name: (imported(path) & FILES.keys()) - {name} for name, path in FILES.items() if path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(needs).prepare()


def test_no_folders_of_a_room_import_each_other_in_a_circle() -> None:
    def folder(name: str) -> str:
        return module(FILES[name].parent / "__init__.py") if FILES[name].name != "__init__.py" else name

    needs: dict[str, set[str]] = {}
    for name, path in FILES.items():
        inside = folder(name)
        if inside.count(".") < 2 or path.name == "__init__.py":
            continue  # the files of a room itself stand between its folders
        needs.setdefault(inside, set()).update({folder(other) for other in imported(path) & FILES.keys()} - {inside})
    graphlib.TopologicalSorter(needs).prepare()


MANY_PARAMETERS = {
    "pipeline/run.py:probe_checkpoint": "public, its signature stays",
    "replay_check/run.py:replay": "public, its signature stays",
    "gradients/capture/layers.py:forward": "torch sets the signature: a tensor each, through autograd.Function.apply",
}
"""Functions with more than eight parameters, and why. The command line is free: an option is a parameter there."""


def test_no_function_has_more_than_eight_parameters_but_for_a_reason() -> None:
    found = set()
    for path in FILES.values():
        if room(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in given if a.arg not in ("self", "cls")]) > 8:
                    found.add(f"{path.relative_to(ROOT).as_posix()}:{node.name}")
    assert found == set(MANY_PARAMETERS)


def test_statistics_know_numpy_and_scipy_alone() -> None:
    for path in (ROOT / "statistics").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & FRAMEWORKS, path


def loaded_with(name: str) -> set[str]:
    """Modules of other libraries that one of ours imports when it is loaded, and those that it imports, and so on."""
    ours, others, waiting = {name}, set(), [name]
    while waiting:
        needs = imported(FILES[waiting.pop()], when_loaded=True)
        others |= needs - FILES.keys()
        waiting += (needs & FILES.keys()) - ours
        ours |= needs & FILES.keys()
    return others


CHOICES = [
    value
    for name in entropy_probe.__all__
    if isinstance(value := getattr(entropy_probe, name), type) and issubclass(value, Enum)
]


@pytest.mark.parametrize("choice", CHOICES)
def test_public_choices_stand_in_files_that_need_no_framework_but_torch(choice: type[Enum]) -> None:
    needs = loaded_with(choice.__module__)
    assert not {name.partition(".")[0] for name in needs} & (FRAMEWORKS - {"torch"})
    assert not {name for name in needs if name.startswith("torch.distributed")}


def test_what_the_command_needs_is_loaded_by_the_command_alone() -> None:
    needs = loaded_with("entropy_probe")
    assert {"torch", "transformers", "scipy.special"} <= needs
    assert not {name.partition(".")[0] for name in needs} & NOT_FOR_THE_LIBRARY


def private(name: str) -> bool:
    """Whether a name, or a part of a dotted one, begins with one underscore; one at the end too is enum's, and public."""
    return any(part.startswith("_") and not part.startswith("__") and part[-1] != "_" for part in name.split("."))


PUBLIC_BY_DOCUMENTATION = {
    "os._exit": "Python documents it: the exit that runs no handlers",
}
ASKING = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}
"""Functions that take an attribute's name as text."""


def private_names(tree: ast.Module) -> list[str]:
    """Where code asks anything but itself or its class for a private name, or imports one, by line."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.Attribute(value=owner, attr=name):
                own = isinstance(owner, ast.Name) and owner.id in {"self", "cls"}
                names = [] if own or ast.unparse(node) in PUBLIC_BY_DOCUMENTATION else [name]
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [node.module or "", *(alias.name for alias in node.names)]
            case ast.Call(func=ast.Name(id=function) | ast.Attribute(attr=function)) if function in ASKING:
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            case ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name(id="vars")))):
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            case ast.Subscript(value=ast.Call(func=ast.Name(id="vars")), slice=ast.Constant(value=str(name))):
                names = [name]
            case ast.Compare(left=ast.Constant(value=str(name)), comparators=[ast.Call(func=ast.Name(id="vars"))]):
                names = [name]
        found += [f"{node.lineno}: {name}" for name in names if private(name)]
    return found


def test_private_names_of_others_are_asked_for_in_compat_alone() -> None:
    """Also those of other files of this package: ``from entropy_probe.x import _y`` is one."""
    found = [
        f"{path.relative_to(ROOT)}:{place}"
        for path in sorted(FILES.values())
        if room(path) != "compat"
        for place in private_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "module._parameters",
        "model.layer._buffers['x'] = 1",
        "super()._step()",
        "import torch._dynamo",
        "from torch.utils._pytree import tree_flatten",
        "from torch.utils.checkpoint import _Mode",
        "from entropy_probe.realized.sweep import _slope",
        "getattr(model, '_no_split_modules', None)",
        "operator.attrgetter('state._policy')",
        "vars(model).get('_original')",
        "vars(model)['_original']",
        "'_original' in vars(model)",
    ],
)
def test_the_search_sees_a_private_name_however_it_is_asked_for(code: str) -> None:
    assert private_names(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "self._own",
        "cls._make()",
        "os._exit(1)",
        "type(x).__name__",
        "vars(x).get('forward')",
        "from __future__ import a",
    ],
)
def test_the_search_leaves_what_is_ones_own_or_public(code: str) -> None:
    assert not private_names(ast.parse(code))


def test_tests_share_helper_modules_and_never_import_each_other() -> None:
    here = Path(__file__).parent
    for path in here.rglob("test_*.py"):
        assert not [name for name in imported(path) if name.rpartition(".")[2].startswith("test_")], path.name
