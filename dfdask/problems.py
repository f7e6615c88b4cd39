"""Pydantic's problems in the words of a job file: where, what is wrong, the value, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from dfdask.arguments import USUAL_ARGUMENTS, nearest, shown
from dfdask.job_file import Lines

Where = tuple[str | int, ...]
PartAt = Callable[[Where], type[BaseModel]]
"""The model that a mapping at some place in the job is read as."""


def located(where: Where, check: Any, *values: Any) -> Any:
    """``check(*values)``, its ValueError placed at ``where`` below the field being validated."""
    try:
        return check(*values)
    except ValueError as error:
        raise problem((where, str(error))) from None


def problem(*found: tuple[Where, str]) -> PydanticCustomError:
    """Problems (where below the field, what) as the one error that a validator may raise."""
    return PydanticCustomError("dfdask", "see the context", {"found": found})


def explain(error: ValidationError, source: str, lines: Lines, part_at: PartAt) -> str:
    found = [text for found_one in error.errors(include_url=False) for text in _texts(dict(found_one), lines, part_at)]
    if len(found) == 1:
        return f"{source}: {found[0]}"
    more = [f"... and {len(found) - 20} more"] if len(found) > 20 else []
    return "\n  ".join([f"{source}: {len(found)} problems", *found[:20], *more])


def _texts(found: dict[str, Any], lines: Lines, part_at: PartAt) -> list[str]:
    path = tuple(p for p in found["loc"] if not str(p).startswith("<") and p != "[key]")
    if found["type"] == "dfdask":
        return [_placed((*path, *where), what, lines) for where, what in found["ctx"]["found"]]
    return [_placed(path, _what(found, part_at(path[:-1]).model_fields, path), lines)]


def _placed(path: Where, what: str, lines: Lines) -> str:
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    return " ".join(filter(None, [f"line {line}:" if line else "", f"{where}:" if where else "", what]))


def _what(found: dict[str, Any], fields: Mapping[str, FieldInfo], path: Where) -> str:
    name, got = str(path[-1]) if path else "", shown(found["input"])
    field = fields.get(name) or next((one for one in fields.values() if one.alias == name), None)
    example = field.examples if field else None
    advice = f"; write e.g. {name}: {example[0]}" if example else ""
    match found["type"]:
        case "value_error":
            return str(found["ctx"]["error"])
        case "missing":
            return f"is missing{advice or '; add it'}"
        case "extra_forbidden" if len(path) == 1 and name in USUAL_ARGUMENTS:
            return f"is no key of a job, got {got}; move it below `arguments`"
        case "extra_forbidden":
            return f"unknown key, got {got}{nearest(name, fields)} (known keys: {', '.join(fields)})"
        case "string_pattern_mismatch" if ending := _missing_ending(found["input"], found["ctx"]["pattern"]):
            return f"must end in {ending}, got {got}{advice}"
        case "string_pattern_mismatch":
            return f"must be a plain name, got {got}; remove the special characters"
        case "string_too_short" | "too_short":
            return f"must not be empty, got {got}{advice}"
        case kind:
            what = _KINDS.get(kind) or found["msg"].replace("Input should be", "must be")
            return f"{what}, got {got}{advice}"


def _missing_ending(text: str, pattern: str) -> str:
    """The word that ``pattern`` wants at the end, a point before it included, where ``text`` does not end in it."""
    found = re.search(r"((?:\\\.)?[A-Za-z]+)\$$", pattern)
    ending = found[1].replace("\\", "") if found else ""
    return "" if text.endswith(ending) else ending


_KINDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}
