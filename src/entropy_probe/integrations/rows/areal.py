"""AReaL's batch at the step: values at the token before, rows padded on the right, or packed."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.cutting import TokenNames, TrainersRow, between_ends, rollouts_of
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.tensors import Tensors, flags, listed, matrix, needed, tensor_of, vector


def rows_of_areal(tensors: Tensors, facts: StepFacts | None = None, *, recomputed: bool = False) -> list[Rollout]:
    """Rows from AReaL's batch: what ``ppo_update`` is given, a mini-batch of it, or a packed micro-batch.

    Padded it holds ``input_ids`` and ``attention_mask`` [B, L]; packed, ``input_ids`` [total] and ``cu_seqlens`` [B + 1]. Of
    the shape of ``input_ids`` are ``loss_mask`` (1 at tokens that the policy drew), ``logprobs`` (the sampler's),
    ``advantages`` and where there is one ``prox_logp`` (the trainer's, to which it takes its ratio; without one that is to
    the sampler's). By then ``compute_advantages`` has moved each of them one place ahead: place t is of id t + 1. A response
    runs from its first drawn token to its last. Rows without any are left out: they have no weight in the loss, and packing
    adds such. Source: AReaL 1.0, trainer/ppo/actor.py, utils/data.py (``pack_tensor_dict``) and
    utils/functional/functional.py (``ppo_actor_loss_fn``).

    Args:
        tensors: by AReaL's names.
        facts: what they do not tell. ``temperature`` is the actor's.
        recomputed: whether ``recompute_logprob`` is on without ``use_decoupled_loss``: ``logprobs`` are then the trainer's
            own, and of the sampler's nothing is left.

    Raises:
        InputError: a tensor is missing or of another shape, which it names, or a row is refused.

    Example:
        >>> import torch
        >>> from entropy_probe.integrations.rows import AREAL_DEFAULTS, StepFacts, rows_of_areal
        >>> batch = {
        ...     "input_ids": torch.tensor([5, 6, 7, 8, 1, 5, 6, 9, 1]),
        ...     "cu_seqlens": torch.tensor([0, 5, 9]),
        ...     "loss_mask": torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 0]),
        ...     "logprobs": torch.tensor([0.0, -0.5, -1.0, -0.25, 0.0, 0.0, -2.0, -0.5, 0.0]),
        ...     "advantages": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -1.0, 0.0]),
        ... }
        >>> facts = StepFacts(rewards=[1.0, 0.0], temperature=1.0, loss=AREAL_DEFAULTS)
        >>> rows = rows_of_areal(batch, facts)
        >>> rows[1].prompt_ids, rows[1].response_ids, rows[1].old_logprobs
        ((5, 6), (9, 1), (-2.0, -0.5))
    """
    facts = facts or StepFacts()
    old = "logprobs" if tensors.get("prox_logp") is None else "prox_logp"
    held = TokenNames(old, "logprobs", "ref_logp").held(tensors, facts.loss)
    needed(tensors, "logprobs")
    if recomputed:
        if facts.loss is not None and facts.loss.importance_sampling_mode is not None:
            raise InputError(
                "logprobs are recomputed, so that none of the sampler's are left, and the loss has the correction "
                f"{facts.loss.importance_sampling_mode} for it; AReaL has one with use_decoupled_loss alone"
            )
        del held["logprobs"]
    # Its KL term is in the reward: a reference's log-probs are in no loss.
    held.pop("ref_logprobs", None)
    names = {"input_ids": "input_ids", "loss_mask": "loss_mask", **held}
    packed = tensors.get("cu_seqlens") is not None
    values, seen = _packed(tensors, names) if packed else _padded(tensors, names)
    rewards = vector(tensors, "rewards", len(seen))
    rows = []
    for place, real in enumerate(seen):
        # The last place has been moved from the first, which nothing predicts.
        trained = flags("loss_mask", values["loss_mask"][place])[:-1]
        rows.append(
            TrainersRow(
                place,
                values["input_ids"][place],
                real,
                between_ends(trained),
                trained,
                {column: values[column][place][:-1] for column in held},
                facts={} if rewards is None else {"reward": rewards[place]},
            )
        )
    return rollouts_of(rows, len(rows), facts)


Rows = dict[str, list[list[Any]]]


def _padded(tensors: Tensors, names: dict[str, str]) -> tuple[Rows, list[list[bool]]]:
    """Values by column and row, and which ids are no padding."""
    ids = matrix(tensors, "input_ids")
    shape = (len(ids), len(ids[0]))
    seen = [flags("attention_mask", row) for row in matrix(tensors, "attention_mask", shape)]
    return {column: matrix(tensors, name, shape) for column, name in names.items()}, seen


def _packed(tensors: Tensors, names: dict[str, str]) -> tuple[Rows, list[list[bool]]]:
    """The same of rows laid end to end."""
    bounds = [int(bound) for bound in listed(tensor_of("cu_seqlens", tensors["cu_seqlens"], 1))]
    found: Rows = {}
    for column, name in names.items():
        values = needed(tensors, name)
        # Engines add a first dimension of one row.
        flat = values[0] if isinstance(values, Tensor) and values.ndim == 2 and len(values) == 1 else values
        row = listed(tensor_of(name, flat, 1))
        if len(row) != bounds[-1]:
            raise InputError(
                f"{name} has {len(row)} values, and cu_seqlens ends at {bounds[-1]}; expected one for each id"
            )
        found[column] = [row[start:stop] for start, stop in itertools.pairwise(bounds)]
    return found, [[True] * len(row) for row in found["input_ids"]]
