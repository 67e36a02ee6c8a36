"""A trainer's row, cut of its padding and split into prompt and response.

Every trainer's layout comes down to one: the ids of a row, some of them padding, and for each of the last A of them a value
a token. verl's and SkyRL's A is the response's width, slime's its length. Where a trainer has its values one place earlier,
at the token that predicts, or for every id, the first id has none, and A is one less than the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entropy_probe.data.rollouts import PromptId, Rollout
from entropy_probe.errors import InputError
from entropy_probe.integrations.rows.facts import StepFacts
from entropy_probe.integrations.rows.loss import DECLARED, TrainersLoss
from entropy_probe.integrations.rows.tensors import Tensors, needed


@dataclass(frozen=True)
class TokenNames:
    """What a trainer calls its values a token, by the column of the rows that they become; None where it has no such thing."""

    old_logprobs: str
    logprobs: str
    ref_logprobs: str
    token_weight: str | None = None
    advantage: str = "advantages"

    def held(self, tensors: Tensors, loss: TrainersLoss | None) -> dict[str, str]:
        """Column and name of what the trainer holds; the advantage is always among them.

        Raises:
            InputError: the advantages are missing, or what the loss needs, or the correction for the sampler is given twice.
        """
        needed(tensors, self.advantage)
        columns = ("advantage", "old_logprobs", "logprobs", "ref_logprobs", "token_weight")
        names: dict[str, str | None] = {column: getattr(self, column) for column in columns}
        held = {column: name for column, name in names.items() if name is not None and tensors.get(name) is not None}
        if loss is None:
            return held
        if loss.beta and "ref_logprobs" not in held:
            raise InputError(
                f"the loss has a KL term (beta {loss.beta:g}), and there is no {self.ref_logprobs} among the tensors; give it, "
                "or a loss without beta"
            )
        if loss.importance_sampling_mode is not None and "logprobs" not in held:
            raise InputError(
                f"the loss has the correction {loss.importance_sampling_mode} for the sampler, and there is no {self.logprobs} "
                "among the tensors; give it, or a loss without importance_sampling_mode"
            )
        if loss.importance_sampling_mode is not None and "token_weight" in held:
            raise InputError(
                f"{self.token_weight} is the correction for the sampler, and the loss names {loss.importance_sampling_mode} as "
                "well; give one of them"
            )
        return held


@dataclass(frozen=True)
class TrainersRow:
    """One row as a trainer has it.

    Attributes:
        place: which of the trainer's rows it is, from 0.
        ids: the ids, padding included.
        real: false at padding, one for each id.
        inside: whether an id belongs to the response; one for each of the last A ids.
        trained: the trainer's mask of them: true where the policy drew the token.
        columns: the values a token, by column, A each.
        loss_mask: false at tokens that the loss alone leaves out, A of them; None for none.
        facts: further columns of the row.
    """

    place: int
    ids: Sequence[int]
    real: Sequence[bool]
    inside: Sequence[bool]
    trained: Sequence[bool]
    columns: Mapping[str, Sequence[float]]
    loss_mask: Sequence[bool] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`~entropy_probe.Rollout`, but for the prompt's name.

        A row of which the mask leaves out every token is in no loss and was drawn all the same: its ``loss_mask`` is 0
        throughout.

        Raises:
            InputError: the response has a hole or padding in it, or there is no prompt before it.
        """
        places = [place for place, here in enumerate(self.inside) if here]
        first, last = places[0], places[-1]
        before = len(self.ids) - len(self.inside)
        if len(places) != last - first + 1 or not all(self.real[before + first : before + last + 1]):
            raise InputError(f"row {self.place}: padding stands inside of the response; expected it before or after")
        prompt = [token for token, there in zip(self.ids[: before + first], self.real, strict=False) if there]
        if not prompt:
            raise InputError(f"row {self.place}: no prompt stands before the response; expected at least one token")
        response = slice(first, last + 1)
        trained = list(self.trained[response])
        sampled = trained if any(trained) else [True] * len(trained)
        left_out = [not any(trained)] * len(trained)
        if self.loss_mask is not None:
            left_out = [out or not kept for out, kept in zip(left_out, self.loss_mask[response], strict=True)]
        values = {name: self._at_sampled(column[response], sampled) for name, column in self.columns.items()}
        drawn = {value for value, there in zip(values["advantage"], sampled, strict=True) if there}
        return {
            **self.facts,
            **values,
            "prompt_ids": prompt,
            "response_ids": list(self.ids[before + first : before + last + 1]),
            "advantage": drawn.pop() if len(drawn) == 1 else values["advantage"],
            "sampled": None if all(sampled) else sampled,
            "loss_mask": [int(not out) for out in left_out] if any(left_out) else None,
        }

    @staticmethod
    def _at_sampled(values: Sequence[float], sampled: Sequence[bool]) -> list[float]:
        """Zeros where nothing was drawn: what a trainer leaves there is no value of the policy's."""
        return [float(value) if there else 0.0 for value, there in zip(values, sampled, strict=True)]


def between_ends(trained: Sequence[bool]) -> list[bool]:
    """The response where nothing else bounds it: from the first token that the policy drew to the last."""
    first = next((place for place, drawn in enumerate(trained) if drawn), len(trained))
    last = max((place for place, drawn in enumerate(trained) if drawn), default=-1)
    return [first <= place <= last for place in range(len(trained))]


def rollouts_of(rows: Sequence[TrainersRow], count: int, facts: StepFacts) -> list[Rollout]:
    """Rows of which a token is inside of the response, as rollouts; others are the trainer's padding.

    Args:
        rows: the trainer's, in its order.
        count: how many it has.
        facts: what the caller says of them.

    Raises:
        InputError: the facts have not one value a row, a row is refused, or none is left.
    """
    facts.check_rows(count)
    loss = {} if facts.loss is None else facts.loss.columns()
    declared = {name: loss.pop(name) for name in DECLARED if name in loss}
    named: dict[tuple[int, ...], PromptId] = {}
    found = []
    for row in (row for row in rows if any(row.inside)):
        columns = {name: value for name, value in facts.of_row(row.place).items() if value is not None}
        fields = row.fields() | columns | declared
        own = tuple(fields["prompt_ids"])
        prompt = named.setdefault(own, len(named)) if facts.prompts is None else facts.prompts[row.place]
        try:
            found.append(Rollout(prompt, **fields, extra=loss))
        except InputError as error:
            raise InputError(f"row {row.place}: {error}") from error
    if not found:
        raise InputError(f"none of the {count} rows has a token in its response; expected a step's batch")
    return found
