"""What a training run leaves on disk: weights, adapters and the optimizer's state."""

from entropy_probe.checkpoints.adam_state import load_adam_state
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names, patterns_of
from entropy_probe.checkpoints.hf import Checkpoint, ModelFolder, load_checkpoint, load_model
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.checkpoints.sharded import load_sharded_checkpoint, load_sharded_model, sharding_of
from entropy_probe.checkpoints.tokenizer_ids import tokenizer_ids
from entropy_probe.checkpoints.trainer_state import TrainerState, read_trainer_state

__all__ = [
    "Checkpoint",
    "ModelFolder",
    "OptimizerMapping",
    "TrainerState",
    "freeze_matching",
    "freeze_names",
    "load_adam_state",
    "load_checkpoint",
    "load_model",
    "load_sharded_checkpoint",
    "load_sharded_model",
    "patterns_of",
    "read_trainer_state",
    "sharding_of",
    "tokenizer_ids",
]
