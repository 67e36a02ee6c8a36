"""A tiny model with Adam's state and rows, on which steps and what-ifs are tried; and the coefficients of its update."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import support
from entropy_probe import AdamState, state_of_optimizer
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights


def coefficients(batch: RolloutBatch) -> Tensor:
    return resolve_advantages(batch, None)[0] * resolve_length_weights(batch, LengthWeight.GUIDE)


@functools.cache
def setting() -> tuple[nn.Module, AdamState, RolloutBatch]:
    model = support.tiny_model("llama-tied", dtype=torch.float64)
    adam = state_of_optimizer(support.trained_optimizer(model, steps=5, learning_rate=1e-4), model)
    return model, adam, support.random_batch(7, [3, 4, 2, 3, 3, 4, 2])
