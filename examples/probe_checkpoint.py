"""Probe a checkpoint folder: what will the next optimizer step do to the policy's entropy?

python examples/probe_checkpoint.py                                      the bundled run, seconds on a CPU
python examples/probe_checkpoint.py output/checkpoint-50 rollouts/step-00051.jsonl
"""

from __future__ import annotations

import sys

from entropy_probe import Settings, probe_checkpoint
from entropy_probe.data.bundled_run import demo_folder

BUNDLED = demo_folder() / "full" / "checkpoint-20", demo_folder() / "full" / "rollouts" / "step-00021.jsonl"


def main() -> None:
    """Probe, and print what one reads first."""
    checkpoint, rollouts = sys.argv[1:3] if len(sys.argv) > 2 else BUNDLED
    # The rows say which loss and clip the trainer used; only what they do not say has to be given here.
    report = probe_checkpoint(checkpoint, rollouts, Settings(noise=False)).report
    print(report.headline)
    for name, part in report.adamw.parts.items():
        if part.value is not None:  # the loss has no such term
            print(f"  {name:12} {part.value:+.5f} ± {part.se:.5f} nats per response")
    for row in report.realized:
        realised = f"{row.delta_h:+.5f} ± {row.se:.5f} (to first order {row.predicted:+.5f})"
        print(f"  realised, {row.step} step, {row.estimator}: {realised}")
    for warning in report.warnings:
        print(f"  warning: {warning.seen}; {warning.advice}")


if __name__ == "__main__":
    main()
