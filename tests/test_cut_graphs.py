"""A parameter that training reached and no response reaches is refused where its module runs, and told where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from entropy_probe import InputError, Settings, probe, state_of_optimizer
from entropy_probe.wrappers import forward_is

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


CUTS: dict[str, tuple[Callable[[Any], AbstractContextManager[None]], str]] = {
    "detach": (detached_below, "model.embed_tokens.weight"),
    "no_grad": (without_grad, "model.layers.0.mlp.up_proj.weight"),
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
    """Two linear layers beside a module, of which the second can be left out, with a scale in a dictionary."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.first, self.second = inner, nn.Linear(width, width), nn.Linear(width, width)
        self.scales = nn.ParameterDict({"both": nn.Parameter(torch.full((width,), 0.1))})
        self.routed = True

    def forward(self, hidden: Tensor) -> Tensor:
        found = self.inner(hidden) + self.scales["both"] * self.first(hidden)
        return found + self.second(hidden) if self.routed else found


def with_experts() -> tuple[Any, Experts]:
    model = support.tiny_model("llama-untied").eval()
    experts = Experts(model.model.layers[0].mlp, 16)
    model.model.layers[0].mlp = experts
    return model, experts


def test_an_expert_that_no_token_goes_to_is_only_told() -> None:
    model, experts = with_experts()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    experts.routed = False
    (told,) = [w for w in probe(model, adam, support.random_batch(), QUIET).report.warnings if "untouched" in w.code]
    assert "2 trainable parameters" in told.seen
    assert "mlp.second.weight" in told.seen


def test_a_parameter_in_a_dictionary_runs_with_the_module_around_it() -> None:
    model, experts = with_experts()
    adam = state_of_optimizer(support.trained_optimizer(model), model)
    scale = experts.scales["both"]

    @contextmanager
    def detached() -> Iterator[None]:
        def forward(hidden: Tensor) -> Tensor:
            found: Tensor = experts.inner(hidden) + scale.detach() * experts.first(hidden) + experts.second(hidden)
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
