"""What to say of an adapter whose tensors do not fit over the base that was given."""

from __future__ import annotations

import re
from pathlib import Path

from entropy_probe.errors import one_line

MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): copying a param with shape torch\.Size\(\[(?P<stored>[\d, ]*)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[(?P<expected>[\d, ]*)\]\)"
)
"""A line of torch's load_state_dict; where torch says it otherwise, its whole message is told."""

Shape = tuple[int, ...]


def does_not_fit(path: Path, name: str, stored: Shape, expected: Shape, vocabulary: int | None) -> str:
    """The line about one tensor, with the advice that its sizes call for.

    Args:
        path: the adapter's folder.
        name: of the tensor.
        stored: its shape in the adapter's file.
        expected: the shape that it would have over the base.
        vocabulary: of the base, where it is known.
    """
    told = f"{path}: adapter weight {name} is {stored}, over this base it would be {expected}"
    pairs = [(mine, other) for mine, other in zip(stored, expected, strict=False) if mine != other]
    if len(stored) == len(expected) and len(pairs) == 1 and vocabulary is not None and pairs[0][1] == vocabulary:
        tokens = pairs[0][0]
        return (
            f"{told}: the adapter was trained with {tokens} tokens, the base has {vocabulary}; give as base the model with "
            f"its embeddings resized (resize_token_embeddings({tokens}), then save_pretrained), which is exact where the "
            "adapter stores whole embeddings (modules_to_save)"
        )
    return f"{told}; the file is truncated or of another base"


def why_not_loaded(path: Path, error: Exception, vocabulary: int | None) -> str:
    """PEFT's or torch's refusal to load an adapter in one line of ours: of tensors of other sizes, the first one's."""
    found = list(MISMATCH.finditer(str(error)))
    if not found:
        return f"{path}: the adapter cannot be loaded: {one_line(error)}"
    stored, expected = (
        tuple(int(size) for size in found[0][key].split(",") if size.strip()) for key in ("stored", "expected")
    )
    more = f" ({len(found) - 1} more tensors do not fit either)" if len(found) > 1 else ""
    return does_not_fit(path, found[0]["name"], stored, expected, vocabulary) + more
