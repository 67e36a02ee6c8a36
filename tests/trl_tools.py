"""What a GRPOTrainer needs to call a tool in a tiny run: conversations, a chat template, a tokenizer that finds the calls."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from trl_training import PROMPTS, SYMBOLS, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endif %}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}z{% endif %}"
)
CALLERS = "abcde"
"""A response with one of these letters calls the tool."""
TOOL_SAYS = "tt"


class CallsByLetters(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Finds a call wherever a response has one of :data:`CALLERS`."""

    def parse_response(self, ids: list[int], **_: Any) -> dict[str, Any]:
        text = self.decode(ids, skip_special_tokens=True)
        found: dict[str, Any] = {"role": "assistant", "content": text}
        if set(text) & set(CALLERS):
            found["tool_calls"] = [{"type": "function", "function": {"name": "look", "arguments": {"letters": text}}}]
        return found


def look(letters: str) -> str:
    """
    Looks letters up.

    Args:
        letters: what to look up.
    """
    return TOOL_SAYS


class Room:
    """An environment with one tool."""

    def reset(self, **_: Any) -> str | None:
        return None

    def look(self, letters: str) -> str:
        """
        Looks letters up.

        Args:
            letters: what to look up.
        """
        return TOOL_SAYS


def lengths(completions: list[list[dict[str, Any]]], **_: Any) -> list[float | None]:
    """Letters that the policy wrote, and a point for each vowel."""
    texts = ["".join(m["content"] for m in turns if m["role"] == "assistant") for turns in completions]
    return [len(text) + sum(letter in "aeiou" for letter in text) for text in texts]


def with_tools(environment: bool = False) -> dict[str, Any]:
    """Options of ``make_trainer``: a run whose responses call a tool twice at most."""
    made = tiny_tokenizer()
    tokenizer = CallsByLetters(tokenizer_object=made.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = {"found by": "parse_response"}  # TRL would look for one of a known template
    assert len(tokenizer) == len(SYMBOLS)
    conversations = Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})
    return {
        "rewards": (lengths,),
        "max_completion_length": 24,
        "max_tool_calling_iterations": 2,
        "given": {
            **({"environment_factory": Room} if environment else {"tools": [look]}),
            "processing_class": tokenizer,
            "train_dataset": conversations,
            "eval_dataset": conversations,
        },
    }
