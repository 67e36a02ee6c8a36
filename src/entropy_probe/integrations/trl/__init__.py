"""Record the exact batch of every GRPO optimizer step of a TRL run."""

from entropy_probe.errors import InputError

try:
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise InputError("the recorder needs TRL, which cannot be imported; install entropy-probe[trl]") from error

from entropy_probe.integrations.trl.recorder import RolloutRecorder

__all__ = ["RolloutRecorder"]
