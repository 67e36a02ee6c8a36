"""What a training run leaves on disk: weights, adapters and the optimizer's state."""

from entropy_probe.checkpoints.adam_state import adam_state_in, load_adam_state
from entropy_probe.checkpoints.beside import Beside
from entropy_probe.checkpoints.files.trainer_state import TrainerState
from entropy_probe.checkpoints.freezing import freeze_matching, freeze_names, patterns_of
from entropy_probe.checkpoints.index_names import OptimizerMapping
from entropy_probe.checkpoints.loading import load_checkpoint, load_model
from entropy_probe.checkpoints.records import Checkpoint, ModelFolder
from entropy_probe.checkpoints.run_time_quantisation import BaseQuantization
from entropy_probe.checkpoints.sharded import load_sharded_checkpoint, load_sharded_model, sharding_of
from entropy_probe.checkpoints.sources import trainer_state_of
from entropy_probe.checkpoints.tokenizer_ids import tokenizer_ids

__all__ = [
    "BaseQuantization",
    "Beside",
    "Checkpoint",
    "ModelFolder",
    "OptimizerMapping",
    "TrainerState",
    "adam_state_in",
    "freeze_matching",
    "freeze_names",
    "load_adam_state",
    "load_checkpoint",
    "load_model",
    "load_sharded_checkpoint",
    "load_sharded_model",
    "patterns_of",
    "sharding_of",
    "tokenizer_ids",
    "trainer_state_of",
]
