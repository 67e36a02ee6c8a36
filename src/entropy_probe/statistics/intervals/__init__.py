"""Confidence intervals of U_cross, one method a file; ``docs/coverage.md`` has the measured coverage of each.

==================  ================================  ==========  ==========================================
file                interval                          matrix?     falls short
==================  ================================  ==========  ==========================================
``normal``          U_cross ± q SE, plug-in           no          with few units
``t``               U_cross ± t SE, plug-in           no          where U_cross is skewed
``jackknife_t``     U_cross ± t SE, delete-one        no          where a few units carry the mean
``unbiased_t``      U_cross ± t √V                    yes         where U_cross is skewed
``skewed_t``        U_cross ± t_ν √V, and more on     yes         where a few units carry the mean
                    the side of the skew
==================  ================================  ==========  ==========================================

``skewed_t`` is the default, and ``jackknife_t`` where there is no matrix of unit dots. To add an interval, write its file
beside these and add its line to :class:`~entropy_probe.statistics.intervals.methods.IntervalMethod`.
:class:`~entropy_probe.statistics.intervals.base.Interval` says what the file must define.
"""

from entropy_probe.statistics.intervals.base import Interval, Spread, symmetric
from entropy_probe.statistics.intervals.methods import (
    DEFAULT_METHOD,
    WITHOUT_MATRIX,
    IntervalMethod,
    RegisteredInterval,
    interval,
)

__all__ = [
    "DEFAULT_METHOD",
    "WITHOUT_MATRIX",
    "Interval",
    "IntervalMethod",
    "RegisteredInterval",
    "Spread",
    "interval",
    "symmetric",
]
