"""FSDP1's flat parameters: which parameters lie in which, told by names, and held to the sizes that the optimizer stored.

FSDP1 joins the parameters of every wrapped module, except those of wrapped modules inside it, into one flat vector in the order
of ``named_parameters``, and gives each of the W ranks ⌈numel / W⌉ elements, the last ones padded. The optimizer's index counts
these units in the order of modules: the root's, then those inside it, frozen ones too. Source: torch.distributed.fsdp's
``FlatParamHandle``, and verl's ``get_fsdp_wrap_policy``, which wraps the decoder layers, and under LoRA every trainable module
without children.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

Shape = tuple[int, ...]
Units = list[list[str]]

LAYER = re.compile(r"(.+?\.\d+)\.")
LEAF = re.compile(r"(.*(?:lora_[AB]|lora_embedding_[AB]|modules_to_save)\.[^.]+)(?:\.|$)")


def _layer(name: str) -> str:
    found = LAYER.match(name)
    return found.group(1) if found else ""


def _layer_or_leaf(name: str) -> str:
    found = LEAF.match(name)
    return found.group(1) if found else _layer(name)


SCHEMES: tuple[Callable[[str], str], ...] = (_layer, _layer_or_leaf, lambda name: "", lambda name: name)
"""The module that a parameter's unit is: decoder layers, these and LoRA's own modules, the whole model, or no units at all but
every parameter for itself (``use_orig_params``)."""


def units_that_fit(
    names: Sequence[str], shapes: Mapping[str, Shape], stored: Sequence[Sequence[int] | None]
) -> Units | None:
    """The first way to wrap that the stored sizes allow; None where none does.

    Args:
        names: of all parameters, tied ones once, in the order of ``named_parameters``.
        shapes: theirs.
        stored: by unit, the elements that each rank holds of it; None where nothing is stored.
    """
    for scheme in SCHEMES:
        units = _units(names, scheme)
        if len(units) != len(stored):
            continue
        sizes = [sum(math.prod(shapes[name]) for name in unit) for unit in units]
        if all(held is None or _fits(size, held) for size, held in zip(sizes, stored, strict=True)):
            return units
    return None


def _units(names: Sequence[str], scheme: Callable[[str], str]) -> Units:
    """By module, the root first: a module comes before those inside it, whatever its own parameters' places."""
    found: dict[str, list[str]] = {"": []} if any(scheme(name) == "" for name in names) else {}
    for name in names:
        unit = scheme(name)
        # A layer stands before the leaves inside it, also where one of these has the layer's first parameter.
        if _layer(unit + ".") not in (unit, "") and scheme is _layer_or_leaf:
            found.setdefault(_layer(unit + "."), [])
        found.setdefault(unit, []).append(name)
    return [unit for unit in found.values() if unit]


def _fits(size: int, held: Sequence[int]) -> bool:
    """Equal parts with padding in the last ones; uneven parts without; or all of it on every rank."""
    return 0 <= sum(held) - size < max(1, len(held)) or all(part == size for part in held)
