"""Readers of prompt files: what tables make of numbers."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from dfdask.errors import PromptError
from dfdask.prompts import ItemTable, read_items
from dfdask.spec import JobSpec


def items(prompts: Any) -> ItemTable:
    return read_items(JobSpec(model="bundled", prompts=prompts))


@pytest.mark.parametrize("blank", [None, math.nan])
@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.parquet"])
def test_whole_numbers_beside_blanks(tmp_path: Path, name: str, blank: float | None) -> None:
    """As pandas writes them: a column of whole numbers that has blanks becomes one of floats."""
    columns = {"seed": [1.0, blank, 4294967295.0], "height": [64.0, blank, 32.0], "guidance_scale": [3.0, blank, 2.5]}
    if name == "p.parquet":
        table = arrow.table({"prompt": ["a", "b", "c"], **{key: arrow.array(v) for key, v in columns.items()}})
        parquet.write_table(table, tmp_path / name)
    else:
        cells = {key: ["" if v in (None, blank) else str(v) for v in values] for key, values in columns.items()}
        rows: list[dict[str, str]] = [
            {"prompt": "abc"[n], **{key: values[n] for key, values in cells.items()}} for n in range(3)
        ]
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name == "p.tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    table = items({"file": str(tmp_path / name), "columns": {"height": "height", "guidance_scale": "guidance_scale"}})
    same = items(
        [
            {"prompt": "a", "seed": 1, "height": 64, "guidance_scale": 3.0},
            {"prompt": "b"},
            {"prompt": "c", "seed": 2**32 - 1, "height": 32, "guidance_scale": 2.5},
        ]
    )
    assert table.digest() == same.digest() and type(table[0].arguments["height"]) is int


def test_parts_of_whole_numbers_are_none(tmp_path: Path) -> None:
    columns = {"height": "height"}
    for key in ("seed", "height"):
        parquet.write_table(
            arrow.table({"prompt": ["a"], "seed": [1.0], "height": [8.0], key: [1.5]}), tmp_path / "p.pq"
        )
        with pytest.raises(PromptError, match=f"row 1: {key}: must be a whole number .*got 1.5"):
            items({"file": str(tmp_path / "p.pq"), "columns": columns})
    (tmp_path / "p.csv").write_text("prompt,height\na,64.0\nb,1.5\n")
    with pytest.raises(PromptError, match=r"line 3: height: must be a whole number .*got 1.5"):
        items({"file": str(tmp_path / "p.csv"), "columns": columns})
