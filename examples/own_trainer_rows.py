"""Rows from a training loop of one's own: plain PyTorch, no trainer library.

    python examples/own_trainer_rows.py --steps 6

A tiny random Llama learns by Dr. GRPO to answer with the token that it was asked for. Before every optimizer step the loop
writes the rows of its batch and probes the live model, which realises the step virtually and takes it back.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_probe import Settings, group_rollouts, probe, state_of_optimizer, write_rollouts

PAD, EOS, VOCABULARY = 0, 1, 12
PROMPTS, RESPONSES, LONGEST = 16, 8, 4


def make_model() -> LlamaForCausalLM:
    """Six thousand random parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )


@torch.no_grad()
def sample(model: Any, step: int) -> list[dict[str, Any]]:
    """A batch from the whole distribution at temperature 1, a dictionary a response: the rollouts format."""
    wanted = torch.randint(2, VOCABULARY, (PROMPTS,)).repeat_interleave(RESPONSES)
    ids, running = wanted[:, None], torch.ones(PROMPTS * RESPONSES, dtype=torch.bool)
    for _ in range(LONGEST):
        drawn = torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)[:, 0]
        ids = torch.cat([ids, torch.where(running, drawn, PAD)[:, None]], dim=1)
        running &= drawn != EOS
    rows = []
    for i, (question, *answer) in enumerate(ids.tolist()):
        ended = EOS in answer
        response = answer[: answer.index(EOS) + 1] if ended else answer  # the end token was sampled too
        rows.append(
            {
                "prompt_id": f"{step}-{i // RESPONSES}",
                "prompt_ids": [question],
                "response_ids": response,
                "reward": response.count(question) / LONGEST,
                "cut": not ended,
                "eos_ids": [EOS],
                # What the loss below is, so that nobody has to say it again when the file is probed.
                "loss_type": "dr_grpo",
                "max_completion_length": LONGEST,
                "max_grad_norm": 1.0,
                "step": step,
            }
        )
    return rows


def loss_of(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Dr. GRPO at ratio 1: −(1/N) Σ (r − the prompt's mean) S / L_max, S the log-probability of the response."""
    total = torch.zeros(())
    rewards = torch.tensor([row["reward"] for row in rows]).view(PROMPTS, RESPONSES)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
    for row, advantage in zip(rows, advantages, strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = total - advantage * log_probs.gather(1, ids[0, 1:, None]).sum() / LONGEST
    return total / len(rows)


def main() -> None:
    """Train, record and probe."""
    parser = argparse.ArgumentParser(description="Rows from a training loop of one's own.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=None, help="keep the rollouts here (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train(arguments.steps, arguments.out or Path(temporary))


def train(steps: int, folder: Path) -> None:
    """The loop."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    preparation = None
    for step in range(1, steps + 1):
        rows = sample(model, step)
        write_rollouts(rows, folder / f"step-{step:05d}.jsonl")
        optimizer.zero_grad()
        loss_of(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step > 1:  # before Adam's first step its preconditioner is not defined
            state = state_of_optimizer(optimizer, model)
            result = probe(model, state, group_rollouts(rows), Settings(noise=False), preparation=preparation)
            preparation = result.preparation  # what was found out about the model need not be found again
            own = result.report.adamw
            realised = next(row for row in result.report.realized if row.step == "adamw")
            print(
                f"step {step}: predicted {own.total:+.4f} ± {own.se:.4f} nats per response, "
                f"realised on the same responses {realised.delta_h:+.4f}"
            )
        optimizer.step()


if __name__ == "__main__":
    main()
