"""``dfdask report``: what a run made, how fast, at what cost and by what decisions, as one HTML page.

The facts are gathered here, ``report_page`` turns them into HTML.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfdask.errors import StorageError
from dfdask.history import History
from dfdask.report_page import Facts, Picture, page
from dfdask.store import RunStore
from dfdask.summary import failures as failed_items
from dfdask.summary import flat, run_status, stage_seconds
from dfdask.words import printable

if TYPE_CHECKING:
    from dfdask.sheet import Tile

REPORT_NAME = "report.html"
PICTURES = 60
FAILURES = 50
_JPEG_QUALITY = 82


def write_report(store: RunStore, output: Path | None = None) -> str:
    """Write the page to ``output``, or into the run; returns its path or URL. Raises StorageError."""
    data = page(gather(store)).encode()
    if output is None:
        return store.put_report(REPORT_NAME, data)
    try:
        output.write_bytes(data)
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error.strerror or error}; choose another file") from None
    return str(output)


def gather(store: RunStore) -> Facts:
    """Raises StorageError."""
    commits = store.commits()
    about: Mapping[str, Any] = store.attributes.get("dfdask", {})
    written = sorted((float(c["written"]), int(c["stop"]) - int(c["start"])) for c in commits if c.get("written"))
    return Facts(
        status=run_status(store, commits),
        kind=store.layout.kind,
        item_shape=store.layout.item_shape,
        about=about,
        stage_seconds=stage_seconds(commits),
        written=tuple(written),
        history=History.of(store.events(), about.get("stages", ())),
        pictures=_pictures(store, commits),
        failures=tuple(failed_items(store, commits, FAILURES)),
        spec=tuple(flat(about.get("spec", {}))),
        model=tuple(flat(about.get("model", {}))),
        versions=tuple(flat(about.get("versions", {}))),
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _pictures(store: RunStore, commits: Sequence[Mapping[str, Any]]) -> tuple[Picture, ...]:
    from dfdask.sheet import read_tiles

    return tuple(_picture(tile) for tile in read_tiles(store, commits, PICTURES))


def _picture(tile: Tile) -> Picture:
    caption = printable(tile.caption) or f"item {tile.row}"
    if tile.image is None:
        return Picture(None, caption, tile.note)
    buffer = BytesIO()
    tile.image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", caption, "")
