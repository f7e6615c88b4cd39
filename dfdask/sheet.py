"""A contact sheet: many pictures of a run at a glance, each with its prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from dfdask.errors import StorageError
from dfdask.export import own_size, picture
from dfdask.store import FAILED, RunStore

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SHEET_NAME = "contact-sheet.png"
_MARGIN_PX, _GAP_PX, _TITLE_PX, _LINE_PX = 28, 16, 58, 18
_CAPTION_LINES = 2
_PAGE, _INK, _FAINT, _TILE, _FAILED = "#ffffff", "#1f2328", "#6e7781", "#f3f4f6", "#e5e7eb"


@dataclass(frozen=True, slots=True)
class _Tile:
    """One item to draw: its picture, or None where it failed and ``note`` says why."""

    image: Image.Image | None
    caption: str
    note: str


def write_sheet(store: RunStore) -> str:
    """Store the contact sheet in the run; returns its path or URL. Raises StorageError."""
    buffer = BytesIO()
    contact_sheet(store).save(buffer, "PNG")
    return store.put_report(SHEET_NAME, buffer.getvalue())


def contact_sheet(store: RunStore, limit: int = 100, thumb_px: int = 168) -> Image.Image:
    """At most ``limit`` committed items, evenly spread over the run, as one RGB image.

    Thumbnails fit a square of ``thumb_px``; a video shows its middle frame. Raises StorageError where nothing
    is committed yet.
    """
    if limit < 1 or thumb_px < 16:
        raise ValueError(f"limit must be at least 1 and thumb_px at least 16, got {limit} and {thumb_px}")
    records = store.commits()
    rows = _spread([range(int(record["start"]), int(record["stop"])) for record in records], limit)
    if not rows:
        raise StorageError(f"{store.location} has no finished pictures yet; run the job first")
    done = sum(int(record["stop"]) - int(record["start"]) for record in records)
    failed = sum(int(record["failed"]) for record in records)
    facts = [f"{done:,} of {store.layout.items:,} items" if done < store.layout.items else f"{done:,} items"]
    facts += [f"{failed:,} failed"] if failed else []
    facts += [f"{len(rows):,} shown"] if len(rows) < done else []
    return _drawn(list(_tiles(store, rows)), store.location.name, ", ".join(facts), thumb_px)


def _spread(ranges: list[range], limit: int) -> list[int]:
    """At most ``limit`` of the numbers in ``ranges``, evenly spaced, in order."""
    total = sum(map(len, ranges))
    wanted = [place * total // min(limit, total) for place in range(min(limit, total))]
    chosen: list[int] = []
    before = 0
    for piece in ranges:
        while len(chosen) < len(wanted) and wanted[len(chosen)] < before + len(piece):
            chosen.append(piece[wanted[len(chosen)] - before])
        before += len(piece)
    return chosen


def _tiles(store: RunStore, rows: list[int]) -> Iterator[_Tile]:
    layout = store.layout
    sizes = [name for name in ("height", "width") if name in store.columns]
    for start, stop in _runs(rows):
        values = store.read(start, stop, [layout.kind, "status", "error", "prompt", *sizes])
        for row in range(stop - start):
            caption = str(values["prompt"][row])
            if values["status"][row] == FAILED:
                yield _Tile(None, caption, str(values["error"][row]))
                continue
            pixels = values[layout.kind][row]
            pixels = pixels[len(pixels) // 2] if layout.kind == "video" else pixels
            size = own_size(values, row, (layout.item_shape[-3], layout.item_shape[-2]))
            yield _Tile(picture(pixels, *size), caption, "")


def _runs(rows: list[int], most: int = 8) -> Iterator[tuple[int, int]]:
    """Neighbouring rows as (start, stop): read together, but few at a time."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1 or place - start == most:
            yield rows[start], rows[place - 1] + 1
            start = place


def _drawn(tiles: list[_Tile], title: str, facts: str, thumb_px: int) -> Image.Image:
    from PIL import Image, ImageDraw

    columns = _columns(len(tiles))
    lines = -(-len(tiles) // columns)
    captions = [_wrapped(tile.caption, _font(13), thumb_px, _CAPTION_LINES) for tile in tiles]
    cell_height = thumb_px + 8 + max(map(len, captions)) * _LINE_PX
    width = max(2 * _MARGIN_PX + columns * (thumb_px + _GAP_PX) - _GAP_PX, 420)
    height = 2 * _MARGIN_PX + _TITLE_PX + lines * (cell_height + _GAP_PX) - _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * _MARGIN_PX
    draw.text((_MARGIN_PX, _MARGIN_PX - 6), _fitted(title, _font(22), room), fill=_INK, font=_font(22))
    draw.text((_MARGIN_PX, _MARGIN_PX + 24), _fitted(facts, _font(14), room), fill=_FAINT, font=_font(14))
    for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        line, column = divmod(place, columns)
        left = _MARGIN_PX + column * (thumb_px + _GAP_PX)
        top = _MARGIN_PX + _TITLE_PX + line * (cell_height + _GAP_PX)
        _draw_tile(sheet, draw, tile, (left, top), thumb_px)
        for number, text in enumerate(caption):
            draw.text((left, top + thumb_px + 6 + number * _LINE_PX), text, fill=_INK, font=_font(13))
    return sheet


def _columns(tiles: int) -> int:
    """A little wider than high, with as few empty places as possible in the last line."""
    wanted = math.sqrt(tiles * 1.3)
    near = range(max(1, math.ceil(wanted * 0.8)), math.floor(wanted * 1.25) + 1)
    return min(near, key=lambda columns: (-tiles % columns, abs(columns - wanted)), default=1)


def _draw_tile(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: _Tile, corner: tuple[int, int], thumb_px: int
) -> None:
    left, top = corner
    box = (left, top, left + thumb_px - 1, top + thumb_px - 1)
    if tile.image is None:
        draw.rectangle(box, fill=_FAILED)
        draw.text((left + 10, top + 10), "failed", fill=_INK, font=_font(14))
        room = max(1, (thumb_px - 40) // 16)
        for number, text in enumerate(_wrapped(tile.note, _font(12), thumb_px - 20, room)):
            draw.text((left + 10, top + 34 + number * 16), text, fill=_FAINT, font=_font(12))
    else:
        draw.rectangle(box, fill=_TILE)
        small = _thumbnail(tile.image, thumb_px)
        sheet.paste(small, (left + (thumb_px - small.width) // 2, top + (thumb_px - small.height) // 2))


def _thumbnail(image: Image.Image, thumb_px: int) -> Image.Image:
    """Scaled to fit the square, small pictures up as well; what is transparent becomes white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, _PAGE), image.convert("RGBA"))
    scale = thumb_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@lru_cache
def _font(size_px: int) -> Any:
    """The font that comes with Pillow, without its kerning, which swallows the spaces at small sizes."""
    from PIL import ImageFont

    font: Any = ImageFont.load_default(size_px)
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _wrapped(text: str, font: Any, room_px: int, lines: int) -> list[str]:
    """At most ``lines`` lines of at most ``room_px``, broken between words, the last one cut with an ellipsis."""
    # No tile has room for more characters; measuring a novel takes minutes, and Pillow refuses a megabyte.
    words = " ".join(text.split())[: lines * room_px].split()
    made: list[str] = []
    while words and len(made) < lines - 1:
        count = len(words)
        while count > 1 and font.getlength(" ".join(words[:count])) > room_px:
            count -= 1
        made.append(_fitted(" ".join(words[:count]), font, room_px))
        words = words[count:]
    return [*made, _fitted(" ".join(words), font, room_px)] if words else made


def _fitted(text: str, font: Any, room_px: int) -> str:
    if font.getlength(text) <= room_px:
        return text
    while text and font.getlength(text + "…") > room_px:
        text = text[:-1].rstrip()
    return text + "…"
