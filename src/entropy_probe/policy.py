"""The policy: fresh teacher-forced log-probs S of given responses under a causal language model.

S = Σ_t log softmax(logits_t / τ)[y_t] over response tokens, first EOS included, in nats. Dropout is inactive (it would make S
differ from the sampler's and from pass to pass), padding is on the right, and log-softmax runs in float32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from entropy_probe.errors import InputError
from entropy_probe.float64_mode import Float64Mode
from entropy_probe.progress import Progress, Silent
from entropy_probe.rollouts import Rollout, RolloutBatch
from entropy_probe.wrappers import without_accelerate_autocast


@dataclass(frozen=True)
class PaddedResponses:
    """Sequences padded on the right.

    ``input_ids`` and ``attention_mask`` are [n, L]; ``rows``, ``positions`` and ``targets`` hold, for each response token, its
    sequence, the position whose logits predict it, and its id: [tokens].
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor


def pad_right(responses: Sequence[Rollout], device: torch.device, length: int | None = None) -> PaddedResponses:
    """Prompt and response ids side by side, padded with masked zeros on the right to ``length``, or to the longest."""
    length = max(r.length for r in responses) if length is None else length
    input_ids = torch.zeros((len(responses), length), dtype=torch.long)
    attention_mask = torch.zeros((len(responses), length), dtype=torch.long)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, response in enumerate(responses):
        ids = (*response.prompt_ids, *response.response_ids)
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        first = len(response.prompt_ids) - 1
        rows.extend([row] * len(response.response_ids))
        positions.extend(range(first, first + len(response.response_ids)))
        targets.extend(response.response_ids)
    return PaddedResponses(
        input_ids.to(device),
        attention_mask.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
    )


def sum_over_tokens(values: Tensor, batch: PaddedResponses) -> Tensor:
    """One value a response token, [tokens], summed for each response: float64 [n].

    In float32 the sum over a long response would lose what its tokens still hold.
    """
    totals = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=values.device)
    return totals.index_add(0, batch.rows, values.double())


@dataclass(frozen=True)
class Policy:
    """A causal language model at a temperature, with how its forwards are run.

    ``microbatch_size`` responses go through one forward; it changes memory and rounding, nothing else. ``autocast`` is the
    type of mixed-precision arithmetic over float32 weights, or None.
    """

    model: nn.Module
    temperature: float = 1.0
    microbatch_size: int = 32
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.model.parameters()).dtype

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, tied ones once, in the order of ``named_parameters``."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def microbatches(self, count: int) -> Iterator[slice]:
        """Consecutive slices of at most ``microbatch_size`` out of ``count``."""
        for start in range(0, count, self.microbatch_size):
            yield slice(start, min(start + self.microbatch_size, count))

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run forwards with dropout inactive, in the policy's arithmetic; training flags come back on every exit."""
        training = [module for module in self.model.modules() if module.training]
        with ExitStack() as stack:
            if self.dtype == torch.float64:
                stack.enter_context(Float64Mode())
            stack.enter_context(without_accelerate_autocast(self.model))
            # Entered also to switch off an autocast that the caller may be in.
            stack.enter_context(
                torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)
            )
            try:
                for module in training:
                    module.training = False
                yield
            finally:
                for module in training:
                    module.training = True

    def token_log_probs(self, batch: PaddedResponses) -> Tensor:
        """log π of each response token by one forward, [tokens], float32 or float64; under ``arithmetic``."""
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        # One flat index: the backward of indexing by two is several times slower.
        chosen = batch.rows * batch.input_ids.shape[1] + batch.positions
        logits = output.logits.flatten(0, 1).index_select(0, chosen)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        scaled = wide if self.temperature == 1.0 else wide / self.temperature
        return torch.log_softmax(scaled, dim=-1).gather(1, batch.targets[:, None])[:, 0]

    def forward_scores(self, responses: Sequence[Rollout]) -> Tensor:
        """S of each response by one forward, float64 [n], with the graph if gradients are enabled; under ``arithmetic``."""
        batch = pad_right(responses, self.device)
        return sum_over_tokens(self.token_log_probs(batch), batch)

    def scores(self, responses: Sequence[Rollout], progress: Progress | None = None) -> Tensor:
        """S of every response without gradients, float64 [N] on the CPU."""
        progress = progress if progress is not None else Silent()
        parts = list(self.microbatches(len(responses)))
        with torch.no_grad(), self.arithmetic():
            found = [
                self.forward_scores(responses[part]).cpu() for part in progress.track(parts, "log-probs", len(parts))
            ]
        return torch.cat(found)


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


def input_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """(vocabulary, context length) of the transformers model in ``model``; None where there is none or it sets no limit."""
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return None, None
    # num_embeddings and not the weight's shape: where weights are sharded, this rank's tensor holds only some rows.
    embedding = inner.get_input_embeddings()
    config = inner.config.get_text_config()
    # An adapter may have put a module of its own in the embedding's place.
    vocabulary = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else config.vocab_size
    return vocabulary, getattr(config, "max_position_embeddings", None)


def end_token_ids(model: nn.Module) -> tuple[int, ...]:
    """The ids that the transformers model in ``model`` ends with, by its config and its generation config; () without any.

    Of a generation config these ids alone are read: many chat models name their end of turn only there.
    """
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return ()
    ids: list[int | None] = []
    generation = vars(inner).get("generation_config")
    own = generation.eos_token_id if isinstance(generation, GenerationConfig) else None
    for configured in (inner.config.get_text_config().eos_token_id, own):
        ids.extend(configured if isinstance(configured, list | tuple) else [configured])
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def check_fits(batch: RolloutBatch, vocabulary: int | None, context_length: int | None) -> None:
    """Refuse rollouts that the model cannot score; a limit of None is not checked.

    Raises:
        InputError: a token id outside the vocabulary, or a sequence past the context length; the prompt is named.
    """
    for response in batch.responses:
        ids = (*response.prompt_ids, *response.response_ids)
        if vocabulary is not None and max(ids) >= vocabulary:
            raise InputError(
                f"prompt_id {response.prompt_id!r} holds token id {max(ids)}, but the model's vocabulary has {vocabulary}; "
                "were these rollouts made with another tokenizer?"
            )
        if context_length is not None and len(ids) > context_length:
            raise InputError(
                f"prompt_id {response.prompt_id!r} with its response has {len(ids)} tokens; "
                f"the model's context holds {context_length}"
            )
