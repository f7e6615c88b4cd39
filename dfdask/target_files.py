"""Storage targets as the YAML files of ``storage/`` define them: data, checked, never a secret."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dfdask.errors import StorageError

STORAGE_FOLDER = "storage"
STORAGE_VARIABLE = "DFDASK_STORAGE"
NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?!\.)[A-Za-z0-9._=-]+(/(?!\.)[A-Za-z0-9._=-]+)*")
_SECRET_KEY = re.compile(r"secret|password|token|credential|(access|api)[_-]?key", re.IGNORECASE)
_MAX_TARGET_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class Target:
    """A place for runs: what a Location is, less the name of the run."""

    kind: Literal["local", "s3"]
    root: str
    options: Mapping[str, Any]


DEFAULT_TARGET = Target("local", "runs", {})


def target_files() -> dict[str, Path]:
    """YAML files by target name; ./storage comes before the folder of the environment."""
    files: dict[str, Path] = {}
    for folder in _folders():
        try:
            found = sorted(folder.iterdir()) if folder.is_dir() else []
        except OSError as error:
            raise StorageError(f"cannot list {folder}: {error.strerror}") from None
        for path in found:
            if path.suffix in (".yaml", ".yml") and NAME.fullmatch(path.stem):
                files.setdefault(path.stem, path)
    return files


def _folders() -> Iterator[Path]:
    yield Path.cwd() / STORAGE_FOLDER
    if named := os.environ.get(STORAGE_VARIABLE):
        yield at_home(named).absolute()


def read_target(path: Path) -> Target:
    """The target in ``path``. Raises StorageError naming the file and what is wrong."""
    values = _mapping(path)
    for key in values:
        if _SECRET_KEY.search(key):
            raise StorageError(
                f"{path}: {key}: secrets do not belong in a file; remove it and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise StorageError(f"{path}: kind: must be local or s3, got {_shown(kind)}")
    for key, value in values.items():
        if key not in _KEYS[kind]:
            near = difflib.get_close_matches(key, _KEYS[kind], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise StorageError(f"{path}: {key}: unknown key{hint} (known keys: {', '.join(_KEYS[kind])})")
        if type(value) is not (wanted := _KEYS[kind][key]):
            word = "text" if wanted is str else "true or false"
            raise StorageError(f"{path}: {key}: must be {word}, got {_shown(value)}")
    return _local(path, values) if kind == "local" else _s3(path, values)


_KEYS: dict[str, dict[str, type]] = {
    "local": {"path": str},
    "s3": {
        "bucket": str,
        "prefix": str,
        "endpoint": str,
        "region": str,
        "allow_http": bool,
        "anonymous": bool,
    },
}


def _local(path: Path, values: dict[str, Any]) -> Target:
    if not (folder := values.get("path")):
        raise StorageError(f"{path}: path: is missing; write e.g. path: ./runs")
    # Relative to the folder that holds storage/, so that a target means the same from anywhere.
    return Target("local", os.path.normpath(path.parent.parent / at_home(folder)), {})


def _s3(path: Path, values: dict[str, Any]) -> Target:
    bucket, prefix = values.pop("bucket", ""), values.pop("prefix", "").strip("/")
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(f"{path}: bucket: must be the name of an S3 bucket, got {bucket!r}")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise StorageError(
            f"{path}: prefix: must be parts of letters, digits, '.', '_', '=' and '-' that do not start with '.', "
            f"joined by '/', got {prefix!r}"
        )
    endpoint = values.get("endpoint", "https://-")
    if "@" in endpoint:
        raise StorageError(f"{path}: endpoint: must not hold a user or password; use the environment")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise StorageError(f"{path}: endpoint: must be a http(s) URL, got {endpoint!r}")
    if endpoint.startswith("http://") and not values.get("allow_http"):
        raise StorageError(f"{path}: endpoint: {endpoint} is not encrypted; say allow_http: true to accept that")
    return Target("s3", f"{bucket}/{prefix}".rstrip("/"), values)


def _shown(value: Any) -> str:
    """A value for a message. Lists are not spelled out: with aliases, a few lines of YAML make an endless one."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict, set, tuple)) else repr(value)[:100]


def at_home(text: str) -> Path:
    """A path whose leading ``~`` is replaced. Raises StorageError."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{text}: {error}") from None


def _mapping(path: Path) -> dict[str, Any]:
    """The flat mapping in a YAML file, refusing duplicate keys, which YAML loaders let through."""
    import yaml

    try:
        if path.stat().st_size > _MAX_TARGET_BYTES:
            raise StorageError(f"{path}: larger than {_MAX_TARGET_BYTES:,} bytes; this is no storage target")
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise StorageError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise StorageError(f"{path}: a storage target is a mapping; start with `kind: local`")
    keys = [str(key.value) for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise StorageError(f"{path}: the key {min(twice)!r} is there twice; remove one")
    return {str(key): value for key, value in values.items()}
