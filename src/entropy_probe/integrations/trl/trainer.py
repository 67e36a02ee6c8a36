"""Whose loss it is: a trainer whose gradient the rows could not tell is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
import trl
from packaging.version import InvalidVersion, Version

from entropy_probe.compat.trl import (
    BATCH,
    BATCH_OF_GRPO,
    BATCH_OF_RLOO,
    FIRST_KNOWN,
    FREE_TO_OVERRIDE,
    IMAGES,
    KNOWN_VERSIONS,
    LAST_KNOWN,
    LOSS_OF_THE_BASE,
    OF_TRANSFORMERS,
    OF_VLLM,
    SETTINGS,
    SETTINGS_OF_GRPO,
    SINCE,
    STATED_WITH_THE_LOSS,
    UNTIL,
    WRAPPED,
    adds_entropy_bonus,
    tokenizer_of,
)
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl.loss_columns import (
    DIVIDE_BY_THE_WINDOW,
    LOSSES,
    corrects_for_vllm,
    is_grpo,
    loss_type_of,
)
from entropy_probe.integrations.trl.own_code import replacement


def refuse(reason: str) -> InputError:
    """The error for a run whose rows would not be the batch."""
    return InputError(f"the recorder cannot record this run exactly: {reason}")


def trl_release() -> tuple[int, int]:
    """TRL's version, major and minor."""
    try:
        release = Version(trl.__version__).release
    except InvalidVersion as error:
        raise InputError(f"TRL's version {trl.__version__!r} cannot be read; install TRL {KNOWN_VERSIONS}") from error
    return (*release, 0)[:2]  # type: ignore[return-value]  # of a slice mypy knows no length


def trl_is_newer_than_known() -> bool:
    """Whether the loss of this TRL has not been read: its rows are marked."""
    return trl_release() > LAST_KNOWN


def check_trainer(trainer: Any, stated_loss: str | None, recorder: type) -> bool:
    """Refuse a trainer whose loss, or whose way from samples to loss, is not that of the known GRPOTrainer or RLOOTrainer.

    Args:
        trainer: any object.
        stated_loss: the loss type whose gradient the user says that a loss of his own has; None: nothing is said.
        recorder: the recorder's class, of which one at a time may wrap the trainer's methods.

    Returns:
        Whether the loss is the user's own, and ``stated_loss`` says which it is like.

    Raises:
        InputError: TRL is too old, the trainer is neither of them or lacks a name, a method is not TRL's own, or a setting
            makes the loss one that the rows could not tell.
    """
    if trl_release() < FIRST_KNOWN:
        raise InputError(f"the recorder knows TRL {KNOWN_VERSIONS}, and this is {trl.__version__}; install a newer TRL")
    if not isinstance(trainer, (trl.GRPOTrainer, trl.RLOOTrainer)):
        raise InputError(
            f"the recorder knows the GRPOTrainer and the RLOOTrainer of TRL {KNOWN_VERSIONS}, and {_name(trainer)} is neither; "
            "sample rows from its checkpoints with `entropy-probe sample` instead"
        )
    _check_names(trainer)
    own_loss = _check_methods(trainer, stated_loss, recorder)
    for reason in _refused_settings(trainer, stated_loss or loss_type_of(trainer)):
        raise refuse(reason)
    if own_loss:
        for name in _options_of_the_loss(trainer):
            raise refuse(
                f"{name} is set for a loss of your own: the rows could not tell what it does there; leave it out"
            )
    return own_loss


def end_tokens(trainer: Any) -> list[int]:
    """Token ids at which the trainer ends a response."""
    known = trl_release() >= SINCE["eos_token_ids"]
    return list(trainer.eos_token_ids) if known else [tokenizer_of(trainer).eos_token_id]


def check_batch(batch: Mapping[str, Any], grpo: bool) -> None:
    """Refuse a batch with what the rows cannot hold.

    Args:
        batch: what TRL hands to its loss.
        grpo: it is a GRPOTrainer's.

    Raises:
        InputError: a key is missing, or there are images, or an advantage per token.
    """
    missing = [name for name in (*BATCH, *(BATCH_OF_GRPO if grpo else BATCH_OF_RLOO)) if name not in batch]
    if missing:
        raise InputError(
            f"the batch of TRL {trl.__version__} has no {', '.join(missing)}; the recorder knows TRL {KNOWN_VERSIONS}"
        )
    images = [name for name in IMAGES if name in batch]
    if images:
        raise InputError(f"the batch holds {', '.join(images)}: multimodal inputs cannot be recorded")
    if batch["advantages"].ndim != 1:
        raise InputError("advantages have a value per token, where TRL's own trainers have one per response")


def learning_rates(optimizer: torch.optim.Optimizer) -> float | list[float]:
    """The rate of the coming step; a list, one for each group that has parameters, where they differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if group["params"]]
    return rates[0] if len(set(rates)) == 1 else rates


def _name(trainer: Any) -> str:
    return f"{type(trainer).__module__}.{type(trainer).__qualname__}"


def _check_names(trainer: Any) -> None:
    release, grpo = trl_release(), is_grpo(trainer)
    names = [*WRAPPED, *SETTINGS, *(SETTINGS_OF_GRPO if grpo else ())]
    names += [name for name, first in SINCE.items() if release >= first]
    names += [name for name, last in UNTIL.items() if grpo and release <= last]
    missing = [name for name in names if not _has(trainer, name)]
    if not missing:
        missing = [name for name in (OF_VLLM if trainer.use_vllm else OF_TRANSFORMERS) if not _has(trainer, name)]
    if missing:
        raise InputError(
            f"{type(trainer).__name__} of TRL {trl.__version__} has no {', '.join(missing)}; the recorder knows the "
            f"{_shipped(trainer).__name__} of TRL {KNOWN_VERSIONS}"
        )


def _shipped(trainer: Any) -> type:
    """TRL's own class that a trainer is of."""
    shipped: type = trl.GRPOTrainer if is_grpo(trainer) else trl.RLOOTrainer
    return shipped


def _has(owner: Any, path: str) -> bool:
    first, _, rest = path.partition(".")
    return hasattr(owner, first) and (not rest or _has(getattr(owner, first), rest))


def _check_methods(trainer: Any, stated_loss: str | None, recorder: type) -> bool:
    """Of TRL's own class body, whatever is not known to be harmless must be TRL's own."""
    if any(isinstance(getattr(vars(trainer).get(name), "__self__", None), recorder) for name in WRAPPED):
        raise InputError(
            f"another {recorder.__name__} records this trainer already; take all out with "
            f"trainer.remove_callback({recorder.__name__}) and add one"
        )
    shipped = _shipped(trainer)
    replaced = {
        name: source
        for name in vars(shipped)
        if not name.startswith("__") and name not in FREE_TO_OVERRIDE
        if (source := replacement(trainer, name, shipped, (trl, torch))) is not None
    }
    base = [name for name in LOSS_OF_THE_BASE if inspect.getattr_static(shipped, name, None) is not None]
    for name in base:
        source = replacement(trainer, name, shipped, (transformers, torch))
        if source is not None:
            replaced[name] = source
    sampling = {name: source for name, source in replaced.items() if name not in STATED_WITH_THE_LOSS}
    if sampling:
        raise refuse(
            f"{_listed(trainer, sampling)}, which can change what is sampled and what the loss is fed; record a "
            f"{shipped.__name__} that keeps it (rewards, callbacks, logging and data loading may be your own)"
        )
    if replaced and stated_loss is None:
        raise refuse(
            f"{_listed(trainer, replaced)}, so its loss need not be that of loss_type {loss_type_of(trainer)!r}; if at ratio 1 "
            "its gradient is that of one of TRL's losses, say which: RolloutRecorder(trainer, folder, loss_type=...)"
        )
    if not replaced and stated_loss not in (None, loss_type_of(trainer)):
        raise InputError(
            f"loss_type {stated_loss!r} was stated for a trainer whose loss is TRL's own {loss_type_of(trainer)!r}; state none"
        )
    return bool(replaced)


def _listed(trainer: Any, replaced: Mapping[str, str]) -> str:
    return f"{type(trainer).__name__} replaces " + ", ".join(f"{name} ({where})" for name, where in replaced.items())


def _refused_settings(trainer: Any, loss_type: str) -> Iterator[str]:
    """What the recorded rows could not tell about the loss, by the setting's name."""
    args = trainer.args
    known = LOSSES if is_grpo(trainer) else (loss_type_of(trainer),)
    if loss_type not in known:
        yield f"loss_type is {loss_type!r}; supported are {', '.join(known)}"
    if loss_type in DIVIDE_BY_THE_WINDOW and args.steps_per_generation % args.gradient_accumulation_steps:
        yield (
            f"steps_per_generation ({args.steps_per_generation}) is not a multiple of gradient_accumulation_steps "
            f"({args.gradient_accumulation_steps}), so the {loss_type} divisor varies within one step"
        )
    if trainer.aux_loss_enabled:
        yield "router_aux_loss_coef adds a router loss; set it to 0"
    if args.neftune_noise_alpha:
        yield (
            f"neftune_noise_alpha is {args.neftune_noise_alpha}: the loss is of embeddings with noise that no row tells; "
            "set it to None"
        )
    if not is_grpo(trainer):
        return
    if trl_release() <= UNTIL["use_liger_kernel"] and trainer.use_liger_kernel:
        yield "use_liger_kernel computes the loss of this TRL in Liger, with divisors of its own; set it to False"
    if trainer.top_entropy_quantile < 1.0 and args.world_size > 1:
        yield (
            f"top_entropy_quantile is {trainer.top_entropy_quantile}, and with several processes TRL takes the quantile over "
            "the tokens of all of them, which no probe computes; set it to 1.0"
        )


def _options_of_the_loss(trainer: Any) -> Iterator[str]:
    """Settings that change TRL's loss; of a loss of the user's own nothing says what they do."""
    options = {
        "mask_truncated_completions": bool(trainer.mask_truncated_completions),
    }
    if is_grpo(trainer):
        options |= {
            "beta": trainer.beta != 0.0,
            # What caps a ratio, or bounds it from above, below 1.
            "delta below 1": trainer.args.delta is not None and trainer.args.delta < 1.0,
            "entropy_coef or use_adaptive_entropy": adds_entropy_bonus(trainer),
            "environment_factory": trainer.environment_factories is not None,
            "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
            "rollout_func": trainer.rollout_func is not None,
            "tools": bool(trainer.tools),
            "top_entropy_quantile": trainer.top_entropy_quantile < 1.0,
            "vllm_importance_sampling_correction": corrects_for_vllm(trainer),
        }
    yield from (name for name, is_set in options.items() if is_set)
