"""Is the step that the probe computes the one that the trainer took? Two checkpoints and the rollouts between them tell."""

from entropy_probe.replay_check.run import replay
from entropy_probe.replay_check.settings import ReplaySettings

__all__ = ["ReplaySettings", "replay"]
