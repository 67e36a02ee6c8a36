"""The one exception that means: the input is at fault, and this line says how."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

import torch

NO_MEMORY = (
    # Of a file that could not be mapped.
    "Cannot allocate memory",
    "DefaultCPUAllocator:",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
"""What torch says, in a plain RuntimeError, where the memory of a machine or of an accelerator does not do."""


TERMINAL_CODE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
"""What makes a terminal print in bold or colour, which torch puts into some of its messages."""


class InputError(ValueError):
    """Bad input, told in one line: what was found, what was expected, what to do.

    The command line prints the message alone and exits with 2. Any other exception is a fault of this package (exit 1).

    Example:
        >>> from entropy_probe import InputError, group_rollouts
        >>> try:
        ...     group_rollouts([])
        ... except InputError as error:
        ...     print(error)
        the rollouts are empty; at least two prompts with two responses each are needed
    """


def one_line(error: BaseException, longest: int = 300) -> str:
    """Another library's message as one line of ours, without terminal codes: all its lines joined, or its type's name where it
    says nothing.

    What is longer than ``longest`` characters ends with an ellipsis after a whole word.
    """
    words = " ".join(TERMINAL_CODE.sub("", str(error)).split()) or type(error).__name__
    if len(words) <= longest:
        return words
    cut = words[: longest - 1]
    return (cut.rpartition(" ")[0] or cut).rstrip(",;:") + " …"


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of the machine or of an accelerator: no input's fault."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
