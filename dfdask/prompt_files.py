"""Readers of prompt files: each yields one ``Row`` per prompt and never holds the whole file.

Text (one prompt a line), CSV, TSV, JSON lines and Parquet, told apart by suffix. Every problem is a
PromptError that names the file and the line or row.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from dfdask.arguments import nearest, shown
from dfdask.errors import PromptError
from dfdask.spec import ITEM_KEYS

Columns = Mapping[str, str | None]


class Row(NamedTuple):
    """What a source says about one prompt, unchecked; ``number`` is its line or (Parquet, inline) row."""

    number: int
    values: dict[str, Any]  # prompt, id, seed and pipeline arguments, as far as the source has them


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The prompts in ``path``. Raises PromptError."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(
            f"{path}: unknown kind of prompt file {path.suffix!r}; use one of {', '.join(_READERS)}, "
            "or a list for the prompts themselves, e.g. prompts: [red apple]"
        )
    try:
        if path.is_dir():
            raise PromptError(f"{path}: is a directory, not a prompt file; name a file in it")
        if not path.is_file() and path.exists():
            raise PromptError(f"{path}: is not a regular file; a run that resumes must be able to read it again")
        yield from reader(path, columns)
    except FileNotFoundError:
        raise PromptError(
            f"{path}: no such prompt file; check the path, or give prompts themselves as a list"
        ) from None
    except UnicodeDecodeError:
        raise PromptError(_where_not_utf8(path)) from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror or error}; check the file") from None


def unit(path: Path) -> str:
    """What ``Row.number`` counts in this file."""
    return "row" if path.suffix.lower() in _PARQUET else "line"


def is_textual(path: Path) -> bool:
    """Whether all values in such a file are text, so that numbers are still to be told from words."""
    return path.suffix.lower() in (*_CSV, *_TSV)


def _open(path: Path) -> IO[str]:
    return path.open(encoding="utf-8-sig", newline="")


def _text(path: Path, columns: Columns) -> Iterator[Row]:
    if columns:
        raise PromptError(f"{path}: a text file has no columns, got columns {dict(columns)}; remove `columns`")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            prompt = line.strip()
            if prompt:
                yield Row(number, {"prompt": prompt})


def _csv(path: Path, columns: Columns) -> Iterator[Row]:
    with _open(path) as file:
        reader = csv.reader(file, strict=True)
        line = 1  # where the record starts: a quoted value may span lines

        def records() -> Iterator[tuple[int, list[str]]]:
            nonlocal line
            for record in reader:
                yield line, record
                line = reader.line_num + 1

        try:
            yield from _table(path, records(), columns)
        except csv.Error as error:
            raise PromptError(
                f"{path}: line {line}: not valid CSV: {error}; a value with quotes needs quotes around it "
                "and its own doubled"
            ) from None


def _tsv(path: Path, columns: Columns) -> Iterator[Row]:
    """One record a line. Quotes are text, unless they wrap a whole value as spreadsheets write it."""
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line.rstrip("\n")) for number, line in enumerate(file, 1))
        records = ((number, [_unquoted(v) for v in line.split("\t")] if line else []) for number, line in lines)
        yield from _table(path, records, columns)


def _unquoted(value: str) -> str:
    inner = value[1:-1]
    wrapped = len(value) >= 2 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if wrapped else value


def _table(path: Path, records: Iterable[tuple[int, list[str]]], columns: Columns) -> Iterator[Row]:
    header: list[str] | None = None
    chosen: list[tuple[str, int]] = []
    for number, record in records:
        if not record:
            continue
        if header is None:
            header = [name.strip() for name in record]
            chosen = [(key, header.index(name)) for key, name in choose(path, header, columns).items()]
            continue
        if len(record) != len(header):
            raise PromptError(
                f"{path}: line {number}: has {len(record)} values, the header has {len(header)}; "
                "put quotes around values that contain the separator"
            )
        yield Row(number, {key: record[place] for key, place in chosen if key in _REQUIRED or record[place] != ""})


_REQUIRED = ("prompt", "id")  # an empty cell of another column means: not given
_WHOLE = frozenset({"seed", "num_inference_steps", "height", "width", "num_frames", "max_sequence_length"})


def _jsonl(path: Path, columns: Columns) -> Iterator[Row]:
    """Lines may lack any mapped key but the prompt's; one that no line has is a mistake."""
    missing = {key: name for key, name in columns.items() if name is not None}
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise PromptError(f"{path}: line {number}: not valid JSON: {error}; write one {{...}} a line") from None
            if not isinstance(record, dict):
                raise PromptError(
                    f'{path}: line {number}: must be a JSON object, got {shown(record)}; write {{"prompt": "..."}}'
                )
            names = choose(path, list(record), columns, f"line {number}: ", sparse=True)
            for key in missing.keys() & names.keys():
                del missing[key]
            yield Row(number, {key: record[name] for key, name in names.items()})
    if number and missing:
        key, name = next(iter(missing.items()))
        raise PromptError(f"{path}: no line has the key {name!r} for {key}; name the right one in `columns`")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _parquet(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise PromptError(f"{path}: reading Parquet needs pyarrow, which is not here; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = choose(path, file.schema_arrow.names, columns)
            row = 0
            for batch in file.iter_batches(batch_size=8192, columns=list(names.values())):
                lists = {key: batch.column(name).to_pylist() for key, name in names.items()}
                for values in zip(*lists.values(), strict=True):
                    row += 1
                    given = zip(lists, values, strict=True)
                    yield Row(row, {key: as_whole(key, value) for key, value in given if not _is_blank(key, value)})
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PromptError(f"{path}: not a readable Parquet file: {first}; write it again") from None


def _is_blank(key: str, value: Any) -> bool:
    return key not in _REQUIRED and (value is None or (isinstance(value, float) and math.isnan(value)))


def as_whole(key: str, value: Any) -> Any:
    """``value``, 5 for 5.0 where whole numbers are needed: tables with blanks have no other numbers than floats."""
    return int(value) if key in _WHOLE and isinstance(value, float) and value.is_integer() else value


def choose(path: Path, names: Sequence[str], columns: Columns, where: str = "", sparse: bool = False) -> dict[str, str]:
    """Which of the columns ``names`` hold prompt, id, seed and the mapped arguments, or PromptError.

    A column is found by its exact name, else without regard to case where that leaves one. ``id`` and
    ``seed`` are read where they are there; null in ``columns`` leaves them out.
    """
    chosen = {}
    for key, wanted in {**dict(zip(ITEM_KEYS, ITEM_KEYS, strict=True)), **columns}.items():
        if wanted is None:
            continue
        found = [name for name in names if name == wanted] or [name for name in names if name.lower() == wanted.lower()]
        if len(found) == 1:
            chosen[key] = found[0]
        elif found or key == "prompt" or (key in columns and not sparse):
            what = f"the column {wanted!r} is there {len(found)} times" if found else f"no column {wanted!r}"
            listed = ", ".join(map(repr, names[:30])) + (", ..." if len(names) > 30 else "")
            if len(names) == 1 and (other := next((sep for sep in ";|\t" if sep in names[0]), None)):
                raise PromptError(
                    f"{path}: {where}{what}, but one that is called {names[0]!r}; is {other!r} between the values? "
                    "Write commas, or tabs in a .tsv file"
                )
            raise PromptError(
                f"{path}: {where}{what} (columns: {listed}){'' if found else nearest(wanted, names)}; "
                f"name the right one, e.g. columns: {{{key}: {names[0] if names else 'caption'}}}"
            )
    return chosen


def unused_columns(path: Path, columns: Columns) -> list[str]:
    """Names in a file that ``read_rows`` has read which are no part of an item; of JSON Lines those of the first."""
    suffix = path.suffix.lower()
    if suffix in _PARQUET:
        import pyarrow.parquet as parquet

        names = list(parquet.read_schema(path).names)
    elif suffix in (*_CSV, *_TSV):
        with _open(path) as file:
            names = next(filter(None, csv.reader(file, delimiter="," if suffix in _CSV else "\t")), [])
    elif _READERS.get(suffix) is _jsonl:
        with _open(path) as file:
            names = list(json.loads(next(filter(str.strip, file), "{}")))
    else:
        return []
    used = set(choose(path, [name.strip() for name in names], columns, sparse=True).values())
    return [name.strip() for name in names if name.strip() not in used]


def _where_not_utf8(path: Path) -> str:
    """Finds the first byte that is not UTF-8, reading the file once more."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(2**20), b""):
            if offset == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return f"{path}: is UTF-16, not UTF-8; save it as UTF-8"
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                place = max(0, error.start - pending)
                line += chunk.count(b"\n", 0, place)
                byte = error.object[error.start]
                offset += error.start - pending
                return f"{path}: line {line}: not UTF-8: byte 0x{byte:02x} at offset {offset}; save it as UTF-8"
            offset += len(chunk)
            line += chunk.count(b"\n")
    return f"{path}: line {line}: not UTF-8: it ends within a character; save it as UTF-8"


_CSV, _TSV, _PARQUET = (".csv",), (".tsv", ".tab"), (".parquet", ".pq")
_READERS = {
    ".txt": _text,
    ".text": _text,
    **dict.fromkeys(_CSV, _csv),
    **dict.fromkeys(_TSV, _tsv),
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    **dict.fromkeys(_PARQUET, _parquet),
}
