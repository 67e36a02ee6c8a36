"""Checkpoints in ``tests/data/checkpoints`` that verl 0.9.1 and DeepSpeed 0.19.8 wrote themselves, two ranks of tiny random
models, each with ``truth.safetensors``: the master weights and moments by name; and the same states as plain folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from entropy_probe.checkpoints import Checkpoint
from support import hf_groups

DATA = Path(__file__).parent / "data" / "checkpoints"
VOCABULARY = 29


@dataclass(frozen=True)
class Real:
    """A folder and what is known of it.

    ``given`` is the folder for the reader, ``inner`` those inside it that may be given too. ``decays``: norms and biases decay,
    with the betas of torch; else neither, and β₂ is 0.95.
    """

    name: str
    inner: tuple[str, ...]
    step: int
    decays: bool
    base: str | None = None
    given: str = ""
    lora: bool = False

    @property
    def root(self) -> Path:
        return DATA / self.name

    def truth(self) -> dict[str, Tensor]:
        return load_file(self.root / "truth.safetensors")

    def copy(self, folder: Path) -> Path:
        """To spoil, without the truth."""
        shutil.copytree(self.root, folder, ignore=shutil.ignore_patterns("truth.*"))
        return folder / self.given

    def base_of(self) -> Path | None:
        return None if self.base is None else DATA / self.base


STEP = ("global_step_4", "global_step_4/actor")
REAL = {
    real.name: real
    for real in (
        Real("verl_fsdp1_qwen2_fp32_w2", STEP, 4, True),
        Real("verl_fsdp2_qwen2_fp32_w2", STEP, 4, True),
        Real("verl_fsdp1_qwen2lora_fp32_w2", STEP, 4, True, lora=True),
        Real("ds_zero0_fp32_qwen2_w2", ("global_step4",), 4, False),
        Real("ds_zero1_fp32_qwen2_w2", ("global_step4",), 4, False),
        Real("ds_zero2_bf16_qwen2_w2", ("global_step4",), 4, False),
        Real("ds_zero3_bf16_qwen2_w2", ("global_step4",), 4, False),
        Real("ds_universal", ("global_step3_universal",), 3, True, base="ds_zero0_fp32_qwen2_w2"),
        Real("trainer_ds_zero2_bf16", ("global_step3",), 3, True, given="checkpoint-3"),
    )
}


def assert_truth(found: Checkpoint, truth: dict[str, Tensor]) -> None:
    """Weights and moments are those of ``truth``, all of them, bit for bit."""
    weights = {name: p.detach() for name, p in found.model.named_parameters()}
    moments = {
        f"{name}|{field}": getattr(entry, field)
        for name, entry in found.adam.moments.items()
        for field in ("exp_avg", "exp_avg_sq")
    }
    ours = moments | {f"{name}|weight": weights[name] for name in {key.partition("|")[0] for key in moments}}
    assert ours.keys() == {
        key for key in truth if not key.endswith("|weight") or key.partition("|")[0] in found.adam.moments
    }
    for key, value in ours.items():
        assert (value.dtype, value.shape) == (truth[key].dtype, truth[key].shape), key
        assert torch.equal(value, truth[key]), key
    for name in weights.keys() & {key.partition("|")[0] for key in truth}:
        assert torch.equal(weights[name], truth[f"{name}|weight"]), name


def plain_folder(real: Real, folder: Path) -> Path:
    """The state of ``truth`` as the Trainer leaves it, full weights."""
    truth = real.truth()
    configuration = next(path.parent for path in (real.base_of() or real.root).rglob("config.json"))
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(configuration), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(truth[f"{name}|weight"])
    groups: Any = list(model.parameters()) if real.decays else hf_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999 if real.decays else 0.95), weight_decay=0.01)
    for name, p in model.named_parameters():
        optimizer.state[p] = {
            "step": torch.tensor(float(real.step)),
            **{field: truth[f"{name}|{field}"] for field in ("exp_avg", "exp_avg_sq")},
        }
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": real.step, "log_history": []}))
    return folder
