"""``entropy-probe sample``: rollouts of a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from entropy_probe.checkpoints import load_model, load_sharded_model, sharding_of
from entropy_probe.cli.bar import TerminalProgress
from entropy_probe.cli.options import (
    FILES,
    OUTPUT,
    BaseOption,
    CheckpointArgument,
    Device,
    DeviceOption,
    DType,
    DTypeOption,
    NamesOption,
    QuantizationOption,
    ShardingOption,
    beside,
)
from entropy_probe.cli.output import make_console
from entropy_probe.common.files import check_writable
from entropy_probe.common.progress import Silent
from entropy_probe.data.rollouts import count_cut, write_rollouts
from entropy_probe.errors import InputError
from entropy_probe.model.policy import Policy
from entropy_probe.pipeline.settings import ShardingChoice
from entropy_probe.ranks.launch import Job
from entropy_probe.sampling.drawing import check_same_sampling, sample_rollouts
from entropy_probe.sampling.prompts import read_prompts
from entropy_probe.sampling.rewards import load_reward
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.sampling.tokenizer import end_tokens, load_tokenizer

SAMPLING = "Sampling"


def sample(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    *,
    prompts: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSON Lines with prompt, messages or prompt_ids.", rich_help_panel=FILES),
    ],
    base: BaseOption = None,
    names: NamesOption = None,
    base_quantization: QuantizationOption = None,
    reward: Annotated[
        str,
        typer.Option(metavar="MODULE:FUNCTION", help="f(prompt, response, row) -> float.", rich_help_panel=SAMPLING),
    ],
    responses: Annotated[int, typer.Option(metavar="G", min=2, help="Responses a prompt.", rich_help_panel=SAMPLING)],
    temperature: Annotated[float, typer.Option(help="Sampling temperature.", rich_help_panel=SAMPLING)] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length limit of a response.", rich_help_panel=SAMPLING)
    ] = 256,
    eos_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Token that ends a response; repeatable. Default: the model's and tokenizer's.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Responses generated at a time; memory grows with it, length and vocabulary.",
            rich_help_panel=SAMPLING,
        ),
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.", rich_help_panel=SAMPLING)] = 0,
    dtype: DTypeOption = DType.FLOAT32,
    device: DeviceOption = Device.AUTO,
    sharding: ShardingOption = ShardingChoice.REPLICATED,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Rollouts to write, .jsonl or .parquet.", rich_help_panel=OUTPUT)
    ],
) -> None:
    """Sample rollouts from a checkpoint's whole distribution, with exact token ids."""
    job: Job = context.obj
    if out.suffix not in {".jsonl", ".parquet"}:
        raise InputError(f"--out {out} ends in {out.suffix!r}; rollouts are written as .jsonl or .parquet")
    own_device = job.device(device.torch_device)
    with job.ranks(own_device) as ranks:
        first = ranks.rank == 0
        if first:
            check_writable(out)
        score = load_reward(reward)
        load = (
            partial(load_model, trainable=False)
            if sharding is ShardingChoice.REPLICATED
            else partial(load_sharded_model, ranks=ranks)
        )
        folder = load(
            checkpoint, base=beside(base, names, base_quantization), dtype=dtype.torch_dtype, device=own_device
        )
        tokenizer = load_tokenizer(folder.tokenizer_folders)
        asked = read_prompts(prompts, tokenizer)
        settings = SamplingSettings(
            responses=responses,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            eos_ids=tuple(eos_id) if eos_id else end_tokens(folder.model, tokenizer),
            batch_size=batch,
        )
        policy = Policy(folder.model, temperature, sharding=sharding_of(folder.model, ranks))
        check_same_sampling(policy, asked, settings)
        found = sample_rollouts(policy, asked, settings, score, tokenizer, TerminalProgress() if first else Silent())
        if first:
            write_rollouts(found, out)
            ends = ", ".join(map(str, settings.eos_ids)) or "none"
            make_console().print(
                f"{len(found)} responses written to {out}; end tokens: {ends}; "
                f"{count_cut(found)} of them were cut at {max_new_tokens} tokens"
            )
            for note in folder.notes:
                make_console().print(f"warning: {note.seen}. {note.advice}")
