"""Rollouts as training libraries write them, made by hand in the layouts of their sources, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

Row = dict[str, Any]
PAD = 0


class Drawn:
    """A response of two prompts' three, with a tool's output in one."""

    def __init__(self, prompt: Sequence[int], response: Sequence[int], reward: float, advantage: float) -> None:
        self.prompt, self.response = list(prompt), list(response)
        self.reward, self.advantage = reward, advantage
        self.sampled = [True] * len(self.response)
        self.logprobs = [-0.25 - 0.125 * place for place in range(len(self.response))]
        self.trainers = [value - 0.0625 for value in self.logprobs]


def drawn() -> list[Drawn]:
    """Two prompts with two responses each; the last has two tokens of a tool inside."""
    found = [
        Drawn([5, 6, 7], [8, 9, 1], 1.0, 0.5),
        Drawn([5, 6, 7], [8, 1], 0.0, -0.5),
        Drawn([5, 4], [9, 9, 1], 0.0, -0.5),
        Drawn([5, 4], [9, 3, 3, 8, 1], 1.0, 0.5),
    ]
    found[3].sampled = [True, False, False, True, True]
    return found


def without_tools() -> list[Drawn]:
    """The same, where the policy drew every token."""
    found = drawn()
    found[3].sampled = [True] * 5
    return found


def zeros(count: int) -> list[float]:
    return [0.0] * count


def at_drawn(row: Drawn, values: Sequence[float]) -> list[float]:
    return [value if here else 0.0 for value, here in zip(values, row.sampled, strict=True)]


def open_instruct(rows: Sequence[Drawn], step: int = 50) -> list[Row]:
    return [
        {
            "step": step, "sample_idx": number, "prompt_idx": number // 2, "prompt_tokens": row.prompt,
            "response_tokens": row.response, "reward": row.reward, "advantage": row.advantage, "finish_reason": "stop",
            "dataset": "gsm8k", "ground_truth": [1], "logprobs": row.logprobs,
            "request_info": {
                "num_calls": 0, "timeouts": 0, "tool_errors": "", "tool_outputs": "", "tool_runtimes": 0.0,
                "tool_calleds": False, "tool_call_stats": [], "rollout_state": {},
            },
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip


def nemo_rl(rows: Sequence[Drawn]) -> list[Row]:
    width = max(len(row.prompt) + len(row.response) for row in rows) + 2

    def padded(prompt: list[Any], response: list[Any], fill: Any) -> list[Any]:
        found = prompt + response
        return found + [fill] * (width - len(found))

    return [
        {
            "content": "a conversation", "rewards": row.reward, "input_lengths": len(row.prompt) + len(row.response),
            "token_ids": padded(row.prompt, row.response, PAD),
            "token_loss_mask": padded([0] * len(row.prompt), [int(here) for here in row.sampled], 0),
            "sample_loss_mask": 1.0,
            "advantages": [row.advantage] * width,
            "generation_logprobs": padded(zeros(len(row.prompt)), at_drawn(row, row.logprobs), 0.0),
            # The trainer's forward has one of every token.
            "prev_logprobs": padded([0.0] + [-3.0] * (len(row.prompt) - 1), row.trainers, -9.0),
            "idx": number,
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip


def slime(rows: Sequence[Drawn], version: str = "7") -> list[Row]:
    return [
        {
            "group_index": number // 2, "index": number, "rollout_id": number, "prompt": "text",
            "tokens": row.prompt + row.response, "multimodal_inputs": None, "multimodal_train_inputs": None,
            "response": "text", "response_length": len(row.response), "label": "12", "reward": row.reward,
            "loss_mask": [int(here) for here in row.sampled], "weight_versions": [version],
            "rollout_log_probs": at_drawn(row, row.logprobs), "rollout_top_p_token_ids": None,
            "rollout_top_p_token_offsets": None, "rollout_routed_experts": None, "remove_sample": False,
            "teacher_log_probs": None, "status": "completed", "metadata": {}, "train_metadata": None, "session_id": None,
            "spec_info": {"spec_accept_token_num": 0}, "prefix_cache_info": {"cached_tokens": 0},
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip


def prime_rl(rows: Sequence[Drawn], step: int = 51, rank: int = 0) -> list[Row]:
    def whole(row: Drawn, values: list[Any], fill: Any) -> list[Any]:
        return [fill] * len(row.prompt) + values

    return [
        {
            "schema_version": 1, "step": step, "rank": rank, "micro_step": number, "micro_sequence_idx": 0,
            "export_sequence_idx": number, "env_name": "math", "token_ids": row.prompt + row.response,
            "position_ids": list(range(len(row.prompt) + len(row.response))),
            "loss_mask": whole(row, row.sampled, False),
            "advantages": whole(row, [row.advantage] * len(row.response), row.advantage),
            "inference_logprobs": whole(row, at_drawn(row, row.logprobs), 0.0),
            "trainer_logprobs": whole(row, row.trainers, -4.0),
            "entropy": whole(row, [0.5] * len(row.response), 0.5),
            **{
                name: [None] * (len(row.prompt) + len(row.response))
                for name in ("mismatch_kl", "log_importance_ratio", "importance_ratio", "prob_delta", "is_masked",
                             "is_masked_high", "is_masked_low", "rl_weights", "ce_weights", "ref_kl_weights")
            },
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip


def verl(step: int = 50) -> list[Row]:
    return [
        {"input": f"user\n{a}+{b}=", "output": out, "gts": "8", "score": score, "step": step, "acc": score}
        for a, b, out, score in ((1, 7, "8", 1.0), (1, 7, "9", 0.0), (2, 3, "5", 1.0), (2, 3, "55", 0.0))
    ]


def trl(step: int = 50) -> list[Row]:
    return [
        {"step": step, "prompt": row["input"], "completion": row["output"], "is_right": row["score"], "advantage": 0.5}
        for row in verl()
    ]


def areal() -> list[Row]:
    return [
        {
            "task_id": number // 2, "sample_idx": number % 2, "seqlen": 9, "prompt_len": 7, "head_version": 3,
            "tail_version": 3, "reward": row["score"], "prompt": row["input"], "completion": row["output"],
        }
        for number, row in enumerate(verl())
    ]  # fmt: skip


def lines(path: Path, rows: Sequence[Row]) -> Path:
    """JSON Lines, as the libraries write them: a NaN is one there."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(path: Path, rows: Sequence[Row]) -> Path:
    """As slime saves."""
    torch.save({"rollout_id": 50, "samples": list(rows)}, path)
    return path


def table(path: Path, rows: Sequence[Row]) -> Path:
    """As pandas writes."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


EXACT: dict[str, tuple[str, Callable[[Sequence[Drawn]], list[Row]], Callable[[Path, Sequence[Row]], Path]]] = {
    "open-instruct": ("run_rollouts_000000.jsonl", open_instruct, lines),
    "nemo-rl": ("train_data_step51.jsonl", nemo_rl, lines),
    "slime": ("rollout_50.pt", slime, saved),
    "prime-rl": ("rank_0.jsonl", prime_rl, lines),
}
"""By name: how a file is called, what stands in it, and how it is written."""

TEXT: dict[str, tuple[str, Callable[[], list[Row]], Callable[[Path, Sequence[Row]], Path]]] = {
    "verl": ("50.jsonl", verl, lines),
    "trl": ("completions_00050.parquet", trl, table),
    "areal": ("17.jsonl", areal, lines),
}


def written(name: str, folder: Path, change: Callable[[list[Row]], object] = lambda rows: None) -> Path:
    """A dump of that layout, after a change of its rows."""
    if name in EXACT:
        file, make, write = EXACT[name]
        rows = make(without_tools() if name == "open-instruct" else drawn())
    else:
        file, of_text, write = TEXT[name]
        rows = of_text()
    change(rows)
    return write(folder / file, rows)
