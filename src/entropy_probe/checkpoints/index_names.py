"""From an optimizer's indices to parameter names: by the names in the file, by a known rule, or by shapes where one way fits.

Shapes are trusted only where they leave a single way (:mod:`~entropy_probe.checkpoints.assignments`); what was told by them is
said in the mapping's rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.checkpoints.assignments import Assignment, Places, Shape, assignments
from entropy_probe.checkpoints.decay_rules import RATE_RULES, RULES, NamedGroups
from entropy_probe.checkpoints.files.stored import StoredTensor
from entropy_probe.errors import InputError, some_of

WAY_OUT = (
    "say with freeze which parameters training left alone (a regular expression that is searched in their names, such as "
    "embed_tokens or layers\\.[0-3]\\.), or save the optimizer with param_names in its groups"
)
NAMES_WAY_OUT = (
    "nothing in the file tells them apart; save the optimizer with param_names in its groups (PyTorch writes them where the "
    "optimizer was given names with the parameters), or probe the model and its optimizer in the training process"
)
"""Where every parameter is trained, so that freezing tells nothing."""


@dataclass(frozen=True)
class OptimizerMapping:
    """How indices became names.

    Attributes:
        rule: in words.
        rivals: what else fits and would have mapped some index elsewhere: other rules, or other groups by shapes alone.
        frozen: parameters that require gradients and that the file does not train.
    """

    rule: str
    rivals: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def said_of(self, asked: Sequence[str]) -> OptimizerMapping:
        """The same, with the parameters that were frozen because they were asked to be in ``rule``."""
        return replace(self, rule=f"{self.rule}; frozen as asked: {some_of(asked)}") if asked else self


def map_names(
    state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], model: nn.Module, path: Path
) -> tuple[NamedGroups, OptimizerMapping]:
    """The names of every group's parameters, in the order of its indices.

    Raises:
        InputError: no way fits the stored sizes and shapes, or more than one does and no rule decides.
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    by_name = _by_stored_names(state, groups, model, path)
    if by_name is not None:
        return by_name
    accepted: list[tuple[str, NamedGroups]] = []
    refusals: list[str] = []
    rules = [(rule.name, rule.groups(model)) for rule in (*RULES, *RATE_RULES)]
    for number, (rule_name, named) in enumerate(rules):
        why_not = _misfit(state, groups, named, shapes)
        if why_not is None:
            accepted.append((rule_name, named))
        elif why_not not in refusals and number < len(RULES):
            refusals.append(why_not)
    places = [[_stored_shape(state, index) for index in group["params"]] for group in groups]
    plain = {name: tuple(shape) for name, shape in shapes.items()}
    if accepted:
        rule_name, named = accepted[0]
        rivals = tuple(name for name, other in accepted[1:] if other != named)
        return named, OptimizerMapping(rule_name, (*rivals, *_rivals_by_shapes(plain, places)))
    found = _by_rule_and_shapes(plain, places, rules, path) or _by_shapes(plain, places, path)
    if found is not None:
        return found
    stored = sum(map(len, places))
    more = f" (the file trains {stored} parameters, the model here {len(shapes)})" if stored != len(shapes) else ""
    raise InputError(
        f"{path} does not fit this model under any known decay rule, nor by shapes with some parameters frozen{more}: "
        f"{'; '.join(refusals)}. Is it the optimizer of another model or of another framework? If not, {WAY_OUT}"
    )


def _by_stored_names(
    state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], model: nn.Module, path: Path
) -> tuple[NamedGroups, OptimizerMapping] | None:
    """What ``param_names`` says; None where the file has none, or names that are not the model's or do not fit it."""
    if not all("param_names" in group for group in groups):
        return None
    named = [list(map(str, group["param_names"])) for group in groups]
    flat = [name for names in named for name in names]
    parameters = dict(model.named_parameters())
    if len(set(flat)) != len(flat) or not set(flat) <= set(parameters):
        return None
    frozen_here = [name for name in flat if not parameters[name].requires_grad]
    if frozen_here:
        raise InputError(
            f"{path} trains {some_of(frozen_here)}, by its param_names, which is frozen here; does freeze name too much?"
        )
    if _misfit(state, groups, named, {name: p.shape for name, p in parameters.items()}) is not None:
        return None
    rest = tuple(name for name, p in parameters.items() if p.requires_grad and name not in set(flat))
    rule = "param_names stored in the file"
    return named, OptimizerMapping(rule + _not_trained(rest), (), rest)


def _by_rule_and_shapes(
    shapes: Mapping[str, Shape], places: Places, rules: Sequence[tuple[str, NamedGroups]], path: Path
) -> tuple[NamedGroups, OptimizerMapping] | None:
    """Groups as a known rule makes them, of fewer parameters than the model has."""
    found: dict[Assignment, str] = {}
    for rule_name, named in rules:
        if len(named) != len(places):
            continue
        of_groups = [
            assignments({name: shapes[name] for name in names}, [stored])
            for names, stored in zip(named, places, strict=True)
        ]
        if any(ways is not None and not ways for ways in of_groups):
            continue
        for ways in of_groups:
            if ways is None or len(ways) > 1:
                raise InputError(_ambiguous(path, ways, f"groups as of {rule_name}", shapes, places))
        single = [ways[0] for ways in of_groups if ways]
        left = {name for way in single for name in way.left_out}
        way = Assignment(tuple(way.groups[0] for way in single), tuple(name for name in shapes if name in left))
        found.setdefault(way, rule_name)
    if len(found) > 1:
        raise InputError(_ambiguous(path, list(found), "groups as of several rules", shapes, places))
    for way, rule_name in found.items():
        rule = f"{rule_name}{_not_trained(way.left_out)}"
        rivals = _rivals_by_shapes(shapes, places)
        return [list(names) for names in way.groups], OptimizerMapping(rule, rivals, way.left_out)
    return None


def _rivals_by_shapes(shapes: Mapping[str, Shape], places: Places) -> tuple[str, ...]:
    """Other contents of groups that fit as well as a rule's, in words."""
    ways = assignments(shapes, places)
    if ways is not None and len(ways) <= 1:
        return ()
    return (f"groups of any kind, by shapes ({_open_places(ways, shapes, places)})",)


def _by_shapes(shapes: Mapping[str, Shape], places: Places, path: Path) -> tuple[NamedGroups, OptimizerMapping] | None:
    """Groups of any kind, such as some parameters at a learning rate of their own."""
    ways = assignments(shapes, places)
    if ways is None or len(ways) > 1:
        raise InputError(_ambiguous(path, ways, "groups of any kind", shapes, places))
    for way in ways:
        listed = "; ".join(f"group {number}: {some_of(names)}" for number, names in enumerate(way.groups))
        rule = f"the only groups that fit by shapes, in the order of named_parameters ({listed}){_not_trained(way.left_out)}"
        return [list(names) for names in way.groups], OptimizerMapping(rule, (), way.left_out)
    return None


def _not_trained(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f", and {some_of(names)} {'is' if len(names) == 1 else 'are'} not trained: the file leaves no place for more"


def _ambiguous(
    path: Path, ways: Sequence[Assignment] | None, kind: str, shapes: Mapping[str, Shape], places: Places
) -> str:
    way_out = NAMES_WAY_OUT if sum(map(len, places)) == len(shapes) else WAY_OUT
    return f"{path} fits this model in more than one way by shapes ({kind}): {_open_places(ways, shapes, places)}; {way_out}"


def _open_places(ways: Sequence[Assignment] | None, shapes: Mapping[str, Shape], places: Places) -> str:
    """What two ways differ in; where there were too many to look for two, a shape that several places have."""
    if ways is None:
        return _shared_shape(shapes, places)
    one, other = (
        {name: f"in group {number}" for number, names in enumerate(way.groups) for name in names} for way in ways[:2]
    )
    differing = [
        f"{name} {one.get(name, 'not trained')} or {other.get(name, 'not trained')}"
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    ]
    return f"it may have {some_of(differing) if differing else 'other places within the groups'}"


def _shared_shape(shapes: Mapping[str, Shape], places: Places) -> str:
    for shape in dict.fromkeys(shapes.values()):
        names = [name for name, other in shapes.items() if other == shape]
        numbers = [str(number) for number, stored in enumerate(places) if shape in stored]
        if len(names) > 1 and len(numbers) > 1:
            return f"{some_of(names)} have one shape, {shape}, and each may be in any of the groups {some_of(numbers)}"
    return "too many parameters of equal shapes could stand at one place"


def _stored_shape(state: Mapping[Any, Any], index: object) -> Shape | None:
    moment = state.get(index, {}).get("exp_avg_sq")
    return tuple(moment.shape) if isinstance(moment, Tensor | StoredTensor) else None


def _misfit(
    state: Mapping[Any, Any],
    groups: Sequence[Mapping[str, Any]],
    named: Sequence[Sequence[str]],
    shapes: Mapping[str, torch.Size],
) -> str | None:
    found, expected = [len(group["params"]) for group in groups], [len(names) for names in named]
    if found != expected:
        return f"group sizes {found} in the file, {expected} in the model"
    for group, names in zip(groups, named, strict=True):
        for index, name in zip(group["params"], names, strict=True):
            shape = _stored_shape(state, index)
            if shape is not None and shape != tuple(shapes[name]):
                return f"exp_avg_sq at index {index} has shape {shape}, {name} {tuple(shapes[name])}"
    return None
