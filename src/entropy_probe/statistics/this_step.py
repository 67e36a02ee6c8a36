"""The error of what *this* step does: its update is known, so that only X's noise and what X and Y share are left.

    SE² = Σ (x_u − U_cross)² / (U(U−1)) + Σ_{u≠w} k̃_uw k̃_wu / (U(U−1))²,    k̃_uw = K_uw − x_u − y_w + U_cross

K is the matrix of dots of units of equal size, over the square of their size; the sum is clipped at 0. Source:
docs/method.md, section 5.
"""

from __future__ import annotations

import numpy as np

from entropy_probe.common.arrays import FloatArray


def this_step_variance(kernel: FloatArray, row_x: FloatArray, row_y: FloatArray, u_cross: float) -> float:
    """Variance of what *this* step does, given its update; equal units, clipped at 0.

    Σ (x_u − U)² / (U(U−1)) is X's noise against the fixed update, to which :func:`shared_noise` comes.
    """
    units = len(kernel)
    of_rows = float(((row_x - u_cross) ** 2).sum()) / (units * (units - 1))
    return max(0.0, of_rows + shared_noise(kernel, row_x, row_y, u_cross))


def shared_noise(kernel: FloatArray, row_x: FloatArray, row_y: FloatArray, u_cross: float) -> float:
    """Σ_{u≠w} k̃_uw k̃_wu / (U(U−1))², k̃ doubly centred: the noise that X_u and Y_u share through their responses.

    Of equal units; it may be negative.
    """
    pairs = len(kernel) * (len(kernel) - 1)
    centred = kernel - row_x[:, None] - row_y[None, :] + u_cross
    np.fill_diagonal(centred, 0.0)
    return float((centred * centred.T).sum()) / pairs**2
