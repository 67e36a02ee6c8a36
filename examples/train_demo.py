"""Make the bundled demonstration data: a tiny language model that adds, and whose entropy reinforcement learning takes.

    python examples/train_demo.py --out src/entropy_probe/demo_data
    python examples/train_demo.py --out /tmp/demo --short       every part once, with few steps and rollouts

1. Supervised: a Llama of 83 thousand parameters learns "12+34=" -> "46" from demonstrations with wrong digits among
   them, until half of its samples are right. Its uncertainty is then shared by all prompts, as a pretrained model's is.
2. Reinforcement: TRL's own GRPOTrainer (Dr. GRPO), once with every weight and once with LoRA, both recorded.
3. Rollouts: responses sampled from every checkpoint that is shipped; most from the two that the demo probes.

Takes two to three minutes on two CPU cores. The seed fixes everything, up to how machines round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from entropy_probe.checkpoints import load_model
from entropy_probe.data.rollouts import Rollout, write_rollouts
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.model.policy import Policy
from entropy_probe.sampling.drawing import sample_rollouts
from entropy_probe.sampling.prompts import read_prompts
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.sampling.tokenizer import end_tokens

SEED = 7
TRAIN_PROMPTS = 1024
GROUP = 8  # responses to a prompt in training
BATCH = 256  # responses in a micro-batch; two micro-batches an optimizer step
LR, LORA_LR = 2e-4, 1e-3
WRONG_DIGITS = 0.2  # share of the demonstrations' digits that are replaced by random ones
MAX_COMPLETION_LENGTH = 6


@dataclass(frozen=True)
class Size:
    """How much is trained and shipped.

    Attributes:
        full_steps: checkpoints of the full run.
        lora_steps: of the LoRA run.
        pair: N of the consecutive pair N, N + 1 in both, with the rollouts of step N + 1: a user can check that step.
        accuracy: of the supervised model, at which reinforcement begins.
        many: (prompts, responses to each) sampled from the demo's checkpoints.
        few: the same from the others.
    """

    full_steps: tuple[int, ...]
    lora_steps: tuple[int, ...]
    pair: int
    accuracy: float
    many: tuple[int, int]
    few: tuple[int, int]


SHIPPED_SIZE = Size((10, 20, 21, 60, 150), (20, 21), 20, 0.5, (128, 16), (64, 8))
SHORT_SIZE = Size((1, 2), (1, 2), 1, 0.0, (8, 4), (4, 4))

SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "trainer_state.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    symbols = ["<pad>", "<eos>", *"0123456789+="]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A two-layer Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def problems() -> list[dict[str, str]]:
    """Every sum of two two-digit numbers, in a fixed random order."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(SEED).shuffle(pairs)
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def sample(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Path, size: tuple[int, int], seed: int
) -> list[Rollout]:
    """Sample from the whole distribution at temperature 1, scored by :func:`sum_is_right`."""
    count, responses = size
    settings = SamplingSettings(
        responses=responses,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        seed=seed,
        eos_ids=end_tokens(model, tokenizer),
        batch_size=512,
    )
    chosen = read_prompts(prompts, tokenizer)[:count]
    drawn = sample_rollouts(Policy(model), chosen, settings, sum_is_right, tokenizer)
    # So that the weights of Dr. GRPO, the loss of these runs, can be asked for.
    return [replace(rollout, max_completion_length=MAX_COMPLETION_LENGTH) for rollout in drawn]


def sum_is_right(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """1 for the right sum, 0 otherwise."""
    return float(response == row["answer"])


def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Accuracy, entropy per response and per token in nats, and the share of prompts with mixed rewards."""
    groups: dict[Any, set[float]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_id, set()).add(rollout.reward)
    surprisal = -sum(sum(rollout.logprobs or ()) for rollout in rollouts)
    return {
        "accuracy": round(sum(rollout.reward for rollout in rollouts) / len(rollouts), 3),
        "entropy_per_response": round(surprisal / len(rollouts), 3),
        "entropy_per_token": round(surprisal / sum(len(rollout.response_ids) for rollout in rollouts), 3),
        "mixed_groups": round(sum(len(rewards) > 1 for rewards in groups.values()) / len(groups), 3),
        "cut": round(sum(bool(rollout.cut) for rollout in rollouts) / len(rollouts), 3),
    }


def supervise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, str]],
    prompts: Path,
    size: Size,
) -> None:
    """Teach the answers by cross-entropy until the size's share of sampled answers to ``prompts`` is right."""
    encoded = [tokenizer.encode(row["prompt"] + row["answer"] + "<eos>") for row in rows]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in encoded])
    learnt = ids != tokenizer.pad_token_id
    learnt[:, : encoded[0].index(tokenizer.convert_tokens_to_ids("=")) + 1] = False  # "12+34=" is given
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(1, 4001):
        model.train()
        batch = torch.randint(len(ids), (256,), generator=generator)
        wrong = torch.rand(batch.shape[0], width, generator=generator) < WRONG_DIGITS
        wrong &= learnt[batch] & torch.isin(ids[batch], digits)
        shown = torch.where(wrong, digits[torch.randint(10, wrong.shape, generator=generator)], ids[batch])
        labels = shown.masked_fill(~learnt[batch], -100)
        logits = model(shown).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            facts = describe(sample(model, tokenizer, prompts, size.few, seed=SEED))
            print(f"  supervised step {step:4d}  loss {loss.item():.3f}  {facts}", flush=True)
            if facts["accuracy"] >= size.accuracy:
                return
    raise RuntimeError("the supervised model did not learn to add")


class SaveAt(TrainerCallback):  # type: ignore[misc]
    """Save at the given steps and no others; print a line now and then."""

    def __init__(self, steps: Sequence[int]) -> None:
        """Keep the steps."""
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask the trainer to save."""
        control.should_save = state.global_step in self.steps
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        """Print what was logged, every twentieth step."""
        if "entropy" in logs and (state.global_step % 20 == 0 or state.global_step == 1):
            entropy, reward, norm = (logs[name] for name in ("entropy", "reward", "grad_norm"))
            print(
                f"  step {state.global_step:3d}  entropy per token {entropy:.3f}  reward {reward:.3f}  "
                f"gradient norm {norm:.3f}",
                flush=True,
            )


def sums_are_right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """The same reward in TRL's form."""
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def reinforce(base: Path, run: Path, rows: Sequence[Mapping[str, str]], steps: Sequence[int], lora: bool) -> None:
    """One recorded GRPO run; checkpoints at ``steps``."""
    set_seed(SEED)
    trainer = GRPOTrainer(
        model=str(base),
        reward_funcs=sums_are_right,
        args=GRPOConfig(
            output_dir=str(run),
            seed=SEED,
            max_steps=max(steps),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=2,
            num_generations=GROUP,
            max_completion_length=MAX_COMPLETION_LENGTH,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.0,
            learning_rate=LORA_LR if lora else LR,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            bf16=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        callbacks=[SaveAt(steps)],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )
        if lora
        else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RolloutRecorder(trainer, run / "rollouts"))
    trainer.train()


def ship(checkpoint: Path, target: Path) -> None:
    """Copy what the probe reads, byte for byte; only the adapter's base path is made relative."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)
    adapter = target / "adapter_config.json"
    if adapter.is_file():
        config = json.loads(adapter.read_text())
        config["base_model_name_or_path"] = "../../base"
        adapter.write_text(json.dumps(config, indent=2) + "\n")


def make(out: Path, work: Path, size: Size) -> None:
    """The three parts, in order."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    for name in ("base", "full", "lora"):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.rmtree(work / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    rows = problems()
    say(f"supervised: {sum(p.numel() for p in model.parameters())} parameters")
    train_rows = [{"prompt_id": f"sum-{i:04d}", **row} for i, row in enumerate(rows[:TRAIN_PROMPTS])]
    prompts = out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in train_rows[: size.many[0]]))
    supervise(model, tokenizer, rows, prompts, size)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    ship(work / "base", out / "base")

    for run, steps in (("full", size.full_steps), ("lora", size.lora_steps)):
        say(f"GRPO, {run}: {max(steps)} steps")
        reinforce(work / "base", work / run, train_rows, steps, lora=run == "lora")
        (out / run / "rollouts").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(
            work / run / "rollouts" / f"step-{size.pair + 1:05d}.jsonl",
            out / run / "rollouts" / f"step-{size.pair + 1:05d}.jsonl",
        )
        for step in steps:
            target = out / run / f"checkpoint-{step}"
            ship(work / run / f"checkpoint-{step}", target)
            policy = load_model(target).model
            rollouts = sample(
                policy, tokenizer, prompts, size.many if step == size.pair else size.few, seed=SEED + step
            )
            write_rollouts(rollouts, out / run / "rollouts" / f"checkpoint-{step}.jsonl")
            say(f"{run}/checkpoint-{step}: {describe(rollouts)}")
    names = {
        "checkpoint": f"full/checkpoint-{size.pair}",
        "rollouts": f"full/rollouts/checkpoint-{size.pair}.jsonl",
        "lora_checkpoint": f"lora/checkpoint-{size.pair}",
        "lora_rollouts": f"lora/rollouts/checkpoint-{size.pair}.jsonl",
        "pair": {
            run: [size.pair, size.pair + 1, f"{run}/rollouts/step-{size.pair + 1:05d}.jsonl"]
            for run in ("full", "lora")
        },
        "prompts": "prompts.jsonl",
        "max_completion_length": MAX_COMPLETION_LENGTH,
    }
    (out / "demo.json").write_text(json.dumps(names, indent=2) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out}: {size / 1e6:.1f} MB")


def main() -> None:
    """Train, sample, and copy what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/entropy_probe/demo_data"))
    parser.add_argument(
        "--work", type=Path, default=None, help="keep the whole runs here (default: a temporary folder)"
    )
    parser.add_argument("--short", action="store_true", help="every part once, with few steps and rollouts")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's own use of renamed options
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        make(args.out, args.work or Path(temporary), SHORT_SIZE if args.short else SHIPPED_SIZE)


if __name__ == "__main__":
    main()
