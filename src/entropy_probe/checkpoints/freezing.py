"""Parameters that training left alone: named by patterns, or found missing from the optimizer's file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from entropy_probe.errors import InputError, some_of


def patterns_of(freeze: Sequence[str]) -> list[str]:
    """The patterns; a single one may be given without a list around it."""
    return [freeze] if isinstance(freeze, str) else list(freeze)


def freeze_matching(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Switch gradients off for every parameter in whose name one of the regular expressions is found; their names.

    A tied parameter goes by any of its names.

    Raises:
        InputError: a pattern is no regular expression or is found in no trainable parameter's name, or none is left to train.
    """
    patterns = patterns_of(patterns)
    trainable = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    frozen: dict[str, None] = {}
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"freeze has {pattern!r}, which is no regular expression ({error}); expected one that is searched in "
                "parameters' names, such as embed_tokens"
            ) from error
        found = [name for name in trainable if compiled.search(name)]
        if not found:
            raise InputError(
                f"freeze has {pattern!r}, which is found in no trainable parameter's name; they are "
                f"{some_of(list(trainable))}"
            )
        frozen |= dict.fromkeys(found)
    kept = {id(p) for p in trainable.values()} - {id(trainable[name]) for name in frozen}
    if patterns and not kept:
        given = some_of([repr(pattern) for pattern in patterns])
        raise InputError(f"freeze ({given}) leaves no parameter to train; give fewer or narrower patterns")
    for name in frozen:
        trainable[name].requires_grad_(False)
    return tuple(frozen)


def freeze_names(model: nn.Module, names: Collection[str]) -> None:
    """Switch gradients off for these parameters, by the names of ``named_parameters``."""
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(False)
