"""Five responses to two prompts, laid out as each trainer lays them out at its step.

Values are binary fractions, so that every precision holds them. Where a trainer has no value of the policy's (padding, the
output of tools) stands junk that no row may show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD, JUNK = 0, 9.5
"""The id of padding, and a value that is no log-prob."""
MULTIPLE = 8
"""To a multiple of which prime-rl pads its micro-batches."""


@dataclass(frozen=True)
class Sample:
    """A response: which of its tokens the policy drew, and a value a token; junk where it did not draw."""

    name: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    drawn: tuple[bool, ...]
    old: tuple[float, ...]
    sampler: tuple[float, ...]
    ref: tuple[float, ...]
    advantages: tuple[float, ...]
    reward: float


def made(
    name: str,
    prompt: Sequence[int],
    response: Sequence[int],
    tool: Sequence[int],
    advantages: Sequence[float],
    reward: float,
) -> Sample:
    """Log-probs that differ from response to response; ``tool`` are the places of a tool's output."""
    drawn = tuple(place not in tool for place in range(len(response)))

    def values(scale: float, *shifts: float) -> tuple[float, ...]:
        return tuple(
            -scale * (token % 7 + 1) - shifts[token % len(shifts)] if there else JUNK
            for token, there in zip(response, drawn, strict=True)
        )

    given = tuple(float(a) if there else JUNK for a, there in zip(advantages, drawn, strict=True))
    return Sample(
        name,
        tuple(prompt),
        tuple(response),
        drawn,
        values(0.25, 0.125),
        values(0.25, 0.25, 0.125, 0.0),
        values(0.125, 0.5),
        given,
        reward,
    )


SAMPLES = (
    made("a", (11, 12), (21, 22, 23, 24, 2), (1, 2), (0.5, 0, 0, -1.0, 0.25), 1.0),  # a tool's turn inside
    made("a", (11, 12), (31, 2), (), (-0.75, -0.75), 0.0),
    made("b", (13, 14, 15, 16), (41, 42, 43, 44, 45, 2), (), (1.5,) * 6, 0.5),  # as wide as prompts and responses are
    made("b", (13, 14, 15, 16), (2,), (), (-2.0,), 0.0),
    made("b", (13, 14, 15, 16), (51, 52, 53, 2), (2,), (-0.25, -0.25, 0, -0.25), 0.25),
)
NAMES = [sample.name for sample in SAMPLES]
REWARDS = [sample.reward for sample in SAMPLES]
TOKENS = sum(sum(sample.drawn) for sample in SAMPLES)
MASKS = {
    "verl": "response_mask",
    "openrlhf": "action_mask",
    "skyrl": "loss_mask",
    "slime": "loss_masks",
    "areal": "loss_mask",
}


def right(values: Sequence[Any], width: int, fill: Any) -> list[Any]:
    return [*values, *[fill] * (width - len(values))]


def left(values: Sequence[Any], width: int, fill: Any) -> list[Any]:
    return [*[fill] * (width - len(values)), *values]


def masked(values: Sequence[float], drawn: Sequence[bool]) -> list[float]:
    """What a trainer that multiplies by its mask holds."""
    return [value if there else 0.0 for value, there in zip(values, drawn, strict=True)]


def verl(dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES) -> dict[str, Any]:
    prompts, responses = max(len(s.prompt) for s in samples), max(len(s.response) for s in samples)

    def of_tokens(get: Callable[[Sample], Sequence[float]]) -> Tensor:
        return torch.tensor([right(get(s), responses, JUNK) for s in samples], dtype=dtype)

    return {
        "input_ids": torch.tensor([left(s.prompt, prompts, PAD) + right(s.response, responses, PAD) for s in samples]),
        "attention_mask": torch.tensor(
            [left([1] * len(s.prompt), prompts, 0) + right([1] * len(s.response), responses, 0) for s in samples]
        ),
        "response_mask": torch.tensor([right([int(d) for d in s.drawn], responses, 0) for s in samples]),
        "old_log_probs": of_tokens(lambda s: s.old),
        "rollout_log_probs": of_tokens(lambda s: s.sampler),
        "ref_log_prob": of_tokens(lambda s: s.ref),
        "advantages": of_tokens(lambda s: s.advantages),
        "token_level_scores": torch.tensor(
            [right(left([s.reward], len(s.response), 0.0), responses, 0.0) for s in samples]
        ),
    }


def verl_jagged(samples: Sequence[Sample] = SAMPLES) -> dict[str, Any]:
    """A worker's, without padding."""

    def jagged(get: Callable[[Sample], Sequence[Any]]) -> Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(get(s)) for s in samples], layout=torch.jagged)

    return {
        "input_ids": jagged(lambda s: s.prompt + s.response),
        "response_mask": jagged(lambda s: [int(d) for d in s.drawn]),
        "old_log_probs": jagged(lambda s: s.old),
        "rollout_log_probs": jagged(lambda s: s.sampler),
        "ref_log_prob": jagged(lambda s: s.ref),
        "advantages": jagged(lambda s: s.advantages),
    }


def openrlhf(dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES) -> dict[str, Any]:
    width = max(len(s.prompt) + len(s.response) for s in samples)

    def actions(get: Callable[[Sample], Sequence[Any]], kind: torch.dtype = dtype) -> Tensor:
        """Of every id but the first."""
        return torch.tensor(
            [right([0] * (len(s.prompt) - 1) + masked(get(s), s.drawn), width - 1, 0) for s in samples], dtype=kind
        )

    return {
        "sequences": torch.tensor([right(s.prompt + s.response, width, PAD) for s in samples]),
        "attention_mask": torch.tensor([right([1] * len(s.prompt + s.response), width, 0) for s in samples]),
        "action_mask": actions(lambda s: s.drawn, torch.bool),
        "action_log_probs": actions(lambda s: s.old),
        "rollout_log_probs": actions(lambda s: s.sampler),
        "base_action_log_probs": actions(lambda s: s.ref),
        "advantages": actions(lambda s: s.advantages),
        "rewards": torch.tensor([s.reward for s in samples]),
        "truncated": torch.tensor([int(place == 2) for place in range(len(samples))]),
    }


def skyrl(
    dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES, *, divisors: Sequence[float] = ()
) -> dict[str, Any]:
    width, responses = max(len(s.prompt) + len(s.response) for s in samples), max(len(s.response) for s in samples)

    def of_tokens(get: Callable[[Sample], Sequence[float]]) -> Tensor:
        return torch.tensor([left(get(s), responses, JUNK) for s in samples], dtype=dtype)

    by = divisors or [float(sum(sum(s.drawn) for s in samples))] * len(samples)
    return {
        "sequences": torch.tensor([left(s.prompt + s.response, width, PAD) for s in samples]),
        "attention_mask": torch.tensor([left([1] * len(s.prompt + s.response), width, 0) for s in samples]),
        "response_mask": torch.tensor([left([1] * len(s.response), responses, 0) for s in samples]),
        "loss_mask": torch.tensor([left([float(d) for d in s.drawn], responses, 0.0) for s in samples]),
        "action_log_probs": of_tokens(lambda s: s.old),
        "rollout_logprobs": of_tokens(lambda s: s.sampler),
        "base_action_log_probs": of_tokens(lambda s: s.ref),
        "advantages": of_tokens(lambda s: s.advantages) / torch.tensor(by, dtype=dtype)[:, None],
        "rewards": torch.tensor([left([s.reward], responses, 0.0) for s in samples]),
    }


def slime(dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES) -> dict[str, Any]:
    def of_tokens(get: Callable[[Sample], Sequence[float]], kind: torch.dtype = dtype) -> list[Tensor]:
        return [torch.tensor(get(s), dtype=kind) for s in samples]

    return {
        "tokens": of_tokens(lambda s: s.prompt + s.response, torch.long),
        "response_lengths": [len(s.response) for s in samples],
        "total_lengths": [len(s.prompt + s.response) for s in samples],
        "loss_masks": of_tokens(lambda s: s.drawn, torch.int),
        "rollout_mask_sums": torch.tensor([float(sum(s.drawn)) for s in samples]),
        "log_probs": of_tokens(lambda s: s.old),
        "rollout_log_probs": of_tokens(lambda s: s.sampler),
        "ref_log_probs": of_tokens(lambda s: s.ref),
        "advantages": of_tokens(lambda s: s.advantages),
        "raw_reward": [s.reward for s in samples],
        "truncated": [int(place == 2) for place in range(len(samples))],
    }


def areal(dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES) -> dict[str, Any]:
    """Values are rolled one place ahead, over the padded width, as ``compute_advantages`` does it."""
    width = max(len(s.prompt) + len(s.response) for s in samples) + 1

    def whole(get: Callable[[Sample], Sequence[Any]], fill: Any, kind: torch.dtype = dtype) -> Tensor:
        rows = [right([fill] * len(s.prompt) + list(get(s)), width, fill) for s in samples]
        return torch.roll(torch.tensor(rows, dtype=kind), shifts=-1, dims=-1)

    mask = whole(lambda s: s.drawn, 0.0)
    return {
        "input_ids": torch.tensor([right(s.prompt + s.response, width, PAD) for s in samples]),
        "attention_mask": torch.tensor([right([1] * len(s.prompt + s.response), width, 0) for s in samples]),
        "loss_mask": mask,
        "logprobs": whole(lambda s: s.sampler, JUNK) * mask,
        "prox_logp": whole(lambda s: s.old, JUNK),
        "advantages": whole(lambda s: s.advantages, JUNK),
        "rewards": torch.tensor([s.reward for s in samples]),
    }


def areal_packed(dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES) -> dict[str, Any]:
    """A worker's micro-batch: rows end to end, and one more of padding."""
    padded = areal(dtype, samples)
    lengths = padded["attention_mask"].sum(1).tolist()
    packed = {
        name: torch.cat(
            [*(row[:n] for row, n in zip(padded[name], lengths, strict=True)), torch.zeros(3, dtype=padded[name].dtype)]
        )
        for name in ("input_ids", "loss_mask", "logprobs", "prox_logp", "advantages")
    }
    return packed | {
        "cu_seqlens": torch.tensor([0, *torch.tensor([*lengths, 3]).cumsum(0).tolist()], dtype=torch.int32)
    }


BINS = ((0, 1), (2, 3, 4))


def prime_rl(
    dtype: torch.dtype = torch.float32, samples: Sequence[Sample] = SAMPLES, bins: Sequence[Sequence[int]] = BINS
) -> list[dict[str, Any]]:
    """Two micro-batches, each padded behind its last sample; and one that stands for a rank that has none."""
    return [*(_micro_batch([samples[i] for i in bin_], dtype) for bin_ in bins), _dummy(samples, dtype)]


def _micro_batch(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, Any]:
    lengths = [len(s.prompt + s.response) for s in samples]
    padding = -sum(lengths) % MULTIPLE
    lengths[-1] += padding

    def packed(get: Callable[[Sample], Sequence[Any]], before: Any, fill: Any, kind: torch.dtype = dtype) -> Tensor:
        values = [value for s in samples for value in [*[before] * len(s.prompt), *get(s)]]
        return torch.tensor([[*values, *[fill] * padding]], dtype=kind)

    ids = [token for s in samples for token in s.prompt + s.response]
    return {
        "input_ids": torch.tensor([[*ids, *[1] * padding]]),
        "loss_mask": packed(lambda s: s.drawn, False, False, torch.bool),
        "advantages": packed(lambda s: s.advantages, JUNK, 0.0),
        "inference_logprobs": packed(lambda s: masked(s.sampler, s.drawn), 0.0, 0.0),
        "temperatures": packed(lambda s: [0.5] * len(s.response), 0.25, 1.0),
        "ref_logprobs": None,
        "rl_weights": None,
        "ce_weights": None,
        "ref_kl_weights": None,
        "sequence_lengths": lengths,
        "seq_lens": torch.tensor(lengths),
    }


def _dummy(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, Any]:
    batch = _micro_batch(samples[:1], dtype)
    return batch | {
        "loss_mask": torch.zeros_like(batch["loss_mask"]),
        "advantages": torch.zeros_like(batch["advantages"]),
    }
