"""Small GRPO runs of TRL with the recorder, and the trainer's gradient rebuilt from the rows that it left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entropy_probe.data.rollouts import Rollout, read_rollouts
from entropy_probe.integrations.trl import RolloutRecorder

SYMBOLS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
EOS = 1
GROUP = 4
MAX_LENGTH = 5
TEMPERATURE = 0.8
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
NEUTRAL_COLUMNS = {
    "sampler": "transformers", "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "repetition_penalty": 1,
    "no_repeat_ngram_size": 0, "min_new_tokens": 0, "suppress_tokens": None, "dropout": 0,
}  # fmt: skip
# One prompt comes three times, so that two groups of a batch share their prompt; lengths differ, so that TRL pads.
PROMPTS = ["abc", "abc", "abc", "de", "fghij", "k"]


def tiny_tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def vowels(completions: Sequence[str], **_: Any) -> list[float | None]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def length(completions: Sequence[str], **_: Any) -> list[float | None]:
    return [float(len(text)) for text in completions]


class KeepGradients(TrainerCallback):  # type: ignore[misc]
    """The trainer's weights and gradients just before each step, by name."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = {name.removeprefix("module."): p for name, p in trained.items()}  # of DistributedDataParallel
        self.weights.append({name: p.detach().clone() for name, p in trained.items()})
        self.gradients.append({name: p.grad.detach().clone() for name, p in trained.items()})


def make_trainer(
    folder: Path,
    lora: bool = False,
    rewards: Sequence[Callable[..., Any]] = (vowels, length),
    kind: type = GRPOTrainer,
    given: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of ``kind``; ``options`` go to its config, ``given`` to itself (tools, rollout_func, callbacks)."""
    rloo = issubclass(kind, RLOOTrainer)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "seed": 3,
        "max_steps": 3,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 2,
        "num_generations": GROUP,
        "max_completion_length": MAX_LENGTH,
        "temperature": TEMPERATURE,
        **({} if rloo else {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        "beta": 0.0,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,  # no clipping: .grad is the gradient of the loss
        "reward_weights": [1.0, 0.5][: len(rewards)],
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    config = RLOOConfig if rloo else GRPOConfig
    model = tiny_model()
    if options.get("beta") and not lora:
        # TRL loads the reference from where the model says that it came from.
        model.config._name_or_path = reference_model(folder / "reference")
    arguments = {
        "model": model,
        "reward_funcs": list(rewards),
        "args": config(**(settings | options)),
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:4]}),
        "processing_class": tiny_tokenizer(),
        "peft_config": LORA if lora else None,
    }
    return kind(**(arguments | (given or {})))


def reference_model(folder: Path) -> str:
    """A model near the trained one's beginning, on disk: a KL term is above 0 from the first step."""
    model = tiny_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    model.save_pretrained(folder)
    return str(folder)


def turns_with_tool_output(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
    """A ``rollout_func`` of two turns: tokens drawn, one put between as a tool would, tokens drawn again after it."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    put = tokenizer.convert_tokens_to_ids("t")
    found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": []}
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        first, then = (_drawn(model, ids, (), 2), ())
        if EOS not in first:
            then = _drawn(model, ids, (*first, put), trainer.max_completion_length - len(first) - 1)
        found["prompt_ids"].append(ids)
        found["completion_ids"].append([*first, *((put, *then) if then else ())])
        found["env_mask"].append([1] * len(first) + ([0] + [1] * len(then) if then else []))
    return found


def _drawn(model: Any, prompt: Sequence[int], before: Sequence[int], most: int) -> tuple[int, ...]:
    """Tokens drawn one by one after ``prompt`` and ``before``, up to the end token."""
    drawn: tuple[int, ...] = ()
    while len(drawn) < most and EOS not in drawn:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *before, *drawn]])).logits[0, -1]
        drawn = (*drawn, int(torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)))
    return drawn


def checkpointed_run(
    folder: Path,
    stated_loss: str | None = None,
    further: Callable[[Any], Sequence[TrainerCallback]] = lambda _: (),
    **options: Any,
) -> Path:
    """A recorded run with a checkpoint after each step and a log of each.

    Step N + 1 leads from ``run/checkpoint-N`` to ``run/checkpoint-{N+1}`` and consumed ``rollouts/step-{N+1:05d}.jsonl``; with
    ``lora`` the base model is in ``base``. ``options`` are those of :func:`make_trainer`, as of GRPOConfig; ``further`` as of
    :func:`train`.
    """
    if options.get("lora"):
        tiny_model().save_pretrained(folder / "base")
    settings = {
        "save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 1, "max_grad_norm": 0.5,
        "weight_decay": 0.1,
    } | options  # fmt: skip
    trainer = make_trainer(folder, **settings)
    trainer.add_callback(RolloutRecorder(trainer, folder / "rollouts", loss_type=stated_loss))
    for callback in further(trainer):
        trainer.add_callback(callback)
    trainer.train()
    return folder


def train(
    folder: Path,
    stated_loss: str | None = None,
    further: Callable[[Any], Sequence[TrainerCallback]] = lambda _: (),
    **options: Any,
) -> tuple[Any, KeepGradients, list[list[Rollout]]]:
    """Train with the recorder; return the trainer, what the callback saw, and the recorded rows of each step.

    ``further`` makes callbacks of the trainer that come after the recorder, which looks at the trainer when training begins.
    """
    trainer = make_trainer(folder, **options)
    seen = KeepGradients()
    trainer.add_callback(RolloutRecorder(trainer, folder / "rollouts", loss_type=stated_loss))
    for callback in (*further(trainer), seen):
        trainer.add_callback(callback)
    trainer.train()
    steps = range(1, len(seen.gradients) + 1)
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == [f"step-{k:05d}.jsonl" for k in steps]
    return trainer, seen, [read_rollouts(folder / "rollouts" / f"step-{k:05d}.jsonl") for k in steps]


def log_probs(model: Any, rows: Sequence[Rollout]) -> list[torch.Tensor]:
    """Per-token log-probs of the recorded responses, padded on the right (TRL pads prompts on the left)."""
    sequences = [row.prompt_ids + row.response_ids for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([list(s) + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    every = (model(input_ids=ids, attention_mask=mask).logits / TEMPERATURE).log_softmax(-1)
    taken = every[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return [
        taken[i, len(row.prompt_ids) - 1 : len(row.prompt_ids) + len(row.response_ids) - 1]
        for i, row in enumerate(rows)
    ]


def sequence_weights(rows: Sequence[Rollout], loss_type: str) -> list[float]:
    """The weight of each response's log-prob in minus the loss of one accumulation window."""
    micro_tokens: Counter[int] = Counter()
    for row in rows:
        assert row.micro_batch is not None
        micro_tokens[row.micro_batch] += len(row.response_ids)
    weights = []
    for row in rows:
        assert row.advantage is not None
        assert row.micro_batch is not None
        assert row.window_tokens is not None
        assert row.max_completion_length is not None
        divisor = {
            "dr_grpo": len(rows) * row.max_completion_length,
            "grpo": len(rows) * len(row.response_ids),
            "sapo": len(rows) * len(row.response_ids),
            "dapo": row.window_tokens,
            "cispo": row.window_tokens,
            "bnpo": len(micro_tokens) * micro_tokens[row.micro_batch],
        }[loss_type]
        weights.append(row.advantage / divisor)
    return weights


def model_at(weights: dict[str, torch.Tensor]) -> Any:
    """A model of ours with the trainer's trained weights: TRL replaces the forward of the one it was given."""
    model = tiny_model()
    if any("lora" in name for name in weights):
        model = get_peft_model(model, LORA)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == weights.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
    return model


def rebuilt_gradient(
    weights: dict[str, torch.Tensor], rows: Sequence[Rollout], loss_type: str
) -> dict[str, torch.Tensor]:
    """The loss's gradient at ``weights``, from the recorded rows alone."""
    model = model_at(weights)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = torch.stack([row_log_probs.sum() for row_log_probs in log_probs(model, rows)])
    loss = -(torch.tensor(sequence_weights(rows, loss_type)) * sums).sum()
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, gradients, strict=True))


def relative_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    flat = [torch.cat([d[name].flatten().double() for name in expected]) for d in (got, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())
