"""What a training run leaves on disk: weights, adapters and the optimizer's state."""

from entropy_probe.checkpoints.adam_state import OptimizerMapping, load_adam_state
from entropy_probe.checkpoints.hf import Checkpoint, ModelFolder, load_checkpoint, load_model

__all__ = ["Checkpoint", "ModelFolder", "OptimizerMapping", "load_adam_state", "load_checkpoint", "load_model"]
