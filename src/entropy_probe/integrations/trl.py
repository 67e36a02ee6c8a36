"""Record the exact batch of every GRPO optimizer step, to pair with the checkpoint before it.

TRL's own completions dump holds text: special tokens are stripped, and there is no group id. This callback writes what
the loss consumed, in the rollouts format::

    trainer = GRPOTrainer(model=..., args=GRPOConfig(loss_type="dapo", beta=0.0, save_steps=50), ...)
    trainer.add_callback(RolloutRecorder(trainer, "rollouts"))
    trainer.train()

    entropy-probe run output/checkpoint-50 --rollouts rollouts/step-00051.jsonl --length-weight dapo
    entropy-probe replay output/checkpoint-50 output/checkpoint-51 --rollouts rollouts/step-00051.jsonl

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
from transformers import TrainerCallback

from entropy_probe.errors import InputError
from entropy_probe.rollouts import Rollout, write_rollouts

try:
    import trl
except ImportError as error:
    raise InputError("the recorder needs TRL, which cannot be imported; install entropy-probe[trl]") from error

logger = logging.getLogger(__name__)

KNOWN_VERSIONS = "1.10 to 1.16"
# At ratio 1 the gradient of each is a weight per response times the gradient of its log-prob.
POLICY_GRADIENT_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
# Generation options that leave the sampling distribution as it is.
HARMLESS_GENERATION_KWARGS = {"cache_implementation", "disable_compile", "seed", "use_cache"}

_WRAPPED = ("_calculate_rewards", "_generate_and_score_completions", "_prepare_inputs")
_SETTINGS = (
    *("accelerator", "args", "beta", "epsilon_high", "loss_type", "max_completion_length", "num_generations"),
    *("num_iterations", "processing_class", "reward_weights", "scale_rewards", "temperature", "top_entropy_quantile"),
    *("top_k", "top_p"),
)
_BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
_IMAGES = ("pixel_values", "image_grid_thw", "num_images", "image_sizes", "spatial_shapes", "image_position_ids")
_REWARD, _GROUP = "entropy_probe_reward", "entropy_probe_group"  # our columns in TRL's batch


class RolloutRecorder(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Write ``folder/step-{N+1:05d}.jsonl``, the rows that optimizer step N+1 consumes.

    Each row holds exact token ids (EOS kept), reward, advantage, the sampling settings, its micro-batch, the token count
    that the dapo loss divides by, and what ``entropy-probe replay`` asks for: clipping, the step's learning rate, responses a
    prompt, mixed precision. ``prompt_id`` names the generation group, ``"{step}-{number}"``: two groups of
    one prompt stay two. A step with a row that has no reward (every reward function returned None) or no response token
    is left out, with a warning.

    Off-policy windows (``num_iterations`` above 1, or generations that serve several steps) are recorded too, with the
    sampler's log-probs and ``on_policy`` false: there the trainer's gradient carries an importance ratio.

    Args:
        trainer: the ``GRPOTrainer`` that the recorder will be added to.
        folder: where the files go; created when training begins.
        every: record only steps N+1 where N is a multiple of this; the trainer's ``save_steps`` fits.

    Raises:
        InputError: the trainer lacks what the recorder needs, or the rows could not tell its loss or its sampling.
            While training, before the first step: the batch holds tool outputs or images.
    """

    def __init__(self, trainer: Any, folder: str | Path, every: int = 1) -> None:
        """Check the trainer's settings; nothing is written yet."""
        _check_names(trainer)
        for reason in _refusals(trainer):
            raise InputError(f"the recorder cannot record this run exactly: {reason}")
        if every < 1:
            raise InputError(f"every is {every}; expected a whole number above 0")
        self.trainer = trainer
        self.folder = Path(folder)
        self.every = every
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
        self.folder.mkdir(parents=True, exist_ok=True)
        self._window = []
        for name in _WRAPPED:
            self._originals[name] = getattr(self.trainer, name)
            setattr(self.trainer, name, getattr(self, name))

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
        rows = [row for index in range(len(window)) for row in self._rows(window, index, step)]
        # A row that the format cannot hold would leave a file that is not the batch: no file is the honest answer.
        bad = sum(not math.isfinite(row.reward) or not row.response_ids for _, row in rows)
        if bad:
            logger.warning("step %d is not recorded: %d rows have no reward or no response tokens", step, bad)
            return
        rows.sort(key=lambda row: row[0])
        rank = f"-rank{args.process_index}" if args.world_size > 1 else ""
        write_rollouts((row for _, row in rows), self.folder / f"step-{step:05d}{rank}.jsonl")

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        per_function: torch.Tensor = self._originals["_calculate_rewards"](*args, **kwargs)
        weights = self.trainer.reward_weights.to(per_function.device)
        self._rewards = (per_function * weights).nansum(dim=1)
        self._rewards[per_function.isnan().all(dim=1)] = torch.nan
        return per_function

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        training = self.trainer.model.training
        output: dict[str, Any] = self._originals["_generate_and_score_completions"](*args, **kwargs)
        if not training:
            return output
        _check_batch(output)
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

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
        inputs: Mapping[str, Any] = self._originals["_prepare_inputs"](*args, **kwargs)
        if self.trainer.model.training:
            self._window.append(inputs)
        return inputs

    def _rows(
        self, window: list[Mapping[str, Any]], index: int, step: int
    ) -> Iterator[tuple[tuple[int, int], Rollout]]:
        """((generation step, group), row) for each row of a micro-batch."""
        trainer, args, inputs = self.trainer, self.trainer.args, window[index]
        tokenizer = trainer.processing_class
        eos = set(getattr(trainer, "eos_token_ids", None) or [tokenizer.eos_token_id])  # TRL 1.10 knows one EOS
        # Each num_items_in_batch counts a generation batch on all processes; it serves steps_per_generation micro-batches.
        window_tokens = sum(float(batch["num_items_in_batch"]) for batch in window) / args.steps_per_generation
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
                top_k=max(int(trainer.top_k or 0), 0),  # None, 0 and -1 all mean the whole vocabulary
                top_p=1.0 if trainer.top_p is None else float(trainer.top_p),
                cut=not response_ids or response_ids[-1] not in eos,
                prompt=tokenizer.decode(prompt_ids, skip_special_tokens=False),
                response=tokenizer.decode(response_ids, skip_special_tokens=False),
                micro_batch=args.process_index * len(window) + index,
                window_tokens=window_tokens,
                max_completion_length=trainer.max_completion_length,
                loss_type=trainer.loss_type,
                step=step,
                on_policy=self._on_policy,
                extra={
                    "scale_rewards": trainer.scale_rewards,
                    "max_grad_norm": args.max_grad_norm,
                    "num_processes": args.world_size,
                    "num_generations": trainer.num_generations,
                    "learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
                    "mixed_precision": trainer.accelerator.mixed_precision,
                },
            )
            yield (generated_for, group), row


def _check_names(trainer: Any) -> None:
    missing = [name for name in (*_WRAPPED, *_SETTINGS) if not hasattr(trainer, name)]
    if missing:
        raise InputError(
            f"{type(trainer).__name__} of TRL {trl.__version__} has no {', '.join(missing)}; the recorder knows the "
            f"GRPOTrainer of TRL {KNOWN_VERSIONS}"
        )


def _check_batch(batch: Mapping[str, Any]) -> None:
    missing = [name for name in _BATCH if name not in batch]
    if missing:
        raise InputError(
            f"the batch of TRL {trl.__version__} has no {', '.join(missing)}; the recorder knows TRL {KNOWN_VERSIONS}"
        )
    if "tool_mask" in batch:
        raise InputError("the batch has a tool_mask: responses that the policy did not sample whole cannot be recorded")
    images = [name for name in _IMAGES if name in batch]
    if images:
        raise InputError(f"the batch holds {', '.join(images)}: multimodal inputs cannot be recorded")
    if batch["advantages"].ndim != 1:
        raise InputError("advantages have a value per token; the rollouts format holds one per response")


def _refusals(trainer: Any) -> Iterator[str]:
    """What the recorded rows could not tell about the loss or the sampling, by the setting's name."""
    args = trainer.args
    if trainer.loss_type not in POLICY_GRADIENT_LOSSES:
        yield f"loss_type is {trainer.loss_type!r}; supported are {', '.join(POLICY_GRADIENT_LOSSES)}"
    if trainer.loss_type == "cispo" and trainer.epsilon_high < 1.0:
        yield (
            f"epsilon_high is {trainer.epsilon_high}, and TRL's cispo caps the ratio itself there, which scales every "
            "on-policy gradient; set it above 1 (5.0 is common)"
        )
    if trainer.loss_type in ("dapo", "cispo") and args.steps_per_generation % args.gradient_accumulation_steps:
        yield (
            f"steps_per_generation ({args.steps_per_generation}) is not a multiple of gradient_accumulation_steps "
            f"({args.gradient_accumulation_steps}), so the {trainer.loss_type} divisor varies within one step"
        )
    if getattr(args, "delta", None) is not None and args.delta < 1.0:
        yield f"delta is {args.delta}: it cuts off the on-policy ratio of 1; set it above 1"
    if trainer.beta != 0.0:
        yield f"beta is {trainer.beta}: the KL term is part of the loss; set beta=0.0"
    if getattr(trainer, "_entropy_bonus_enabled", False):
        yield "entropy_coef or use_adaptive_entropy adds an entropy bonus to the loss"
    if trainer.top_entropy_quantile < 1.0:
        yield f"top_entropy_quantile is {trainer.top_entropy_quantile}: the loss leaves tokens out; set it to 1.0"
    if getattr(trainer, "off_policy_mask_threshold", None) is not None:
        yield "off_policy_mask_threshold drops responses from the loss"
    if getattr(trainer, "aux_loss_enabled", False):
        yield "router_aux_loss_coef adds a router loss; set it to 0"
    if getattr(trainer, "use_vllm", False) and getattr(trainer, "vllm_importance_sampling_correction", False):
        yield "vllm_importance_sampling_correction weights the tokens of the loss; set it to False"
    if getattr(trainer, "mask_truncated_completions", False):
        yield "mask_truncated_completions empties responses that the length limit ended; set it to False"
    if getattr(trainer, "tools", None):
        yield "tools put tokens into responses that the policy did not sample"
    if getattr(args, "min_p", None) or getattr(args, "repetition_penalty", 1.0) != 1.0:
        yield "min_p or repetition_penalty changes the sampling distribution"
    changed = set(getattr(args, "generation_kwargs", None) or {}) - HARMLESS_GENERATION_KWARGS
    if changed:
        yield f"generation_kwargs sets {', '.join(sorted(changed))}, which may change the sampling distribution"
