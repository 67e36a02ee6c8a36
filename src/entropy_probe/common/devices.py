"""Where to compute: a device that has float64, in which dots and sums of scores are taken whatever the weights' type."""

from __future__ import annotations

import torch

from entropy_probe.errors import InputError

AUTO = "auto"


def choose_device(asked: str | torch.device = AUTO, shared: torch.device | None = None) -> torch.device:
    """The device that was asked for; ``auto`` takes ``shared``, else a CUDA GPU where there is one, else the CPU.

    Args:
        asked: ``auto`` or what torch.device takes.
        shared: the device of this rank's collectives, where several ranks share the work.

    Raises:
        InputError: torch does not know the device or sees none of the kind, or it has no float64.
    """
    if isinstance(asked, str) and asked == AUTO:
        return shared if shared is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {asked!r}: torch knows none of that name; expected auto, cpu or cuda") from error
    check_device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: torch sees no CUDA device; use cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise InputError(f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices, the first is cuda:0")
    return device


def check_device(device: torch.device) -> None:
    """Refuse a device on which the probe cannot compute.

    Raises:
        InputError: it has no float64, as mps, or holds no numbers, as meta.
    """
    if supports_float64(device):
        return
    if device.type == "meta":
        raise InputError("device meta holds no numbers; load the weights onto cpu or cuda")
    has = "has no" if device.type in {"mps", "xpu"} else "is not known to have"
    raise InputError(f"device {device} {has} float64, in which dots are summed; use cpu or cuda")


def supports_float64(device: torch.device) -> bool:
    """Whether float64 tensors can be made and computed with there; False for kinds that are not known to."""
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type in {"cpu", "cuda"}
