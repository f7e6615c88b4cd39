"""Prompts from every source become the same items; every mistake is one PromptError that says where."""

from __future__ import annotations

import csv
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.errors import PromptError
from dfdask.prompts import ItemTable, read_items, unused_columns
from dfdask.spec import JobSpec

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
PROMPT = TEXT.filter(str.strip)


def items(prompts: Any, **fields: Any) -> ItemTable:
    return read_items(JobSpec(model="bundled", prompts=prompts, **fields))


def test_inline() -> None:
    table = items(
        ["a", {"prompt": "b", "id": "x", "seed": 2**32 - 1, "height": 128}],
        images_per_prompt=2,
        arguments={"height": 64, "guidance_scale": 3.0},
    )
    assert len(table) == 4
    assert [item.id for item in table] == ["000000-0", "000000-1", "x-0", "x-1"]
    assert [item.prompt for item in table] == ["a", "a", "b", "b"]
    assert [item.seed for item in table][2:] == [2**32 - 1, 0]
    assert table[-1].arguments == {"height": 128, "guidance_scale": 3.0} and table[-1].index == 3
    assert table[0].arguments == {"height": 64, "guidance_scale": 3.0}
    assert table.items(1, 99) == list(table)[1:]
    with pytest.raises(IndexError):
        table[4]
    columns = table.columns()
    assert columns["height"].tolist() == [64, 64, 128, 128] and columns["height"].dtype == np.int64
    assert columns["seed"].dtype == np.uint32 and columns["image_index"].dtype == np.uint16
    assert columns["id"].dtype == columns["prompt"].dtype == np.dtypes.StringDType()
    assert "guidance_scale" not in columns
    assert pickle.loads(pickle.dumps(table)).digest() == table.digest()


def test_argument_columns() -> None:
    rows: list[Any] = [
        {
            "prompt": "a",
            "f": 1.5,
            "mixed": 1,
            "b": True,
            "s": "x",
            "j": [1, {"k": 2.0}],
            "big": 2**70,
            "gap": 3,
        },
        {"prompt": "b", "f": 2.0, "mixed": 2.5, "b": False, "s": "", "j": None, "big": 1},
    ]
    table = items(rows, arguments={"other": 1})
    for item, row in zip(table, rows, strict=True):
        given_arguments = {key: value for key, value in row.items() if key != "prompt"}
        assert repr(dict(item.arguments)) == repr({"other": 1, **given_arguments})
    columns = table.columns()
    kinds = {name: columns[name].dtype.kind for name in ("f", "mixed", "b", "s", "j", "big", "gap")}
    assert kinds == {"f": "f", "mixed": "f", "b": "b", "s": "T", "j": "T", "big": "f", "gap": "f"}
    assert np.isnan(columns["gap"][1]) and columns["j"].tolist() == ['[1,{"k":2}]', "null"]


def write_txt(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{row['prompt']}\n\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(arrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "p.csv": write_csv,
    "p.CSV": write_csv,
    "p.tsv": write_csv,
    "p.jsonl": write_jsonl,
    "p.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_columns_that_are_not_read_are_known(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"Prompt": "a", "seed": 7, "negative_prompt": "b", "guidance_scale": 3, "cfg": 1}])
    spec = JobSpec(model="bundled", prompts={"file": tmp_path / name, "columns": {"guidance_scale": "cfg"}})  # type: ignore[arg-type]
    assert unused_columns(spec) == ["negative_prompt", "guidance_scale"]


def test_lists_and_texts_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    for prompts in (["a"], {"file": tmp_path / "p.txt"}):
        assert unused_columns(JobSpec(model="bundled", prompts=prompts)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_items(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {
            "Prompt": 'ein "grüner" Apfel, 苹果 🍏',
            "id": "a",
            "seed": 7,
            "cfg": 3.5,
            "steps": 4,
            "neg": "12",
            "junk": 1,
        },
        {"Prompt": "b", "id": "b", "seed": 8, "cfg": 4.0, "steps": 5, "neg": "13", "junk": 2},
    ]
    WRITERS[name](tmp_path / name, rows)
    columns = {"guidance_scale": "cfg", "num_inference_steps": "steps", "negative_prompt": "neg"}
    table = items({"file": tmp_path / name, "columns": columns})
    same = items(
        [
            {
                "prompt": row["Prompt"],
                "id": row["id"],
                "seed": row["seed"],
                "guidance_scale": row["cfg"],
                "num_inference_steps": row["steps"],
                "negative_prompt": row["neg"],
            }
            for row in rows
        ]
    )
    assert list(table) == list(same) and table.digest() == same.digest()


@pytest.mark.parametrize("name", ["p.txt", *WRITERS])
@pytest.mark.parametrize("limit", [None, 2])
def test_prompts_alone(tmp_path: Path, name: str, limit: int | None) -> None:
    WRITERS.get(name, write_txt)(tmp_path / name, [{"prompt": text} for text in ("ä", "b", "c")])
    table = items({"file": str(tmp_path / name), "limit": limit})
    assert [item.prompt for item in table] == ["ä", "b", "c"][:limit]
    assert table.digest() == items(["ä", "b", "c"][:limit]).digest()


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\r\n  two\u2028still two \nthree".encode())
    assert [item.prompt for item in items(str(tmp_path / "p.txt"))] == ["one", "two\u2028still two", "three"]


def test_csv_values_may_span_lines_and_cells_may_be_empty(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('prompt,seed,height\n"two\nlines",,64\n\nb,3,\n')
    table = items({"file": str(tmp_path / "p.csv"), "columns": {"height": "height"}}, arguments={"height": 32})
    assert [(i.prompt, i.arguments["height"]) for i in table] == [("two\nlines", 64), ("b", 32)]
    assert table[0].seed == items(["two\nlines"])[0].seed and table[1].seed == 3


def test_tsv_quotes_are_text(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text('Prompt\tNote\n"G I G" painted\t\n"say ""hi"""\tx\n"a" and "b"\tx\n')
    assert [i.prompt for i in items(str(tmp_path / "p.tsv"))] == [
        '"G I G" painted',
        'say "hi"',
        '"a" and "b"',
    ]


def test_jsonl_lines_may_lack_arguments(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "h": 64}\n\n{"prompt": "b", "id": 7}\n')
    table = items({"file": str(tmp_path / "p.jsonl"), "columns": {"height": "h"}})
    assert [(i.id, dict(i.arguments)) for i in table] == [("000000", {"height": 64}), ("7", {})]


def test_a_column_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,id,seed\na,1,x\nb,1,y\n")
    table = items({"file": str(tmp_path / "p.csv"), "columns": {"id": None, "seed": None}})
    assert [item.id for item in table] == ["000000", "000001"]


@pytest.mark.parametrize(
    ("name", "data", "columns", "message"),
    [
        ("p.txt", b"", {}, "there are no prompts"),
        ("p.txt", b"\n \n", {}, "there are no prompts"),
        ("p.txt", b"a\nb\0c\n", {}, "line 2: prompt: must not contain NUL"),
        ("p.txt", b"a\ncaf\xe9\n", {}, r"line 2: not UTF-8: byte 0xe9 at offset 5"),
        ("p.txt", "a".encode("utf-16"), {}, "is UTF-16"),
        ("p.txt", b"a\n\xf0\x9f", {}, "line 2: not UTF-8: it ends within a character"),
        ("p.txt", b"a", {"prompt": "x"}, "a text file has no columns"),
        ("p.doc", b"a", {}, "unknown kind of prompt file '.doc'; use one of .txt"),
        ("p.csv", b"", {}, "there are no prompts"),
        ("p.csv", b"prompt\n", {}, "there are no prompts"),
        ("p.csv", b"promt,x\na,b\n", {}, "no column 'prompt' .columns: 'promt', 'x'.; did you mean 'promt'"),
        ("p.csv", b"caption\na\n", {"prompt": "captoin"}, "did you mean 'caption'"),
        ("p.csv", b"prompt\na\n", {"height": "h"}, "no column 'h'"),
        ("p.csv", b"Prompt,PROMPT\na,b\n", {}, "'prompt' is there 2 times"),
        ("p.csv", b"prompt,prompt\na,b\n", {}, "'prompt' is there 2 times"),
        ("p.csv", b"prompt,x\na,b\na\n", {}, "line 3: has 1 values, the header has 2"),
        ("p.csv", b"prompt,x\na,b,c\n", {}, "line 2: has 3 values, the header has 2"),
        ("p.csv", b'prompt\n"a\nb"\n"c" d\n', {}, "line 4: not valid CSV"),
        ("p.csv", b'prompt\na\n"b\n', {}, "line 3: not valid CSV"),
        ("p.csv", b"prompt,x\na,1\n ,2\n", {}, "line 3: prompt: must not be empty"),
        ("p.csv", b"prompt,id\na,x\nb,y\nc,x\n", {}, "the id 'x' is there twice, in line 2 and line 4"),
        ("p.csv", b"prompt,id\na,\n", {}, "line 2: id: must be visible"),
        ("p.csv", b"prompt,id\na,x\x07\n", {}, "line 2: id: must be visible"),
        (
            "p.csv",
            b"prompt,seed\na,1.5\n",
            {},
            "line 2: seed: must be a whole number from 0 to 4294967295, got '1.5'",
        ),
        ("p.csv", b"prompt,seed\na,-1\n", {}, "line 2: seed: .*got '-1'"),
        ("p.csv", b"prompt,seed\na,4294967296\n", {}, "line 2: seed: .*got 4294967296"),
        (
            "p.csv",
            b"prompt,h\na,64\nb,tall\n",
            {"height": "h"},
            "line 2: height: must be a whole number.*'64'|line 3: height: .*'tall'",
        ),
        ("p.csv", b"prompt,g\na,nan\n", {"guidance_scale": "g"}, "line 2: guidance_scale: must be a finite"),
        ("p.tsv", b"prompt\tx\na\n", {}, "line 2: has 1 values"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', {}, "line 2: not valid JSON"),
        ("p.jsonl", b'"a"\n', {}, "line 1: must be a JSON object, got 'a'"),
        ("p.jsonl", b'{"prompt": NaN}\n', {}, "line 1: not valid JSON: NaN"),
        ("p.jsonl", b'{"prompt": 3}\n', {}, "line 1: prompt: must be text, got 3"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', {}, "line 1: prompt: must be valid Unicode"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', {}, "line 2: no column 'prompt' .columns: 'text'"),
        ("p.jsonl", b'{"prompt": "a"}\n', {"height": "h"}, "no line has the key 'h' for height"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}\n', {}, "line 1: seed: must be a whole number"),
        ("p.jsonl", b'{"prompt": "a", "id": null}\n', {}, "line 1: id: must be text"),
        ("p.jsonl", b"[" * 100_000, {}, "line 1: not valid JSON"),
        ("p.parquet", b"PAR1 no", {}, "not a readable Parquet file"),
        ("p.csv", b"prompt;id\na;b\n", {}, "is ';' between the values"),
        ("p.parquet", b"", {}, "not a readable Parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, columns: dict[str, str], message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError, match=message) as found:
        items({"file": str(tmp_path / name), "columns": columns})
    assert str(found.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        (["a", " "], "item 1: prompt: must not be empty"),
        (
            [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}],
            "'x' is there twice, in item 0 and item 1",
        ),
        ([{"prompt": "a", "id": "000001"}, "b"], "'000001' is there twice"),
        ([{"prompt": "a", "seed": 1.0}], "item 0: seed: must be a whole number"),
        ([{"prompt": "a", "latents": 1}], "item 0: latents: cannot be set here"),
        ([{"prompt": "a", "height": 0}], "item 0: height: must be a whole number of at least 1, got 0"),
        ([{"prompt": "a", "a-b": 0}], "is not the name of a pipeline argument"),
    ],
)
def test_bad_inline_prompts(prompts: list[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        items(prompts)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such prompt file; .*as a list"):
        items(str(tmp_path / "none.txt"))
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(PromptError, match="is a directory"):
        items(str(tmp_path / "dir.csv"))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(PromptError, match="not a regular file"):
        items(str(tmp_path / "pipe.txt"))
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(PromptError, match="cannot be read"):
        items(str(tmp_path / "p.txt" / "q.txt"))


def test_parquet_types(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    texts = arrow.array(["a", "b"])
    for kind in (
        texts,
        texts.cast(arrow.large_string()),
        texts.dictionary_encode(),
        texts.cast(arrow.string_view()),
    ):
        parquet.write_table(arrow.table({"prompt": kind}), path)
        assert [item.prompt for item in items(str(path))] == ["a", "b"]
    for column, message in (
        (arrow.array([1, 2]), "row 1: prompt: must be text, got 1"),
        (arrow.array([b"a", b"b"]), "row 1: prompt: must be text"),
        (arrow.array(["a", None]), "row 2: prompt: must be text, got None"),
        (arrow.array([{"x": "a"}, {"x": "b"}]), "row 1: prompt: must be text"),
    ):
        parquet.write_table(arrow.table({"prompt": column}), path)
        with pytest.raises(PromptError, match=message):
            items(str(path))
    parquet.write_table(arrow.table({"prompt": texts, "t": arrow.array([0, 0], arrow.timestamp("s"))}), path)
    with pytest.raises(PromptError, match="row 1: when: must be a number, text"):
        items({"file": str(path), "columns": {"when": "t"}})
    data = path.read_bytes()
    path.write_bytes(data[:40] + b"\xff" * 20 + data[60:])
    with pytest.raises(PromptError):
        items(str(path))


@given(st.lists(PROMPT, min_size=1, max_size=20), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_rows_and_columns_agree(prompts: list[str], copies: int, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = items(prompts, images_per_prompt=copies, seed=seed)
        columns = table.columns()
    rows = list(table)
    assert [item.index for item in rows] == list(range(len(prompts) * copies))
    assert columns["id"].tolist() == [item.id for item in rows] and len({item.id for item in rows}) == len(rows)
    assert columns["prompt"].tolist() == [item.prompt for item in rows]
    assert columns["seed"].tolist() == [item.seed for item in rows]
    assert columns["image_index"].tolist() == list(range(copies)) * len(prompts)
    assert [item.prompt for item in rows[::copies]] == prompts


@given(st.lists(PROMPT, min_size=1, max_size=8), st.lists(PROMPT, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_digest_tells_tables_apart(one: list[str], two: list[str]) -> None:
    assert (items(one).digest() == items(two).digest()) == (one == two)


def test_the_digest_covers_everything() -> None:
    variants: list[tuple[Any, dict[str, Any]]] = [
        (["a", "b"], {}),
        (["ab"], {}),
        (["a", "b"], {"seed": 1}),
        (["a", "b"], {"images_per_prompt": 2}),
        (["a", "b"], {"arguments": {"height": 64}}),
        (["a", {"prompt": "b", "height": 64}], {}),
        ([{"prompt": "a", "height": 64}, "b"], {}),
        (["a", {"prompt": "b", "id": "000001"}], {}),
        (["a", {"prompt": "b", "seed": 1}], {}),
    ]
    digests = [items(prompts, **fields).digest() for prompts, fields in variants]
    assert len(set(digests)) == len(digests)
    assert items(["a", "b"]).digest() == items(iter(["a", "b"]), workers=2, device="cpu").digest() == digests[0]


@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "id", "note", "x"]), TEXT), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_csv_gives_items_or_one_error(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("any") / "p.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "id", "note", "x"])
        writer.writeheader()
        writer.writerows(rows)
    try:
        table = items({"file": str(path), "columns": {"note": "note"}})
    except PromptError as error:
        assert str(path) in str(error)
    else:
        assert [item.prompt for item in table] == [row["prompt"] for row in rows]


@given(st.binary(max_size=60), st.sampled_from([".txt", ".csv", ".tsv", ".jsonl", ".parquet"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_items_or_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"p{suffix}"
    path.write_bytes(data)
    try:
        assert len(items(str(path)))
    except PromptError as error:
        assert str(error).startswith(str(path))
