"""A digest of rollouts, by which ranks find out whether they were given the same."""

from __future__ import annotations

import json

from entropy_probe.data.rollouts.records import RolloutBatch
from entropy_probe.data.rollouts.rows import row_from_rollout
from entropy_probe.ranks.same_inputs import sha256


def digest_of_batch(batch: RolloutBatch | None) -> bytes:
    """Of every column of every row, in order, and the temperature; of no batch too, since one rank may have been given none."""
    if batch is None:
        return sha256(b"no rollouts")
    rows = (json.dumps(row_from_rollout(row), sort_keys=True, default=repr) for row in batch.responses)
    return sha256(*(f"{row}\n".encode() for row in rows), repr((batch.temperature, batch.group_sizes)).encode())
