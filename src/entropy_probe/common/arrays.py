"""What arrays of numbers are called in signatures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
"""NumPy, float64; docstrings give the shape."""
