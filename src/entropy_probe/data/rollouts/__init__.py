"""Rollouts: prompts, their sampled responses, and the files that hold them (JSON Lines or Parquet, one row a response).

Exact token ids are the truth; text is for people. Rows of one prompt need not be adjacent: a prompt stands where its
first row stands, its responses in the order of their rows. Unknown columns are kept in ``Rollout.extra``; those that
contradict what the probe computes are refused (:mod:`~entropy_probe.data.rollouts.columns`). Dumps of training libraries are
read too (:mod:`~entropy_probe.data.rollouts.formats`).
"""

from entropy_probe.data.rollouts.containers.rows import read_rows
from entropy_probe.data.rollouts.files import read_batch, read_rollouts, write_rollouts
from entropy_probe.data.rollouts.grouping import as_batch, group_rollouts, same_temperature
from entropy_probe.data.rollouts.padding import SpecialIds, doubtful_rows, refuse_unsampled
from entropy_probe.data.rollouts.records import PromptGroup, PromptId, Rollout, RolloutBatch, count_cut
from entropy_probe.data.rollouts.rows import rollout_from_row, row_from_rollout

__all__ = [
    "PromptGroup",
    "PromptId",
    "Rollout",
    "RolloutBatch",
    "SpecialIds",
    "as_batch",
    "count_cut",
    "doubtful_rows",
    "group_rollouts",
    "read_batch",
    "read_rollouts",
    "read_rows",
    "refuse_unsampled",
    "rollout_from_row",
    "row_from_rollout",
    "same_temperature",
    "write_rollouts",
]
