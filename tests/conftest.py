"""Test-wide settings: models here are too small for two threads to help."""

from __future__ import annotations

import os

import torch
from transformers.utils import logging

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
