"""Vectors of four numbers and their matrices, without numpy: its way to a product of four is longer than the product.

The cost model asks for them whenever a task ends.
"""

from __future__ import annotations

import math
from typing import Any

Vector = tuple[float, float, float, float]
Matrix = tuple[Vector, Vector, Vector, Vector]
"""Symmetric and positive definite, by rows."""


def vector(numbers: Any) -> Vector:
    """Raises TypeError or ValueError for anything but four finite numbers."""
    a, b, c, d = map(float, numbers)
    if not all(map(math.isfinite, (a, b, c, d))):
        raise ValueError(f"not finite: {numbers!r}")
    return a, b, c, d


def matrix(rows: Any) -> Matrix:
    """Raises TypeError or ValueError for anything but four rows of four finite numbers that `solve` can take."""
    a, b, c, d = map(vector, rows)
    try:
        solve((a, b, c, d), (1.0, 1.0, 1.0, 1.0))
    except ZeroDivisionError:
        raise ValueError(f"singular: {rows!r}") from None
    return a, b, c, d


def dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]


def solve(left: Matrix, right: Vector) -> Vector:
    """The x of ``left @ x = right``, by the decomposition L D L^T (Golub and Van Loan, Matrix Computations, 4.1.2)."""
    (d0, b0, c0, e0), (_, d1, c1, e1), (_, _, d2, e2), (_, _, _, d3) = left
    b, c, e = b0 / d0, c0 / d0, e0 / d0
    d1 -= b * b0
    c1, e1 = c1 - b * c0, e1 - b * e0
    f, g = c1 / d1, e1 / d1
    d2 -= c * c0 + f * c1
    e2 -= c * e0 + f * e1
    h = e2 / d2
    d3 -= e * e0 + g * e1 + h * e2
    y0 = right[0]
    y1 = right[1] - b * y0
    y2 = right[2] - c * y0 - f * y1
    x3 = (right[3] - e * y0 - g * y1 - h * y2) / d3
    x2 = y2 / d2 - h * x3
    x1 = y1 / d1 - f * x2 - g * x3
    return y0 / d0 - b * x1 - c * x2 - e * x3, x1, x2, x3


def diagonal(a: float, b: float, c: float, d: float) -> Matrix:
    return (a, 0.0, 0.0, 0.0), (0.0, b, 0.0, 0.0), (0.0, 0.0, c, 0.0), (0.0, 0.0, 0.0, d)


def scaled(left: Matrix, factor: float) -> Matrix:
    rows = [(a * factor, b * factor, c * factor, d * factor) for a, b, c, d in left]
    return rows[0], rows[1], rows[2], rows[3]
