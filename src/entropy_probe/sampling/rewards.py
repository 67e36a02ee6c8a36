"""The caller's reward function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_probe.errors import InputError, out_of_memory
from entropy_probe.sampling.prompts import Prompt

Reward = Callable[[str, str, dict[str, Any]], float]
"""``f(prompt, response, row) -> float``: texts without special tokens, and the prompt's row with all its columns."""


def load_reward(spec: str) -> Reward:
    """The function named by ``module:function``; modules in the working directory can be imported.

    Raises:
        InputError: the name has another form, the module cannot be imported, or nothing callable is there.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise InputError(f"reward is {spec!r}; expected module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's, and runs when it is imported
        if out_of_memory(error):
            raise
        raise InputError(f"reward {spec}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    function = vars(module).get(function_name)
    if not callable(function):
        raise InputError(f"reward {spec}: {module_name} has no function {function_name}")
    reward: Reward = function
    return reward


def reward_of(reward: Reward, prompt: Prompt, text: str) -> float:
    """What the caller's function gives for a response.

    Raises:
        InputError: it fails, or gives no finite number.
    """
    try:
        value = reward(prompt.text, text, dict(prompt.row))
    except Exception as error:  # the function is the user's
        if out_of_memory(error):
            raise
        raise InputError(
            f"the reward of prompt_id {prompt.prompt_id!r} raised {type(error).__name__}: {error}"
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the reward of prompt_id {prompt.prompt_id!r} is {value!r}; expected a number") from error
    if number != number or abs(number) == float("inf"):
        raise InputError(f"the reward of prompt_id {prompt.prompt_id!r} is {number}; expected a finite number")
    return number
