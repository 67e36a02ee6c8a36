"""The Hugging Face Trainer's folder, which TRL writes too: ``checkpoint-N`` with full weights or a PEFT adapter.

Full weights: config.json and model.safetensors, or its shards with an index. An adapter: adapter_config.json and
adapter_model.safetensors, over a base that is elsewhere; both in a folder of the adapter's name
where it has one. Adam's state is optimizer.pt, by index, trainable parameters alone.
Pickled weights are not read.
"""

from __future__ import annotations

from pathlib import Path

from entropy_probe.checkpoints.files.four_bit import dequantised, in_four_bits
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
REFERENCES = ("ref", "reference", "ref_model", "old")
"""Names of adapters that trainers keep beside the one that they train."""


class TrainerFolder:
    """``checkpoint-N`` of the Trainer; also any folder that ``save_pretrained`` wrote, which has no optimizer."""

    name = "Hugging Face Trainer checkpoint"

    def detects(self, path: Path) -> bool:
        """By a configuration, by weights in safetensors, or by optimizer.pt."""
        return any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, WHOLE, INDEX, ADAPTER, OPTIMIZER))

    def files(self, path: Path) -> tuple[FoundFile, ...]:
        """What inspection lists; an adapter needs no configuration of a whole model."""
        inside = None if (path / CONFIG).is_file() else named_adapter(path)
        adapted = (path / ADAPTER_CONFIG).is_file() or inside is not None
        where = "" if inside is None else f"{inside.name}/"
        return (
            found_file(path, CONFIG, "architecture", required=not adapted),
            found_file(path, f"{where}{ADAPTER_CONFIG}", "PEFT adapter", required=False),
            found_file(path, f"{where}*.safetensors", "weights", required=True),
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
        """model.safetensors or its shards, also in bitsandbytes' 4 bits; None beside an adapter, and without safetensors."""
        if (path / ADAPTER_CONFIG).is_file() or not any(path.glob("*.safetensors")):
            return None
        tensors = tensors_of_model(path)
        # transformers would need bitsandbytes for these, and would not give them back as numbers.
        return (
            StoredWeights(dequantised(path, tensors))
            if in_four_bits(tensors)
            else StoredWeights(tensors, pretrained=path)
        )

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
        inside = named_adapter(path)
        if inside is None:
            return None
        if not (inside / ADAPTER).is_file():
            raise InputError(f"{inside} has no {ADAPTER}; pickled adapters are not loaded")
        tensors = tensors_of_file(inside / ADAPTER)
        return StoredAdapter(read_json(inside / ADAPTER_CONFIG), tensors, pretrained=inside, name=inside.name)

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


def named_adapter(path: Path) -> Path | None:
    """The folder of the adapter that was trained, which PEFT names after it unless it is called "default"; None without one.

    Raises:
        InputError: there are several, and their names do not say which is the reference.
    """
    if not (path / OPTIMIZER).is_file() or (path / ADAPTER_CONFIG).is_file():
        return None
    inside = sorted(file.parent for file in path.glob(f"*/{ADAPTER_CONFIG}"))
    trained = [folder for folder in inside if folder.name not in REFERENCES] or inside
    if len(trained) > 1:
        raise InputError(
            f"{path} holds the adapters {some_of([folder.name for folder in trained])}, and {OPTIMIZER} does not say which one "
            f"it trains; copy {ADAPTER_CONFIG} and {ADAPTER} of that one beside {OPTIMIZER}"
        )
    return trained[0] if trained else None
