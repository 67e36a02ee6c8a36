"""Two checkpoints and a rollouts file that belong together: one step apart, of one model, the rows that the step consumed."""

from __future__ import annotations

from pathlib import Path

from entropy_probe.checkpoints import ModelFolder, TrainerState, adam_state_in
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.errors import InputError
from entropy_probe.optimizers.state import AdamState


def check_consecutive(before: Path, after: Path, state: TrainerState, state_after: TrainerState) -> None:
    """Refuse two checkpoints that are not one step apart, as far as trainer_state.json tells.

    Raises:
        InputError: they are the same, in the wrong order, or several steps apart.
    """
    for path in (before, after):
        if not path.is_dir():
            raise InputError(f"{path} is not a folder; expected a checkpoint folder such as checkpoint-100")
    if before.resolve() == after.resolve():
        raise InputError(f"{before} was given twice; replay takes a checkpoint and the one after the next step")
    first, second = state.global_step, state_after.global_step
    if first is None or second is None:
        return
    if second <= first:
        what = "the same step" if second == first else "an earlier step"
        raise InputError(
            f"{before} is of step {first} and {after} of step {second}, {what}; give the checkpoint before the step first, "
            "then the one after it"
        )
    if second != first + 1:
        raise InputError(
            f"{second - first} steps lie between {before} (step {first}) and {after} (step {second}); replay takes one: "
            "save two consecutive checkpoints (TRL: save_steps=1 for two steps, or a callback)"
        )


def check_step(batch: RolloutBatch, rollouts: str, step: int | None) -> None:
    """Refuse rows that say that another step consumed them.

    Raises:
        InputError: they do.
    """
    said = batch.responses[0].step
    if step is not None and said is not None and said != step:
        raise InputError(
            f"{rollouts} is what step {said} consumed, but these checkpoints are before and after step {step}; give that "
            f"step's file (RolloutRecorder: step-{step:05d}.jsonl)"
        )


def check_same_model(before: ModelFolder, after: ModelFolder) -> None:
    """Refuse checkpoints of two models.

    Raises:
        InputError: they are of different kinds or architectures, or differ in a trainable parameter's name or shape.
    """
    if (before.kind, before.architecture) != (after.kind, after.architecture):
        raise InputError(
            f"{before.path} is a {before.kind} checkpoint of a {before.architecture} model, {after.path} a {after.kind} one "
            f"of a {after.architecture} model; expected two checkpoints of one run"
        )
    shapes = [
        {name: tuple(p.shape) for name, p in folder.model.named_parameters() if p.requires_grad}
        for folder in (before, after)
    ]
    for name in (*shapes[0], *shapes[1]):
        found = [of.get(name, "missing") for of in shapes]
        if found[0] != found[1]:
            raise InputError(
                f"trainable parameter {name} is {found[0]} in {before.path} and {found[1]} in {after.path}; expected two "
                "checkpoints of one run"
            )


def adam_after(path: Path, folder: ModelFolder, adam: AdamState) -> AdamState | None:
    """Adam's state after the step, where the checkpoint has it; the moments tell the gradient that the trainer used."""
    found = adam_state_in(path, folder.model)
    if found is None:
        return None
    for name, moments in found.moments.items():
        old = adam.moments[name].step if name in adam.moments else 0
        # A count of 1 is an optimizer that was started again, which is tried as a suspicion.
        if moments.step not in (old + 1, 1):
            raise InputError(
                f"Adam's t goes from {old} to {moments.step} ({name}), so these optimizer states are not one step apart; "
                "expected the optimizer state that was saved with each checkpoint"
            )
    return found
