"""A parameter that training reached and no response reaches is refused, but of an expert that no token was sent to told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.compat.torch_modules import forward_is
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.replay_check import ReplaySettings, replay

QUIET = Settings(noise=False)


def detached_below(model: Any) -> AbstractContextManager[None]:
    layer = model.model.layers[1]
    inner = layer.forward
    return forward_is(layer, lambda hidden, *rest, **more: inner(hidden.detach(), *rest, **more))


def without_grad(model: Any) -> AbstractContextManager[None]:
    projection = model.model.layers[0].mlp.up_proj
    inner = projection.forward

    def forward(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return inner(hidden)  # type: ignore[no-any-return]

    return forward_is(projection, forward)


def by_a_kernel_without_a_backward(model: Any) -> AbstractContextManager[None]:
    """As quantised layers have it in evaluation mode: weights taken by address."""
    projection = model.model.layers[0].self_attn.o_proj

    def forward(hidden: Tensor) -> Tensor:
        return torch.from_numpy(hidden.detach().numpy() @ projection.weight.detach().numpy().T)

    return forward_is(projection, forward)


def read_past_its_module(model: Any) -> AbstractContextManager[None]:
    """The module that holds the weight is never called."""
    mlp = model.model.layers[0].mlp

    def forward(hidden: Tensor) -> Tensor:
        up = nn.functional.linear(hidden, mlp.up_proj.weight.detach())
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)) * up)  # type: ignore[no-any-return]

    return forward_is(mlp, forward)


def skipped(model: Any) -> AbstractContextManager[None]:
    return forward_is(model.model.layers[1], lambda hidden, *rest, **more: hidden)


CUTS: dict[str, tuple[Callable[[Any], AbstractContextManager[None]], str]] = {
    "detach": (detached_below, "model.embed_tokens.weight"),
    "no_grad": (without_grad, "model.layers.0.mlp.up_proj.weight"),
    "past-the-module": (read_past_its_module, "model.layers.0.mlp.up_proj.weight"),
    "skipped": (skipped, "model.layers.1.self_attn.q_proj.weight"),
    "kernel": (by_a_kernel_without_a_backward, "model.layers.0.self_attn.q_proj.weight"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_whatever_cuts_the_graph_the_parameter_below_is_named(cut: str) -> None:
    how, name = CUTS[cut]
    model = support.tiny_model("llama-untied").eval()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with (
        how(model),
        pytest.raises(InputError, match=f"^parameter {name}.* was trained.*no response's gradient reaches"),
    ):
        probe(model, adam, support.random_batch(), QUIET)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert "untouched_parameters" not in {
        w.code for w in probe(model, adam, support.random_batch(), QUIET).report.warnings
    }


class Experts(nn.Module):
    """Two experts beside a module, of which the second can be left out, with a scale in a dictionary and maybe a router."""

    def __init__(self, inner: nn.Module, width: int, router: str) -> None:
        super().__init__()
        self.inner = inner
        self.experts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.add_module(router, nn.Linear(width, 1))
        self.scored_by = router
        self.scales = nn.ParameterDict({"both": nn.Parameter(torch.full((width,), 0.1))})
        self.routed = True

    def forward(self, hidden: Tensor) -> Tensor:
        found = self.inner(hidden) + self.get_submodule(self.scored_by)(hidden) * self.scales["both"] * self.experts[0](
            hidden
        )
        return found + self.experts[1](hidden) if self.routed else found


def with_experts(router: str = "gate") -> tuple[Any, Experts]:
    model = support.tiny_model("llama-untied").eval()
    experts = Experts(model.model.layers[0].mlp, 16, router)
    model.model.layers[0].mlp = experts
    return model, experts


@pytest.mark.parametrize("router", ["gate", "router"])
def test_an_expert_that_no_token_goes_to_is_only_told(router: str) -> None:
    model, experts = with_experts(router)
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    experts.routed = False
    (told,) = [w for w in probe(model, adam, support.random_batch(), QUIET).report.warnings if "untouched" in w.code]
    assert "2 trainable parameters" in told.seen
    assert "Adam's moments show that training reached them" in told.seen
    assert "mlp.experts.1.weight" in told.seen


def test_without_a_router_a_layer_that_is_left_out_is_no_expert() -> None:
    model, experts = with_experts("mixer")
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    experts.routed = False
    with pytest.raises(InputError, match=r"^parameter model\.layers\.0\.mlp\.experts\.1\.weight \(and 1 more"):
        probe(model, adam, support.random_batch(), QUIET)


def test_an_expert_below_a_cut_is_refused_as_any_other() -> None:
    model, experts = with_experts()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    expert: Any = experts.experts[1]
    inner = expert.forward
    with forward_is(expert, lambda hidden: inner(hidden).detach()), pytest.raises(InputError, match=r"mlp\.experts\.1"):
        probe(model, adam, support.random_batch(), QUIET)


def test_replay_refuses_what_the_probe_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.tiny_model("llama-untied")
    optimizer = support.trained_optimizer(model)
    before = support.save_checkpoint(model, optimizer, tmp_path / "checkpoint-3")
    ids = torch.tensor([[4, 5, 6, 1]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = support.save_checkpoint(model, optimizer, tmp_path / "checkpoint-4", step=4)
    write_rollouts(support.random_rollouts(), tmp_path / "rollouts.jsonl")
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: hidden)
    with pytest.raises(InputError, match=r"^parameter model\.layers\.0\.mlp\.gate_proj\.weight .* was trained"):
        replay(before, after, tmp_path / "rollouts.jsonl", ReplaySettings(length_weight="grpo"))


def test_a_parameter_in_a_dictionary_runs_with_the_module_around_it() -> None:
    model, experts = with_experts()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    scale = experts.scales["both"]

    @contextmanager
    def detached() -> Iterator[None]:
        def forward(hidden: Tensor) -> Tensor:
            first, second = (expert(hidden) for expert in experts.experts)
            found: Tensor = (
                experts.inner(hidden) + experts.get_submodule("gate")(hidden) * scale.detach() * first + second
            )
            return found

        with forward_is(experts, forward):
            yield

    with detached(), pytest.raises(InputError, match=r"parameter model\.layers\.0\.mlp\.scales\.both was trained"):
        probe(model, adam, support.random_batch(), QUIET)


def test_one_that_training_never_reached_is_only_told() -> None:
    model = support.tiny_model("llama-untied").eval()
    with detached_below(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        ids = torch.tensor([[4, 5, 6, 1]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        found = probe(model, state_of_optimizer(optimizer, model), support.random_batch(), QUIET).report
    assert "untouched_parameters" in {warning.code for warning in found.warnings}
