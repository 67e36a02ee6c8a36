"""The tokenizer beside a model, and the ids that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer

from entropy_probe.data.rollouts import SpecialIds
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.model.input_limits import special_ids


def load_tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of the first folder that has one, or None.

    Raises:
        InputError: its files are damaged.
    """
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # tokenizer files are parsed by several libraries, which raise anything
                if out_of_memory(error):
                    raise
                raise InputError(
                    f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {one_line(error)}"
                ) from error
    return None


def end_tokens(model: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """The ids that end a response: those of the model's config, and the tokenizer's."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    return special_ids(model, SpecialIds(stop=() if own is None else (own,))).stop
