"""Rows from the tensors that a trainer holds at its step: verl, OpenRLHF, SkyRL, slime, AReaL, prime-rl.

Each function takes the tensors under the names that they have there, and :class:`StepFacts` for what tensors do not tell.
None of the trainers is imported. What they do by default is in docs/trainers.md, and in the records of
:mod:`~entropy_probe.integrations.rows.defaults`.
"""

from entropy_probe.integrations.rows.areal import rows_of_areal
from entropy_probe.integrations.rows.defaults import (
    AREAL_DEFAULTS,
    OPENRLHF_DEFAULTS,
    PRIME_RL_DEFAULTS,
    SKYRL_DEFAULTS,
    SLIME_DEFAULTS,
    VERL_DEFAULTS,
)
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.loss import TrainersLoss
from entropy_probe.integrations.rows.openrlhf import rows_of_openrlhf
from entropy_probe.integrations.rows.prime_rl import rows_of_prime_rl
from entropy_probe.integrations.rows.skyrl import rows_of_skyrl
from entropy_probe.integrations.rows.slime import rows_of_slime
from entropy_probe.integrations.rows.verl import rows_of_verl

__all__ = [
    "AREAL_DEFAULTS",
    "OPENRLHF_DEFAULTS",
    "PRIME_RL_DEFAULTS",
    "SKYRL_DEFAULTS",
    "SLIME_DEFAULTS",
    "VERL_DEFAULTS",
    "StepFacts",
    "TrainersLoss",
    "rows_of_areal",
    "rows_of_openrlhf",
    "rows_of_prime_rl",
    "rows_of_skyrl",
    "rows_of_slime",
    "rows_of_verl",
]
