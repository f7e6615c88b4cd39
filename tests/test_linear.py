"""Small linear programs, held against scipy's solution of the same."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from dfdask.linear import minimum

numbers = st.integers(-3, 5).map(float)


@st.composite
def programs(draw: st.DrawFn) -> dict[str, Any]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    matrix = np.array(
        draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    )
    return {
        "matrix": matrix,
        "costs": np.array(draw(st.lists(numbers, min_size=columns, max_size=columns))),
        "upper": np.array(draw(st.lists(numbers, min_size=rows, max_size=rows))),
        "lower": np.array(draw(st.lists(numbers.map(lambda number: number - 6), min_size=rows, max_size=rows))),
        "most": np.array(draw(st.lists(st.integers(0, 7).map(float), min_size=columns, max_size=columns))),
        "whole": draw(st.lists(st.integers(0, columns - 1), unique=True)),
    }


@settings(deadline=None)
@given(programs())
def test_the_least_is_the_same(program: dict[str, Any]) -> None:
    matrix, whole = program.pop("matrix"), program["whole"]
    entries = [(row, column, matrix[row, column]) for row, column in np.ndindex(matrix.shape)]
    found = minimum(entries=entries, **program)
    solved = milp(
        program["costs"],
        constraints=LinearConstraint(matrix, program["lower"], program["upper"]),
        bounds=Bounds(0, program["most"]),
        integrality=[int(column in whole) for column in range(len(program["costs"]))],
    )
    expected = None if solved.x is None else solved.fun
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert program["costs"] @ found == pytest.approx(expected, abs=1e-6)
        assert all(found >= -1e-9) and all(found <= program["most"] + 1e-9)
        assert all(matrix @ found <= program["upper"] + 1e-6) and all(matrix @ found >= program["lower"] - 1e-6)
        assert all(abs(found[column] - round(found[column])) < 1e-6 for column in whole)


def test_a_least_without_bound_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not solved"):
        minimum([-1.0], [(0, 0, -1.0)], [0.0])


def test_threads_solve_side_by_side(capfd: pytest.CaptureFixture[str]) -> None:
    found: list[float] = []

    def solve(limit: float) -> None:
        for _ in range(50):
            solution = minimum([-1.0, -1.0], [(0, 0, 1.0), (0, 1, 2.0)], [limit])
            assert solution is not None
            found.append(float(solution.sum()) / limit)

    threads = [threading.Thread(target=solve, args=(limit,)) for limit in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == pytest.approx([1.0] * 150) and capfd.readouterr().out == ""
