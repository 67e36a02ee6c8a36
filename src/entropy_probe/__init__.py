"""entropy-probe: what will the next optimizer step do to a language model policy's entropy, how sure are we, what did it do?"""

from entropy_probe.checkpoints import BaseQuantization, Beside
from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts, read_batch, read_rollouts, write_rollouts
from entropy_probe.data.units import Mode
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.kl import KLEstimator
from entropy_probe.losses.length_weights import LengthWeight, LossAggregation
from entropy_probe.losses.named import LossName
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.state import AdamState
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.pipeline.run import ProbeResult, probe, probe_checkpoint
from entropy_probe.pipeline.settings import Settings, ShardingChoice
from entropy_probe.ranks.collectives import Ranks
from entropy_probe.replay_check import ReplaySettings, replay
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.choices import EntropyUnit, Estimator, SamplerWeights

__version__ = "0.1.0"

__all__ = [
    "AdamState",
    "AdvantageRule",
    "BaseQuantization",
    "Beside",
    "EntropyUnit",
    "Estimator",
    "InputError",
    "IntervalMethod",
    "KLEstimator",
    "LengthWeight",
    "LossAggregation",
    "LossName",
    "Mode",
    "ProbeResult",
    "Ranks",
    "ReplaySettings",
    "Rollout",
    "RolloutBatch",
    "Rounding",
    "SamplerWeights",
    "Settings",
    "ShardingChoice",
    "SweepRange",
    "Weighting",
    "ZeroV",
    "group_rollouts",
    "probe",
    "probe_checkpoint",
    "read_batch",
    "read_rollouts",
    "replay",
    "state_of_optimizer",
    "write_rollouts",
]
