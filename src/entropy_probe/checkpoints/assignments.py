"""Which parameters stand where in an optimizer's groups, told by shapes and order alone.

Whoever builds groups walks over ``named_parameters`` once, so that every group holds its parameters in that order; what is in
no group was frozen. All ways to deal the parameters out so that every stored shape fits are counted, up to two: one way is an
answer, two are not.

A way is a walk over the parameters whose state is the number of places filled in each group, so that ways share what they have
in common (dynamic programming).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
Places = Sequence[Sequence[Shape | None]]
"""By group, the shape stored at every place; None where nothing is stored."""

State = tuple[int, ...]

MOST_NUMBERS = 800_000
"""In the states of one search: beyond it so many equal shapes are interchangeable that no single way is left."""


@dataclass(frozen=True)
class Assignment:
    """One way: names by group, in the order of the places, and those in no group."""

    groups: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...]


def assignments(
    shapes: Mapping[str, Shape], places: Places, groups_of: Mapping[str, Collection[int]] | None = None
) -> list[Assignment] | None:
    """Up to two ways to fill every place with parameters in their order; None where there are too many states to tell.

    Args:
        shapes: of the parameters, in the order of ``named_parameters``.
        places: to fill, all of them.
        groups_of: into which groups each parameter may go, by name; None: into any.
    """
    names = list(shapes)
    spare = len(names) - sum(len(group) for group in places)
    if spare < 0 or _short_of(shapes, places):
        return []
    search = _Search(names, shapes, places, groups_of, spare)
    layers = search.forwards()
    if layers is None:
        return None
    alive = search.backwards(layers)
    start: State = (0,) * len(places)
    if start not in alive[0]:
        return []
    first = search.walk(alive, start, 0)
    fork = next(
        (
            (number, other)
            for number, (state, taken) in enumerate(first)
            for other in search.options(number, state)
            if other != taken and search.after(state, other) in alive[number + 1]
        ),
        None,
    )
    found = [search.assignment(first)]
    if fork is not None:
        number, other = fork
        state = first[number][0]
        rest = search.walk(alive, search.after(state, other), number + 1)
        found.append(search.assignment([*first[:number], (state, other), *rest]))
    return found


def _short_of(shapes: Mapping[str, Shape], places: Places) -> bool:
    """Whether some shape is stored more often than the model has it: no search is needed to refuse."""
    stored = Counter(shape for group in places for shape in group if shape is not None)
    return bool(stored - Counter(shapes.values()))


@dataclass(frozen=True)
class _Search:
    names: Sequence[str]
    shapes: Mapping[str, Shape]
    places: Places
    groups_of: Mapping[str, Collection[int]] | None
    spare: int

    def options(self, number: int, state: State) -> list[int | None]:
        """Groups whose next place takes this parameter, then None where it may be left out."""
        name = self.names[number]
        allowed = range(len(self.places)) if self.groups_of is None else sorted(self.groups_of[name])
        found: list[int | None] = [
            group
            for group in allowed
            if state[group] < len(self.places[group]) and self.places[group][state[group]] in (None, self.shapes[name])
        ]
        if number - sum(state) < self.spare:
            found.append(None)
        return found

    @staticmethod
    def after(state: State, group: int | None) -> State:
        return state if group is None else (*state[:group], state[group] + 1, *state[group + 1 :])

    def forwards(self) -> list[set[State]] | None:
        """By number of parameters dealt, every state that can be reached."""
        layers: list[set[State]] = [{(0,) * len(self.places)}]
        count = 1
        for number in range(len(self.names)):
            layers.append({self.after(s, option) for s in layers[-1] for option in self.options(number, s)})
            count += len(layers[-1])
            if count * len(self.places) > MOST_NUMBERS:
                return None
        return layers

    def backwards(self, layers: Sequence[set[State]]) -> list[set[State]]:
        """Of those the states from which every place gets filled."""
        end: State = tuple(len(group) for group in self.places)
        alive = [layers[-1] & {end}]
        for number in range(len(self.names) - 1, -1, -1):
            later = alive[-1]
            alive.append(
                {s for s in layers[number] if any(self.after(s, option) in later for option in self.options(number, s))}
            )
        return alive[::-1]

    def walk(self, alive: Sequence[set[State]], state: State, number: int) -> list[tuple[State, int | None]]:
        """The first way from a state on: each parameter's state before it, and its group."""
        steps: list[tuple[State, int | None]] = []
        for index in range(number, len(self.names)):
            option = next(o for o in self.options(index, state) if self.after(state, o) in alive[index + 1])
            steps.append((state, option))
            state = self.after(state, option)
        return steps

    def assignment(self, steps: Sequence[tuple[State, int | None]]) -> Assignment:
        groups: list[list[str]] = [[] for _ in self.places]
        left_out: list[str] = []
        for name, (_, group) in zip(self.names, steps, strict=True):
            (left_out if group is None else groups[group]).append(name)
        return Assignment(tuple(map(tuple, groups)), tuple(left_out))
