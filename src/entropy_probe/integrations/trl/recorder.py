"""Record the exact batch of every GRPO optimizer step, to pair with the checkpoint before it.

TRL's own completions dump holds text: special tokens are stripped, and there is no group id. This callback writes what
the loss consumed, in the rollouts format::

    trainer = GRPOTrainer(model=..., args=GRPOConfig(loss_type="dapo", beta=0.0, save_steps=50), ...)
    trainer.add_callback(RolloutRecorder(trainer, "rollouts"))
    trainer.train()

    entropy-probe run output/checkpoint-50 --rollouts rollouts/step-00051.jsonl
    entropy-probe replay output/checkpoint-50 output/checkpoint-51 --rollouts rollouts/step-00051.jsonl

A trainer of your own whose loss has, on-policy, the gradient of one of TRL's is recorded if you say which one::

    RolloutRecorder(trainer, "rollouts", loss_type="grpo")

The file of step N+1 goes with ``checkpoint-N``. With several processes each writes its own rows, to
``step-00051-rank0.jsonl`` and so on: concatenate them (a group may be spread over ranks; its id is the same on all).

How it works: what the rows need and the batch that TRL hands to its loss does not hold (rewards, groups, what was drawn where
a mask hides it) is taken from private methods of the trainer, which are wrapped while it trains. What they return gains
columns of ours, which TRL then shuffles and splits along with the rest. No random number is drawn, so the training is the same
with and without the recorder. What a loss divides by, and from which columns that follows, is in
:mod:`~entropy_probe.integrations.trl.loss_columns`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import TrainerCallback

from entropy_probe.common.choices import whole_number
from entropy_probe.compat.trl import (
    CALCULATE_REWARDS,
    GENERATE_AND_SCORE,
    GENERATE_TURNS,
    OLD_LOGPS,
    PER_TOKEN_LOGPS,
    PREPARE_INPUTS,
    RESPONSE_IDS,
    TOOL_MASK,
    entropy_coefficient,
    tokenizer_of,
)
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl.generation import Generated
from entropy_probe.integrations.trl.loss_columns import is_grpo, loss_columns, loss_type_of, reads_the_sampler
from entropy_probe.integrations.trl.rows import (
    DRAWN,
    GROUP,
    LENGTH,
    OLD,
    REFERENCE,
    REWARD,
    OfTheStep,
    rows_of,
    unfit_rows,
)
from entropy_probe.integrations.trl.sampling import draws_by_function, neutral_sampling
from entropy_probe.integrations.trl.trainer import (
    check_batch,
    check_trainer,
    end_tokens,
    learning_rates,
    trl_is_newer_than_known,
)
from entropy_probe.model.dropout import active_dropout

logger = logging.getLogger(__name__)


class RolloutRecorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Write ``folder/step-{N+1:05d}.jsonl``, the rows that optimizer step N+1 consumes.

    Each row holds exact token ids (EOS kept), reward, advantage, the sampling settings, its micro-batch, the token count
    that the dapo loss divides by, what ``entropy-probe replay`` asks for (clipping, the step's learning rate, responses a
    prompt, mixed precision), and how generation drew, all of it neutral. ``prompt_id`` names the generation group,
    ``"{step}-{number}"``: two groups of one prompt stay two.

    Of the loss it holds what the trainer uses: ``old_logprobs`` where the loss takes a ratio, ``ref_logprobs`` and ``beta``
    with a KL term, ``sampled`` with tools, an environment or an ``env_mask``, ``loss_mask`` 0 where
    ``mask_truncated_completions`` leaves a response out, the coefficient of an entropy bonus at this very step, and whatever of
    clipping, masks and the correction for vLLM is set (:mod:`~entropy_probe.integrations.trl.loss_columns`). A row without
    any reward has the advantage that TRL gave it, 0. A step is left out, with a warning, if a row has no token that the
    policy drew, or log-probs of the loss that are not finite.

    ``logprobs`` are the sampler's: vLLM's, or the trainer's own model's at generation. ``on_policy`` is false in rows that an
    earlier step's policy drew (``num_iterations`` above 1, or generations that serve several steps). Responses that a
    ``rollout_func`` drew say neither that, nor top-k and top-p: the function alone knows.

    With ``mask_truncated_completions`` TRL's log-probs of such responses are not those of their tokens, so that where TRL
    computes old or reference log-probs the recorder computes them once more: one forward without gradient each.

    Rows are marked, and ``entropy-probe run`` says so, where TRL is newer than those whose loss was read, where the loss
    is the user's own, and where dropout was on.

    Args:
        trainer: the ``GRPOTrainer`` or ``RLOOTrainer`` that the recorder will be added to.
        folder: where the files go; created when training begins.
        every: record only steps N+1 where N is a multiple of this; the trainer's ``save_steps`` fits.
        loss_type: for a trainer whose loss is its own: the loss of TRL's that has the same gradient at ratio 1.

    Raises:
        InputError: the trainer lacks what the recorder needs, or the rows could not tell its loss or its sampling.
            The same before any later generation, if it was changed meanwhile, and if the batch holds images.
    """

    def __init__(self, trainer: Any, folder: str | Path, every: int = 1, *, loss_type: str | None = None) -> None:
        """Check the trainer's settings; nothing is written yet."""
        self._stated_loss = loss_type
        self._own_loss = check_trainer(trainer, loss_type, RolloutRecorder)
        self._sampling = neutral_sampling(trainer)
        self.trainer = trainer
        self.folder = Path(folder)
        self.every = whole_number("every", every, least=1)
        # TRL's own rule: each generation batch is used up within one optimizer step.
        generate_every = trainer.args.steps_per_generation * trainer.num_iterations
        if trainer.args.gradient_accumulation_steps % generate_every:
            logger.warning("generations serve several optimizer steps: rows of later ones will say on_policy false")
        self._originals: dict[str, Callable[..., Any]] = {}
        self._window: list[Mapping[str, Any]] = []
        self._rewards = torch.empty(0)
        self._groups_of_step = (0, 0)
        self._generated: Generated | None = None
        self._entropy_coefficient = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the trainer's methods; create the folder."""
        self.on_train_end(args, state, control)  # a run that raised left them wrapped
        # It may have been changed since.
        self._own_loss = check_trainer(self.trainer, self._stated_loss, RolloutRecorder)
        self._sampling = neutral_sampling(self.trainer)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._window, self._generated = [], None
        ours = {
            CALCULATE_REWARDS: self._keep_rewards,
            GENERATE_TURNS: self._keep_turns,
            GENERATE_AND_SCORE: self._add_columns,
            PER_TOKEN_LOGPS: self._keep_log_probs,
            PREPARE_INPUTS: self._keep_inputs,
        }
        for name, method in ours.items():
            self._originals[name] = getattr(self.trainer, name)
            setattr(self.trainer, name, method)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its own methods back."""
        for name, original in self._originals.items():
            delattr(self.trainer, name)
            if getattr(self.trainer, name) != original:  # it was wrapped by someone before us
                setattr(self.trainer, name, original)
        self._originals = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the accumulation window that the coming optimizer step consumes."""
        window, self._window = self._window, []
        if state.global_step % self.every:
            return
        step = state.global_step + 1
        # A row that the format cannot hold would leave a file that is not the batch: no file is the honest answer.
        bad = sum(unfit_rows(inputs, reads_the_sampler(self.trainer)) for inputs in window)
        if bad:
            logger.warning(
                "step %d is not recorded: in %d rows the policy drew no token, or log-probs are not finite",
                step,
                bad,
            )
            return
        shared, first = self._of_the_step(window, step), args.process_index * len(window)
        rows = [row for index, inputs in enumerate(window) for row in rows_of(inputs, first + index, shared)]
        rows.sort(key=lambda row: row[0])
        rank = f"-rank{args.process_index}" if args.world_size > 1 else ""
        write_rollouts((row for _, row in rows), self.folder / f"step-{step:05d}{rank}.jsonl")

    def _keep_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        per_function: torch.Tensor = self._originals[CALCULATE_REWARDS](*args, **kwargs)
        weights = self.trainer.reward_weights.to(per_function.device)
        self._rewards = (per_function * weights).nansum(dim=1)
        self._rewards[per_function.isnan().all(dim=1)] = torch.nan
        return per_function

    def _keep_turns(self, *args: Any, **kwargs: Any) -> Any:
        found = self._originals[GENERATE_TURNS](*args, **kwargs)
        if self._generated is not None:
            drawn = found[TOOL_MASK] if is_grpo(self.trainer) else None
            self._generated.add_turns(found[RESPONSE_IDS], drawn)
        return found

    def _keep_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        compute = self._originals[PER_TOKEN_LOGPS]
        if self._generated is None:  # the loss's own forward
            return compute(*args, **kwargs)
        return self._generated.score(compute, self.trainer.mask_truncated_completions, args, kwargs)

    def _add_columns(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        training = self.trainer.model.training
        if training:
            self._sampling = neutral_sampling(self.trainer)
            self._generated = Generated()
        generated = self._generated
        try:
            output: dict[str, Any] = self._originals[GENERATE_AND_SCORE](*args, **kwargs)
        finally:
            self._generated = None
        if generated is None:
            return output
        check_batch(output, is_grpo(self.trainer))
        output[REWARD], output[GROUP] = self._rewards_and_groups(len(output["advantages"]))
        output[LENGTH] = generated.length_column(output["completion_ids"])
        drawn = generated.drawn_column(output["completion_mask"])
        if drawn is not None:
            output[DRAWN] = drawn
        # TRL computes the policy's first, then the reference's.
        has_old = OLD_LOGPS in output or not is_grpo(self.trainer)
        names = [name for name, there in ((OLD, has_old), (REFERENCE, self.trainer.beta != 0.0)) if there]
        if len(names) != len(generated.scores):
            raise InputError(
                f"TRL {trl.__version__} computed {len(generated.scores)} sets of log-probs of a generation, where the recorder "
                f"expects {len(names)}; install a version that it knows"
            )
        output |= dict(zip(names, generated.scores, strict=True))
        if not is_grpo(self.trainer):
            output.pop(REFERENCE, None)  # its KL is in the reward
        return output

    def _rewards_and_groups(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The reward of each of this process's rows, [N], and the step and number of its group, [N, 2]."""
        accelerator = self.trainer.accelerator
        # Rewards are gathered over processes; a group's rows are neighbours in that order, before TRL shuffles.
        local = accelerator.process_index * rows + torch.arange(rows, device=self._rewards.device)
        step = self.trainer.state.global_step + 1
        first = self._groups_of_step[1] if self._groups_of_step[0] == step else 0
        self._groups_of_step = (step, first + accelerator.num_processes * rows // self.trainer.num_generations)
        groups = first + local // self.trainer.num_generations
        return self._rewards[local], torch.stack([torch.full_like(groups, step), groups], dim=1)

    def _keep_inputs(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        inputs: Mapping[str, Any] = self._originals[PREPARE_INPUTS](*args, **kwargs)
        if self.trainer.model.training:
            self._window.append(inputs)
            # Before the loss of this micro-batch, which may change it for the next step.
            self._entropy_coefficient = entropy_coefficient(self.trainer) if is_grpo(self.trainer) else 0.0
        return inputs

    def _of_the_step(self, window: list[Mapping[str, Any]], step: int) -> OfTheStep:
        trainer = self.trainer
        known = not draws_by_function(trainer)
        return OfTheStep(
            step=step,
            loss_type=self._stated_loss or loss_type_of(trainer),
            window_tokens=self._window_tokens(window),
            old_is_the_samplers=known and not trainer.use_vllm,
            draws_are_known=known,
            temperature=float(trainer.temperature),
            max_completion_length=trainer.max_completion_length,
            eos_ids=tuple(sorted(end_tokens(trainer))),
            tokenizer=tokenizer_of(trainer),
            columns=self._facts(ratios=any(OLD in inputs for inputs in window)),
        )

    def _window_tokens(self, window: list[Mapping[str, Any]]) -> float | None:
        if not is_grpo(self.trainer):
            return None
        # Each num_items_in_batch counts a generation batch on all processes; it serves steps_per_generation micro-batches.
        counts = sum(max(1.0, float(inputs["num_items_in_batch"])) for inputs in window)
        return counts / float(self.trainer.args.steps_per_generation)

    def _facts(self, ratios: bool) -> dict[str, Any]:
        """What every row of a step says of the trainer, beside the format's own columns."""
        trainer, args = self.trainer, self.trainer.args
        facts = {
            **({"scale_rewards": trainer.scale_rewards} if is_grpo(trainer) else {}),
            "max_grad_norm": args.max_grad_norm,
            "num_processes": args.world_size,
            "num_generations": trainer.num_generations,
            "learning_rate": learning_rates(trainer.optimizer),
            "mixed_precision": trainer.accelerator.mixed_precision,
            **self._sampling,
            "dropout": active_dropout(trainer.accelerator.unwrap_model(trainer.model)),
            "trl_version": trl.__version__,
        }
        if not self._own_loss:
            facts |= loss_columns(trainer, ratios, self._entropy_coefficient)
        share = args.gradient_accumulation_steps / args.steps_per_generation
        if share < 1.0:
            facts["window_share"] = (
                share  # of a generation batch, so that a prompt's responses may lie in several files
            )
        if trl_is_newer_than_known():
            facts["trl_is_unknown"] = True
        if self._own_loss:
            facts["trainer_class"] = type(trainer).__name__
        return facts
