"""Small models, checkpoints and rollouts that tests share."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.trainer_pt_utils import get_parameter_names

from entropy_probe.data.rollouts import Rollout, RolloutBatch, group_rollouts
from entropy_probe.data.units import Mode
from entropy_probe.gradients.plan import Plan, make_plan
from entropy_probe.optimizers.live import state_of_optimizer
from entropy_probe.optimizers.state import AdamState

VOCABULARY = 23
EOS = 1


def _config(cls: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 2,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    return cls(**(common | more))


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-tied": lambda: _config(LlamaConfig, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True),
    "llama-untied": lambda: _config(LlamaConfig, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=EOS,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    ),
    "qwen2": lambda: _config(Qwen2Config, intermediate_size=24, num_key_value_heads=1),
    "opt": lambda: _config(OPTConfig, ffn_dim=24, word_embed_proj_dim=16, dropout=0.1),
    "gemma2": lambda: _config(Gemma2Config, intermediate_size=24, num_key_value_heads=1, head_dim=8, sliding_window=8),
    "mixtral": lambda: _config(MixtralConfig, intermediate_size=24, num_key_value_heads=1, num_local_experts=4),
    "phi": lambda: _config(PhiConfig, intermediate_size=24, num_key_value_heads=2, partial_rotary_factor=0.5),
}  # fmt: skip


def tiny_model(name: str = "llama-tied", *, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.3) -> Any:
    """A random model of a family, spread wide enough that its log-probs differ."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if "initializer_range" in config.to_dict():
        config.initializer_range = std
    kernels = {"experts_implementation": "eager"} if name == "mixtral" else {}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **kernels)


def hf_groups(model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Decay and no-decay groups as the installed Trainer makes them."""
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decaying = get_parameter_names(model, [nn.LayerNorm], patterns)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trainable if n in decaying], "weight_decay": weight_decay},
        {"params": [p for n, p in trainable if n not in decaying], "weight_decay": 0.0},
    ]


def trained_optimizer(
    model: Any,
    *,
    steps: int = 3,
    learning_rate: float = 1e-3,
    seed: int = 1,
    vocabulary: int = VOCABULARY,
    **adam: Any,
) -> torch.optim.AdamW:
    """AdamW after a few supervised steps on random tokens, so that every parameter has moments."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(hf_groups(model), lr=learning_rate, **adam)
    training = model.training
    model.eval()
    for _ in range(steps):
        ids = torch.randint(3, vocabulary, (8, 12), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.train(training)
    return optimizer


def save_checkpoint(model: Any, optimizer: torch.optim.Optimizer, path: Path, step: int = 3) -> Path:
    """A folder as a Trainer leaves it: weights or adapter, optimizer.pt, trainer_state.json."""
    model.save_pretrained(path)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def save_in_shards(model: Any, optimizer: torch.optim.Optimizer, path: Path, step: int = 3) -> Path:
    """The same as accelerate leaves it in shards, here of one process; of an adapter with its configuration."""
    from peft import PeftModel, get_peft_model_state_dict
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state, weights = optimizer.state_dict(), model.state_dict()
    path.mkdir(parents=True)
    if isinstance(model, PeftModel):
        weights = get_peft_model_state_dict(model)
        model.peft_config["default"].save_pretrained(path)
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = [group | {"params": [order[index] for index in group["params"]]} for group in state["param_groups"]]
    named = {"state": {order[index]: entry for index, entry in state["state"].items()}, "param_groups": groups}
    for folder, content in (("pytorch_model_fsdp_0", {"model": weights}), ("optimizer_0", {"optimizer": named})):
        save(content, storage_writer=FileSystemWriter(path / folder), no_dist=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def make_checkpoint(path: Path, name: str = "llama-tied", *, seed: int = 0, **optimizer: Any) -> Path:
    """A random model of a family, trained for a few steps, on disk."""
    model = tiny_model(name, seed=seed)
    return save_checkpoint(model, trained_optimizer(model, **optimizer), path)


def lora_model(model: Any, *, rank: int = 2, seed: int = 0) -> Any:
    """A PEFT model with LoRA on the attention projections, both factors non-zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    return adapted


def wrapped(model: Any, names: Sequence[str], **how: Any) -> Any:
    """The model with these modules in torch's checkpoint_wrapper; one inside of another is named before it."""
    for name in names:
        model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name), **how))
    return model


def random_rollouts(
    prompts: int = 5,
    responses: int | Sequence[int] = 3,
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    longest: int = 7,
    **columns: Any,
) -> list[Rollout]:
    """Rows of random tokens with prompts and responses of different lengths and rewards of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sizes = [responses] * prompts if isinstance(responses, int) else list(responses)
    rows = []
    for n, size in enumerate(sizes):
        prompt_ids = tuple(draw(3, vocabulary) for _ in range(draw(1, 6)))
        for _ in range(size):
            body = tuple(draw(3, vocabulary) for _ in range(draw(0, longest)))
            rows.append(Rollout(f"p{n}", prompt_ids, (*body, EOS), float(draw(0, 2)), **columns))
    return rows


def random_batch(prompts: int = 5, responses: int | Sequence[int] = 3, **more: Any) -> RolloutBatch:
    """The same rows, grouped."""
    return group_rollouts(random_rollouts(prompts, responses, **more))


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The non-empty lines of standard error."""
        return [line for line in self.err.splitlines() if line.strip()]


def run_command(*arguments: str | Path) -> Outcome:
    """The real command line, in this process; an exception that escapes it escapes from here too."""
    from entropy_probe import cli

    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["entropy-probe", *map(str, arguments)]
    code: object = None
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    assert isinstance(code, int), f"the command ended with {code!r}"
    return Outcome(code, out.getvalue(), err.getvalue())


def fingerprint(folder: Path) -> dict[str, str]:
    """Every path below a folder with the hash of its content, hidden and temporary files included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_equal(found: Any, expected: Any) -> None:
    """Two checkpoints of one process: weights, buffers, moments and settings, bit for bit."""
    ours, theirs = (dict(c.model.named_parameters()) for c in (found, expected))
    assert list(ours) == list(theirs)
    for name, p in theirs.items():
        assert (ours[name].requires_grad, ours[name].dtype) == (p.requires_grad, p.dtype), name
        assert torch.equal(ours[name], p), name
    buffers, others = (dict(c.model.named_buffers()) for c in (found, expected))
    assert buffers.keys() == others.keys()
    assert all(b.dtype == others[name].dtype and torch.equal(b, others[name]) for name, b in buffers.items())
    assert_same_moments(found.adam, expected.adam)
    assert found.adam.groups == expected.adam.groups
    assert found.preconditioner_test == expected.preconditioner_test
    assert found.trainer_step == expected.trainer_step


def assert_same_moments(found: AdamState, expected: AdamState) -> None:
    assert set(found.moments) == set(expected.moments)
    for name, moments in expected.moments.items():
        assert found.moments[name].step == moments.step, name
        assert torch.equal(found.moments[name].exp_avg, moments.exp_avg), name
        assert torch.equal(found.moments[name].exp_avg_sq, moments.exp_avg_sq), name


def adam_state(**changed: Any) -> tuple[AdamState, dict[str, torch.Size]]:
    """A state of three parameters, the second of them as told."""
    model = nn.ModuleDict({name: nn.Linear(3, 2, bias=False) for name in ("a", "b", "c")}).double()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = state_of_optimizer(optimizer, model)
    moments = dict(state.moments)
    moments["b.weight"] = replace(moments["b.weight"], **changed)
    return AdamState(state.groups, moments), {name: p.shape for name, p in model.named_parameters()}


def plan(**more: Any) -> Plan:
    """What is planned for 40 prompts of 1000 parameters and 1 GB, or as told."""
    common = {"prompts": 40, "parameters": 1000, "bytes_per_value": 4, "memory_bytes": 1e9}
    return make_plan(more.pop("mode", Mode.AUTO), more.pop("blocks", None), **(common | more))
