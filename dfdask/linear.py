"""Linear programs, small and many: HiGHS (Huangfu and Hall, Math. Prog. Comp. 10, 2018) as directly as it can be had.

General interfaces to it take several times as long to prepare a program as these take to be solved.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from highspy import Highs

Entry = tuple[int, int, float]
"""A row, a column and the number there."""
_here = threading.local()


def minimum(
    costs: ArrayLike,
    entries: Sequence[Entry],
    upper: ArrayLike,
    lower: ArrayLike | None = None,
    most: ArrayLike | None = None,
    whole: Sequence[int] = (),
) -> NDArray[np.float64] | None:
    """The ``x`` of least ``costs @ x`` with ``lower <= A @ x <= upper`` and ``0 <= x <= most``; None where none is.

    ``entries`` are the numbers of A that are not zero, (rows, columns); each at most once. The columns ``whole`` take
    whole numbers. Raises RuntimeError where the solver fails or the least is without bound.
    """
    from highspy import HighsLp, HighsModelStatus, HighsVarType, MatrixFormat

    lp, costs, upper = HighsLp(), np.asarray(costs, np.float64), np.asarray(upper, np.float64)
    rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
    order = np.argsort(columns, kind="stable")
    lp.num_row_, lp.num_col_ = len(upper), len(costs)
    lp.col_cost_ = costs
    lp.col_lower_ = np.zeros(len(costs))
    lp.col_upper_ = np.full(len(costs), np.inf) if most is None else np.asarray(most, np.float64)
    lp.row_lower_ = np.full(len(upper), -np.inf) if lower is None else np.asarray(lower, np.float64)
    lp.row_upper_ = upper
    lp.a_matrix_.format_ = MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.searchsorted(columns[order], np.arange(len(costs) + 1)).astype(np.int32)
    lp.a_matrix_.index_ = rows[order].astype(np.int32)
    lp.a_matrix_.value_ = values[order].astype(np.float64)
    if whole:
        kinds = [HighsVarType.kContinuous] * len(costs)
        for column in whole:
            kinds[column] = HighsVarType.kInteger
        lp.integrality_ = kinds
    solver = _solver()
    # Programs of a few dozen numbers are solved before they are simplified.
    solver.setOptionValue("presolve", "choose" if whole else "off")
    solver.passModel(lp)
    solver.run()
    status = solver.getModelStatus()
    if status == HighsModelStatus.kInfeasible:
        return None
    if status != HighsModelStatus.kOptimal:
        raise RuntimeError(f"the linear program was not solved: {solver.modelStatusToString(status)}")
    return np.array(solver.getSolution().col_value)


def _solver() -> Highs:
    """One for each thread: to make it takes longer than to use it."""
    if not hasattr(_here, "solver"):
        from highspy import Highs

        _here.solver = Highs()
        _here.solver.silent()
    solver: Highs = _here.solver
    return solver
