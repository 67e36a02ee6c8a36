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

How it works: rewards and groups are not in the batch that TRL hands to its loss, so two private methods of the trainer
are wrapped while it trains. What they return gains a reward and a group for each row, which TRL then shuffles and splits
along with the rest. A third, which hands out the micro-batches, is wrapped to keep those of the current accumulation
window. No random number is drawn, so the training is the same with and without the recorder.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import TrainerCallback

from entropy_probe.common.choices import whole_number
from entropy_probe.compat.trl import CALCULATE_REWARDS, GENERATE_AND_SCORE, PREPARE_INPUTS, tokenizer_of
from entropy_probe.data.rollouts import Rollout, write_rollouts
from entropy_probe.integrations.trl.sampling import neutral_sampling
from entropy_probe.integrations.trl.trainer import (
    check_batch,
    check_trainer,
    end_tokens,
    learning_rates,
    trl_is_newer_than_known,
)
from entropy_probe.model.dropout import active_dropout

logger = logging.getLogger(__name__)

_REWARD, _GROUP = "entropy_probe_reward", "entropy_probe_group"  # our columns in TRL's batch


class RolloutRecorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Write ``folder/step-{N+1:05d}.jsonl``, the rows that optimizer step N+1 consumes.

    Each row holds exact token ids (EOS kept), reward, advantage, the sampling settings, its micro-batch, the token count
    that the dapo loss divides by, what ``entropy-probe replay`` asks for (clipping, the step's learning rate, responses a
    prompt, mixed precision), and how generation drew, all of it neutral. ``prompt_id`` names the generation group,
    ``"{step}-{number}"``: two groups of one prompt stay two. A step with a row that has no reward (every reward function
    returned None) or no response token is left out, with a warning.

    Off-policy windows (``num_iterations`` above 1, or generations that serve several steps) are recorded too, with the
    sampler's log-probs and ``on_policy`` false: there the trainer's gradient carries an importance ratio.

    Rows are marked, and ``entropy-probe run`` says so, where TRL is newer than those whose loss was read, where the loss
    is the user's own, and where dropout was on.

    Args:
        trainer: the ``GRPOTrainer`` that the recorder will be added to.
        folder: where the files go; created when training begins.
        every: record only steps N+1 where N is a multiple of this; the trainer's ``save_steps`` fits.
        loss_type: for a trainer whose loss is its own: the loss of TRL's that has the same gradient at ratio 1.

    Raises:
        InputError: the trainer lacks what the recorder needs, or the rows could not tell its loss or its sampling.
            The same before any later generation, if it was changed meanwhile, and if the batch holds tool outputs
            or images.
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
        self._on_policy = trainer.args.gradient_accumulation_steps % generate_every == 0
        if not self._on_policy:
            logger.warning("generations serve several optimizer steps: the rows will say on_policy false")
        self._originals: dict[str, Callable[..., Any]] = {}
        self._window: list[Mapping[str, Any]] = []
        self._rewards = torch.empty(0)
        self._groups_of_step = (0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the trainer's methods; create the folder."""
        self.on_train_end(args, state, control)  # a run that raised left them wrapped
        # It may have been changed since.
        self._own_loss = check_trainer(self.trainer, self._stated_loss, RolloutRecorder)
        self._sampling = neutral_sampling(self.trainer)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._window = []
        ours = {
            CALCULATE_REWARDS: self._keep_rewards,
            GENERATE_AND_SCORE: self._add_rewards_and_groups,
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
        bad = sum(_unscored_or_empty(inputs) for inputs in window)
        if bad:
            logger.warning("step %d is not recorded: %d rows have no reward or no response tokens", step, bad)
            return
        rows = [row for index in range(len(window)) for row in self._rows(window, index, step)]
        rows.sort(key=lambda row: row[0])
        rank = f"-rank{args.process_index}" if args.world_size > 1 else ""
        write_rollouts((row for _, row in rows), self.folder / f"step-{step:05d}{rank}.jsonl")

    def _keep_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        per_function: torch.Tensor = self._originals[CALCULATE_REWARDS](*args, **kwargs)
        weights = self.trainer.reward_weights.to(per_function.device)
        self._rewards = (per_function * weights).nansum(dim=1)
        self._rewards[per_function.isnan().all(dim=1)] = torch.nan
        return per_function

    def _add_rewards_and_groups(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        training = self.trainer.model.training
        if training:
            self._sampling = neutral_sampling(self.trainer)
        output: dict[str, Any] = self._originals[GENERATE_AND_SCORE](*args, **kwargs)
        if not training:
            return output
        check_batch(output)
        rows, accelerator = len(output["advantages"]), self.trainer.accelerator
        # Rewards are gathered over processes; a group's rows are neighbours in that order, before TRL shuffles.
        local = accelerator.process_index * rows + torch.arange(rows, device=self._rewards.device)
        step = self.trainer.state.global_step + 1
        first = self._groups_of_step[1] if self._groups_of_step[0] == step else 0
        self._groups_of_step = (step, first + accelerator.num_processes * rows // self.trainer.num_generations)
        groups = first + local // self.trainer.num_generations
        output[_REWARD] = self._rewards[local]
        output[_GROUP] = torch.stack([torch.full_like(groups, step), groups], dim=1)
        return output

    def _keep_inputs(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        inputs: Mapping[str, Any] = self._originals[PREPARE_INPUTS](*args, **kwargs)
        if self.trainer.model.training:
            self._window.append(inputs)
        return inputs

    def _rows(
        self, window: list[Mapping[str, Any]], index: int, step: int
    ) -> Iterator[tuple[tuple[int, int], Rollout]]:
        """((generation step, group), row) for each row of a micro-batch."""
        trainer, args, inputs = self.trainer, self.trainer.args, window[index]
        tokenizer, eos = tokenizer_of(trainer), set(end_tokens(trainer))
        # Each num_items_in_batch counts a generation batch on all processes; it serves steps_per_generation micro-batches.
        window_tokens = sum(float(batch["num_items_in_batch"]) for batch in window) / args.steps_per_generation
        facts = self._facts()
        sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        for i in range(len(inputs["advantages"])):
            generated_for, group = inputs[_GROUP][i].tolist()
            prompt_ids = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            mask = inputs["completion_mask"][i].bool()
            response_ids = inputs["completion_ids"][i][mask].tolist()
            logprobs = None if sampled is None else tuple(sampled[i][mask].tolist())
            row = Rollout(
                prompt_id=f"{generated_for}-{group}",
                prompt_ids=tuple(prompt_ids),
                response_ids=tuple(response_ids),
                reward=float(inputs[_REWARD][i]),
                advantage=float(inputs["advantages"][i]),
                logprobs=logprobs if logprobs and all(map(math.isfinite, logprobs)) else None,
                temperature=float(trainer.temperature),
                top_k=0,
                top_p=1.0,
                cut=response_ids[-1] not in eos,
                prompt=tokenizer.decode(prompt_ids, skip_special_tokens=False),
                response=tokenizer.decode(response_ids, skip_special_tokens=False),
                micro_batch=args.process_index * len(window) + index,
                window_tokens=window_tokens,
                max_completion_length=trainer.max_completion_length,
                loss_type=self._stated_loss or trainer.loss_type,
                step=step,
                on_policy=self._on_policy,
                eos_ids=tuple(sorted(eos)),
                extra=facts,
            )
            yield (generated_for, group), row

    def _facts(self) -> dict[str, Any]:
        """What every row of a step says of the trainer, beside the format's own columns."""
        trainer, args = self.trainer, self.trainer.args
        facts = {
            "scale_rewards": trainer.scale_rewards,
            "max_grad_norm": args.max_grad_norm,
            "num_processes": args.world_size,
            "num_generations": trainer.num_generations,
            "learning_rate": learning_rates(trainer.optimizer),
            "mixed_precision": trainer.accelerator.mixed_precision,
            **self._sampling,
            "dropout": active_dropout(trainer.accelerator.unwrap_model(trainer.model)),
            "trl_version": trl.__version__,
        }
        if trl_is_newer_than_known():
            facts["trl_is_unknown"] = True
        if self._own_loss:
            facts["trainer_class"] = type(trainer).__name__
        return facts


def _unscored_or_empty(inputs: Mapping[str, Any]) -> int:
    """How many rows of a micro-batch have no reward or no response token."""
    empty = ~inputs["completion_mask"].bool().any(dim=1)
    return int((empty | ~inputs[_REWARD].isfinite().to(empty.device)).sum())
