"""Pictures of a run for other programs: PNG files, WebDataset tars or a Parquet dataset; videos as MP4 files.

Works shard by shard, so memory does not grow with the run. Everything is written into a folder beside the
destination, which takes the destination's name only once it is complete.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dfdask.errors import StorageError
from dfdask.export_formats import WRITERS, Picture, Writer
from dfdask.store import FAILED, OK, RunStore
from dfdask.video import FRAMES_PER_SECOND, check_available, mp4

if TYPE_CHECKING:
    from PIL import Image

Format = Literal["png", "webdataset", "parquet", "mp4"]
MARKER = ".dfdask-export.json"
FAILURES = (
    "failures.log"  # JSON lines; called .jsonl, Hugging Face `datasets` takes it for the data beside a single tar
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,119}")
_PNG_LEVEL = 4  # half the time of zlib's default for 3% more bytes


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """``items`` pictures in ``files`` files; of ``skipped`` items, ``failed`` have failed, others are not there yet."""

    files: int
    items: int
    skipped: int
    failed: int


def export_run(
    store: RunStore,
    format: Format,
    destination: Path,
    overwrite: bool = False,
    frames_per_second: int = FRAMES_PER_SECOND,
) -> ExportSummary:
    """Write the ok items of all committed shards to the folder ``destination``; failed ones are listed.

    ``overwrite`` replaces an earlier export, never a folder with anything else; ``frames_per_second`` is for videos.
    Raises StorageError, also where a shard is not what was committed.
    """
    if format not in WRITERS:
        raise StorageError(f"unknown format {format!r}; choose one of {', '.join(WRITERS)}")
    if (format == "mp4") != (store.layout.kind == "video"):
        other = "mp4" if store.layout.kind == "video" else "png, webdataset or parquet"
        raise StorageError(f"{store.location} holds {store.layout.kind}s, which {format} is not for; choose {other}")
    if format == "mp4":
        check_available()
    destination = Path(os.path.abspath(os.path.expanduser(destination)))
    _check_destination(store, destination, overwrite)
    if not store.committed():
        raise StorageError(f"{store.location} has no finished pictures yet; run the job first")
    folder = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir(parents=True)
        writer = WRITERS[format](folder)
        items, failed = _write(store, writer, folder, frames_per_second)
        if not items:
            raise StorageError(f"all {failed} finished items of {store.location} failed: nothing to export")
        about = {"run": str(store.location), "format": format, "items": items}
        (folder / MARKER).write_text(json.dumps(about) + "\n", encoding="utf-8")
        _replace(folder, destination)
    except OSError as error:
        raise StorageError(f"cannot export to {destination}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ExportSummary(writer.files, items, store.layout.items - items, failed)


def picture(pixels: NDArray[np.uint8], height: int | None = None, width: int | None = None) -> Image.Image:
    """(y, x, channel) uint8 as a PIL image, cut to the item's own size. Raises StorageError."""
    from PIL import Image

    channels = pixels.shape[-1]
    if channels > 4:
        raise StorageError(f"pictures with {channels} channels cannot be exported; read them with run.dataset()")
    shown = pixels[:height, :width]
    return Image.fromarray(shown[..., 0] if channels == 1 else shown)


def own_size(columns: Mapping[str, Any], row: int, layout_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an item whose run has columns of that name, else those of the run."""
    return (
        int(columns["height"][row]) if "height" in columns else layout_size[0],
        int(columns["width"][row]) if "width" in columns else layout_size[1],
    )


def _write(store: RunStore, writer: Writer, folder: Path, frames_per_second: int) -> tuple[int, int]:
    """Stream all committed shards into ``writer``; how many items are in it and how many have failed."""
    items = failed = 0
    with _closing(writer), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for record in store.commits():
            values = store.read_shard(int(record["shard"]), record)
            ok = np.flatnonzero(values["status"] == OK).tolist()
            for made in pool.map(partial(_made, store, values, int(record["start"]), frames_per_second), ok):
                writer.add(made)
            writer.end_of_shard()
            broken = np.flatnonzero(values["status"] == FAILED).tolist()
            if broken:
                with (folder / FAILURES).open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(_failure(values, row), ensure_ascii=False) + "\n" for row in broken)
            items += len(ok)
            failed += len(broken)
    return items, failed


@contextmanager
def _closing(writer: Writer) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(Exception):  # what it has to say now follows from the first error
            writer.close()
        raise
    writer.close()


def _made(store: RunStore, values: Mapping[str, NDArray[Any]], start: int, frames_per_second: int, row: int) -> Picture:
    columns = {name: values[name] for name in store.columns}
    height, width = own_size(columns, row, (store.layout.item_shape[-3], store.layout.item_shape[-2]))
    if store.layout.kind == "video":
        data = mp4(values["video"][row][:, :height, :width], frames_per_second)
    else:
        buffer = BytesIO()
        picture(values["image"][row], height, width).save(buffer, "PNG", compress_level=_PNG_LEVEL)
        data = buffer.getvalue()
    others = {name: plain(column[row]) for name, column in columns.items() if name not in ("id", "prompt", "seed")}
    ident, prompt, seed = str(columns["id"][row]), str(columns["prompt"][row]), int(columns["seed"][row])
    return Picture(file_name(ident, start + row), ident, prompt, seed, others, data)


def _failure(values: Mapping[str, NDArray[Any]], row: int) -> dict[str, Any]:
    return {name: plain(values[name][row]) for name in ("id", "prompt", "seed", "error")}


def plain(value: Any) -> Any:
    """A NumPy scalar as JSON knows it; what is not a number is null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_name(ident: str, item: int) -> str:
    """An id as a file name on any system, without dots. Where that changes it, its row makes it unique."""
    if _PLAIN_NAME.fullmatch(ident) and not re.search(r"--\d+$", ident):
        return ident
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", ident).lstrip("-")[:100]
    return f"{cleaned or '_'}--{item}"


def _check_destination(store: RunStore, destination: Path, overwrite: bool) -> None:
    if store.location.kind == "local":
        run, target = Path(os.path.realpath(store.location.path)), Path(os.path.realpath(destination))
        if run.is_relative_to(target) or target.is_relative_to(run):
            raise StorageError(f"{destination} and the run {store.location} overlap; export to another folder")
    try:
        folder = destination.is_dir() and not destination.is_symlink()
        if not os.path.lexists(destination) or (folder and not any(destination.iterdir())):
            return
        exported = folder and (destination / MARKER).is_file()
    except OSError as error:
        raise StorageError(f"cannot export to {destination}: {error}") from None
    if not overwrite:
        raise StorageError(f"{destination} is there already; choose another folder or overwrite it (--overwrite)")
    if not exported:
        raise StorageError(
            f"{destination} is no earlier export ({MARKER} is not in it), so it is not overwritten; choose "
            "another folder or remove it yourself"
        )


def _replace(folder: Path, destination: Path) -> None:
    """Give the finished ``folder`` its name. What was there goes only once the new one is in place."""
    old = folder.with_suffix(".old")
    if destination.exists():
        destination.rename(old)
    try:
        folder.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
