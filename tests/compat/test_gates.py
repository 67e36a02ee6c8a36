"""A private name that a library no longer has, or has for something else, ends in one line and never in another number."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo
import torch.utils._pytree
import torch.utils.checkpoint
import transformers
import trl
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from entropy_probe.compat.accelerate import without_accelerate_autocast
from entropy_probe.compat.checkpoint_wrappers import (
    checkpoint_wrappers,
    is_selective,
    named_parameters,
    unwrapped_names,
    wrapped_layer,
)
from entropy_probe.compat.fsdp import gathered_as_held, mixed_precision
from entropy_probe.compat.gates import CHECKED, attribute, module_name
from entropy_probe.compat.torch_modules import (
    HOOKS,
    flattened,
    has_hooks,
    own_buffers,
    own_parameters,
    unflattened,
    unwrap,
)
from entropy_probe.compat.transformers_models import unexpected_keys_to_ignore, unsplit_classes
from entropy_probe.compat.trl import adds_entropy_bonus, entropy_coefficient, tokenizer_of
from entropy_probe.errors import InputError
from entropy_probe.ranks.collectives import Ranks
from rank_processes import failed_cases
from support import tiny_model


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    return str(caught.value)


def assert_tells(line: str, library: str, name: str, version: str, problem: str = "is missing") -> None:
    """Which library, in which version, lacks what, and what to do."""
    assert "\n" not in line
    assert re.search(rf"{re.escape(name)} {problem} in {library} {re.escape(version)}", line), line
    assert line.endswith(f"install {library} {CHECKED[library]}")


@pytest.mark.parametrize("name", ["_parameters", "_buffers", *HOOKS])
def test_a_module_without_its_tables_is_refused(name: str) -> None:
    module = nn.BatchNorm1d(2)
    del module.__dict__[name]
    read = {"_parameters": own_parameters, "_buffers": own_buffers}.get(name, has_hooks)
    assert_tells(refusal(lambda: read(module)), "torch", f"BatchNorm1d.{name}", torch.__version__)


def test_a_table_of_another_kind_is_refused() -> None:
    module = nn.Linear(2, 2)
    vars(module)["_parameters"] = ["weight", "bias"]
    line = refusal(lambda: own_parameters(module))
    assert_tells(line, "torch", "Linear._parameters", torch.__version__, "is of type list")


@pytest.mark.parametrize(
    ("module", "name", "read"),
    [
        (checkpoint_wrapper, "_CHECKPOINT_PREFIX", lambda: list(named_parameters(nn.Linear(1, 1)))),
        (checkpoint_wrapper, "_CHECKPOINT_PREFIX", lambda: unwrapped_names(nn.Linear(1, 1))),
        (checkpoint_wrapper, "CheckpointWrapper", lambda: list(checkpoint_wrappers(nn.Linear(1, 1)))),
        (torch.utils.checkpoint, "_CachingTorchDispatchMode", lambda: is_selective(None)),
        (torch.utils._pytree, "tree_flatten", lambda: flattened((1, 2))),
        (torch.utils._pytree, "tree_unflatten", lambda: unflattened([1], None)),
        (torch._dynamo, "OptimizedModule", lambda: unwrap(nn.Linear(1, 1))),
    ],
)
def test_a_module_of_torch_without_the_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, read: Callable[[], object]
) -> None:
    read() if name != "tree_unflatten" else None
    monkeypatch.delattr(module, name)
    assert_tells(refusal(read), "torch", f"{module.__name__}.{name}", torch.__version__)


def test_a_module_that_is_gone_is_refused() -> None:
    line = refusal(lambda: module_name("torch.of_another_time", "name", type))
    assert_tells(line, "torch", "torch.of_another_time", torch.__version__)


def test_what_is_inside_a_wrapper_is_never_guessed() -> None:
    compiled = torch.compile(nn.Linear(1, 1))
    del compiled._modules["_orig_mod"]
    assert_tells(refusal(lambda: unwrap(compiled)), "torch", "OptimizedModule._orig_mod", torch.__version__)
    wrapper = checkpoint_wrapper.checkpoint_wrapper(nn.Linear(1, 1))
    wrapper._modules["inside"] = wrapper._modules.pop("_checkpoint_wrapped_module")
    line = refusal(lambda: wrapped_layer(wrapper))
    assert_tells(line, "torch", "CheckpointWrapper._checkpoint_wrapped_module", torch.__version__)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("_keys_to_ignore_on_load_unexpected", unexpected_keys_to_ignore),
        ("_no_split_modules", unsplit_classes),
    ],
)
def test_a_transformers_model_without_the_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[PreTrainedModel], object]
) -> None:
    model = tiny_model()
    read(model)
    vars(model).pop(name, None)
    for owner in type(model).__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    assert_tells(refusal(lambda: read(model)), "transformers", name, transformers.__version__)


@pytest.mark.parametrize(
    ("name", "read"), [("_tokenizer", tokenizer_of), ("_entropy_bonus_enabled", adds_entropy_bonus)]
)
def test_a_trainer_without_the_name_is_refused(name: str, read: Callable[[Any], object]) -> None:
    assert_tells(refusal(lambda: read(SimpleNamespace())), "trl", name, trl.__version__)


def test_an_adaptive_bonus_without_the_entropy_that_it_looks_at_is_refused() -> None:
    trainer = SimpleNamespace(_entropy_bonus_enabled=True, use_adaptive_entropy=True, entropy_coef=0.1)
    assert_tells(refusal(lambda: entropy_coefficient(trainer)), "trl", "_last_world_entropy", trl.__version__)
    trainer.use_adaptive_entropy = False
    assert entropy_coefficient(trainer) == 0.1


def test_accelerates_mixed_precision_is_never_left_on_because_its_name_changed() -> None:
    model = nn.Linear(2, 2)
    original = model.forward
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert model.forward != original
    with without_accelerate_autocast(model):
        assert model.forward == original
    del vars(model)["_original_forward"]
    line = refusal(lambda: without_accelerate_autocast(model))
    assert_tells(line, "accelerate", "Linear._original_forward", accelerate.__version__)


def test_a_forward_that_is_the_users_own_is_left() -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x: 2 * x  # type: ignore[method-assign]
    with without_accelerate_autocast(model):
        assert torch.equal(model.forward(torch.ones(2)), torch.full((2,), 2.0))


def cut() -> Any:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return model


def without(owner: Callable[[Any], Any], name: str, read: Callable[[Any], object]) -> Callable[[Ranks], None]:
    """A case: ``owner`` of a sharded model's state has lost ``name``, and the read is refused and changes nothing."""

    def case(ranks: Ranks) -> None:
        model = cut()
        read(model)
        holder = owner(model._get_fsdp_state())
        found = next(found for found in (holder, *type(holder).__mro__) if name in vars(found))
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(found, name)
            line = refusal(lambda: read(model))
        assert_tells(line, "torch", f"{type(holder).__qualname__}.{name}", torch.__version__)
        read(model)

    return case


def gather(model: Any) -> None:
    with gathered_as_held(model):
        assert model._get_fsdp_state()._mp_policy.param_dtype is None
    assert model._get_fsdp_state()._mp_policy.param_dtype is torch.bfloat16


def unknown_parameter(ranks: Ranks) -> None:
    model = cut()
    p = group_of(model._get_fsdp_state()).fsdp_params[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(p), "init_unsharded_param", lambda self: None)
        line = refusal(lambda: gather(model))
    assert_tells(line, "torch", "FSDPParam._unsharded_param", torch.__version__)


def without_state(ranks: Ranks) -> None:
    model = cut()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(FSDPModule, "_get_fsdp_state")
        line = refusal(lambda: mixed_precision(model))
    assert_tells(line, "torch", "FSDPSequential._get_fsdp_state", torch.__version__)


def group_of(state: Any) -> Any:
    return state._fsdp_param_groups[0] if hasattr(state, "_fsdp_param_groups") else state._fsdp_param_group


CASES: dict[str, Callable[[Ranks], None]] = {
    "the policy": without(lambda state: state, "_mp_policy", mixed_precision),
    "a group's policy": without(group_of, "mp_policy", gather),
    "a group's parameters": without(group_of, "fsdp_params", gather),
    "what was gathered": without(lambda state: group_of(state).fsdp_params[0], "all_gather_outputs", gather),
    "the whole parameter": unknown_parameter,
    "a parameter's types": without(lambda state: group_of(state).fsdp_params[0], "init_dtype_attrs", gather),
    "the state": without_state,
}


@pytest.fixture(scope="module")
def failed() -> dict[str, str]:
    return failed_cases(1, CASES)[0]


@pytest.mark.parametrize("case", CASES)
def test_shards_whose_state_has_lost_a_name_are_refused(failed: dict[str, str], case: str) -> None:
    assert case not in failed, failed[case]


def test_a_gate_tells_what_it_found_instead() -> None:
    line = refusal(lambda: attribute("torch", SimpleNamespace(_x=3), "_x", (str, bytes)))
    assert_tells(line, "torch", "SimpleNamespace._x", torch.__version__, "is of type int")
