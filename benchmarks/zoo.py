"""Every causal language model that transformers knows, shrunk, against one-sequence-at-a-time autograd in float64.

    python benchmarks/zoo.py [--json FILE] [--markdown FILE] [--only llama,gpt2]

A family is built from its default config made small, with random weights and no download, and gets a batch of four responses
of different lengths. The truth is one forward and one backward a response, alone and unpadded; the engine's kernel
K_uw = X_u · P · Y_w and its mean update direction are compared with it. A family is exact where both agree to ``EXACT``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts
from entropy_probe.data.units import Units, exact_units
from entropy_probe.errors import InputError, one_line
from entropy_probe.gradients import prepare, unit_gradients
from entropy_probe.gradients.coefficients import Sides
from entropy_probe.model.float64_mode import Float64Mode
from entropy_probe.model.language_head import HeadMode
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.targets.entropy import EntropyTarget

EXACT = 1e-9
"""Relative error up to which a family counts as exact."""

NEGLIGIBLE = 1e-6
"""A parameter whose true gradient is a smaller share of the whole gradient's norm is measured against that share."""

MEMORY = 1e9
"""Bytes a probe may use here."""

VOCABULARY = 31
TOKENS = range(3, 25)
"""Ids that rollouts draw from: below them padding, start and end; above them the special tokens of images and sound."""

LAYERS = 2
HYBRID_LAYERS = 4
INITIAL_STD = 0.3
JITTER = 0.05
"""Standard deviation of the noise added to every parameter, so that none is left at the zero or one it was made with."""

TIME_LIMIT = 60.0
WHOLE_LIMIT = 15 * 60.0
WORKERS = 2

# --- configs -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    # Tokens and positions.
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "context_length": 64,
    "max_target_positions": 64,
    "type_vocab_size": 2,
    # Widths.
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_dim": 32,
    "embedding_size": 16,
    "word_embed_proj_dim": 16,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_ffn_dim": 24,
    "ffn_hidden_size": 24,
    "n_inner": 24,
    "dff": 24,
    "d_inner": 24,
    "dim_ff": 24,
    "feed_forward_size": 24,
    # Depth.
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "num_blocks": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    # Heads.
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "dim_head": 8,
    "attention_head_size": 8,
    "d_head": 8,
    "rotary_dim": 4,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "shared_experts_intermediate_size": 12,
    "shared_intermediate_size": 12,
    "expert_ffn_hidden_size": 12,
    "dense_intermediate_size": 24,
    "intermediate_size_mlp": 24,
    "router_hidden_size": 8,
    # Attention through low ranks, and what picks the keys that it sees.
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "o_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    # Scores of keys are sums over these heads after a ReLU: few heads tie at zero, and ties fall as padding has it.
    "index_n_heads": 8,
    "index_head_dim": 8,
    "index_topk": 4,
    "index_block_size": 2,
    "index_topk_blocks": 2,
    # Windows, shorter than the longest sequence.
    "sliding_window": 4,
    "sliding_window_size": 4,
    "attention_chunk_size": 4,
    "attention_window_size": 4,
    "window_size": 4,
    "keep_window_size": 4,
    "local_attention": 4,
    "block_size": 4,
    "max_window_layers": 1,
    # State-space and linear-attention layers.
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "n_mamba_heads": 2,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "n_groups": 2,
    "lru_width": 32,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # The rest.
    "num_attention_heads_per_layer": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "input_embedding_size": 16,
    "output_embedding_size": 24,
    "hidden_size_global": 32,
    "pronunciation_vocab_size": 8,
    "shape_vocab_size": 8,
    "pronunciation_embed_dim": 8,
    "shape_embed_dim": 8,
    "rel_extent": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8,
    "adapter_rank": 4,
    "dropout": 0.0,
}
"""Attribute to small value, wherever a config has the attribute with a value of its own."""

SPREAD = ("initializer_range", "init_std", "initializer_factor")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

PLAIN_ROPE: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "default"}
FULL_AND_SLIDING: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
LINEAR_AND_FULL: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
DENSE_AND_SPARSE = ["dense", "dense", "sparse", "sparse"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_size": [2, 3], "encoder_hash_byte_group_vocab": 16},
    "cohere_compass_text": FULL_AND_SLIDING
    | {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
    },
    "dots1": FULL_AND_SLIDING
    | {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]},
    "gemma4_text": {
        "global_head_dim": 16,
        "num_kv_shared_layers": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "granitemoehybrid": LINEAR_AND_FULL,
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": FULL_AND_SLIDING,
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"num_hidden_layers": 4, "num_dense_layers": 2, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "mellum": FULL_AND_SLIDING | {"mlp_layer_types": DENSE_AND_SPARSE},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 4,
        "index_n_heads": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": DENSE_AND_SPARSE,
    },
    "ministral": {"head_dim": 8},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zaya": {
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": 4,
    },
}
"""What the table above does not get right, by the model type of the config; ``None`` leaves the default."""


NEED_ANOTHER_MODEL = ("gemma4_assistant", "gemma4_unified_assistant")
"""Drafters: their forward takes the embeddings, keys and values of the model that they draft for."""


def families() -> list[str]:
    """Model types that transformers maps to a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> type[Any]:
    """The causal language model of a family."""
    found: type[Any] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return found


def config_class(model_type: str) -> type[PretrainedConfig]:
    """The config that the family's model is built from: its text part where the family's own config has several."""
    whole, own = CONFIG_MAPPING[model_type], model_class(model_type).config_class
    return own if own in whole.sub_configs.values() else whole


def shrunk_config(model_type: str) -> PretrainedConfig:
    """The family's default config, made small; hybrids keep every kind of layer."""
    config = _shrunk(config_class(model_type))
    config.use_cache = False
    return config


def _shrunk(cls: type[PretrainedConfig]) -> PretrainedConfig:
    overrides = OVERRIDES.get(cls.model_type, {})
    default = cls()
    values = vars(default)
    depth = next((values[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values), None)
    kinds = {
        name: list(dict.fromkeys(values[name]))
        for name in KINDS
        if isinstance(values.get(name), list) and name not in overrides
    }
    layers = HYBRID_LAYERS if any(len(found) > 1 for found in kinds.values()) else LAYERS
    layers = next(
        (overrides[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in overrides), layers
    )
    settings: dict[str, Any] = {}
    special = TOKENS.stop
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            settings[name] = _shrunk(type(value))
        elif name in kinds:
            settings[name] = _laid_out(kinds[name], layers, alternate=name != "mlp_layer_types")
        elif name in SMALL and value is not None:
            small = SMALL[name]
            if small == LAYERS and value == depth:
                small = layers
            settings[name] = [small] * layers if isinstance(value, list | tuple) else small
        elif name in SPREAD:
            settings[name] = INITIAL_STD
        elif isinstance(value, list) and len(value) == depth and depth > 2:
            settings[name] = value[:layers]
    for name, value in values.items():
        if not name.endswith(("_token_id", "_token_index")):
            continue
        fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name)
        if fixed is not None:
            settings[name] = fixed
        elif isinstance(value, int):
            settings[name] = special
            special = min(special + 1, VOCABULARY - 1)
    if values.get("kv_lora_rank"):
        # Latent attention has as many keys as queries, and its rotary table takes head_dim for the rotated part.
        settings["num_key_value_heads"] = SMALL["num_attention_heads"]
        if values.get("head_dim") == values.get("qk_rope_head_dim"):
            settings["head_dim"] = SMALL["qk_rope_head_dim"]
    if "is_decoder" in values:
        settings["is_decoder"] = True
    settings |= overrides
    return cls(**{name: value for name, value in settings.items() if value is not None})


def _laid_out(kinds: Sequence[str], layers: int, *, alternate: bool) -> list[str]:
    """Each kind in turn, or each in a run, so that two lists laid out differently meet in all combinations."""
    return [kinds[n % len(kinds) if alternate else n * len(kinds) // layers] for n in range(layers)]


# --- models ------------------------------------------------------------------------------------------------------------


def build(model_type: str, seed: int = 0) -> Any:
    """The family's model in float64 and eval mode, without fused kernels, every parameter moved off its initial value."""
    torch.manual_seed(seed)
    cls, config = model_class(model_type), shrunk_config(model_type)
    errors: list[Exception] = []
    for kernels in (
        {"attn_implementation": "eager", "experts_implementation": "eager"},
        {"attn_implementation": "eager"},
        {},
    ):
        try:
            model = cls._from_config(config, dtype=torch.float64, **kernels)
            break
        except (TypeError, ValueError) as error:
            errors.append(error)
    else:
        raise errors[0]
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += JITTER * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def small_batch(seed: int = 0) -> RolloutBatch:
    """Two prompts of two responses, all sequences but two of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(TOKENS.start, TOKENS.stop, (count,), generator=generator).tolist())

    rows = []
    for name, prompt_length, lengths, rewards in (("a", 2, (3, 6), (1.0, 0.0)), ("b", 3, (8, 5), (0.25, 1.0))):
        prompt = draw(prompt_length)
        rows += [Rollout(name, prompt, draw(n), reward) for n, reward in zip(lengths, rewards, strict=True)]
    return group_rollouts(rows)


# --- truth -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """S [N], the kernel of EXACT units [B, B] and (1/B) Σ Y_n by parameter name."""

    scores: np.ndarray
    kernel: np.ndarray
    ascent: dict[str, Tensor]


def score_alone(model: Any, row: Rollout, padding: int = 0, copies: int = 1) -> Tensor:
    """S of one response without the package; with masked padding on its right, or beside copies of itself, if asked."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids, *[0] * padding]] * copies)
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] - padding :] = 0
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    first = len(row.prompt_ids) - 1
    total = logits.new_zeros(())
    for t, token in enumerate(row.response_ids):
        total = total + torch.log_softmax(logits[first + t], dim=-1)[token]
    return total


def one_at_a_time(
    model: Any, batch: RolloutBatch, advantage_coefficients: Tensor, preconditioners: Mapping[str, Tensor]
) -> Truth:
    """One forward and one backward a response; X_n and Y_n by their definitions, response by response."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scores: list[float] = []
    gradients: list[list[Tensor | None]] = []
    with Float64Mode(), torch.enable_grad():
        for row in batch.responses:
            score = score_alone(model, row)
            gradients.append(list(torch.autograd.grad(score, list(parameters.values()), allow_unused=True)))
            scores.append(float(score.detach()))
    if not all(map(math.isfinite, scores)):
        raise ValueError("the scores are not finite")
    xs: list[list[Tensor]] = []
    ys: list[list[Tensor]] = []
    i = 0
    for group in batch.groups:
        count = len(group.responses)
        x = [torch.zeros_like(p) for p in parameters.values()]
        y = [torch.zeros_like(p) for p in parameters.values()]
        for g in range(i, i + count):
            others = sum(scores[h] for h in range(i, i + count) if h != g) / (count - 1)
            for k, gradient in enumerate(gradients[g]):
                if gradient is not None:
                    x[k] += (scores[g] - others) / count * gradient
                    y[k] += advantage_coefficients[g] * gradient
        xs.append(x)
        ys.append(y)
        i += count
    kernel = [
        [
            math.fsum(float((a * preconditioners[name] * b).sum()) for name, a, b in zip(parameters, x, y, strict=True))
            for y in ys
        ]
        for x in xs
    ]
    ascent = {name: sum(y[k] for y in ys) / len(ys) for k, name in enumerate(parameters)}
    return Truth(np.array(scores), np.array(kernel), {name: torch.as_tensor(value) for name, value in ascent.items()})


# --- the engine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineResult:
    """What is compared: the kernel, the mean update direction, and the share of parameters without a rule of their own."""

    kernel: np.ndarray
    ascent: Mapping[str, Tensor]
    fallback_share: float
    head: HeadMode


def engine(
    policy: Policy,
    batch: RolloutBatch,
    units: Units,
    advantage_coefficients: Tensor,
    preconditioners: Mapping[str, Tensor],
) -> EngineResult:
    """The engine's kernel and mean update, prepared as a probe prepares it."""
    prepared = prepare(policy, batch, memory_bytes=MEMORY)
    found = unit_gradients(
        prepared.applied(policy),
        batch,
        units,
        Sides(EntropyTarget(), advantage_coefficients),
        Geometry.fixed(preconditioners),
        rules=prepared.rules,
    )
    kernel = found.total.kernel
    assert kernel is not None
    return EngineResult(kernel, found.ascent, found.coverage.fallback_share, prepared.head)


# --- one family --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One family.

    ``status`` is "rules" or "fallback" where the engine ran, "refused" where it declined in one line, "failed" where it broke,
    "unbuildable" where the shrunk model does not run at all, and "slow" past the time limit. ``kernel_error`` is
    max|K − K*| / max|K*|, ``ascent_error`` the worst over parameters of ‖ΔȲ‖ / ‖Ȳ*‖, at ``worst_parameter``.
    """

    family: str
    model_class: str
    status: str
    notes: str = ""
    parameters: int = 0
    fallback_share: float | None = None
    kernel_error: float | None = None
    ascent_error: float | None = None
    worst_parameter: str = ""
    seconds: float = 0.0

    @property
    def error(self) -> float | None:
        """The larger of both errors."""
        if self.kernel_error is None or self.ascent_error is None:
            return None
        return float(np.maximum(self.kernel_error, self.ascent_error))

    @property
    def exact(self) -> bool:
        """Whether the engine ran and agrees with the truth."""
        return self.error is not None and self.error <= EXACT

    @property
    def verdict(self) -> str:
        """The status in words."""
        if self.status not in ("rules", "fallback"):
            return self.status
        return f"exact by {self.status}" if self.exact else f"NOT EXACT ({self.status})"


@dataclass(frozen=True)
class Case:
    """A family's model with what both sides are given, and the truth."""

    model: Any
    batch: RolloutBatch
    advantages: Tensor
    preconditioners: dict[str, Tensor]
    truth: Truth
    notes: tuple[str, ...]


def make_case(model_type: str) -> Case:
    """Build a family and find the truth.

    Where the forward fails or overflows in float64 because it makes tensors of torch's default type, it is run once more with
    that type at float64, and the process stays so.
    """
    if model_type in NEED_ANOTHER_MODEL:
        raise ValueError("its forward takes the embeddings, keys and values of the model that it drafts for")
    model, batch = build(model_type), small_batch()
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(len(batch.responses), generator=generator, dtype=torch.float64)
    preconditioners = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).exp()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    notes: tuple[str, ...] = ()
    try:
        truth = one_at_a_time(model, batch, advantages, preconditioners)
    except Exception as first:
        torch.set_default_dtype(torch.float64)
        try:
            truth = one_at_a_time(model, batch, advantages, preconditioners)
        except Exception:
            torch.set_default_dtype(torch.float32)
            raise first from None
        notes = (f"runs only with torch's default dtype at float64 ({_reason(first)})",)
    return Case(model, batch, advantages, preconditioners, truth, notes)


def measure(model_type: str) -> Row:
    """Build a family, find the truth, run the engine, compare."""
    start = time.perf_counter()
    row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "unbuildable")
    try:
        case = make_case(model_type)
    except Exception as error:
        return replace(row, notes=_reason(error), seconds=time.perf_counter() - start)
    row = replace(row, parameters=sum(p.numel() for p in case.model.parameters()))
    policy = Policy(case.model, temperature=case.batch.temperature)
    units = exact_units(len(case.batch.groups))
    notes = list(case.notes)
    try:
        notes += _peculiarities(case.model, policy, case.batch, case.truth)
        found = engine(policy, case.batch, units, case.advantages, case.preconditioners)
    except InputError as error:
        row = replace(row, status="refused", notes="; ".join([one_line(error), *notes]))
    except Exception as error:
        row = replace(row, status="failed", notes="; ".join([_reason(error), *notes]))
    else:
        kernel_error = float(np.abs(found.kernel - case.truth.kernel).max() / np.abs(case.truth.kernel).max())
        ascent_error, worst = _worst_parameter(found.ascent, case.truth.ascent)
        row = replace(
            row,
            status="fallback" if found.fallback_share > 0 else "rules",
            notes="; ".join([*notes, *(["logits of every position"] if found.head is HeadMode.WHOLE else [])]),
            fallback_share=found.fallback_share,
            kernel_error=kernel_error,
            ascent_error=ascent_error,
            worst_parameter=worst,
        )
    return replace(row, seconds=time.perf_counter() - start)


def _worst_parameter(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[float, str]:
    """The worst relative error of a parameter's mean update direction, and whose it is."""
    floor = NEGLIGIBLE * math.sqrt(math.fsum(float(t.norm()) ** 2 for t in truth.values()))
    errors = {
        name: float((found[name].double() - t).norm() if name in found else t.norm()) / max(float(t.norm()), floor)
        for name, t in truth.items()
    }
    unknown = sorted(set(found) - set(truth))
    if unknown:
        return math.inf, unknown[0]
    # A NaN is the worst there is.
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[worst], worst


def _peculiarities(model: Any, policy: Policy, batch: RolloutBatch, truth: Truth) -> list[str]:
    """What makes S depend on more than the response's own earlier tokens."""
    notes = []

    def differs(left: np.ndarray, right: np.ndarray) -> bool:
        return not float(np.abs(left - right).max()) <= EXACT * float(np.abs(right).max())

    def alone(**how: int) -> np.ndarray:
        with Float64Mode(), torch.no_grad():
            return np.array([float(score_alone(model, row, **how)) for row in batch.responses])

    if differs(alone(), truth.scores):
        return ["two forwards differ: the model draws random numbers"]
    if differs(policy.scores(batch.responses).numpy(), truth.scores):
        causes = []
        if differs(alone(padding=3), truth.scores):
            causes.append("masked padding on the right changes S")
        if differs(alone(copies=2), truth.scores):
            causes.append("a response's copies in the batch change S")
        notes.append("; ".join(causes) or "S in a batch is not S alone")
    if not _causal(model, batch):
        notes.append("not causal: logits see later tokens")
    unreached = [name for name, t in truth.ascent.items() if not bool(t.any())]
    if unreached:
        notes.append(f"{len(unreached)} of {len(truth.ascent)} parameters get no gradient")
    return notes


def _causal(model: Any, batch: RolloutBatch) -> bool:
    row = max(batch.responses, key=lambda r: len(r.response_ids))
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    other = ids.clone()
    other[0, -1] = TOKENS.start + (int(ids[0, -1]) - TOKENS.start + 1) % len(TOKENS)
    with Float64Mode(), torch.no_grad():
        before, after = (
            model(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits[0, :-1] for x in (ids, other)
        )
    return bool((before - after).abs().max() <= EXACT * before.abs().max())


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


# --- all families ------------------------------------------------------------------------------------------------------


def _child(model_type: str, pipe: Connection) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    pipe.send(measure(model_type))
    pipe.close()


def measure_all(names: Sequence[str], *, limit: float = TIME_LIMIT, whole: float = WHOLE_LIMIT) -> Iterator[Row]:
    """Each family in a process of its own, ``WORKERS`` at a time; rows come as they are done."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(names))
    running: dict[Connection, tuple[str, multiprocessing.process.BaseProcess, float]] = {}
    start = time.monotonic()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name = waiting.pop()
            if time.monotonic() - start > whole:
                yield _unmeasured(name, "slow", f"not started: the run's {whole:.0f} s were over")
                continue
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=0.2)
        for pipe, (name, child, begun) in list(running.items()):
            seconds = time.monotonic() - begun
            if pipe in ready:
                try:
                    yield pipe.recv()
                except EOFError:
                    child.join()
                    yield _unmeasured(name, "failed", f"the process died with exit code {child.exitcode}", seconds)
            elif seconds > limit:
                child.kill()
                yield _unmeasured(name, "slow", f"over {limit:g} s", seconds)
            else:
                continue
            child.join()
            pipe.close()
            del running[pipe]


def _unmeasured(family: str, status: str, notes: str, seconds: float = 0.0) -> Row:
    return Row(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], status, notes, seconds=seconds)


def summary(rows: Sequence[Row], seconds: float) -> str:
    """One line."""
    ran = [row for row in rows if row.error is not None]
    inexact = [row.family for row in ran if not row.exact]
    worst = max((row.error for row in ran if row.exact and row.error is not None), default=0.0)
    counted = ", ".join(
        f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in sorted({row.verdict for row in rows})
    )
    tail = f"; not exact: {', '.join(inexact)}" if inexact else ""
    return (
        f"{len(rows)} families of transformers {transformers.__version__}: {counted}; worst error of the exact ones "
        f"{worst:.1e}; {seconds:.0f} s{tail}"
    )


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("family", lambda row: row.family),
    ("class", lambda row: row.model_class),
    ("parameters", lambda row: f"{row.parameters:,}" if row.parameters else ""),
    ("verdict", lambda row: row.verdict),
    ("fallback share", lambda row: "" if row.fallback_share is None else f"{row.fallback_share:.0%}"),
    ("worst error", lambda row: "" if row.error is None else f"{row.error:.1e}"),
    (
        "notes",
        lambda row: row.notes if row.exact or not row.worst_parameter else f"{row.notes} [{row.worst_parameter}]",
    ),
)


def markdown(rows: Sequence[Row], line: str) -> str:
    """The table and the summary."""
    lines = ["| " + " | ".join(title for title, _ in COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row).replace("|", "\\|") for _, cell in COLUMNS) + " |" for row in rows]
    return "\n".join([*lines, "", line, ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--only", help="families to measure, separated by commas")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds a family")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else families()
    unknown = sorted(set(names) - set(families()))
    if unknown:
        parser.error(f"transformers maps no causal language model to {', '.join(unknown)}")
    start = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = []
    with console.status("") as status:
        for row in measure_all(names, limit=arguments.limit):
            rows.append(row)
            status.update(f"{len(rows)} of {len(names)}: {row.family} {row.verdict}")
    rows.sort(key=lambda row: row.family)
    table = Table(*(title for title, _ in COLUMNS))
    for row in rows:
        table.add_row(*(cell(row) for _, cell in COLUMNS))
    line = summary(rows, time.monotonic() - start)
    console.print(table)
    console.print(line)
    if arguments.json:
        rendered = [asdict(row) | {"error": row.error, "verdict": row.verdict} for row in rows]
        arguments.json.write_text(json.dumps(rendered, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, line))


if __name__ == "__main__":
    main()
