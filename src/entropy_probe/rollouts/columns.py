"""Columns that say how a row was sampled or what its loss was, and what each may say without contradicting the probe.

The probe takes a response as sampled whole from the policy's whole distribution, and the loss as one weight a response times
its log-prob. A column that says otherwise is refused by its name: its row would be computed as something that it is not.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from entropy_probe.errors import InputError
from entropy_probe.rollouts.masks import ATTENTION_MASKS, zeros_and_ones

if TYPE_CHECKING:
    from entropy_probe.rollouts.records import Rollout

UNIT_ROUNDING = 1e-6
"""By which a weight may differ from 1: rounding of float32."""
IGNORED_LABEL = -100
"""What trainers write into labels at tokens that are not in the loss."""


class Kind(StrEnum):
    """What a column is about: one setting of the sampler or the loss, or a mask or weights of the response's tokens."""

    SAMPLING = "sampling"
    LOSS = "loss"
    MASK = "mask"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Assumption:
    """What a column may say.

    Attributes:
        kind: what the column is about.
        neutral: of a setting, the values that change nothing; a mask has ones, and weights are 1.
        why: of a setting, what any other value means.
    """

    kind: Kind
    neutral: tuple[object, ...] = (None,)
    why: str = ""


OFF: tuple[object, ...] = (None, 0)
NONE: tuple[object, ...] = (None, [], {})
"""A tuple counts as a list."""
UNSET: tuple[object, ...] = (None,)
KL = "a KL term is in the trainer's loss or reward"
ENTROPY = "an entropy term is in the trainer's loss"
FURTHER = "a further term is in the trainer's loss"
LEFT_OUT = "tokens are left out of the trainer's loss"
CORRECTED = "the trainer's loss weights tokens by importance ratios"

SAMPLING: dict[str, tuple[object, ...]] = {
    "top_k": (None, 0, -1),
    "top_p": (None, 1),
    "min_p": OFF,
    "top_a": OFF,
    "top_h": (None, 1),
    "typical_p": (None, 1),
    "tfs": (None, 1),
    "epsilon_cutoff": OFF,
    "eta_cutoff": OFF,
    "repetition_penalty": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "presence_penalty": OFF,
    "frequency_penalty": OFF,
    "no_repeat_ngram_size": OFF,
    "encoder_no_repeat_ngram_size": OFF,
    "min_length": OFF,
    "min_new_tokens": OFF,
    "min_tokens": OFF,
    "suppress_tokens": NONE,
    "begin_suppress_tokens": NONE,
    "bad_words_ids": NONE,
    "bad_words": NONE,
    "allowed_token_ids": NONE,
    "force_words_ids": NONE,
    "constraints": NONE,
    "sequence_bias": NONE,
    "logit_bias": NONE,
    "logits_processor": NONE,
    "logits_processors": NONE,
    "forced_bos_token_id": NONE,
    "forced_eos_token_id": NONE,
    "forced_decoder_ids": NONE,
    "exponential_decay_length_penalty": NONE,
    "guidance_scale": (None, 1),
    "penalty_alpha": OFF,
    "dola_layers": UNSET,
    "watermarking_config": UNSET,
    # An empty schema asks for JSON of any form.
    "structured_outputs": UNSET,
    "guided_decoding": UNSET,
    "guided_json": UNSET,
    "guided_regex": UNSET,
    "guided_grammar": UNSET,
    "remove_invalid_values": (None, False),
    "token_healing": (None, False),
    "do_sample": (None, True),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": OFF,
    "use_beam_search": (None, False),
    "best_of": (None, 1),
}
"""Settings of a sampler, by transformers' and vLLM's names, and the values that leave the distribution whole.

The one place where these stand: the TRL recorder's tables are made of them.
"""
BIASES = ("logit_bias", "sequence_bias")
"""Settings that add to logits: neutral too where all that they add is 0."""

NESTED = ("sampling_params", "sampling_args", "sampling", "generation_config", "generation_kwargs")
"""Columns that hold such settings by name: a mapping, or the JSON text of one. Other text is not looked into."""

_KL_NAMES = (
    *(
        "beta",
        "kl_beta",
        "kl_coef",
        "kl_coeff",
        "init_kl_coef",
        "kl_ctl",
        "kl_ctrl",
        "kl_tau",
        "kl_weight",
        "kl_penalty",
    ),
    *("kl_loss_coef", "kl_loss_coeff", "kl_loss_weight", "kl_penalty_coef", "kl_penalty_coeff", "kl_reg_coef"),
    *("reference_policy_kl_penalty", "ref_kl_coef", "use_kl_loss", "use_kl_in_reward"),
)
_ENTROPY_NAMES = (
    *("ent_coef", "entropy_coef", "entropy_coeff", "entropy_loss_coef", "entropy_loss_coeff", "entropy_loss_weight"),
    *("entropy_bonus", "entropy_bonus_coef", "entropy_weight", "entropy_beta", "entropy_reg_coef", "entropy_penalty"),
    *("use_adaptive_entropy", "use_entropy_loss"),
)
_FURTHER_NAMES = ("router_aux_loss_coef", "aux_loss_coef", "ptx_coef", "sft_coef", "sft_loss_coef", "nll_loss_coef")
_MASK_NAMES = (
    *("response_mask", "completion_mask", "loss_mask", "loss_masks", "tool_mask", "env_mask", "action_mask"),
    *("assistant_mask", "assistant_masks", "assistant_tokens_mask", "token_mask", "token_loss_mask", "sample_mask"),
    *("completion_loss_mask", "response_loss_mask", "generation_mask"),
)
_WEIGHT_NAMES = (
    *("importance_sampling_ratio", "importance_ratio", "importance_ratios", "importance_weight", "importance_weights"),
    *("is_weight", "is_weights", "rollout_is_weight", "rollout_is_weights", "token_weight", "token_weights"),
    *("loss_weight", "loss_weights", "sample_weight", "sample_weights", "sequence_weight", "sequence_weights"),
    *("vllm_importance_sampling_ratio", "tis_weights"),
)
_VAGUE_WEIGHTS = ("weight", "weights", "ratio", "ratios")
"""Of the loss where they have a value a response token; else names of anything: of a data set, or of what a prompt is about."""
_PADDING_WORDS = {"pad", "padding", "padded"}
_OVERLONG_WORDS = {"overlong"}
_OTHER_WORDS = {"eos", "bos", "prompt", "truncated", "truncation"}
"""Words in the names of masks that say nothing of which response tokens are in the loss."""

ASSUMPTIONS: dict[str, Assumption] = {
    **{name: Assumption(Kind.SAMPLING, neutral) for name, neutral in SAMPLING.items()},
    **{name: Assumption(Kind.LOSS, OFF, KL) for name in _KL_NAMES},
    **{name: Assumption(Kind.LOSS, OFF, ENTROPY) for name in _ENTROPY_NAMES},
    **{name: Assumption(Kind.LOSS, OFF, FURTHER) for name in _FURTHER_NAMES},
    **{
        name: Assumption(Kind.LOSS, OFF, LEFT_OUT)
        for name in ("off_policy_mask_threshold", "mask_truncated_completions")
    },
    "top_entropy_quantile": Assumption(Kind.LOSS, (None, 1), LEFT_OUT),
    "vllm_importance_sampling_correction": Assumption(Kind.LOSS, OFF, CORRECTED),
    **{name: Assumption(Kind.MASK) for name in _MASK_NAMES},
    **{name: Assumption(Kind.WEIGHTS) for name in _WEIGHT_NAMES},
}
"""By column: what it may say. Columns that neither stand here nor are like :data:`LIKE` say nothing that the probe knows of."""

_COEFFICIENT = r"(_\w+)?_(coef|coeff|coefficient|weight|beta|lambda|alpha)s?$"
LIKE: tuple[tuple[re.Pattern[str], Assumption], ...] = (
    (re.compile(rf"(^|_)kl{_COEFFICIENT}|(^|_)beta_kl$"), Assumption(Kind.LOSS, OFF, KL)),
    (re.compile(rf"(^|_)ent(ropy)?{_COEFFICIENT}"), Assumption(Kind.LOSS, OFF, ENTROPY)),
    (re.compile(rf"(^|_)(aux|router|moe_aux){_COEFFICIENT}"), Assumption(Kind.LOSS, OFF, FURTHER)),
    (
        re.compile(
            r"(^|_)(t?is|mis|importance|advantage|token(_level)?|loss|sequence)_(weight|ratio|multiplier|scale)s?$"
        ),
        Assumption(Kind.WEIGHTS),
    ),
    (re.compile(r"^rollout_is$"), Assumption(Kind.WEIGHTS)),
    (re.compile(r"^masks?$"), Assumption(Kind.MASK)),
)
"""Other spellings: what a name means that is in no list. The first pattern that is found counts."""

_OF_A_CONFIG = {"config", "cfg", "args", "settings", "algorithm", "actor", "loss", "trainer", "hyperparameters"}
"""Words in the names of columns that hold the trainer's settings by name."""


def assumption_of(name: str) -> Assumption | None:
    """What a column may say, by its name, of a dotted one by the last part; None where nothing is known of it."""
    last = name.rpartition(".")[2]
    return ASSUMPTIONS.get(last) or next((found for pattern, found in LIKE if pattern.search(last)), None)


def is_of_tokens(name: str) -> bool:
    """Whether a column has a value a response token, or may have: it is cut where padding is."""
    found = assumption_of(name)
    known = found is not None and found.kind in (Kind.MASK, Kind.WEIGHTS)
    return known or name in _VAGUE_WEIGHTS or name == "labels" or _looks_like_a_mask(name)


def among(value: object, allowed: Sequence[object]) -> bool:
    """Whether a plain value equals one of these; a tensor or an object equals none, and None only None."""
    if not (value is None or isinstance(value, bool | int | float | str | list | tuple | dict)):
        return False
    listed = list(value) if isinstance(value, tuple) else value
    return any((value is None) == (one is None) and listed == one for one in allowed)


def leaves_whole(name: str, value: object, neutral: Sequence[object]) -> bool:
    """Whether a sampler's setting leaves every token its probability: a neutral value, or biases that are all 0."""
    if among(value, neutral):
        return True
    if name not in BIASES or not isinstance(value, Mapping | list | tuple):
        return False
    # By token, or as pairs of tokens and bias, as transformers has it too.
    biases = value.values() if isinstance(value, Mapping) else (_last(item) for item in value)
    return all(among(bias, (0,)) for bias in biases)


def _last(item: object) -> object:
    return item[-1] if isinstance(item, list | tuple) and item else item


def refuse_contradictions(row: Rollout, temperature: float) -> None:
    """Refuse a row of which a column says that the probe would compute something else at this temperature.

    Raises:
        InputError: the prompt, the column, its value, and what to do.
    """
    declared: dict[str, object] = {"top_k": row.top_k, "top_p": row.top_p, **row.extra}
    for name, value in declared.items():
        if value is None:
            continue
        settings = _settings(value) if name in NESTED else None
        said = _contradiction(name, value, row) if settings is None else _of_nested(name, settings, temperature)
        if said is not None:
            raise InputError(f"prompt_id {row.prompt_id!r} {said}")


def _contradiction(name: str, value: object, row: Rollout) -> str | None:
    """What a column says against the probe, to stand after the row's prompt; None where it says nothing."""
    found = assumption_of(name)
    if found is None:
        return _of_other_columns(name, value, row)
    match found.kind:
        case Kind.SAMPLING:
            return None if leaves_whole(name, value, found.neutral) else _sampled_with(name, value)
        case Kind.LOSS:
            return _of_the_loss(name, value, found, row)
        case Kind.MASK:
            return _of_a_mask(name, value, row)
        case Kind.WEIGHTS:
            return _of_weights(name, value, row)


def _of_other_columns(name: str, value: object, row: Rollout) -> str | None:
    """Of columns whose name alone does not tell what they are."""
    if name == "advantages":
        return _of_advantages(value, row)
    words = set(name.replace(".", "_").split("_"))
    if isinstance(value, Mapping) and words & _OF_A_CONFIG:
        said = (_contradiction(f"{name}.{key}", item, row) for key, item in value.items() if _is_of_the_loss(key))
        return next(filter(None, said), None)
    if (
        _looks_like_a_mask(name)
        and among(value, (0,))
        and not words & (_PADDING_WORDS | _OVERLONG_WORDS | _OTHER_WORDS)
    ):
        return _of_a_mask(name, value, row)
    if not isinstance(value, list | tuple):
        return None
    lengths = (len(row.response_ids), row.length)
    if name == "labels" and len(value) in lengths and IGNORED_LABEL in value:
        return _of_a_mask(name, [int(item != IGNORED_LABEL) for item in value], row)
    if name in _VAGUE_WEIGHTS and len(value) == lengths[0]:
        return _of_weights(name, value, row)
    if _looks_like_a_mask(name) and len(value) in lengths and all(among(item, (0, 1)) for item in value):
        return _of_an_unknown_mask(name, value, row)
    return None


def _of_an_unknown_mask(name: str, value: Sequence[Any], row: Rollout) -> str | None:
    """Of a mask that only its name tells of; one of the loss, or of who wrote which token, where no word says otherwise."""
    words = set(name.split("_"))
    over_response = value[-len(row.response_ids) :]
    if "loss" in words:
        return _of_a_mask(name, value, row)
    if words & _PADDING_WORDS:
        # Whether 1 is padding or what is none: where both stand, some is.
        if len(set(value)) == 1:
            return None
        return (
            f"has {name} with both 0 and 1: some of the ids are padding; leave it out of prompt_ids and response_ids, or give "
            "attention_mask (0 at padding) instead"
        )
    if words & _OVERLONG_WORDS:
        if all(over_response):
            return None
        return (
            f"has {name} with 0 at {over_response.count(0)} of {len(over_response)} response tokens: overlong responses are "
            "left out of the trainer's loss; leave such rows out"
        )
    return None if words & _OTHER_WORDS else _of_a_mask(name, value, row)


def _looks_like_a_mask(name: str) -> bool:
    return name.endswith(("_mask", "_masks")) and name not in ATTENTION_MASKS


def _sampled_with(name: str, value: object) -> str:
    return (
        f"was sampled with {name} = {reprlib.repr(value)}: its log-probs are not the policy's; "
        "sample from the whole distribution (top_k = 0, top_p = 1, no other processors)"
    )


def _of_the_loss(name: str, value: object, found: Assumption, row: Rollout) -> str | None:
    # verl's kl_penalty names an estimator, which does nothing without a coefficient.
    if among(value, found.neutral) or (name == "kl_penalty" and isinstance(value, str)):
        return None
    if isinstance(value, Mapping):
        inner = {key: item for key, item in value.items() if _is_of_the_loss(key)}
        said = (_contradiction(key, item, row) for key, item in inner.items())
        # A mapping that names no coefficient cannot be read.
        if not value or (inner and not any(said)):
            return None
    if name == "mask_truncated_completions" and row.cut is False:
        return None
    return (
        f"says {name} = {reprlib.repr(value)}: {found.why}, and the probe computes the policy gradient alone; train without "
        "it, or drop the column to probe that gradient without it"
    )


def _is_of_the_loss(name: object) -> bool:
    found = assumption_of(name) if isinstance(name, str) else None
    return found is not None and found.kind is Kind.LOSS


def _of_a_mask(name: str, value: object, row: Rollout) -> str | None:
    if isinstance(value, bool | int | float):
        return (
            None if value == 1 else f"has {name} = {value}: the row is not in the trainer's loss; leave such rows out"
        )
    try:
        mask = zeros_and_ones(value, name)
    except InputError as error:
        return f"has a mask that cannot be read: {error}"
    tokens = len(row.response_ids)
    if len(mask) not in (tokens, row.length):
        return (
            f"has {name} of {len(mask)} values; expected {tokens}, one for each of response_ids, or {row.length} with those of "
            "prompt_ids before"
        )
    ahead, over_response = mask[:-tokens], mask[-tokens:]
    zeros = over_response.count(0)
    if zeros:
        return (
            f"has {name} with 0 at {zeros} of {tokens} response tokens: they were not sampled by the policy, or are not in the "
            "loss, and would be scored as if they were; give rows whose whole response was sampled and counts (where the zeros "
            "are padding, cut response_ids and logprobs there)"
        )
    if any(ahead):
        return (
            f"has {name} with 1 at {sum(ahead)} of {len(ahead)} prompt tokens: the prompt is not in the loss that the probe "
            "computes; give 0 there, or the mask of the response alone"
        )
    return None


def _of_weights(name: str, value: object, row: Rollout) -> str | None:
    why = "the loss weights its tokens, and the probe counts all alike; give weights of 1, or drop the column to probe without"
    if isinstance(value, int | float):
        return None if _is_one(value) else f"has {name} = {value}: {why}"
    tokens = len(row.response_ids)
    if not isinstance(value, list | tuple) or len(value) not in (tokens, row.length):
        shown = f"of {len(value)} values" if isinstance(value, list | tuple) else f"= {reprlib.repr(value)}"
        return f"has {name} {shown}; expected one number, or {tokens}, one for each of response_ids"
    for place, weight in enumerate(value[-tokens:]):
        if not _is_one(weight):
            return f"has {name} = {reprlib.repr(weight)} at response token {place}: {why}"
    return None


def _of_advantages(value: object, row: Rollout) -> str | None:
    given: Sequence[object] = value if isinstance(value, list | tuple) else [value]
    own = row.advantage
    if own is not None and all(isinstance(a, int | float) and math.isclose(a, own, rel_tol=1e-6) for a in given):
        return None
    return (
        f"has a column advantages ({reprlib.repr(value)}), which is not read; give advantage, one number a response, or drop "
        "the column to have advantages computed from the rewards"
    )


def _of_nested(name: str, value: Mapping[Any, Any], temperature: float) -> str | None:
    for inner, item in value.items():
        if inner in SAMPLING and not leaves_whole(inner, item, (None, *SAMPLING[inner])):
            return _sampled_with(f"{name}.{inner}", item)
    said = value.get("temperature")
    if said is not None and said != temperature:
        return (
            f"was sampled with {name}.temperature = {reprlib.repr(said)}, and is taken as sampled at {temperature:g}; give a "
            "column temperature with the sampler's own"
        )
    return None


def _settings(value: object) -> Mapping[Any, Any] | None:
    """Settings by name, also of JSON text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def _is_one(value: object) -> bool:
    return isinstance(value, int | float) and abs(value - 1) <= UNIT_ROUNDING
