"""What transformers' models and generation configs say of themselves in private names alone.

The names were read in transformers 4.56 and 5.23.
"""

from __future__ import annotations

from collections.abc import Collection
from types import NoneType

from transformers import PreTrainedModel

from entropy_probe.compat.gates import attribute

GENERATION_CONFIGS_OWN = frozenset({"_commit_hash", "_from_model_config", "_original_object_hash"})
"""Fields of a GenerationConfig that say where it comes from, and nothing of how tokens are drawn."""


def unexpected_keys_to_ignore(model: PreTrainedModel) -> Collection[str]:
    """Regular expressions of stored keys that the model does without. Reads ``_keys_to_ignore_on_load_unexpected``.

    Raises:
        InputError: there is no such name.
    """
    return _texts(model, "_keys_to_ignore_on_load_unexpected")


def unsplit_classes(model: PreTrainedModel) -> Collection[str]:
    """Names of the module classes that are never split over devices. Reads ``_no_split_modules``.

    Raises:
        InputError: there is no such name.
    """
    return _texts(model, "_no_split_modules")


def _texts(model: PreTrainedModel, name: str) -> Collection[str]:
    found: Collection[str] | None = attribute("transformers", model, name, (list, set, tuple, NoneType))
    return found or ()
