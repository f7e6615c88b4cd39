"""The contact sheet: which items are on it, and that all is drawn where it belongs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from numpy.typing import NDArray
from PIL import Image
from stored import TEXT, columns, everything, new_run, put

from dfdask import sheet as sheet_module
from dfdask.errors import StorageError
from dfdask.sheet import contact_sheet, write_sheet
from dfdask.store import FAILED, OK, Layout, RunStore
from dfdask.targets import Location, resolve_output

WHITE, GREY = (255, 255, 255), (229, 231, 235)
THUMB, MARGIN, GAP, TITLE = 168, 28, 16, 58


def plain_run(
    location: Location,
    items: int,
    shard_items: int = 8,
    shape: tuple[int, ...] = (8, 8, 3),
    failed: dict[int, str] | None = None,
    prompts: list[str] | None = None,
    shards: list[int] | None = None,
) -> RunStore:
    """Every picture of one colour, that of ``colour(row)``."""
    values = columns(items)
    if prompts:
        values["prompt"] = np.array(prompts, dtype=TEXT)
    layout = Layout("image" if len(shape) == 3 else "video", shape, items, shard_items)
    store = RunStore.create(location, layout, values, {"dfdask": {}})
    failed = failed or {}
    for shard in range(layout.shards) if shards is None else shards:
        rows = layout.rows(shard)
        data = np.zeros((len(rows), *shape), np.uint8)
        for place, row in enumerate(rows):
            data[place] = colour(row)
        status = np.array([FAILED if row in failed else OK for row in rows], np.uint8)
        store.write_shard(shard, data, status, [failed.get(row, "") for row in rows], {})
    return store


def colour(row: int) -> tuple[int, int, int]:
    return row // 256, row % 256, 77


def tiles(sheet: Image.Image) -> Iterator[NDArray[np.uint8]]:
    """The squares of the pictures, (168, 168, 3) uint8, line by line; all white where there is none."""
    pixels = np.asarray(sheet)
    across = (sheet.width - 2 * MARGIN + GAP) // (THUMB + GAP)
    tops = [y for y in range(MARGIN + TITLE, sheet.height - THUMB) if is_top(pixels, y)]
    for top in tops:
        for column in range(across):
            left = MARGIN + column * (THUMB + GAP)
            yield pixels[top : top + THUMB, left : left + THUMB]


def is_top(pixels: NDArray[np.uint8], y: int) -> bool:
    """Whether the first tile of a line begins at ``y``: its edge is a whole line that is not white."""
    edge = slice(MARGIN, MARGIN + THUMB)
    return bool((pixels[y, edge] != 255).any(-1).all()) and not (pixels[y - 1, edge] != 255).any(-1).all()


def middles(sheet: Image.Image) -> list[tuple[int, ...]]:
    found = [tuple(int(value) for value in tile[THUMB // 2, THUMB // 2]) for tile in tiles(sheet)]
    while found and found[-1] == WHITE:
        found.pop()
    return found


def test_all_items_in_order(location: Location) -> None:
    store = plain_run(location, 13, failed={5: "CUDA out of memory"})
    sheet = contact_sheet(store)
    assert sheet.mode == "RGB"
    assert middles(sheet) == [GREY if row == 5 else colour(row) for row in range(13)]


@pytest.mark.parametrize("items", [1, 2, 3, 5, 17, 100])
def test_it_is_about_as_wide_as_high(tmp_path: Path, items: int) -> None:
    sheet = contact_sheet(plain_run(resolve_output(str(tmp_path / "demo")), items))
    assert middles(sheet) == [colour(row) for row in range(items)]
    assert 0.5 < sheet.width / sheet.height < 2


def test_a_hundred_of_ten_thousand(local: Location) -> None:
    store = plain_run(local, 10_000, shard_items=500, shape=(2, 2, 3))
    assert middles(contact_sheet(store)) == [colour(row) for row in range(0, 10_000, 100)]
    assert middles(contact_sheet(store, limit=3)) == [colour(row) for row in (0, 3333, 6666)]


def test_only_what_is_committed(local: Location) -> None:
    store = plain_run(local, 40, shards=[1, 4])
    assert middles(contact_sheet(store)) == [colour(row) for row in (*range(8, 16), *range(32, 40))]
    assert middles(contact_sheet(store, limit=4)) == [colour(row) for row in (8, 12, 32, 36)]


def test_nothing_is_committed_yet(local: Location) -> None:
    store = new_run(local)
    for attempt in (contact_sheet, write_sheet):
        with pytest.raises(StorageError, match="has no finished pictures yet; run the job first"):
            attempt(store)
    assert not any(key.endswith(".png") for key in everything(local))


def test_all_items_failed(local: Location) -> None:
    store = new_run(local, items=3)
    put(store, 0, failed=(0, 1, 2))
    assert middles(contact_sheet(store)) == [GREY] * 3


def test_a_video_shows_its_middle_frame(local: Location) -> None:
    store = new_run(local, items=1, shape=(5, 8, 8, 3))
    frames = np.arange(5, dtype=np.uint8).reshape(1, 5, 1, 1, 1) * np.full((1, 5, 8, 8, 3), 50, np.uint8)
    store.write_shard(0, frames, np.array([OK], np.uint8), [""], {})
    assert middles(contact_sheet(store)) == [(100, 100, 100)]


def test_shapes_are_kept_and_cut_to_their_own_size(local: Location) -> None:
    sizes = [(20, 40), (20, 10), (8, 40)]
    heights, widths = np.array(sizes).T
    store = new_run(local, items=3, shape=(20, 40, 3), height=heights, width=widths)
    data = np.zeros((3, 20, 40, 3), np.uint8)  # black beyond the own size, as workers leave it
    for item, (height, width) in enumerate(sizes):
        data[item, :height, :width] = (10, 200, 100)
    store.write_shard(0, data, np.full(3, OK, np.uint8), [""] * 3, {})
    for tile, (height, width) in zip(tiles(contact_sheet(store)), sizes, strict=False):
        shown = np.argwhere((tile == (10, 200, 100)).all(-1))
        extent = shown.max(0) - shown.min(0) + 1
        wanted = np.array([height, width]) * THUMB / max(height, width)
        assert np.abs(extent - wanted).max() <= 1
        assert not (tile == 0).all(-1).any(), "nothing of the unused black is seen"


@pytest.mark.parametrize(("channels", "middle"), [(1, (64, 64, 64)), (4, (191, 191, 191))])
def test_other_channels(local: Location, channels: int, middle: tuple[int, int, int]) -> None:
    store = new_run(local, items=1, shape=(8, 8, channels))
    data = np.full((1, 8, 8, channels), 64, np.uint8)
    data[..., 3:] = 85  # a third: of grey on white
    store.write_shard(0, data, np.array([OK], np.uint8), [""], {})
    (found,) = middles(contact_sheet(store))
    assert np.abs(np.array(found) - middle).max() <= 1


CAPTIONS = [
    "",
    "   \n\t ",
    "猫が窓辺で眠っている",
    "كلب يركض في الحديقة",
    "emoji 🐈🚀 👨‍👩‍👧",
    "line one\nline two\r\nline three",
    "nul \x00 and \x1b[31mcolour",
    "two words " * 1000,
    "W" * 5000,
    "кот в шляпе " * 50,
    "i" * 5000,
    "é" * 400 + " ünïcödé — “naïve”",
    "\u0301" * 300,
    "x" * 1_100_000,
]


@pytest.mark.parametrize("failed", [False, True], ids=["ok", "failed"])
def test_captions_stay_in_their_places(local: Location, failed: bool) -> None:
    """Any text, as a prompt and as an error: nothing is drawn between the columns or on the margins."""
    items = len(CAPTIONS)
    notes = dict(enumerate(CAPTIONS)) if failed else {}
    store = plain_run(local, items, failed=notes, prompts=CAPTIONS)
    sheet = contact_sheet(store)
    assert middles(sheet) == ([GREY] * items if failed else [colour(row) for row in range(items)])
    pixels = np.asarray(sheet)
    assert (pixels[:, :MARGIN] == 255).all() and (pixels[:, -MARGIN:] == 255).all()
    assert (pixels[-8:] == 255).all()
    body = pixels[MARGIN + TITLE :]
    for column in range(1, (sheet.width - 2 * MARGIN + GAP) // (THUMB + GAP)):
        right = MARGIN + column * (THUMB + GAP)
        assert (body[:, right - GAP + 1 : right - 1] == 255).all(), f"the gap before column {column}"


def drawn_texts(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from PIL import ImageDraw

    draw: Any = ImageDraw.ImageDraw.text
    found: list[str] = []

    def listening(self: Any, place: Any, text: str, **options: Any) -> None:
        found.append(text)
        draw(self, place, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", listening)
        contact_sheet(store)
    return found


def test_what_is_written(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet_module, "_other_fonts", lambda size_px: ())
    prompts = ["a red apple on a wooden table", "猫", "crème brûlée – déjà vu", "a   b\nc", "no " * 40, "🐈 cat"]
    store = plain_run(local, 6, failed={3: "ValueError: no\nluck"}, prompts=prompts)
    assert drawn_texts(store, monkeypatch) == [
        "demo",
        "6 items, 1 failed",
        "a red apple on a wooden",
        "table",
        "item 1",
        "creme brulee - deja vu",
        "failed",
        "ValueError: no luck",
        "a b c",
        *drawn_texts(store, monkeypatch)[9:11],
        "cat",
    ]
    long = drawn_texts(store, monkeypatch)[9:11]
    assert set(long[0].split()) == {"no"} and long[1].startswith("no no") and long[1].endswith("…")


def test_the_facts_in_the_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = plain_run(resolve_output(str(tmp_path / "one")), 1)
    assert drawn_texts(one, monkeypatch)[:2] == ["one", "1 item"]
    part = plain_run(resolve_output(str(tmp_path / ("long-" * 20))), 1600, 160, shards=list(range(6)), failed={3: "x"})
    title, facts, *_ = drawn_texts(part, monkeypatch)
    assert facts == "960 of 1,600 items, 1 failed, 100 shown"
    assert title.startswith("long-long-")


def test_it_is_stored_in_the_run(location: Location) -> None:
    store = plain_run(location, 3)
    assert write_sheet(store) == write_sheet(store) == f"{location}/report/contact-sheet.png"
    data = bytes(obstore.get(location.object_store(), "report/contact-sheet.png").bytes())
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert middles(image.convert("RGB")) == [colour(row) for row in range(3)]
    assert store.dataset().sizes["item"] == 3 and store.verify() == []


def test_scripts_that_pillows_font_lacks(local: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    store = plain_run(local, 2, prompts=["кот", "\U0001f3af кот"])
    monkeypatch.setattr(sheet_module, "_other_fonts", lambda size_px: ())
    assert drawn_texts(store, monkeypatch)[-2:] == ["item 0", "item 1"]
    monkeypatch.undo()
    if not any(sheet_module._has(font, letter) for font in sheet_module._other_fonts(13) for letter in "кот"):
        pytest.skip("no font of this system has Cyrillic letters")
    assert drawn_texts(store, monkeypatch)[-2] == "кот"
