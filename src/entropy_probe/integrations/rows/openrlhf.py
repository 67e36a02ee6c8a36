"""OpenRLHF's Experience at the step: rows padded on the right, values at the token before."""

from __future__ import annotations

from entropy_probe.data.rollouts import Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.cutting import TokenNames, TrainersRow, between_ends, rollouts_of
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.tensors import Tensors, flags, matrix, vector

NAMES = TokenNames("action_log_probs", "rollout_log_probs", "base_action_log_probs")


def rows_of_openrlhf(tensors: Tensors, facts: StepFacts | None = None) -> list[Rollout]:
    """Rows from the fields of OpenRLHF's ``Experience`` (``vars(experience)``).

    With B rows of T ids it holds ``sequences`` and ``attention_mask`` [B, T] and, each [B, A], ``action_mask`` (1 at tokens
    that the policy drew), ``action_log_probs``, ``advantages`` and where there are any ``rollout_log_probs`` (the sampler's)
    and ``base_action_log_probs`` (the reference's); [B], ``rewards`` and ``truncated``. A is T − 1, and place a is of id a +
    1; in general of id T − A + a. A response runs from its first drawn token to its last. Rows without any are left out:
    they have no weight in the loss. Source: OpenRLHF 0.11, trainer/ppo_utils/experience.py, models/actor.py and
    models/loss.py.

    Args:
        tensors: by OpenRLHF's names.
        facts: what they do not tell. ``temperature`` is ``rollout.temperature``.

    Raises:
        InputError: a tensor is missing or of another shape, which it names, or a row is refused.

    Example:
        >>> import torch
        >>> from entropy_probe.integrations.rows import OPENRLHF_DEFAULTS, StepFacts, rows_of_openrlhf
        >>> experience = {
        ...     "sequences": torch.tensor([[5, 6, 7, 8, 1], [5, 6, 9, 1, 0]]),
        ...     "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
        ...     "action_mask": torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0]]),
        ...     "action_log_probs": torch.tensor([[0.0, -0.5, -1.0, -0.25], [0.0, -2.0, -0.5, 0.0]]),
        ...     "advantages": torch.tensor([[0.0, 1.0, 0.5, 0.25], [0.0, -1.0, -1.0, 0.0]]),
        ...     "rewards": torch.tensor([1.0, 0.0]),
        ... }
        >>> rows = rows_of_openrlhf(experience, StepFacts(temperature=1.0, loss=OPENRLHF_DEFAULTS))
        >>> rows[0].response_ids, rows[0].advantage, rows[1].response_ids, rows[1].reward
        ((7, 8, 1), (1.0, 0.5, 0.25), (9, 1), 0.0)
    """
    facts = facts or StepFacts()
    held = NAMES.held(tensors, facts.loss)
    ids = matrix(tensors, "sequences")
    count, width = len(ids), len(ids[0])
    seen = matrix(tensors, "attention_mask", (count, width))
    masks = matrix(tensors, "action_mask")
    actions = len(masks[0])
    if len(masks) != count or actions >= width:
        raise InputError(
            f"action_mask has shape {[len(masks), actions]}; expected {[count, width - 1]}, or fewer places: none is of the "
            "first id of sequences"
        )
    columns = {column: matrix(tensors, name, (count, actions)) for column, name in held.items()}
    rewards, cut = vector(tensors, "rewards", count), vector(tensors, "truncated", count)
    rows = []
    for place in range(count):
        trained = flags("action_mask", masks[place])
        beside = {} if rewards is None else {"reward": rewards[place]}
        rows.append(
            TrainersRow(
                place,
                ids[place],
                flags("attention_mask", seen[place]),
                between_ends(trained),
                trained,
                {name: values[place] for name, values in columns.items()},
                facts=beside | ({} if cut is None else {"cut": bool(cut[place])}),
            )
        )
    return rollouts_of(rows, count, facts)
