"""A contact sheet: many pictures of a run at a glance, each with its prompt."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

from dfdask.errors import StorageError
from dfdask.export import own_size, picture
from dfdask.store import FAILED, RunStore
from dfdask.words import count

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SHEET_NAME = "contact-sheet.png"
_THUMB_PX, _MARGIN_PX, _GAP_PX, _TITLE_PX, _LINE_PX = 168, 28, 16, 58, 18
_READERS = 4
_READ_BYTES = 32_000_000
_MAX_CHARACTERS = 500  # more than any tile has room for; prompts may be novels
_CAPTION_LINES = 2
_OTHER_FONTS = (  # of systems and their packages, for scripts that Pillow's font lacks; most scripts first
    *("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "PingFang.ttc"),
    *("msyh.ttc", "malgun.ttf", "Nirmala.ttf", "segoeui.ttf", "arial.ttf", "LiberationSans-Regular.ttf"),
)
_PAGE, _INK, _FAINT, _TILE, _FAILED = "#ffffff", "#1f2328", "#6e7781", "#f3f4f6", "#e5e7eb"


@dataclass(frozen=True, slots=True)
class Tile:
    """One item of a gallery: its thumbnail (RGB, 168 px), or None where it failed and ``note`` says why."""

    row: int
    image: Image.Image | None
    caption: str
    note: str


def write_sheet(store: RunStore) -> str:
    """Store the contact sheet in the run; returns its path or URL. Raises StorageError."""
    buffer = BytesIO()
    contact_sheet(store).save(buffer, "PNG")
    return store.put_report(SHEET_NAME, buffer.getvalue())


def contact_sheet(store: RunStore, limit: int = 100, rows: Sequence[int] | None = None) -> Image.Image:
    """At most ``limit`` committed items, evenly spread over the run (or of its ``rows``), as one RGB image.

    A video shows its middle frame. Raises StorageError where nothing is committed yet.
    """
    records = store.commits()
    tiles = read_tiles(store, records, limit, rows)
    if not tiles:
        raise StorageError(f"{store.location} has no finished pictures yet; run the job first")
    done = sum(int(record["stop"]) - int(record["start"]) for record in records)
    failed = sum(int(record["failed"]) for record in records)
    items = count(store.layout.items, "item")
    facts = [items if done == store.layout.items else f"{done:,} of {items}"]
    facts += [f"{failed:,} failed"] if failed else []
    facts += [f"{len(tiles):,} shown"] if len(tiles) < done else []
    return _drawn(tiles, _readable(store.location.name), ", ".join(facts))


def read_tiles(
    store: RunStore, records: Sequence[Mapping[str, Any]], limit: int, only: Sequence[int] | None = None
) -> list[Tile]:
    """At most ``limit`` items of the commits ``records``, evenly spread over them, or over the rows ``only`` in them.

    Raises StorageError.
    """
    ranges = [range(int(record["start"]), int(record["stop"])) for record in records]
    if only is not None:
        done = {row for piece in ranges for row in piece}
        ranges = [range(row, row + 1) for row in sorted(done.intersection(only))]
    rows = _spread(ranges, limit)
    most = max(1, min(8, _READ_BYTES // store.layout.item_bytes))
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(lambda part: _tiles(store, *part), _runs(rows, most))
        return [tile for part in parts for tile in part]


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


def _tiles(store: RunStore, start: int, stop: int) -> list[Tile]:
    """The items ``start`` to ``stop`` (exclusive)."""
    layout = store.layout
    sizes = [name for name in ("height", "width") if name in store.columns]
    values = store.read(start, stop, [layout.kind, "status", "error", "prompt", *sizes])
    tiles = []
    for row in range(stop - start):
        caption = str(values["prompt"][row])[:_MAX_CHARACTERS]
        if values["status"][row] == FAILED:
            tiles.append(Tile(start + row, None, caption, str(values["error"][row])[:_MAX_CHARACTERS]))
            continue
        pixels = values[layout.kind][row]
        pixels = pixels[len(pixels) // 2] if layout.kind == "video" else pixels
        size = own_size(values, row, (layout.item_shape[-3], layout.item_shape[-2]))
        tiles.append(Tile(start + row, _thumbnail(picture(pixels, *size)), caption, ""))
    return tiles


def _runs(rows: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring rows as (start, stop): read together, but few at a time."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1 or place - start == most:
            yield rows[start], rows[place - 1] + 1
            start = place


def _drawn(tiles: list[Tile], title: str, facts: str) -> Image.Image:
    from PIL import Image, ImageDraw

    columns = _columns(len(tiles))
    lines = -(-len(tiles) // columns)
    written = [_caption(tile) for tile in tiles]
    captions = [_wrapped(text, font, _THUMB_PX, _CAPTION_LINES) for text, font in written]
    cell_height = _THUMB_PX + 8 + max(map(len, captions)) * _LINE_PX
    width = max(2 * _MARGIN_PX + columns * (_THUMB_PX + _GAP_PX) - _GAP_PX, 420)
    height = 2 * _MARGIN_PX + _TITLE_PX + lines * (cell_height + _GAP_PX) - _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAGE)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * _MARGIN_PX
    draw.text((_MARGIN_PX, _MARGIN_PX - 6), _fitted(title, _font(22), room), fill=_INK, font=_font(22))
    draw.text((_MARGIN_PX, _MARGIN_PX + 24), _fitted(facts, _font(14), room), fill=_FAINT, font=_font(14))
    for place, (tile, caption, (_, font)) in enumerate(zip(tiles, captions, written, strict=True)):
        line, column = divmod(place, columns)
        left = _MARGIN_PX + column * (_THUMB_PX + _GAP_PX)
        top = _MARGIN_PX + _TITLE_PX + line * (cell_height + _GAP_PX)
        _draw_tile(sheet, draw, tile, (left, top))
        for number, text in enumerate(caption):
            draw.text((left, top + _THUMB_PX + 6 + number * _LINE_PX), text, fill=_INK, font=font)
    return sheet


def _columns(tiles: int) -> int:
    """A little wider than high, with as few empty places as possible in the last line."""
    wanted = math.sqrt(tiles * 1.3)
    near = range(max(1, math.ceil(wanted * 0.8)), math.floor(wanted * 1.25) + 1)
    return min(near, key=lambda columns: (-tiles % columns, abs(columns - wanted)), default=1)


def _draw_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, corner: tuple[int, int]) -> None:
    left, top = corner
    box = (left, top, left + _THUMB_PX - 1, top + _THUMB_PX - 1)
    if tile.image is None:
        draw.rectangle(box, fill=_FAILED)
        draw.text((left + 10, top + 10), "failed", fill=_INK, font=_font(14))
        room = max(1, (_THUMB_PX - 40) // 16)
        for number, text in enumerate(_wrapped(_readable(tile.note), _font(12), _THUMB_PX - 20, room)):
            draw.text((left + 10, top + 34 + number * 16), text, fill=_FAINT, font=_font(12))
    else:
        draw.rectangle(box, fill=_TILE)
        small = tile.image
        sheet.paste(small, (left + (_THUMB_PX - small.width) // 2, top + (_THUMB_PX - small.height) // 2))


def _thumbnail(image: Image.Image) -> Image.Image:
    """Scaled to fit the square, small pictures up as well; what is transparent becomes white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, _PAGE), image.convert("RGBA"))
    scale = _THUMB_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@lru_cache
def _font(size_px: int) -> Any:
    """The font that comes with Pillow, without its kerning, which swallows the spaces at small sizes."""
    from PIL import ImageFont

    font: Any = ImageFont.load_default(size_px)
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


@lru_cache
def _other_fonts(size_px: int) -> tuple[Any, ...]:
    from PIL import ImageFont

    found = []
    for name in _OTHER_FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size_px))
    return tuple(found)


def _caption(tile: Tile) -> tuple[str, Any]:
    """What is written below it, and in which font: another one where that has all of it and Pillow's has not."""
    whole, readable = " ".join(tile.caption.split())[:_MAX_CHARACTERS], _readable(tile.caption)
    if not all(map(_drawable, whole.replace(" ", ""))):
        for font in _other_fonts(13):
            if all(_has(font, character) for character in set(whole) - {" "}):
                return whole, font
    return readable or f"item {tile.row}", _font(13)


@lru_cache(maxsize=16384)
def _has(font: Any, character: str) -> bool:
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def _readable(text: str) -> str:
    """``text`` as far as the font has it, in one line: letters lose the accents that it lacks, the rest goes."""
    return " ".join("".join(map(_drawable, " ".join(text.split())[:_MAX_CHARACTERS])).split())


@lru_cache(maxsize=4096)
def _drawable(character: str) -> str:
    if unicodedata.category(character) == "Pd":
        return "-"
    forms = (character, unicodedata.normalize("NFKD", character))
    kept = ("".join(part for part in form if _has(_font(13), part)) for form in forms)
    return next(filter(None, kept), "")


def _wrapped(text: str, font: Any, room_px: int, lines: int) -> list[str]:
    """At most ``lines`` lines of at most ``room_px``, broken between words, the last one cut with an ellipsis."""
    words = text.split()
    made: list[str] = []
    while words and len(made) < lines - 1:
        fit = 1
        while fit < len(words) and font.getlength(" ".join(words[: fit + 1])) <= room_px:
            fit += 1
        made.append(_fitted(" ".join(words[:fit]), font, room_px))
        words = words[fit:]
    return [*made, _fitted(" ".join(words), font, room_px)] if words else made


def _fitted(text: str, font: Any, room_px: int) -> str:
    if font.getlength(text) <= room_px:
        return text
    longest = bisect_right(range(1, len(text)), room_px, key=lambda length: font.getlength(text[:length] + "…"))
    return text[:longest].rstrip() + "…"
