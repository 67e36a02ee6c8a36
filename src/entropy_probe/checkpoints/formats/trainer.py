"""The Hugging Face Trainer's folder, which TRL writes too: ``checkpoint-N`` with full weights or a PEFT adapter.

Full weights: config.json and model.safetensors, or its shards with an index. An adapter: adapter_config.json and
adapter_model.safetensors, over a base that is elsewhere. Adam's state is optimizer.pt, by index, trainable parameters alone.
Pickled weights are not read.
"""

from __future__ import annotations

from pathlib import Path

from entropy_probe.checkpoints.files.optimizer_pt import read_optimizer_file
from entropy_probe.checkpoints.files.safetensors_files import INDEX, WHOLE, tensors_of_file, tensors_of_model
from entropy_probe.checkpoints.files.stored import StoredOptimizer
from entropy_probe.checkpoints.files.trainer_state import TrainerState, read_trainer_state
from entropy_probe.checkpoints.formats.base import ADAM_STATE, FoundFile, StoredAdapter, StoredWeights, found_file
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, some_of

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"


class TrainerFolder:
    """``checkpoint-N`` of the Trainer; also any folder that ``save_pretrained`` wrote, which has no optimizer."""

    name = "Hugging Face Trainer checkpoint"

    def detects(self, path: Path) -> bool:
        """By a configuration, by weights in safetensors, or by optimizer.pt."""
        return any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, WHOLE, INDEX, ADAPTER, OPTIMIZER))

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """What inspection lists; an adapter needs no configuration of a whole model."""
        adapted = (path / ADAPTER_CONFIG).is_file()
        return (
            found_file(path, CONFIG, "architecture", required=not adapted),
            found_file(path, ADAPTER_CONFIG, "PEFT adapter", required=False),
            found_file(path, "*.safetensors", "weights", required=True),
            found_file(path, OPTIMIZER, ADAM_STATE, required=True),
            found_file(path, "trainer_state.json", "training log", required=False),
            found_file(path, "tokenizer_config.json", "tokenizer", required=False),
        )

    def world_size(self, path: Path) -> int | None:
        """One rank writes it for all, and does not say how many there are."""
        return None

    def configuration(self, path: Path) -> Path | None:
        """The folder itself, where it has config.json."""
        return path if (path / CONFIG).is_file() else None

    def weights(self, path: Path) -> StoredWeights | None:
        """model.safetensors or its shards; None beside an adapter, and where no file is safetensors."""
        if (path / ADAPTER_CONFIG).is_file() or not any(path.glob("*.safetensors")):
            return None
        return StoredWeights(tensors_of_model(path), pretrained=path)

    def adapter(self, path: Path) -> StoredAdapter | None:
        """adapter_model.safetensors with its configuration.

        Raises:
            InputError: one is there without the other, or both are in a folder that has the adapter's name.
        """
        if (path / ADAPTER_CONFIG).is_file():
            if not (path / ADAPTER).is_file():
                raise InputError(f"{path} has no {ADAPTER}; pickled adapters are not loaded")
            return StoredAdapter(read_json(path / ADAPTER_CONFIG), tensors_of_file(path / ADAPTER), pretrained=path)
        if (path / CONFIG).is_file():
            return None
        if (path / ADAPTER).is_file():
            raise InputError(adapter_without_config(path, ADAPTER))
        _refuse_named_adapter(path)
        return None

    def optimizer(self, path: Path) -> StoredOptimizer | None:
        """optimizer.pt."""
        return read_optimizer_file(path / OPTIMIZER) if (path / OPTIMIZER).is_file() else None

    def trainer_state(self, path: Path) -> TrainerState:
        """trainer_state.json; empty where there is none."""
        return read_trainer_state(path)


def adapter_without_config(path: Path, found: str) -> str:
    """What to say of an adapter's weights without its configuration, which the Trainer leaves out of accelerate's shards."""
    return (
        f"{path} holds an adapter's weights ({found}) and no {ADAPTER_CONFIG}; write it there from the model that was "
        'trained: model.peft_config["default"].save_pretrained(folder)'
    )


def _refuse_named_adapter(path: Path) -> None:
    """Refuse an adapter in a folder of its name, as PEFT keeps those that are not called "default"."""
    inside = sorted(file.parent.name for file in path.glob(f"*/{ADAPTER_CONFIG}"))
    if inside and (path / OPTIMIZER).is_file():
        raise InputError(
            f"{path} keeps its adapter in {some_of(inside)}/, as PEFT does with adapters that have a name; copy "
            f"{ADAPTER_CONFIG} and {ADAPTER} from {inside[0]}/ beside {OPTIMIZER}"
        )
