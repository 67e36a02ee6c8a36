"""Is the realised change linear in the step to first order, and what is left quadratic? On every bundled checkpoint.

    python benchmarks/linearity.py --json FILE --markdown docs/linearity.md        all of it
    python benchmarks/linearity.py --prompts 16                                    a look

The preconditioned and the AdamW step are made from one half of each checkpoint's prompts and realised on the same half and on
the other one, by both estimators, in true float64. L is the estimator's own linear term.

- α₁ is the factor of the learning rate at which ΔH(α) and α L come to differ by 1 %. Over nine factors in [0.01, 1] α₁ the
  log-log slope of abs(ΔH) is within 1 ± 0.01, with R² of at least 0.9999.
- The exponent of ΔH(α) − α L over nine factors in [0.01, 0.1] of ``linear_until`` (10 %) is 2 ± 0.05; where the second-order
  term at the smallest of them is under ten noise floors, that is said instead. Where the curvature is so small that the third
  order reaches into that range, the exponent cannot be 2 there. Such a row does not hold. Its exponent over [0.01, 0.1] α₂
  stands beside it; α₂ is where that difference and ½ α² d²ΔH/dα² come to differ by 10 %.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from entropy_probe import read_batch
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.common.progress import Silent
from entropy_probe.data.bundled_run import demo_files, demo_folder
from entropy_probe.data.rollouts import RolloutBatch
from entropy_probe.gradients import loss_gradient
from entropy_probe.losses.length_weights import LengthWeight
from entropy_probe.model.policy import Policy
from entropy_probe.optimizers.adam import Adam
from entropy_probe.optimizers.geometry import Geometry
from entropy_probe.pipeline.inputs import resolve_advantages, resolve_length_weights
from entropy_probe.realized.changes import RealizedChange
from entropy_probe.realized.measure import EntropyMeasure
from entropy_probe.realized.rows import Realizer
from entropy_probe.realized.steps import HELD_OUT, SAME
from entropy_probe.realized.sweep import StepLine
from entropy_probe.statistics.linearity import Curve, curvature_at_zero, fit_power_law, linear_until
from entropy_probe.targets.choices import Estimator
from entropy_probe.targets.entropy import EntropyTarget

FACTORS = tuple(2.0**k for k in range(-8, 13))
"""Where a departure from the linear term is looked for."""

SLOPE_TOLERANCE, LEAST_R_SQUARED, EXPONENT_TOLERANCE, FLOORS = 0.01, 0.9999, 0.05, 10.0


@dataclass(frozen=True)
class Figures:
    """What one curve shows, None where there is no such α; ``floors``: the second-order term at 0.01 ``until``, in floors."""

    predicted: float
    noise_floor: float
    curvature: float
    alpha_one: float | None
    slope: float | None
    r_squared: float | None
    until: float | None
    exponent: float | None
    floors: float | None
    inner_until: float | None
    inner_exponent: float | None

    @property
    def is_linear(self) -> bool:
        """The slope is 1."""
        return (
            self.slope is not None
            and self.r_squared is not None
            and abs(self.slope - 1.0) <= SLOPE_TOLERANCE
            and self.r_squared >= LEAST_R_SQUARED
        )

    @property
    def drowned(self) -> bool:
        """The second-order term is too small to tell its exponent."""
        return self.floors is not None and self.floors < FLOORS

    @property
    def is_quadratic(self) -> bool:
        """Whether what the linear term leaves is proportional to the square of the factor."""
        return self.exponent is not None and abs(self.exponent - 2.0) <= EXPONENT_TOLERANCE

    @property
    def holds(self) -> bool:
        """Both claims."""
        return self.is_linear and (self.is_quadratic or self.drowned)


def figures(curve: Curve, predicted: float, floor: float) -> Figures:
    """α₁, slope, R², ``linear_until`` and the exponent of what is left, of one curve against one linear term."""

    def rest(alpha: float) -> float:
        return curve(alpha) - alpha * predicted

    def exponent_below(end: float) -> float | None:
        alphas = np.geomspace(0.01, 0.1, 9) * end
        sizes = [abs(rest(alpha)) for alpha in alphas]
        return fit_power_law(alphas, sizes).exponent if min(sizes) > 0.0 else None

    one = linear_until(curve, predicted, FACTORS, tolerance=0.01, floor=floor)
    ten = linear_until(curve, predicted, FACTORS, floor=floor)
    slope = exponent = floors = None
    start = 1.0 if ten.until is None else ten.until
    second = curvature_at_zero(curve, start, floor)
    if one.until is not None:
        alphas = np.geomspace(0.01, 1.0, 9) * one.until
        slope = fit_power_law(alphas, [abs(curve(alpha)) for alpha in alphas])
    if ten.until is not None:
        exponent = exponent_below(ten.until)
        floors = abs(second.second_order(0.01 * ten.until)) / floor
    inner = linear_until(lambda alpha: rest(alpha) / alpha, 0.5 * second.value, FACTORS)
    return Figures(
        predicted,
        floor,
        second.value,
        one.until,
        None if slope is None else slope.exponent,
        None if slope is None else slope.r_squared,
        ten.until,
        exponent,
        floors,
        inner.until,
        None if inner.until is None else exponent_below(inner.until),
    )


@dataclass(frozen=True)
class Row:
    """Figures of one checkpoint, step, batch and estimator."""

    checkpoint: str
    step: str
    batch: str
    estimator: str
    figures: Figures


def halves(batch: RolloutBatch, prompts: int | None) -> tuple[RolloutBatch, RolloutBatch]:
    """Every other prompt for the update, the rest held out; ``prompts`` at most in each."""
    count = len(batch.groups)
    return batch.of_prompts(range(0, count, 2)[:prompts]), batch.of_prompts(range(1, count, 2)[:prompts])


def lines(checkpoint: Path, rollouts: Path, prompts: int | None = None) -> list[tuple[StepLine, list[RealizedChange]]]:
    """Both steps of one checkpoint on both batches, each with its realised changes, one an estimator."""
    update, held_out = halves(read_batch(rollouts), prompts)
    loaded = load_checkpoint(checkpoint, dtype=torch.float64)
    policy = Policy(loaded.model, update.temperature, microbatch_size=256)
    weights = resolve_length_weights(update, LengthWeight.DR_GRPO, demo_files().max_completion_length)
    coefficients = resolve_advantages(update, None)[0] * weights / len(update.groups)
    realizer = Realizer(
        policy=policy,
        geometry=Geometry.of(Adam(loaded.adam)),
        optimizer=Adam(loaded.adam),
        measures=[EntropyMeasure(EntropyTarget(estimator)) for estimator in (Estimator.RAO_BLACKWELL, Estimator.SCORE)],
        rules=None,
        progress=Silent(),
    )
    steps = realizer.steps(loss_gradient(policy, update.responses, coefficients))
    found = []
    for batch, name in ((update, SAME), (held_out, HELD_OUT)):
        before = realizer.measured(batch)
        rows = realizer.realized(batch, before, steps, name)
        for step in steps:
            line = StepLine(policy, batch, before, step, realizer.measures)
            found.append((line, [row for row in rows if row.step == step.name]))
    return found


def measure(checkpoint: Path, rollouts: Path, prompts: int | None = None) -> list[Row]:
    """Rows of one checkpoint."""
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    return [
        Row(
            name,
            row.step,
            row.batch,
            row.measure.target.estimator.value,
            figures(line.curve(m), row.predicted, row.noise_floor),
        )
        for line, rows in lines(checkpoint, rollouts, prompts)
        for m, row in enumerate(rows)
    ]


def bundled() -> list[tuple[Path, Path]]:
    """Every bundled checkpoint that has rollouts of its own, by kind and step."""
    folders = sorted(demo_folder().glob("*/checkpoint-*"), key=lambda p: (p.parent.name, int(p.name.split("-")[1])))
    pairs = [(folder, folder.parent / "rollouts" / f"{folder.name}.jsonl") for folder in folders]
    return [(folder, rollouts) for folder, rollouts in pairs if rollouts.is_file()]


def said(row: Row) -> list[str]:
    """A row's cells."""
    f = row.figures
    if f.exponent is None:
        exponent = "none"
    elif f.drowned:
        exponent = f"second-order term {f.floors:.1f} floors"
    elif f.is_quadratic or f.inner_exponent is None:
        exponent = f"{f.exponent:.4f}"
    else:
        exponent = f"{f.exponent:.4f}; {f.inner_exponent:.4f} below α₂ = {f.inner_until:.2g}"
    return [
        row.checkpoint, row.step, row.batch, row.estimator, f"{f.predicted:+.3e}",
        "none" if f.alpha_one is None else f"{f.alpha_one:.3g}",
        "none" if f.slope is None else f"{f.slope:.5f}",
        "none" if f.r_squared is None else f"{1 - f.r_squared:.1e}",
        "none" if f.until is None else f"{f.until:.3g}",
        f"{f.curvature:+.2e}", exponent, f"{f.noise_floor:.0e}", "yes" if f.holds else "NO",
    ]  # fmt: skip


HEADER = [
    "checkpoint", "step", "batch", "estimator", "L, nats", "α₁", "slope", "1 − R²", "linear until", "d²ΔH/dα²", "exponent",
    "floor", "holds",
]  # fmt: skip


def markdown(rows: list[Row], command: str, seconds: float) -> str:
    """The page: what was run, what it says, the table."""
    holding = sum(row.figures.holds for row in rows)
    drowned = sum(row.figures.drowned for row in rows)
    table = [HEADER, ["---"] * len(HEADER), *(said(row) for row in rows)]
    return "\n".join(
        [
            "# How linear a step is",
            "",
            f"`{command}`, one run of {seconds / 60:.0f} min on a CPU.",
            "",
            *((__doc__ or "").split("\n\n", 1)[1].split("a look\n\n", 1)[1].strip().splitlines()),
            "",
            f"{holding} of {len(rows)} rows hold; in {drowned} of them the second-order term is under {FLOORS:g} noise floors, "
            "so that no exponent is claimed.",
            "",
            *("| " + " | ".join(cells) + " |" for cells in table),
            "",
        ]
    )


def main() -> None:
    """Measure, print a line a row, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Linearity of realised changes on the bundled checkpoints.")
    parser.add_argument("--prompts", type=int, default=None, help="at most so many a half; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = []
    print("  ".join(HEADER))
    for checkpoint, rollouts in bundled():
        for row in measure(checkpoint, rollouts, arguments.prompts):
            rows.append(row)
            print("  ".join(said(row)), flush=True)
    if arguments.json is not None:
        content = [asdict(row) | {"holds": row.figures.holds} for row in rows]
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown is not None:
        command = "python benchmarks/linearity.py" + (f" --prompts {arguments.prompts}" if arguments.prompts else "")
        arguments.markdown.write_text(markdown(rows, command, time.perf_counter() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
