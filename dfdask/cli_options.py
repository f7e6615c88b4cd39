"""What the command line's options may say, read into values."""

from __future__ import annotations

import json
from typing import Any

from dfdask.errors import SpecError


def read_settings(texts: tuple[str, ...]) -> dict[str, Any]:
    """``--set``: NAME=VALUE pairs; a value is JSON where it reads as that, else text. Raises SpecError."""
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not name or not separator:
            raise SpecError(f"--set: must be NAME=VALUE, got {text!r}; write e.g. --set height=512")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def read_stage_names(text: str | None) -> list[str] | None:
    """``--stages``: different names with commas between. Raises SpecError."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise SpecError(f"--stages: must be different names, got {text!r}; write e.g. encode,decode")
    return names


def read_class(text: str | None) -> str | None:
    """``--device-class``: a printable name. Raises SpecError."""
    if text is not None and not (text.strip() and text.isprintable()):
        raise SpecError(f"--device-class: must be a name, got {text!r}; write e.g. h100")
    return text


def check_address(text: str) -> None:
    """``--dashboard-address``. Raises SpecError."""
    if not text.rpartition(":")[2].isdecimal():
        raise SpecError(f"--dashboard-address: must be HOST:PORT, got {text!r}; write e.g. 0.0.0.0:8787")


def read_bytes(text: str | None) -> int | None:
    """``--memory``: a size such as 24GB, in bytes. Raises SpecError."""
    if text is None:
        return None
    from dask.utils import parse_bytes

    try:
        size = int(parse_bytes(text)) if text.strip() else 0
    except ValueError:
        size = 0
    if size < 1:
        raise SpecError(f"--memory: must be a size above 0, got {text!r}; write e.g. 24GB")
    return size
