"""``entropy-probe demo | run | replay | sample | inspect``."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from entropy_probe.checkpoints import load_model, load_sharded_model, sharding_of
from entropy_probe.cli.bar import TerminalProgress
from entropy_probe.cli.inspection import print_inspection
from entropy_probe.cli.options import Autocast, Device, DType, ExactDType
from entropy_probe.common.files import check_writable
from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.bundled_run import demo_files
from entropy_probe.data.rollouts import count_cut, write_rollouts
from entropy_probe.data.units import Mode
from entropy_probe.errors import InputError
from entropy_probe.losses.advantages import AdvantageRule
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.preconditioner import ZeroV
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.pipeline.run import ProbeResult, probe_checkpoint
from entropy_probe.pipeline.settings import Settings, ShardingChoice, autocast_setting
from entropy_probe.ranks.launch import Job
from entropy_probe.ranks.launch import run as run_on_ranks
from entropy_probe.ranks.watch import INTERRUPTED
from entropy_probe.replay_check import ReplaySettings
from entropy_probe.replay_check import replay as replay_step
from entropy_probe.report.files import check_report_folder, write_json, write_report_folder
from entropy_probe.report.replay_text import print_replay
from entropy_probe.report.text import print_report
from entropy_probe.sampling.drawing import check_same_sampling, sample_rollouts
from entropy_probe.sampling.prompts import read_prompts
from entropy_probe.sampling.rewards import load_reward
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.sampling.tokenizer import end_tokens, load_tokenizer
from entropy_probe.statistics.importance_sampling import Weighting
from entropy_probe.statistics.intervals import IntervalMethod
from entropy_probe.statistics.linearity import SweepRange
from entropy_probe.targets.entropy import EntropyUnit, Estimator

app = typer.Typer(
    name="entropy-probe",
    help="What will the next optimizer step do to my policy's entropy, how sure are we, and what did it do?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Newer versions of typer carry their own copy of click; this reaches the class of either one.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
ON_SEVERAL_RANKS = {"run", "sample"}

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Trainer or TRL checkpoint.")
]
BaseOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the base model, for an adapter checkpoint; for full weights without a config.json, as accelerate's "
        "shards are, the model that training started from: of that the configuration alone is read."
    ),
]
FreezeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--freeze",
        metavar="PATTERN",
        help="Parameters that training left alone: a regular expression searched in their names; repeatable.",
    ),
]
DTypeOption = Annotated[DType, typer.Option(help="Weights and arithmetic.")]
DeviceOption = Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")]
ShardingOption = Annotated[
    ShardingChoice, typer.Option(help="What torchrun's ranks hold: all parameters each, or FSDP2's shards.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write report.json, kernel.npy and plots there.")
]


@app.callback()
def check_ranks(context: typer.Context) -> None:
    """Refuse, before a command begins, one that several ranks would each do whole.

    Raises:
        InputError: torchrun started more than one rank.
    """
    job: Job = context.obj
    if job.count > 1 and context.invoked_subcommand not in ON_SEVERAL_RANKS:
        raise InputError(
            f"{context.invoked_subcommand} runs in one process, and torchrun started {job.count}; leave torchrun out, "
            "or use run or sample"
        )


@app.command()
def demo(json_file: JsonOption = None, out: OutOption = None, dtype: DTypeOption = DType.FLOAT32) -> None:
    """Probe the bundled checkpoint of a real GRPO run, end to end."""
    _check_outputs(json_file, out)
    # So small a model gains nothing from threads, and loses much where other work has the cores.
    torch.set_num_threads(1)
    files = demo_files()
    console = _console()
    console.print(f"A real GRPO checkpoint of a small Llama that adds two-digit numbers: {files.checkpoint.name}\n")
    result = probe_checkpoint(
        files.checkpoint,
        files.rollouts,
        Settings(
            dtype=dtype.torch_dtype,
            length_weight=LengthWeight.DR_GRPO,
            max_completion_length=files.max_completion_length,
        ),
        device="cpu",
        progress=TerminalProgress(),
    )
    _show(result, console, json_file, out)


@app.command()
def run(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    rollouts: Annotated[Path, typer.Option(metavar="FILE", help="Rollouts, .jsonl or .parquet, one row a response.")],
    mode: Annotated[Mode, typer.Option(help="exact: a prompt is a unit; block: a run of prompts; auto: by memory.")] = (
        Mode.AUTO
    ),
    blocks: Annotated[int | None, typer.Option(metavar="M", help="Number of blocks; implies --mode block.")] = None,
    dtype: DTypeOption = DType.FLOAT32,
    autocast: Annotated[
        Autocast | None,
        typer.Option(help="Mixed precision over float32 weights; default: as the rows recorded it, else none."),
    ] = None,
    estimator: Annotated[
        Estimator, typer.Option(help="Of the entropy and its gradient; score: the guide's, with more noise.")
    ] = Estimator.RAO_BLACKWELL,
    entropy: Annotated[
        EntropyUnit, typer.Option(help="Entropy per response, or per token: H over the mean length.")
    ] = EntropyUnit.PER_RESPONSE,
    importance_weights: Annotated[
        Weighting, typer.Option(help="Over which responses the realised change normalises its weights.")
    ] = Weighting.GLOBAL,
    evaluation_rollouts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Other rollouts of this policy: X from them, against the update of --rollouts."
        ),
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(metavar="K", help="Hold prompts out in K folds: the step from the others, realised on each."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH:COUNT",
            help="Realise the steps at so many factors of the learning rate too, as in 0.1:10:9.",
        ),
    ] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="Draw fresh responses after each step too: for a low effective sample.")
    ] = False,
    resample_batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Fresh responses drawn at a time; default 32. Fewer take less memory."),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option(
            "--noise/--no-noise", help="Say where the noise of δH₁ comes from; a forward and two backwards more."
        ),
    ] = True,
    interval: Annotated[
        IntervalMethod | None,
        typer.Option(
            help="Of δH₁; default: skewed_t, or jackknife_t where vectors are streamed or blocks are unequal."
        ),
    ] = None,
    target_se: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Say how many prompts would bring the error of δH₁ down to this."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="X", help="Default: as the rows recorded it, else the stored one.")
    ] = None,
    max_grad_norm: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The trainer's clip, for the adamw step; 0 for none. Default: as the rows recorded it, else none.",
        ),
    ] = None,
    weight_rounding: Annotated[
        Rounding, typer.Option(help="How the optimizer rounds weights that it holds in bfloat16 or float16.")
    ] = Rounding.NEAREST,
    what_if_learning_rate: Annotated[
        float | None, typer.Option(metavar="X", help="Also say what a step at this learning rate would do.")
    ] = None,
    what_if_max_grad_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Also say what a step clipped at this norm would do.")
    ] = None,
    what_if_no_negatives: Annotated[
        bool,
        typer.Option(
            "--what-if-no-negatives",
            help="Also say what responses with advantages above zero alone would do; one more pass over the batch.",
        ),
    ] = False,
    what_if_fall: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Say which multiple of the learning rate would lower the entropy by this."),
    ] = None,
    zero_v: Annotated[
        ZeroV, typer.Option(help="Elements with v = 0: left out of P, or with 1/ε as the guide has it.")
    ] = ZeroV.LEAVE_OUT,
    advantage: Annotated[
        AdvantageRule | None, typer.Option(help="Default: given where the rows have it, else dr_grpo.")
    ] = None,
    length_weight: Annotated[
        LengthWeight | None,
        typer.Option(help="How the training loss weighs lengths. Default: by the rows' loss_type, else guide."),
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, metavar="L", help="Constant of --length-weight dr_grpo.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of rows that declare none; else 1.")] = None,
    microbatch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Responses in one forward; default: what fits.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB", help="Unit vectors take at most half of this, activations a quarter; default: what is free."
        ),
    ] = None,
    vectors: Annotated[
        DType | None,
        typer.Option(help="Type of stored unit vectors; default: that of the weights, float32 at least."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Recompute layers in the backward: less memory, a forward more."),
    ] = False,
    base: BaseOption = None,
    freeze: FreezeOption = None,
    device: DeviceOption = Device.AUTO,
    sharding: ShardingOption = ShardingChoice.REPLICATED,
    seed: Annotated[
        int, typer.Option(help="Of the preconditioner's test vectors, --resample and --weight-rounding stochastic.")
    ] = 0,
    json_file: JsonOption = None,
    out: OutOption = None,
) -> None:
    """Predict the entropy change of the next step from a checkpoint and rollouts, and realise it.

    On N ranks: torchrun --nproc-per-node N -m entropy_probe run ...
    """
    job: Job = context.obj
    settings = Settings(
        mode=mode,
        blocks=blocks,
        estimator=estimator,
        entropy=entropy,
        weighting=importance_weights,
        target_se=target_se,
        noise=noise,
        interval=interval,
        split=split,
        sweep=None if sweep is None else SweepRange.parse(sweep),
        resample=resample,
        resample_batch=resample_batch,
        learning_rate=learning_rate,
        advantage=advantage,
        length_weight=length_weight,
        max_completion_length=max_completion_length,
        dtype=dtype.torch_dtype,
        autocast=autocast_setting("autocast", autocast),
        microbatch_size=microbatch,
        vector_dtype=None if vectors is None else vectors.torch_dtype,
        gradient_checkpointing=gradient_checkpointing,
        memory_bytes=None if memory is None else memory * 1e9,
        seed=seed,
        max_grad_norm=max_grad_norm,
        weight_rounding=weight_rounding,
        what_if_learning_rate=what_if_learning_rate,
        what_if_max_grad_norm=what_if_max_grad_norm,
        what_if_no_negatives=what_if_no_negatives,
        what_if_fall=what_if_fall,
        zero_v=zero_v,
    )
    own_device = job.device(device.torch_device)
    with job.ranks(own_device) as ranks:
        first = ranks.rank == 0
        if first:
            _check_outputs(json_file, out)
        progress: Progress = TerminalProgress() if first else Silent()
        result = probe_checkpoint(
            checkpoint,
            rollouts,
            settings,
            evaluation_rollouts=evaluation_rollouts,
            base=base,
            freeze=tuple(freeze or ()),
            temperature=temperature,
            device=own_device,
            progress=progress,
            ranks=ranks,
            sharding=sharding,
        )
        if first:
            _show(result, _console(), json_file, out)


@app.command()
def replay(
    before: Annotated[Path, typer.Argument(metavar="CHECKPOINT_N", help="Folder of the checkpoint before the step.")],
    after: Annotated[Path, typer.Argument(metavar="CHECKPOINT_N+1", help="Folder of the one after it.")],
    rollouts: Annotated[
        Path, typer.Option(metavar="FILE", help="What that step consumed, as RolloutRecorder wrote it.")
    ],
    length_weight: Annotated[
        LengthWeight | None, typer.Option(help="How the training loss weighs lengths; default: as recorded.")
    ] = None,
    advantage: Annotated[
        AdvantageRule | None, typer.Option(help="Default: given where the rows have it, else dr_grpo.")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, metavar="L", help="Constant of --length-weight dr_grpo.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(metavar="X", help="The trainer's clip, 0 for none; default: as recorded, else none.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="X", help="Default: as recorded, else the stored one.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of rows that declare none; else 1.")] = None,
    dtype: Annotated[ExactDType, typer.Option(help="Of weights and arithmetic.")] = ExactDType.FLOAT32,
    autocast: Annotated[
        Autocast | None, typer.Option(help="Mixed precision over float32 weights; default: as recorded, else none.")
    ] = None,
    microbatch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Responses in one forward; default: what fits.")
    ] = None,
    base: BaseOption = None,
    freeze: FreezeOption = None,
    device: DeviceOption = Device.AUTO,
    json_file: JsonOption = None,
) -> None:
    """Compute the step between two consecutive checkpoints from its rollouts, and compare it with the real one."""
    _check_outputs(json_file, None)
    settings = ReplaySettings(
        length_weight=length_weight,
        advantage=advantage,
        max_completion_length=max_completion_length,
        max_grad_norm=max_grad_norm,
        learning_rate=learning_rate,
        dtype=dtype.torch_dtype,
        autocast=autocast_setting("autocast", autocast),
        microbatch_size=microbatch,
    )
    report = replay_step(
        before,
        after,
        rollouts,
        settings,
        base=base,
        freeze=tuple(freeze or ()),
        temperature=temperature,
        device=device.torch_device,
        progress=TerminalProgress(),
    )
    console = _console()
    print_replay(report, console)
    if json_file is not None:
        write_json(report, json_file)
        console.print(f"report written to {json_file}")


@app.command()
def sample(
    context: typer.Context,
    checkpoint: CheckpointArgument,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="JSON Lines with prompt or prompt_ids.")],
    reward: Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="f(prompt, response, row) -> float.")],
    responses: Annotated[int, typer.Option(metavar="G", min=2, help="Responses a prompt.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Rollouts to write, .jsonl or .parquet.")],
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of a response.")] = 256,
    eos_id: Annotated[
        list[int] | None,
        typer.Option(help="Token that ends a response; repeatable. Default: the model's and tokenizer's."),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Responses generated at a time; memory grows with it, length and vocabulary.")
    ] = 64,
    base: BaseOption = None,
    dtype: DTypeOption = DType.FLOAT32,
    device: DeviceOption = Device.AUTO,
    sharding: ShardingOption = ShardingChoice.REPLICATED,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
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
        folder = load(checkpoint, base=base, dtype=dtype.torch_dtype, device=own_device)
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
            _console().print(
                f"{len(found)} responses written to {out}; end tokens: {ends}; "
                f"{count_cut(found)} of them were cut at {max_new_tokens} tokens"
            )
            for note in folder.notes:
                _console().print(f"warning: {note.seen}. {note.advice}")


@app.command()
def inspect(checkpoint: CheckpointArgument, base: BaseOption = None, freeze: FreezeOption = None) -> None:
    """Say what a checkpoint holds and lacks, and map Adam's state parameter by parameter."""
    if not print_inspection(checkpoint, base, tuple(freeze or ()), _console()):
        raise InputError(f"{checkpoint} cannot be probed as it is; the table above says what is missing")


def _console() -> Console:
    console = Console()
    # Where no terminal sets a width (a pipe, a log), names and numbers are not broken over lines.
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _check_outputs(json_file: Path | None, out: Path | None) -> None:
    if json_file is not None:
        check_writable(json_file)
    if out is not None:
        check_report_folder(out)


def _show(result: ProbeResult, console: Console, json_file: Path | None, out: Path | None) -> None:
    print_report(result.report, console)
    if json_file is not None:
        write_json(result.report, json_file)
        console.print(f"report written to {json_file}")
    if out is not None:
        write_report_folder(result.report, result.kernel, out)
        console.print(f"report, kernel and plots written to {out}")


def main() -> NoReturn:
    """Run the command line: 0, or 2 with one line on stderr for bad input, 130 when interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.warnoptions:
        # Other libraries' warnings are not for the user of a command; `python -W` brings them back.
        warnings.filterwarnings("ignore", module=r"(?!entropy_probe)")
    run_on_ranks(_command, os.environ)


def _command(job: Job) -> int:
    try:
        code = typer.main.get_command(app).main(args=sys.argv[1:] or ["--help"], standalone_mode=False, obj=job)
    except USAGE_ERROR as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        raise InputError(f"{error.format_message()}{where}") from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if code == INTERRUPTED:  # so does typer tell of an interrupt
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
