"""What the recorder takes from inside TRL and transformers, in one place; whatever is missing is refused by name.

Read in the sources of TRL 1.10 to 1.16 and of transformers 4.56 to 5.23.
"""

from __future__ import annotations

from typing import Any

from entropy_probe.compat.gates import attribute

FIRST_KNOWN, LAST_KNOWN = (1, 10), (1, 16)
"""Versions of TRL, major and minor, whose loss was read."""
KNOWN_VERSIONS = f"{FIRST_KNOWN[0]}.{FIRST_KNOWN[1]} to {LAST_KNOWN[0]}.{LAST_KNOWN[1]}"

CALCULATE_REWARDS = "_calculate_rewards"
GENERATE_TURNS = "_generate"
GENERATE_AND_SCORE = "_generate_and_score_completions"
PER_TOKEN_LOGPS = "_get_per_token_logps_and_entropies"
PREPARE_INPUTS = "_prepare_inputs"
WRAPPED = (CALCULATE_REWARDS, GENERATE_TURNS, GENERATE_AND_SCORE, PER_TOKEN_LOGPS, PREPARE_INPUTS)
"""Methods of the trainer that the recorder wraps while it trains."""
RESPONSE_IDS, TOOL_MASK = 1, 2
"""Where in what ``_generate`` returns the ids of every response stand; and, with a GRPOTrainer, its mask of tool outputs."""

SETTINGS = (
    *("_tokenizer", "accelerator", "args", "aux_loss_enabled", "beta", "epsilon_high", "epsilon_low"),
    *("mask_truncated_completions", "max_completion_length", "model", "num_generations", "num_iterations"),
    *("reward_weights", "temperature", "top_k", "use_transformers_continuous_batching", "use_vllm"),
    *("args.gradient_accumulation_steps", "args.max_grad_norm", "args.neftune_noise_alpha"),
    *("args.steps_per_generation",),
)
"""What every known trainer has; ``args.`` for its configuration."""
SETTINGS_OF_GRPO = (
    *("_entropy_bonus_enabled", "_last_world_entropy", "entropy_coef", "environment_factories"),
    *("importance_sampling_level", "loss_type", "off_policy_mask_threshold", "rollout_func", "scale_rewards", "tools"),
    *("top_entropy_quantile", "use_adaptive_entropy", "vllm_importance_sampling_clip_max"),
    *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("args.delta", "args.entropy_target", "args.sapo_temperature_neg", "args.sapo_temperature_pos"),
    *("args.use_bias_correction_kl", "args.vespo_k_neg", "args.vespo_k_pos", "args.vespo_lambda_neg"),
    *("args.vespo_lambda_pos",),
)
"""What every known GRPOTrainer has besides."""
SINCE = {"eos_token_ids": (1, 15)}
"""Settings that came with a version, and must be there from it on."""
UNTIL = {"use_liger_kernel": (1, 14)}
"""Settings of the GRPOTrainer that went with the version after this one. Later, Liger replaces layers and leaves the loss."""
OF_TRANSFORMERS = ("generation_config", "generation_kwargs")
OF_VLLM = ("vllm_generation",)
"""What a trainer that generates with transformers, or with vLLM, has besides."""
VLLM_SETTINGS = (
    *("generation_kwargs", "max_completion_length", "min_p", "mode", "repetition_penalty", "structured_outputs_regex"),
    *("temperature", "top_k", "top_p"),
)

BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
BATCH_OF_GRPO = ("num_items_in_batch",)
BATCH_OF_RLOO = ("old_logps",)
IMAGES = ("pixel_values", "image_grid_thw", "num_images", "image_sizes", "spatial_shapes", "image_position_ids")
"""Keys of the batch that TRL hands to its loss; the next two are there for a GRPOTrainer where it has them."""
OLD_LOGPS, SAMPLER_LOGPS = "old_per_token_logps", "sampling_per_token_logps"

STATED_WITH_THE_LOSS = {
    *("_chunked_logps", "_compute_loss", "_full_logits_logps", "_get_last_hidden_state", "compute_liger_loss"),
    *("_get_per_token_logps_and_entropies", "compute_loss", "get_gamma_weights", "get_high_entropy_mask"),
    *("get_off_policy_mask", "loss_is_scaled_for_ga", "training_step"),
}
"""Attributes of a GRPOTrainer that make its loss, and nothing else of what the rows say."""
FREE_TO_OVERRIDE = {
    *("_calculate_rewards", "_get_eval_sampler", "_get_train_sampler", "_load_optimizer_and_scheduler"),
    *("_log_completion_extra", "_log_metric", "_name", "_paper", "_save_checkpoint", "_tag_names", "_template_file"),
    *("_set_signature_columns_if_needed", "_tokenize_prompts", "get_eval_dataloader", "get_train_dataloader", "log"),
    *("prediction_step",),
}
"""Attributes of a GRPOTrainer that change neither its loss nor how a prompt's responses are drawn."""
LOSS_OF_THE_BASE = ("autocast_smart_context_manager", "compute_loss_context_manager", "get_batch_samples")
"""Methods of transformers' Trainer that act on the loss."""

PREPARE = "_prepare_generation_config"
OVERRIDE = "_override_model_generation_config"
GENERATE = ("generate", PREPARE, "_get_logits_processor", "_get_stopping_criteria", "_sample")
GENERATE_BATCH = (
    *("generate_batch", "continuous_batching_context_manager", "init_continuous_batching", "_get_logits_processor"),
)
"""Methods of a transformers model that decide which token is drawn: in ``generate``, and in continuous batching."""


def tokenizer_of(trainer: Any) -> Any:
    """The trainer's tokenizer, also where its processing class is a multimodal processor. Reads ``_tokenizer``.

    Raises:
        InputError: there is no such name.
    """
    return attribute("trl", trainer, "_tokenizer", object)


def entropy_coefficient(trainer: Any) -> float:
    """What multiplies the entropy in the loss of the coming micro-batch; 0 without a bonus.

    An adaptive coefficient counts only while the last step's entropy was at the target or below; TRL changes it at the end of
    each window, so that it is one number for a step's micro-batches. Reads ``_last_world_entropy``.

    Raises:
        InputError: there is no such name, or it is no number.
    """
    if not adds_entropy_bonus(trainer):
        return 0.0
    if trainer.use_adaptive_entropy:
        last: float = attribute("trl", trainer, "_last_world_entropy", float)
        if last > trainer.args.entropy_target:
            return 0.0
    return float(trainer.entropy_coef)


def adds_entropy_bonus(trainer: Any) -> bool:
    """Whether the trainer's loss has an entropy bonus, fixed or adaptive. Reads ``_entropy_bonus_enabled``.

    Raises:
        InputError: there is no such name, or it is no bool.
    """
    enabled: bool = attribute("trl", trainer, "_entropy_bonus_enabled", bool)
    return enabled
