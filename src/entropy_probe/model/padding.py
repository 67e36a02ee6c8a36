"""Sequences padded on the right, and where in them the response tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.data.rollouts import Rollout


@dataclass(frozen=True)
class PaddedResponses:
    """Sequences padded on the right.

    ``input_ids`` and ``attention_mask`` are [n, L]; ``rows``, ``positions``, ``targets`` and ``places`` hold, for each response
    token that the policy drew, its sequence, the position whose logits predict it, its id, and its place in the response:
    [tokens].
    ``first`` is each sequence's first such position, ``longest`` the length R of the longest response.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    places: Tensor
    first: tuple[int, ...]
    longest: int

    def on_responses(self, hidden: Tensor) -> Tensor:
        """The positions of [n, L, d] whose logits predict response tokens: [n, R, d]; short responses repeat a later one."""
        if len(set(self.first)) == 1 and self.first[0] + self.longest <= hidden.shape[1]:
            return hidden[:, self.first[0] : self.first[0] + self.longest]
        starts = torch.tensor(self.first, device=hidden.device)[:, None]
        window = starts + torch.arange(self.longest, device=hidden.device)
        # Flat: the backward of indexing by two is several times slower.
        row_starts = torch.arange(len(hidden), device=hidden.device)[:, None] * hidden.shape[1]
        flat = window.clamp(max=hidden.shape[1] - 1) + row_starts
        return hidden.flatten(0, 1).index_select(0, flat.flatten()).view(*flat.shape, hidden.shape[-1])

    def of_tokens(self, values: Tensor) -> Tensor:
        """The entries of [n, R, …] that belong to response tokens: [tokens, …]."""
        if len(self.rows) == values.shape[0] * values.shape[1]:
            return values.flatten(0, 1)
        return values.flatten(0, 1).index_select(0, self.rows * values.shape[1] + self.places)


def pad_right(responses: Sequence[Rollout], device: torch.device, length: int | None = None) -> PaddedResponses:
    """Prompt and response ids side by side, padded with masked zeros on the right to ``length``, or to the longest."""
    length = max(r.length for r in responses) if length is None else length
    input_ids = torch.zeros((len(responses), length), dtype=torch.long)
    attention_mask = torch.zeros((len(responses), length), dtype=torch.long)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    for row, response in enumerate(responses):
        ids = (*response.prompt_ids, *response.response_ids)
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        first = len(response.prompt_ids) - 1
        drawn = response.sampled_places
        rows.extend([row] * len(drawn))
        positions.extend(first + place for place in drawn)
        targets.extend(response.at_sampled(response.response_ids))
        places.extend(drawn)
    return PaddedResponses(
        input_ids.to(device),
        attention_mask.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(places, device=device),
        tuple(len(response.prompt_ids) - 1 for response in responses),
        max(len(response.response_ids) for response in responses),
    )


def sum_over_tokens(values: Tensor, batch: PaddedResponses) -> Tensor:
    """One value a response token, [tokens], summed for each response: float64 [n].

    In float32 the sum over a long response would lose what its tokens still hold.
    """
    totals = torch.zeros(len(batch.input_ids), dtype=torch.float64, device=values.device)
    return totals.index_add(0, batch.rows, values.double())


def idle_row(responses: Sequence[Rollout]) -> Rollout:
    """Two tokens for a rank that has no rows left while others, whose forwards need it, have."""
    first = responses[0]
    return Rollout(first.prompt_id, first.prompt_ids[:1], first.response_ids[:1], 0.0)
