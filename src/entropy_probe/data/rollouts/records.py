"""Responses, prompts and batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from entropy_probe.data.importance import Importance
from entropy_probe.data.rollouts import values
from entropy_probe.data.rollouts.columns import SAMPLED_ALIASES, is_of_tokens
from entropy_probe.data.rollouts.masks import ATTENTION_MASKS, padding_of
from entropy_probe.errors import InputError

PromptId = str | int
T = TypeVar("T")


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt, checked and put into Python's own types when it is made, from a file or not.

    ``prompt_ids`` and ``response_ids`` are token ids; the response holds its EOS if one was sampled. ``logprobs`` are the
    sampler's, one per response token, in nats. ``cut`` is true where the length limit ended the response. ``eos_ids`` are the
    ids at which the sampler ended a response, where it is known; () for none. ``reward`` may be None where every row of a batch
    has an ``advantage``: one number, or one a response token.

    Of the trainer's loss, each with a value a response token: ``old_logprobs``, the trainer's own log-probs, of which it takes
    its importance ratio; ``ref_logprobs``, the reference policy's, for a KL term; ``loss_mask``, 0 at tokens that the loss
    alone leaves out; ``token_weight``, which multiplies a token's loss. ``sampled`` is false at tokens that the policy did not
    draw, as the output of a tool: they are context, and neither in the score and the entropy nor in the loss. Its other names
    are ``response_mask``, ``tool_mask`` and ``env_mask``.

    Lists, NumPy arrays and torch tensors of ids and numbers become tuples. Attention masks in ``extra``
    (:mod:`~entropy_probe.data.rollouts.masks`) are used: ids that they call padding are dropped, with their log-probs,
    values in masks of tokens and those attention masks; ``padding_id`` is then the id that stood at the response's end.

    Others describe the trainer's accumulation window, where a recorder knows it: ``micro_batch`` is the index of
    the micro-batch that held the row, ``mini_batch`` of the optimizer step among those that share a batch,
    ``window_tokens`` the token count that the trainer divides by (dapo),
    ``max_completion_length`` the constant of Dr. GRPO, ``loss_type`` the trainer's name of its loss, ``step`` the optimizer
    step that consumed the row (N + 1 for checkpoint N), and ``on_policy`` whether the sampler was the policy at that step.

    Raises:
        InputError: a value has the wrong type, is not finite, or is empty; log-probs are not one a response token; a mask does
            not fit. The prompt and the column are named.

    Example:
        >>> from entropy_probe import Rollout
        >>> row = Rollout("p0", prompt_ids=[5, 6], response_ids=[7, 8, 1], reward=1, logprobs=[-0.5, -0.2, -0.1])
        >>> row.response_ids, row.reward, row.length
        ((7, 8, 1), 1.0, 5)
    """

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float | None = None
    advantage: float | tuple[float, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cut: bool | None = None
    prompt: str | None = None
    response: str | None = None
    micro_batch: int | None = None
    window_tokens: float | None = None
    max_completion_length: int | None = None
    loss_type: str | None = None
    step: int | None = None
    on_policy: bool | None = None
    eos_ids: tuple[int, ...] | None = None
    padding_id: int | None = None
    old_logprobs: tuple[float, ...] | None = None
    ref_logprobs: tuple[float, ...] | None = None
    loss_mask: tuple[int, ...] | None = None
    sampled: tuple[bool, ...] | None = None
    token_weight: tuple[float, ...] | None = None
    mini_batch: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every column, and drop what a mask calls padding.

        Raises:
            InputError: a value has the wrong type, is not finite, or is empty; log-probs are not one a response token; a mask
                does not fit. The prompt and the column are named.
        """
        self._set("prompt_id", values.prompt_id(self.prompt_id, "prompt_id"))
        try:
            for name, check in values.REQUIRED.items():
                self._set(name, check(getattr(self, name), name))
            for name, check in values.OPTIONAL.items():
                value = getattr(self, name)
                self._set(name, None if values.missing(value, name) else check(value, name))
            if self.reward is None and self.advantage is None:
                raise InputError("there is neither a reward nor an advantage; give one of them")
            self._set("extra", values.columns(self.extra, "extra"))
            self._take_aliases()
            for name in (*values.OF_TOKENS, "advantage"):
                self._check_count(name)
            self._drop_padding()
            self._drop_all_sampled()
        except InputError as error:
            raise InputError(f"prompt_id {self.prompt_id!r}: {error}") from error

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the record is frozen for everyone else

    def _take_aliases(self) -> None:
        """``sampled`` by its other names.

        Raises:
            InputError: two of them disagree.
        """
        for name in SAMPLED_ALIASES:
            value = self.extra.get(name)
            if value is None or isinstance(value, bool | int | float):
                continue  # one value for the row is a mask of rows, which :mod:`contradictions` looks at
            found = values.flags(value, name)
            if self.sampled is None:
                if len(found) != len(self.response_ids):
                    raise InputError(_miscounted(name, len(found), len(self.response_ids)))
                self._set("sampled", found)
            elif found != self.sampled:
                raise InputError(
                    f"{name} and another column say different tokens were sampled; give one of sampled, "
                    f"{', '.join(SAMPLED_ALIASES)}"
                )

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, tuple) and len(value) != len(self.response_ids):
            raise InputError(_miscounted(name, len(value), len(self.response_ids)))

    def _drop_all_sampled(self) -> None:
        """A mask that is true throughout says what is said without it.

        Raises:
            InputError: it is false throughout.
        """
        if self.sampled is None:
            return
        if not any(self.sampled):
            raise InputError(
                "sampled is false at every response token; leave rows out of which the policy drew nothing"
            )
        if all(self.sampled):
            self._set("sampled", None)

    def _drop_padding(self) -> None:
        padding = padding_of(self.extra, len(self.prompt_ids), len(self.response_ids))
        if not padding.prompt and not padding.response:
            return
        kept = len(self.response_ids) - padding.response
        dropped = set(self.response_ids[kept:])
        if len(dropped) > 1:
            raise InputError(
                f"a mask is 0 over different ids at the response's end ({', '.join(map(str, sorted(dropped)))}), of which one "
                "alone can be padding; is it 0 over the end token, which was sampled? Give 1 there"
            )
        lengths = {len(self.response_ids): 0, self.length: padding.prompt}
        extra = {}
        for name, value in self.extra.items():
            if name in ATTENTION_MASKS:
                continue  # it would no longer fit
            first = lengths.get(len(value)) if isinstance(value, list | tuple) and is_of_tokens(name) else None
            extra[name] = value if first is None else value[first : len(value) - padding.response]
        self._set("prompt_ids", self.prompt_ids[padding.prompt :])
        self._set("response_ids", self.response_ids[:kept])
        for name in (*values.OF_TOKENS, "advantage"):
            value = getattr(self, name)
            self._set(name, value[:kept] if isinstance(value, tuple) else value)
        self._set("padding_id", dropped.pop() if dropped else self.padding_id)
        self._set("extra", extra)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @cached_property
    def sampled_places(self) -> tuple[int, ...]:
        """Where in the response the tokens stand that the policy drew: T places."""
        if self.sampled is None:
            return tuple(range(len(self.response_ids)))
        return tuple(place for place, drawn in enumerate(self.sampled) if drawn)

    @property
    def tokens(self) -> int:
        """T, the response tokens that the policy drew."""
        return len(self.sampled_places)

    @property
    def tokens_in_loss(self) -> int:
        """How many of them are in the trainer's loss."""
        return self.tokens if self.loss_mask is None else sum(self.at_sampled(self.loss_mask))

    def at_sampled(self, values: Sequence[T]) -> tuple[T, ...]:
        """Of values a response token those at tokens that the policy drew: T of them."""
        return tuple(values) if self.sampled is None else tuple(values[place] for place in self.sampled_places)


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and its responses, in the order of their rows."""

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    responses: tuple[Rollout, ...]


@dataclass(frozen=True)
class RolloutBatch:
    """The rollouts of one probe: prompts in the order of their first row, each with its responses.

    Attributes:
        groups: the B prompts, each with G_n responses.
        temperature: τ, at which every response was sampled; scores are taken of logits / τ.
        importance: what the responses count in means under the probed policy, once that is known; None where each counts once.

    Example:
        >>> from entropy_probe import group_rollouts
        >>> rows = [
        ...     {"prompt_id": n, "prompt_ids": [5, n], "response_ids": [7] * (n + g) + [1], "reward": g}
        ...     for n in (2, 3) for g in (0, 1)
        ... ]
        >>> batch = group_rollouts(rows)
        >>> batch.group_sizes, batch.tokens, batch.mean_length, batch.temperature
        ((2, 2), 16, 4.0, 1.0)
    """

    groups: tuple[PromptGroup, ...]
    temperature: float
    importance: Importance | None = field(default=None, compare=False)

    @cached_property
    def responses(self) -> tuple[Rollout, ...]:
        """Every response, prompt by prompt: the order in which scores and coefficients are laid out."""
        return tuple(response for group in self.groups for response in group.responses)

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """G_n, the number of responses of each prompt."""
        return tuple(len(group.responses) for group in self.groups)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """T of every response: its tokens that the policy drew, flat."""
        return tuple(response.tokens for response in self.responses)

    @cached_property
    def first_token(self) -> tuple[int, ...]:
        """Where every response's tokens begin among all response tokens laid end to end; their number comes last: [N + 1]."""
        return (0, *itertools.accumulate(self.lengths))

    @cached_property
    def first_row(self) -> tuple[int, ...]:
        """Where every prompt's responses begin among all; their number comes last: [B + 1]."""
        return (0, *itertools.accumulate(self.group_sizes))

    @cached_property
    def prompt_of_row(self) -> tuple[int, ...]:
        """The prompt of every response, by its place: [N]."""
        return tuple(n for n, size in enumerate(self.group_sizes) for _ in range(size))

    def of_tokens(self, column: str, default: float | None = None) -> tuple[float, ...] | None:
        """A column's values at the tokens that the policy drew, end to end, [tokens].

        A row that lacks it has ``default`` at each token; without a default all is None.
        """
        columns = [getattr(row, column) for row in self.responses]
        if default is None and any(values is None for values in columns):
            return None
        parts = (
            (default,) * row.tokens if values is None else row.at_sampled(values)
            for row, values in zip(self.responses, columns, strict=True)
        )
        return tuple(itertools.chain.from_iterable(parts))

    def of_prompts(self, prompts: Sequence[int]) -> RolloutBatch:
        """The batch of these prompts alone, by their places."""
        importance = self.importance
        if importance is not None:
            rows = [row for n in prompts for row in range(self.first_row[n], self.first_row[n + 1])]
            importance = importance.of_rows(rows)
        return RolloutBatch(tuple(self.groups[n] for n in prompts), self.temperature, importance)

    @cached_property
    def mean_length(self) -> float:
        """T̄, the mean over prompts of the mean response length, in tokens."""
        parts = itertools.pairwise(self.first_row)
        means = [sum(self.lengths[start:stop]) / (stop - start) for start, stop in parts]
        return sum(means) / len(means)

    @cached_property
    def tokens(self) -> int:
        """Number of response tokens."""
        return self.first_token[-1]

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Of every prompt, tokens of all its sequences, prompts and responses: what its forwards cost."""
        return tuple(sum(response.length for response in group.responses) for group in self.groups)


def _miscounted(name: str, found: int, tokens: int) -> str:
    return f"{found} {name} for {tokens} response tokens; expected one each"


def count_cut(rollouts: Iterable[Rollout]) -> int:
    """How many responses the length limit ended."""
    return sum(rollout.cut is True for rollout in rollouts)
