"""What TRL draws and scores in one generation and does not hand to its loss as it was.

Where ``mask_truncated_completions`` leaves a response out, TRL sets its ``completion_mask`` and its tool mask to 0 throughout.
Its length is then no longer told from its padding, nor what a tool wrote from what was drawn; and the log-probs that are
computed there are of tokens that do not see the response before them. RLOOTrainer keeps of its old log-probs their sum alone.
So all of it is taken where it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Generated:
    """One generation of one process, filled while TRL makes it.

    Attributes:
        lengths: tokens of every response, tool outputs included, [N].
        drawn: for every response 1 at tokens that the policy drew and 0 at others; None where all were drawn.
        scores: log-probs of the responses' tokens, [N, C] each: the policy's and the reference's, if TRL computes them.
    """

    lengths: list[int] = field(default_factory=list)
    drawn: list[list[int]] | None = None
    scores: list[Tensor] = field(default_factory=list)

    def add_turns(self, responses: Sequence[Sequence[int]], drawn: Sequence[Sequence[int]] | None) -> None:
        """What was drawn: ids of every response, and the mask of those that the policy drew."""
        self.lengths = [len(ids) for ids in responses]
        self.drawn = None if drawn is None else [[int(one) for one in mask] for mask in drawn]

    def length_column(self, like: Tensor) -> Tensor:
        """T of every response, [N], on the device of ``like``."""
        return torch.tensor(self.lengths, device=like.device)

    def drawn_column(self, like: Tensor) -> Tensor | None:
        """The mask of drawn tokens, [N, C] as ``like`` is, 1 at padding; None where all were drawn."""
        if self.drawn is None:
            return None
        column = torch.ones_like(like)
        for place, mask in enumerate(self.drawn):
            column[place, : len(mask)] = torch.tensor(mask, device=like.device, dtype=like.dtype)
        return column

    def score(self, compute: Callable[..., Any], masked: bool, arguments: tuple[Any, ...], options: Any) -> Any:
        """What TRL's method for log-probs returns; the log-probs of whole responses are kept.

        Args:
            compute: the method: of model, ids [N, P + C], attention mask, C, ....
            masked: the attention mask may leave out responses. They are then scored again with a mask that does not, with the
                random state as it was before: one more forward without gradient.
            arguments: of the method.
            options: of the method, by name.
        """
        found = compute(*arguments, **options)
        scores = found[0]
        if masked:
            model, ids, attention, kept, *rest = arguments
            whole = attention.clone()
            places = torch.arange(kept, device=attention.device)
            whole[:, -kept:] = places < self.length_column(attention).unsqueeze(1)
            with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
                scores = compute(model, ids, whole, kept, *rest, **options)[0]
        self.scores.append(scores.detach())
        return found
