"""What surrounds the engine on models that FSDP2 shards, against the same models whole in one process, in float64.

Two ranks are started once and go through all cases; a test looks up what became of its case on each rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from entropy_probe.checkpoints.sharded import decoder_layers, shard_model, sharding_of
from entropy_probe.compat.fsdp import gathered_as_held
from entropy_probe.data.rollouts import RolloutBatch, group_rollouts
from entropy_probe.data.units import exact_units
from entropy_probe.errors import InputError
from entropy_probe.gradients import (
    Storage,
    UnitGradients,
    Wanted,
    loss_gradient,
    marked,
    prepare,
    response_dots,
    unit_gradients,
    weighted_gradient,
)
from entropy_probe.gradients.capture.backward_order import sharded_layers
from entropy_probe.gradients.capture.modules import Treatment
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.gradients.preparation import measure_activations
from entropy_probe.gradients.treatments import prove_rules
from entropy_probe.model.language_head import HeadMode
from entropy_probe.model.policy import Policy
from entropy_probe.model.virtual_step import virtual_step
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.pipeline.run import probe
from entropy_probe.pipeline.settings import Settings
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.targets.base import TokenPair
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget
from entropy_probe.targets.of_responses import TargetOfResponses
from entropy_probe.targets.registry import ALSO_MOVED
from rank_processes import failed_cases
from support import CONFIGS, lora_model, random_batch, random_rollouts, tiny_model, trained_optimizer, wrapped

RELATIVE = 1e-9
SCORE, RAO_BLACKWELL = EntropyTarget(Estimator.SCORE), EntropyTarget(Estimator.RAO_BLACKWELL)


def cut(model: nn.Module, ranks: Ranks, *, keeps_root: bool = False) -> None:
    """Layer by layer, as a checkpoint's, or as a trainer may: then the root's weights stay gathered after a forward."""
    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    if not keeps_root:
        shard_model(Path("live"), model, mesh)
        return
    for layer in list(decoder_layers(model)):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def made(name: str) -> Any:
    if name == "lora":
        # One row in every lora_A, of which the second rank has none.
        return lora_model(tiny_model("llama-untied"), rank=1).double()
    if name == "gpt2-frozen":
        model = tiny_model("gpt2").double()
        for parameter_name, p in model.named_parameters():
            p.requires_grad_("h.1" in parameter_name)
        return model
    return tiny_model(name).double()


@dataclass(frozen=True)
class Pair:
    """One model whole, as one process has it, and sharded."""

    whole: Policy
    sharded: Policy

    @staticmethod
    def of(model: nn.Module, again: nn.Module, ranks: Ranks, *, keeps_root: bool = False) -> Pair:
        cut(again, ranks, keeps_root=keeps_root)
        return Pair(
            Policy(model, 0.8, microbatch_size=4),
            Policy(again, 0.8, microbatch_size=4, sharding=sharding_of(again, ranks)),
        )

    def own(self, name: str, whole: Tensor) -> Tensor:
        """This rank's span of a whole tensor."""
        return whole.flatten()[self.sharded.sharding.own(name)]


def pair_of(name: str, ranks: Ranks) -> Pair:
    return Pair.of(made(name), made(name), ranks)


@functools.cache
def batch_of() -> RolloutBatch:
    return random_batch(5, [3, 2, 4, 2, 3])


def close(found: Tensor, expected: Tensor, scale: float | None = None) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        limit = float(expected.abs().max()) if scale is None else scale
        assert float((found - expected).abs().max()) <= RELATIVE * limit


def token_weights(batch: RolloutBatch) -> TokenPair:
    """ω and β a token, some of them 0."""
    generator = torch.Generator().manual_seed(3)
    omega, beta = torch.randn((2, batch.tokens), generator=generator, dtype=torch.float64)
    return TokenPair(omega * (omega.abs() > 0.3), beta)


def gradients(
    policy: Policy,
    batch: RolloutBatch,
    pair: Pair,
    target: EntropyTarget,
    storage: Storage,
    update: TokenPair | None = None,
    also: tuple[TargetOfResponses, ...] = (),
) -> UnitGradients:
    generator = torch.Generator().manual_seed(1)
    whole = {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1
        for name, p in pair.whole.trainable().items()
    }
    p = {n: pair.own(n, v) for n, v in whole.items()} if policy.sharding.sharded else whole
    p = {n: v.view(policy.held()[n].shape) for n, v in p.items()}
    a = torch.randn(len(batch.responses), generator=generator, dtype=torch.float64)
    geometry = Geometry.fixed(p, {name: 0.5 if "norm" in name else 1.0 for name in p})
    sides = Sides(target, a if update is None else update, also)
    return unit_gradients(policy, batch, exact_units(len(batch.groups)), sides, geometry, wanted=Wanted(storage))


def same_gradients(name: str, target: EntropyTarget, storage: Storage, checkpointed: bool, ranks: Ranks) -> None:
    assert_same_gradients(pair_of(name, ranks), target, storage, checkpointed)


def same_token_weights(name: str, target: EntropyTarget, storage: Storage, ranks: Ranks) -> None:
    """Y weighs tokens, and reward and length are asked for beside it."""
    update = token_weights(batch_of())
    assert_same_gradients(pair_of(name, ranks), target, storage, storage is Storage.STREAMED, update, ALSO_MOVED)


def assert_same_gradients(
    pair: Pair,
    target: EntropyTarget,
    storage: Storage,
    checkpointed: bool,
    update: TokenPair | None = None,
    also: tuple[TargetOfResponses, ...] = (),
) -> None:
    batch, found = batch_of(), []
    for policy in (pair.sharded, pair.whole):
        with marked(policy.model) if checkpointed else nullcontext():
            found.append(gradients(policy, batch, pair, target, storage, update, also))
    sharded, whole = found
    assert sharded.untouched == whole.untouched
    assert sharded.rules is not None
    assert whole.rules is not None
    assert sharded.rules.treatments == whole.rules.treatments
    close(sharded.scores, whole.scores)
    assert sharded.also.keys() == whole.also.keys()
    for mine_of, theirs_of in [(sharded.dots, whole.dots), *((sharded.also[n], whole.also[n]) for n in whole.also)]:
        for group, dots in theirs_of.items():
            for field in ("x_dot_sum", "y_dot_sum", "diagonal"):
                mine, theirs = getattr(mine_of[group], field), getattr(dots, field)
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=RELATIVE * np.abs(theirs).max())
    scale = max(float(y.abs().max()) for y in whole.ascent.values())
    for parameter, y in whole.ascent.items():
        close(sharded.ascent[parameter].flatten(), pair.own(parameter, y), scale)


@dataclass(frozen=True)
class Means:
    """Dots of X_u with Ȳ and every Ȳᵏ, and with YS_u and every YᵏS_u."""

    ascent: Mapping[str, Tensor]
    terms: Sequence[Mapping[str, Tensor]]

    @property
    def count(self) -> int:
        return 2 + 2 * len(self.terms)

    def mean(self, ascent: Mapping[str, Tensor], name: str, part: slice) -> Tensor:
        return ascent[name].flatten()[part]

    def along(
        self, name: str, part: slice, x: Tensor, y: Tensor, units: Sequence[int], terms: Sequence[Tensor] = ()
    ) -> Tensor:
        means = [x @ self.mean(ascent, name, part) for ascent in (self.ascent, *self.terms)]
        return torch.stack([*means, *((x * own).sum(1) for own in (y, *terms))], dim=1)

    def response(self, name: str, part: slice) -> Tensor:
        return self.mean(self.ascent, name, part)

    def term_responses(self, name: str, part: slice) -> Sequence[tuple[Tensor, Tensor]]:
        return [(self.response(name, part), self.mean(term, name, part)) for term in self.terms]


def same_terms_of_the_loss(target: EntropyTarget, storage: Storage, ranks: Ranks) -> None:
    """Vectors of terms by themselves, their sums, and what is taken of both."""
    batch, pair, update = batch_of(), pair_of("llama-tied", ranks), token_weights(batch_of())
    assert update.entropies is not None
    terms = {"a": TokenPair(0.3 * update.log_probs), "b": TokenPair(torch.zeros(batch.tokens), update.entropies)}
    found = []
    for policy in (pair.sharded, pair.whole):
        like = {name: torch.ones_like(held) for name, held in policy.held().items()}
        looked = unit_gradients(
            policy,
            batch,
            exact_units(5),
            Sides(target, update, ALSO_MOVED, terms),
            Geometry.fixed(like),
            wanted=Wanted(storage, look=Means),
        ).looked
        assert looked is not None
        found.append(looked)
    sharded, whole = found
    for field in ("along", "kernel", "term_kernels"):
        mine, theirs = getattr(sharded, field), getattr(whole, field)
        assert (mine is None) == (theirs is None) == (field != "along" and storage is Storage.STREAMED)
        if theirs is not None:
            assert np.abs(theirs).min() > 0
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=RELATIVE * np.abs(theirs).max())


def wrapped_layers(around: bool, ranks: Ranks) -> None:
    """Layers in torch's checkpoint_wrapper, sharded inside of it, as accelerate does, or around it: one process's unwrapped."""
    again = wrapped(made("llama-tied"), ["model.layers.0", "model.layers.1"])
    if around:
        assert ranks.group is not None
        mesh = DeviceMesh.from_group(ranks.group, "cpu")
        for wrapper in [module for module in again.modules() if isinstance(module, CheckpointWrapper)]:
            fully_shard(wrapper, mesh=mesh)
        fully_shard(again, mesh=mesh)
    else:
        cut(again, ranks)
    whole = Policy(made("llama-tied"), 0.8, microbatch_size=4)
    pair = Pair(whole, Policy(again, 0.8, microbatch_size=4, sharding=sharding_of(again, ranks)))
    assert [len(layer.names) for layer in sharded_layers(again, prove_rules(whole, batch_of()).treatments)] == [7, 7]
    assert_same_gradients(pair, RAO_BLACKWELL, Storage.STREAMED, False)


def same_loss_gradient(name: str, prompts: int, of_tokens: bool, ranks: Ranks) -> None:
    """Also where a rank has nothing, and with gradients of a trainer's own standing in ``.grad``."""
    assert_same_loss_gradient(pair_of(name, ranks), prompts, of_tokens)


def assert_same_loss_gradient(pair: Pair, prompts: int, of_tokens: bool = False) -> None:
    batch = batch_of().of_prompts(range(prompts))
    coefficients: Tensor | TokenPair = torch.linspace(-1, 2, len(batch.responses), dtype=torch.float64)
    if of_tokens:
        coefficients = token_weights(batch)
    trainers = {name: torch.ones_like(p) for name, p in pair.sharded.trainable().items()}
    for parameter, p in pair.sharded.trainable().items():
        p.grad = trainers[parameter]
    found = weighted_gradient(pair.sharded, batch, coefficients)
    expected = loss_gradient(pair.whole, batch.responses, coefficients)
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in expected.items():
        close(found[parameter].flatten(), pair.own(parameter, gradient), scale)
    for parameter, p in pair.sharded.trainable().items():
        assert p.grad is trainers[parameter]


def same_row_dots(name: str, ranks: Ranks) -> None:
    pair, batch = pair_of(name, ranks), batch_of()
    generator = torch.Generator().manual_seed(2)
    whole = {n: torch.randn(p.shape, generator=generator).double() for n, p in pair.whole.trainable().items()}
    own = {n: pair.own(n, v).view(pair.sharded.held()[n].shape) for n, v in whole.items()}
    close(response_dots(pair.sharded, batch, [own, own]), response_dots(pair.whole, batch, [whole, whole]))


def moved_and_back(keeps_root: bool, ranks: Ranks) -> None:
    """Every forward within sees moved weights, also where a gathered copy stood; afterwards θ bit for bit."""
    model, again = made("llama-tied"), made("llama-tied")
    pair, batch = Pair.of(model, again, ranks, keeps_root=keeps_root), batch_of()
    before = {name: held.clone() for name, held in pair.sharded.held().items()}
    whole = {n: torch.full_like(p, 0.01, dtype=torch.float64) for n, p in pair.whole.trainable().items()}
    own = {n: pair.own(n, v).view(before[n].shape) for n, v in whole.items()}
    at_theta = pair.sharded.measure(batch.responses)
    with virtual_step(pair.sharded.model, own, 2.0):
        found = pair.sharded.measure(batch.responses)
    assert torch.equal(pair.sharded.measure(batch.responses).scores, at_theta.scores)
    with virtual_step(pair.whole.model, whole, 2.0):
        expected = pair.whole.measure(batch.responses)
    close(found.scores, expected.scores)
    assert not torch.allclose(found.scores, at_theta.scores)

    def fails() -> None:
        with virtual_step(pair.sharded.model, own):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert all(torch.equal(held, before[name]) for name, held in pair.sharded.held().items())
    again = pair.sharded.measure(batch.responses)
    assert torch.equal(again.scores, at_theta.scores)


def same_preparation(ranks: Ranks) -> None:
    """Gathered weights do not count as activations; no head in chunks, and the reason says so."""
    pair, batch = pair_of("llama-untied", ranks), batch_of()
    found, expected = (measure_activations(policy, batch) for policy in (pair.sharded, pair.whole))
    assert found.of_row(8) == pytest.approx(expected.of_row(8), rel=0.02)
    weights = sum(p.numel() * p.element_size() for p in pair.whole.model.parameters())
    assert abs(found.constant - expected.constant) < 0.05 * weights
    chosen = prepare(pair.sharded, batch, memory_bytes=1e3)
    assert (chosen.head, chosen.chunked) == (HeadMode.RESPONSES, False)
    assert "not in chunks: weights are sharded" in chosen.reason
    assert prepare(pair.whole, batch, memory_bytes=1e3).head is HeadMode.CHUNKED


class Scaled(nn.Module):
    """A layer that uses a matrix in arithmetic of its own, over positions of all sequences at once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.weight = nn.Parameter(torch.full((16, 16), 0.1, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.inner(hidden)
        return found + torch.einsum("blq,pq->blp", hidden, self.weight @ self.weight)


def with_layer(make: Callable[[nn.Module], nn.Module]) -> Any:
    model = made("llama-tied")
    model.model.layers[0].mlp = make(model.model.layers[0].mlp)
    return model


def slower_rules(ranks: Ranks) -> None:
    """A rule that does not serve is left for a slower one, as in one process."""
    pair = Pair.of(with_layer(Scaled), with_layer(Scaled), ranks)
    found, expected = (prove_rules(policy, batch_of()) for policy in (pair.sharded, pair.whole))
    assert found.treatments == expected.treatments
    assert Treatment.RECOMPUTE in found.treatments.values()


class Fussy(Scaled):
    """Raises where a rule has put a leaf a sequence in the place of its vector; FSDP2 is then in the midst of a forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.weight = nn.Parameter(torch.full((16,), 0.1, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.inner(hidden)
        if self.weight.dim() > 1:
            raise AssertionError
        return found * self.weight


class _Times(torch.autograd.Function):
    """hidden · weight, whose backward knows weights of one dimension alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        if weight.dim() > 1:
            raise AssertionError("one dimension was expected")
        return delta * weight, (delta * hidden).flatten(0, -2).sum(0)


class FussyBackward(Fussy):
    """The same, in the midst of a backward."""

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = _Times.apply(self.inner(hidden), self.weight)  # type: ignore[no-untyped-call]
        return found


def broken_half_way(layer: Callable[[nn.Module], nn.Module], ranks: Ranks) -> None:
    """A rule that breaks the model's own code is left for the next one, and FSDP2 does not go on in the midst of a pass."""
    pair = Pair.of(with_layer(layer), with_layer(layer), ranks)
    found, expected = (prove_rules(policy, batch_of()) for policy in (pair.sharded, pair.whole))
    assert found.treatments == expected.treatments
    assert found.treatments["model.layers.0.mlp.weight"] is Treatment.RECOMPUTE
    assert_same_loss_gradient(pair, 5)


class Gated(Scaled):
    """A matrix that only batches with a token above 12 use: its gradient may come on one rank alone."""

    def __init__(self, inner: nn.Module, seen: list[Tensor]) -> None:
        super().__init__(inner)
        self.weight = nn.Parameter(torch.full((16, 16), 0.1, dtype=torch.float64))
        self.seen = seen

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.inner(hidden)
        high = (self.seen[0] > 12).to(found)
        return found + nn.functional.linear(hidden, self.weight) * high[:, :, None] if bool(high.any()) else found


def gated_model() -> Any:
    """Trained are the gated matrix of the last layer, which is all of its layer, and one matrix of the first."""
    torch.manual_seed(0)
    config = CONFIGS["llama-tied"]()
    config.num_hidden_layers = 3  # FSDP2 gathers one layer ahead
    model, seen = LlamaForCausalLM(config).double(), [torch.zeros(0)]

    def remember(_: nn.Module, __: object, named: dict[str, Any]) -> None:
        seen[0] = named["input_ids"]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.requires_grad_(False)
    model.model.layers[2].mlp = Gated(model.model.layers[2].mlp, seen)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    return model


def reached_on_one_rank(ranks: Ranks) -> None:
    """Layers are exchanged where the backward passes, not where a gradient comes: else the ranks' collectives differ."""
    rows = [
        replace(
            row,
            prompt_ids=tuple(3 + t % 9 for t in row.prompt_ids),
            response_ids=(13 + k % 4, 13 + (k + 1) % 4, 14, 5 + k) if row.prompt_id in ("p0", "p1") else (5, 3 + k, 1),
        )
        for k, row in enumerate(random_rollouts(5, 2))
    ]
    batch = group_rollouts(rows)
    pair = Pair.of(gated_model(), gated_model(), ranks)
    sharded, whole = (gradients(policy, batch, pair, SCORE, Storage.STORED) for policy in (pair.sharded, pair.whole))
    assert sharded.total.kernel is not None
    assert whole.total.kernel is not None
    scale = np.abs(whole.total.kernel).max()
    np.testing.assert_allclose(sharded.total.kernel, whole.total.kernel, rtol=0, atol=RELATIVE * scale)
    directions = {n: pair.own(n, v).view(sharded.ascent[n].shape) for n, v in whole.ascent.items()}
    close(response_dots(pair.sharded, batch, [directions]), response_dots(pair.whole, batch, [whole.ascent]))
    ones = torch.ones(len(batch.responses), dtype=torch.float64)
    found, expected = (weighted_gradient(policy, batch, ones) for policy in (pair.sharded, pair.whole))
    for name, gradient in expected.items():
        close(found[name].flatten(), pair.own(name, gradient), float(gradient.abs().max()))


def pending(ranks: Ranks) -> None:
    """Gradients of a backward without synchronisation are a trainer's, and a pass would mix with them."""
    pair = pair_of("llama-tied", ranks)
    model: Any = pair.sharded.model
    model.set_requires_gradient_sync(False)
    pair.sharded.forward_scores(batch_of().responses[:2]).sum().backward()
    with pytest.raises(InputError, match=r"not reduced yet.*zero_grad"):
        prove_rules(pair.sharded, batch_of())


def trainers_settings(ranks: Ranks) -> None:
    """How a trainer has FSDP2 scale and synchronise gradients does not matter: rules are proved without its reduction."""
    pair = pair_of("llama-tied", ranks)
    model: Any = pair.sharded.model
    model.set_requires_gradient_sync(False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    assert prove_rules(pair.sharded, batch_of()).treatments == prove_rules(pair.whole, batch_of()).treatments


def live(ranks: Ranks) -> None:
    """A live FSDP2 model with its optimizer, whose moments are DTensors: the report is one process's."""
    model, again = tiny_model().double(), tiny_model().double()
    whole = state_of_optimizer(trained_optimizer(model, weight_decay=0.02), model)
    cut(again, ranks, keeps_root=True)
    optimizer = trained_optimizer(again, weight_decay=0.02)
    again.eval()
    with torch.no_grad():
        again(torch.tensor([[3, 4]]))
    assert not isinstance(again.lm_head.weight, DTensor), "the root is to be gathered"
    own = state_of_optimizer(optimizer, again)
    assert all(type(moments.exp_avg) is Tensor for moments in own.moments.values())
    settings = Settings(max_grad_norm=0.05, noise=False)
    flags = [p.requires_grad for p in again.parameters()]
    batch = random_batch(3, 2)
    found = probe(again, own, batch, settings, ranks=ranks)
    expected = probe(model, whole, batch, settings)
    for section in ("first_order", "checkpoint"):
        mine, theirs = asdict(getattr(found.report, section)), asdict(getattr(expected.report, section))
        for key, value in theirs.items():
            if isinstance(value, float):
                assert mine[key] == pytest.approx(value, rel=1e-8), key
            elif not isinstance(value, dict | list):
                assert mine[key] == value, key
    for mine_row, their_row in zip(found.report.realized, expected.report.realized, strict=True):
        assert mine_row.delta_h == pytest.approx(their_row.delta_h, rel=1e-7)
        assert mine_row.step_norm == pytest.approx(their_row.step_norm, rel=1e-9)
    assert [p.requires_grad for p in again.parameters()] == flags
    assert all(p.grad is None for p in again.parameters())


BRAIN = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mixed_precision(layers: MixedPrecisionPolicy, root: MixedPrecisionPolicy, ranks: Ranks) -> None:
    """float32 shards that FSDP2 gathers in bfloat16, where a small step would vanish: it is realised in float32 all the same.

    Afterwards FSDP2 gathers what it did before, into the same tensors.
    """
    assert ranks.group is not None
    model = tiny_model("llama-untied")
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    for layer in list(decoder_layers(model)):
        fully_shard(layer, mesh=mesh, mp_policy=layers)
    fully_shard(model, mesh=mesh, mp_policy=root)
    adam = state_of_optimizer(trained_optimizer(model), model).with_learning_rate(1e-5)
    model.eval()
    model.zero_grad()
    policy = Policy(model, sharding=sharding_of(model, ranks))
    before, scores = policy.in_forwards(), policy.scores(batch_of().responses)
    for row in probe(model, adam, batch_of(), Settings(noise=False), ranks=ranks).report.realized:
        assert row.noise_floor is not None
        assert row.noise_floor < 0.05 * abs(row.predicted)
        assert row.delta_h == pytest.approx(row.predicted, rel=0.05)

    def fails() -> None:
        with gathered_as_held(model):
            assert {p.dtype for p in policy.in_forwards().values()} == {torch.float32}
            policy.scores(batch_of().responses)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    after = policy.in_forwards()
    assert all(p is before[name] for name, p in after.items())
    assert policy.arithmetic_dtype() == torch.bfloat16
    assert torch.equal(policy.scores(batch_of().responses), scores)


def no_number_in_a_prompt_in_pieces(ranks: Ranks) -> None:
    """A prompt of several microbatches is scored ahead by all; NaN then is no score to be found yet, by one rank alone."""
    model: Any = tiny_model("llama-untied").double()
    cut(model, ranks)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True)
    model.model.norm.register_forward_hook(
        lambda _, __, hidden: hidden.masked_fill(((seen[-1] == 22).cumsum(1) > 0)[..., None], torch.nan)
    )
    rows = [replace(row, prompt_ids=(3, 4), response_ids=(5, 6, 7, 8, 9, 10, 1)) for row in random_rollouts(4, 4)]
    batch = group_rollouts([*rows[:-1], replace(rows[-1], response_ids=(5, 6, 7, 8, 22, 10, 1))])
    policy = Policy(model, 0.8, microbatch_size=2, sharding=sharding_of(model, ranks))
    like = {name: torch.ones_like(held) for name, held in policy.held().items()}
    for target in (SCORE, RAO_BLACKWELL):
        with pytest.raises(InputError, match="prompt_id 'p3'"):
            unit_gradients(policy, batch, exact_units(4), Sides(target, torch.ones(16)), Geometry.fixed(like))


def no_casts_are_kept(ranks: Ranks) -> None:
    """Autocast's cache would hold every layer that FSDP2 has gathered, narrowed, until the pass is over."""
    pair = Pair.of(tiny_model("llama-tied"), tiny_model("llama-tied"), ranks)
    kept = {}
    for name, policy in (("sharded", pair.sharded), ("whole", pair.whole)):
        with replace(policy, autocast=torch.bfloat16).arithmetic():
            kept[name] = torch.is_autocast_cache_enabled()
    assert kept == {"sharded": False, "whole": True}


def not_for_one(ranks: Ranks) -> None:
    """A sharded model needs all its ranks, which a live probe is by default not given."""
    model = tiny_model()
    cut(model, ranks)
    with pytest.raises(InputError, match=r"cut over 2 ranks and 1 were given; .*Ranks\.of_group"):
        sharding_of(model, ALONE)


def narrow(ranks: Ranks) -> None:
    """bfloat16 weights are refused by name of the remedy."""
    model = tiny_model()
    adam = state_of_optimizer(trained_optimizer(model), model)
    again = tiny_model().to(torch.bfloat16)
    cut(again, ranks)
    sharding = sharding_of(again, ranks)
    moments = {
        name: replace(
            m,
            **{
                field: getattr(m, field).flatten()[sharding.own(name)].view(-1, *m.exp_avg.shape[1:])
                for field in ("exp_avg", "exp_avg_sq")
            },
        )
        for name, m in adam.moments.items()
    }
    with pytest.raises(InputError, match="autocast to bfloat16"):
        probe(again, replace(adam, moments=moments), batch_of(), ranks=ranks)


CASES: Mapping[str, Callable[[Ranks], None]] = {
    **{f"gradients-{name}": partial(same_gradients, name, SCORE, Storage.STORED, False) for name in ("gpt2", "gemma2")},
    "gradients-mixtral": partial(same_gradients, "mixtral", RAO_BLACKWELL, Storage.STORED, False),
    "gradients-checkpointed": partial(same_gradients, "gpt2-frozen", RAO_BLACKWELL, Storage.STREAMED, True),
    "wrapped-layers": partial(wrapped_layers, False),
    "layers-wrapped-and-sharded-around": partial(wrapped_layers, True),
    "token-weights-beside-score": partial(same_token_weights, "gpt2", SCORE, Storage.STORED),
    "token-weights-beside-rao-blackwell": partial(same_token_weights, "qwen2", RAO_BLACKWELL, Storage.STORED),
    "token-weights-streamed": partial(same_token_weights, "llama-tied", SCORE, Storage.STREAMED),
    "terms-of-the-loss": partial(same_terms_of_the_loss, SCORE, Storage.STORED),
    "terms-of-the-loss-streamed": partial(same_terms_of_the_loss, RAO_BLACKWELL, Storage.STREAMED),
    "loss": partial(same_loss_gradient, "llama-tied", 5, False),
    "loss-idle": partial(same_loss_gradient, "llama-tied", 1, False),
    "loss-of-tokens": partial(same_loss_gradient, "llama-tied", 5, True),
    "loss-of-tokens-idle": partial(same_loss_gradient, "llama-tied", 1, True),
    "dots": partial(same_row_dots, "lora"),
    "virtual-step": partial(moved_and_back, False),
    "virtual-step-root-gathered": partial(moved_and_back, True),
    "preparation": same_preparation,
    "slower-rules": slower_rules,
    "broken-forward": partial(broken_half_way, Fussy),
    "broken-backward": partial(broken_half_way, FussyBackward),
    "reached-on-one-rank": reached_on_one_rank,
    "pending": pending,
    "trainers-settings": trainers_settings,
    "live": live,
    "mixed-precision": partial(mixed_precision, BRAIN, BRAIN),
    "mixed-precision-of-layers": partial(
        mixed_precision, replace(BRAIN, output_dtype=torch.float32), MixedPrecisionPolicy()
    ),
    "mixed-precision-of-outputs": partial(
        mixed_precision, MixedPrecisionPolicy(), MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    ),
    "no-number": no_number_in_a_prompt_in_pieces,
    "no-casts-kept": no_casts_are_kept,
    "narrow": narrow,
    "not-for-one": not_for_one,
}


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return failed_cases(2, CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, outcomes: list[dict[str, str]]) -> None:
    for rank, failures in enumerate(outcomes):
        assert case not in failures, f"rank {rank}:\n{failures[case]}"
