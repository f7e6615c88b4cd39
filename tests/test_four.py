"""Products and solutions of four are numpy's, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask.four import Matrix, Vector, diagonal, dot, matrix, scaled, solve, vector

NUMBERS = st.floats(-10, 10)
VECTORS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)


@given(st.tuples(VECTORS, VECTORS, VECTORS, VECTORS), VECTORS, st.floats(1e-2, 1e2))
def test_a_solution_is_numpys(rows: tuple[Vector, Vector, Vector, Vector], right: Vector, least: float) -> None:
    left = np.array(rows) @ np.array(rows).T + least * np.eye(4)
    wanted = np.linalg.solve(left, right)
    np.testing.assert_allclose(solve(matrix(left.tolist()), right), wanted, rtol=1e-7, atol=1e-7 * abs(wanted).max())


@given(VECTORS, VECTORS, NUMBERS)
def test_products_are_numpys(a: Vector, b: Vector, factor: float) -> None:
    assert dot(a, b) == pytest.approx(float(np.dot(a, b)), abs=1e-9)
    np.testing.assert_array_equal(scaled(diagonal(*a), factor), np.diag(a) * factor)


@pytest.mark.parametrize(
    "numbers", [None, [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, float("nan")], [1, 2, 3, [4]], ["a"] * 4]
)
def test_what_is_no_vector_is_refused(numbers: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        vector(numbers)
    with pytest.raises((TypeError, ValueError)):
        matrix([numbers] * 4)


def test_a_matrix_has_four_rows() -> None:
    rows: Matrix = diagonal(1.0, 2.0, 3.0, 4.0)
    assert matrix(rows) == rows
    with pytest.raises(ValueError):
        matrix(rows[:3])
    with pytest.raises(ValueError, match="singular"):
        matrix([[0.0] * 4] * 4)
