"""Columns that say how a row was sampled or what its loss was, and what each may say without contradicting the probe.

The probe takes a response as sampled from the policy's whole distribution, but for tokens that ``sampled`` leaves out, and the
loss as the columns of :data:`OF_THE_LOSS` and of :class:`~entropy_probe.data.rollouts.Rollout` say. A column that says
otherwise is refused by its name: its row would be computed as something that it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from entropy_probe.data.rollouts.masks import ATTENTION_MASKS

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
    *("ent_coef", "entropy_coeff", "entropy_loss_coef", "entropy_loss_coeff", "entropy_loss_weight"),
    *("entropy_bonus", "entropy_bonus_coef", "entropy_weight", "entropy_beta", "entropy_reg_coef", "entropy_penalty"),
    *("use_adaptive_entropy", "use_entropy_loss"),
)
_FURTHER_NAMES = ("router_aux_loss_coef", "aux_loss_coef", "ptx_coef", "sft_coef", "sft_loss_coef", "nll_loss_coef")
OF_THE_LOSS = (
    *(
        "beta",
        "kl_estimator",
        "use_bias_correction_kl",
        "entropy_coef",
        "epsilon_low",
        "epsilon_high",
        "delta",
        "loss_agg",
    ),
    *(
        "importance_sampling_level",
        "importance_sampling_mode",
        "importance_sampling_clip_min",
        "importance_sampling_clip_max",
    ),
    *("top_entropy_quantile", "off_policy_mask_threshold", "loss_scale", "kl_agg", "kl_tau"),
)
"""Columns with one value for all rows that say what the trainer's loss is, and that the probe computes."""
SAMPLED_ALIASES = ("response_mask", "tool_mask", "env_mask")
"""Other names of the column ``sampled``."""
_MASK_NAMES = (
    *("completion_mask", "loss_masks", "action_mask"),
    *("assistant_mask", "assistant_masks", "assistant_tokens_mask", "token_mask", "token_loss_mask", "sample_mask"),
    *("completion_loss_mask", "response_loss_mask", "generation_mask"),
)
_WEIGHT_NAMES = (
    *("importance_sampling_ratio", "importance_ratio", "importance_ratios", "importance_weight", "importance_weights"),
    *("is_weight", "is_weights", "rollout_is_weight", "rollout_is_weights", "token_weights"),
    *("loss_weight", "loss_weights", "sample_weight", "sample_weights", "sequence_weight", "sequence_weights"),
    *("vllm_importance_sampling_ratio", "tis_weights"),
)
VAGUE_WEIGHTS = ("weight", "weights", "ratio", "ratios")
"""Of the loss where they have a value a response token; else names of anything: of a data set, or of what a prompt is about."""
PADDING_WORDS = {"pad", "padding", "padded"}
OVERLONG_WORDS = {"overlong"}
OTHER_WORDS = {"eos", "bos", "prompt", "truncated", "truncation"}
"""Words in the names of masks that say nothing of which response tokens are in the loss."""

ASSUMPTIONS: dict[str, Assumption] = {
    **{name: Assumption(Kind.SAMPLING, neutral) for name, neutral in SAMPLING.items()},
    **{name: Assumption(Kind.LOSS, OFF, KL) for name in _KL_NAMES},
    **{name: Assumption(Kind.LOSS, OFF, ENTROPY) for name in _ENTROPY_NAMES},
    **{name: Assumption(Kind.LOSS, OFF, FURTHER) for name in _FURTHER_NAMES},
    "mask_truncated_completions": Assumption(Kind.LOSS, OFF, LEFT_OUT),
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

OF_A_CONFIG = {"config", "cfg", "args", "settings", "algorithm", "actor", "loss", "trainer", "hyperparameters"}
"""Words in the names of columns that hold the trainer's settings by name."""


def assumption_of(name: str) -> Assumption | None:
    """What a column may say, by its name, of a dotted one by the last part; None where nothing is known of it.

    Nothing is said against columns that the probe reads itself.
    """
    if name in OF_THE_LOSS or name in SAMPLED_ALIASES:
        return None
    last = name.rpartition(".")[2]
    return ASSUMPTIONS.get(last) or next((found for pattern, found in LIKE if pattern.search(last)), None)


def is_of_tokens(name: str) -> bool:
    """Whether a column has a value a response token, or may have: it is cut where padding is."""
    found = assumption_of(name)
    known = name in SAMPLED_ALIASES or (found is not None and found.kind in (Kind.MASK, Kind.WEIGHTS))
    return known or name in VAGUE_WEIGHTS or name == "labels" or looks_like_a_mask(name)


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


def looks_like_a_mask(name: str) -> bool:
    """Whether a name ends as masks do; attention masks are known."""
    return name.endswith(("_mask", "_masks")) and name not in ATTENTION_MASKS
