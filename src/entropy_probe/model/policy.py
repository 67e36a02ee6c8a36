"""The policy: fresh teacher-forced log-probs S of given responses under a causal language model.

S = Σ_t log softmax(logits_t / τ)[y_t] over response tokens, first EOS included, in nats. Where it is asked for, the entropy
H_t = −Σ_v p_v log p_v of p = softmax(logits_t / τ), which token t was drawn from, comes from the same forward.

Dropout is inactive (it would make S differ from the sampler's and from pass to pass), padding is on the right, and log-softmax
runs in float32 or better.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from entropy_probe.common.progress import Progress, Silent
from entropy_probe.compat.accelerate import without_accelerate_autocast
from entropy_probe.compat.checkpoint_wrappers import named_parameters
from entropy_probe.compat.fsdp import held_part, mixed_precision, reset_sharding, reshard
from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.model.float64_mode import Float64Mode
from entropy_probe.model.language_head import (
    HeadMode,
    chunked_values,
    head_calls,
    log_probs_and_entropies,
    output_head,
)
from entropy_probe.model.measured import Measured, TokenValues
from entropy_probe.model.padding import PaddedResponses, idle_row, pad_right, sum_over_tokens
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.ranks.dealing import deal
from entropy_probe.ranks.sharding import WHOLE, Sharding


@dataclass(frozen=True)
class Policy:
    """A causal language model at a temperature, with how its forwards are run.

    ``microbatch_size`` responses go through one forward; it changes memory and rounding, nothing else. ``autocast`` is the
    type of mixed-precision arithmetic over float32 weights, or None. ``head`` says where logits are computed
    (:func:`choose_head`). ``sharding`` says who shares the work, and whether weights are sharded: a forward is then every
    rank's, and all must run as many.
    """

    model: nn.Module
    temperature: float = 1.0
    microbatch_size: int = 32
    autocast: torch.dtype | None = None
    head: HeadMode = HeadMode.WHOLE
    sharding: Sharding = WHOLE

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.model.parameters()).dtype

    def arithmetic_dtype(self) -> torch.dtype:
        """The narrowest type in forwards: autocast's or that of the weights, or of FSDP2's mixed precision in any module."""
        own = self.dtype if self.autocast is None else self.autocast
        return min((own, *mixed_precision(self.model)), key=lambda dtype: dtype.itemsize)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, tied ones once, in the order of ``named_parameters``."""
        reshard(self.model)
        return {name: p for name, p in named_parameters(self.model) if p.requires_grad}

    def held(self) -> dict[str, Tensor]:
        """What this rank holds of each trainable parameter, without gradient: all of it, or its rows."""
        return {name: held_part(p.detach()) for name, p in self.trainable().items()}

    def in_forwards(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name as the model's code sees them: the same, or what FSDP2 gathers them into.

        FSDP2 keeps those objects and frees their memory in between: whole gradients can be asked for by them, values not read.
        To get hold of them each layer is gathered once, so that every rank must call this.

        Raises:
            InputError: gradients of a backward without synchronisation are there.
        """
        if not self.sharding.sharded:
            return self.trainable()
        found: dict[str, nn.Parameter] = {}
        for path, module in self.model.named_modules():
            if not isinstance(module, FSDPModule):
                continue
            module.unshard()
            gathered: nn.Module = module  # type: ignore[assignment]  # to mypy FSDPModule is no module
            own = named_parameters(gathered, path)
            found.update({name: p for name, p in own if p.requires_grad and not isinstance(p, DTensor)})
            module.reshard()
        pending = [name for name, p in found.items() if p.grad is not None]
        if pending:
            raise InputError(
                f"{len(pending)} parameters ({pending[0]}, …) hold gradients that FSDP2 has not reduced yet, which a pass "
                "would disturb; probe after the optimizer's step and zero_grad()"
            )
        return {name: found[name] for name in self.trainable()}

    def microbatches(self, count: int) -> Iterator[slice]:
        """Consecutive slices of at most ``microbatch_size`` out of ``count``."""
        for start in range(0, count, self.microbatch_size):
            yield slice(start, min(start + self.microbatch_size, count))

    def forwards(self, responses: Sequence[Rollout]) -> list[list[int]]:
        """Indices of the responses of every forward, as many as ``microbatches`` has, the longest first.

        Responses of similar length go together: what is padded is computed for nothing.
        """
        order = sorted(range(len(responses)), key=lambda row: -responses[row].length)
        return [order[part] for part in self.microbatches(len(responses))]

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run forwards with dropout inactive, in the policy's arithmetic; training flags come back on every exit."""
        training = [module for module in self.model.modules() if module.training]
        with ExitStack() as stack:
            if self.dtype == torch.float64:
                stack.enter_context(Float64Mode())
            stack.enter_context(without_accelerate_autocast(self.model))
            # Hooks, replaced forwards and function modes do not reach into compiled code.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            # Entered also to switch off an autocast that the caller may be in.
            stack.enter_context(
                torch.autocast(
                    self.device.type,
                    dtype=self.autocast,
                    enabled=self.autocast is not None,
                    # FSDP2 gathers into the same tensors each time: kept casts would be the whole model.
                    cache_enabled=not self.sharding.sharded,
                )
            )
            try:
                for module in training:
                    module.training = False
                yield
            except BaseException:
                reset_sharding(self.model)
                raise
            finally:
                for module in training:
                    module.training = True

    def modes(self) -> Callable[[], AbstractContextManager[Any]]:
        """What enters the function modes of :meth:`arithmetic` again where autograd has taken them off."""
        return Float64Mode if self.dtype == torch.float64 else nullcontext

    def token_log_probs(self, batch: PaddedResponses) -> Tensor:
        """log π of each response token by one forward, [tokens], float32 or float64; under ``arithmetic``."""
        return self.token_values(batch, entropies=False).log_probs

    def token_values(self, batch: PaddedResponses, *, entropies: bool) -> TokenValues:
        """log π, and H where asked for, of each response token by one forward; under ``arithmetic``."""
        ids = batch.input_ids

        def logits() -> Tensor:
            found: Tensor = self.model(input_ids=ids, attention_mask=batch.attention_mask, use_cache=False).logits
            return found

        if self.head is HeadMode.WHOLE:
            # One flat index: the backward of indexing by two is several times slower.
            chosen = batch.rows * ids.shape[1] + batch.positions
            return self._values(logits().flatten(0, 1).index_select(0, chosen), batch, entropies)
        head = output_head(self.model)
        assert head is not None, "choose_head found one"
        if self.head is HeadMode.RESPONSES:
            with head_calls(head, batch.on_responses, stop=False):
                return self._values(batch.of_tokens(logits()), batch, entropies)
        if self.head is not HeadMode.CHUNKED:
            assert_never(self.head)
        with head_calls(head, batch.on_responses, stop=True) as calls:
            logits()
        assert isinstance(head, nn.Linear)
        targets = torch.zeros((len(ids), batch.longest), dtype=torch.long, device=ids.device)
        targets[batch.rows, batch.places] = batch.targets
        log_probs, found = chunked_values(calls[0].hidden, head.weight, head.bias, targets, self.temperature, entropies)
        return TokenValues(batch.of_tokens(log_probs), None if found is None else batch.of_tokens(found))

    def _values(self, logits: Tensor, batch: PaddedResponses, entropies: bool) -> TokenValues:
        """log softmax(z/τ) of the target, and H where asked for, from logits [tokens, V]."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        if entropies:
            return TokenValues(*log_probs_and_entropies(wide, batch.targets, self.temperature))
        scaled = wide if self.temperature == 1.0 else wide / self.temperature
        return TokenValues(torch.log_softmax(scaled, dim=-1).gather(1, batch.targets[:, None])[:, 0], None)

    def forward_scores(self, responses: Sequence[Rollout]) -> Tensor:
        """S of each response by one forward, float64 [n], with the graph if gradients are enabled; under ``arithmetic``."""
        batch = pad_right(responses, self.device)
        return sum_over_tokens(self.token_log_probs(batch), batch)

    def scores(self, responses: Sequence[Rollout], progress: Progress | None = None) -> Tensor:
        """S of every response without gradients, float64 [N] on the CPU."""
        return self.measure(responses, progress, entropies=False).scores

    def measure(
        self,
        responses: Sequence[Rollout],
        progress: Progress | None = None,
        *,
        entropies: bool = True,
    ) -> Measured:
        """S of every response, log π and, on request, H of every response token, without gradients, from the same forwards.

        Ranks share the responses out by their tokens, and each gets the values of all: every rank must call it.
        """
        progress = progress if progress is not None else Silent()
        ranks = self.sharding.ranks
        shares = deal([response.length for response in responses], ranks.count)
        own = responses[shares[ranks.rank].start : shares[ranks.rank].stop]
        idle = 0
        if self.sharding.sharded:
            forwards = [len(list(self.microbatches(len(share)))) for share in shares]
            idle = max(forwards) - forwards[ranks.rank]
        here = self.measure_here(own, progress, entropies=entropies)
        with torch.no_grad(), self.arithmetic():
            for _ in range(idle):
                self.forward_scores([idle_row(responses)])
        return combine(here, responses, shares[ranks.rank], ranks)

    def measure_here(
        self,
        responses: Sequence[Rollout],
        progress: Progress | None = None,
        *,
        entropies: bool = True,
    ) -> Measured:
        """:meth:`measure` on this rank alone."""
        progress = progress if progress is not None else Silent()
        parts = self.forwards(responses)
        scores = torch.zeros(len(responses), dtype=torch.float64)
        none = torch.zeros(0, dtype=torch.float64)
        of_entropies, of_log_probs = [none] * len(responses), [none] * len(responses)
        with torch.no_grad(), self.arithmetic():
            for rows in progress.track(parts, "log-probs", len(parts)):
                together = [responses[row] for row in rows]
                batch = pad_right(together, self.device)
                values = self.token_values(batch, entropies=entropies)
                scores[rows] = sum_over_tokens(values.log_probs, batch).cpu()
                lengths = [response.tokens for response in together]
                for found, of_tokens in ((of_entropies, values.entropies), (of_log_probs, values.log_probs)):
                    if of_tokens is not None:
                        for row, own in zip(rows, torch.split(of_tokens.double().cpu(), lengths), strict=True):
                            found[row] = own
        return Measured(
            scores,
            torch.cat([none, *of_entropies]) if entropies else None,
            torch.cat([none, *of_log_probs]),
        )


def combine(here: Measured, responses: Sequence[Rollout], rows: range, ranks: Ranks) -> Measured:
    """What every rank has measured of its ``rows``, put together: all ``responses``' values."""
    if ranks.count == 1:
        return here
    first = [0, *itertools.accumulate(response.tokens for response in responses)]
    tokens = slice(first[rows.start], first[rows.stop])

    def of_all(values: Tensor | None, count: int, own: slice) -> Tensor | None:
        if values is None:
            return None
        every = np.zeros(count)
        every[own] = values.numpy()
        return torch.from_numpy(every)

    parts = (
        of_all(here.scores, len(responses), slice(rows.start, rows.stop)),
        of_all(here.entropies, first[-1], tokens),
        of_all(here.log_probs, first[-1], tokens),
    )
    # One message: each is a wait for all ranks.
    summed = torch.from_numpy(ranks.sum_numbers(np.concatenate([part.numpy() for part in parts if part is not None])))
    found = iter(torch.split(summed, [len(part) for part in parts if part is not None]))
    scores, entropies, log_probs = (None if part is None else next(found) for part in parts)
    assert scores is not None
    return Measured(scores, entropies, log_probs)


def check_finite(scores: Tensor, responses: Sequence[Rollout]) -> None:
    """Refuse scores that are not finite.

    Raises:
        InputError: a response that the model gives probability zero, or NaN; its prompt is named.
    """
    for response, score in zip(responses, scores.tolist(), strict=True):
        if not -float("inf") < score < float("inf"):
            raise InputError(
                f"prompt_id {response.prompt_id!r}: a response has log-probability {score} under this checkpoint; "
                "the weights are damaged, or it was sampled from another model"
            )
