"""Renders the glyphs of Noto Color Emoji, with their Unicode names and keywords, to one file.

    python -m dfdask.bundled.render glyphs.npz

On Debian the two sources are the packages fonts-noto-color-emoji and unicode-cldr-core.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
STRIKE = 109
"""The only size of the font's bitmaps: 136 x 128 pixels for every glyph."""

Pixels = npt.NDArray[np.uint8]

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_REGIONAL = {chr(code) for code in range(0x1F1E6, 0x1F200)}
_TAGS = {chr(code) for code in range(0xE0020, 0xE0080)}
_GENDERED = set("\u2640\u2642\U0001f468\U0001f469")


class GlyphFileError(Exception):
    """The glyph file, the font or CLDR is missing, or not what it should be."""


@dataclass(frozen=True)
class Glyph:
    """One picture and what it is called: `name` is the one that adherence is measured with."""

    sequence: str
    name: str
    keywords: tuple[str, ...]


def read_annotations(cldr: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """English name and keywords of every sequence in CLDR's two annotation files."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for entry in ElementTree.parse(cldr / folder / "en.xml").iter("annotation"):
            sequence, text = entry.get("cp", ""), (entry.text or "").strip().lower()
            if entry.get("type") == "tts":
                names[sequence] = text
            else:
                keywords[sequence] = tuple(word.strip() for word in text.split("|"))
    return {sequence: (name, keywords.get(sequence, ())) for sequence, name in names.items()}


def is_wanted(sequence: str) -> bool:
    """Every single code point; of the sequences those that are pictures of their own.

    Left out: skin tones and the gendered versions of people and families (near-duplicates), and the flags
    of countries and regions (many are the same picture twice).
    """
    if sequence.isascii():
        return False
    if len(sequence) == 1:
        return sequence not in _REGIONAL
    parts = set(sequence)
    return not parts & (_SKIN_TONES | _REGIONAL | _TAGS | _GENDERED)


def draw(sequence: str, font: ImageFont.FreeTypeFont, size: int) -> Pixels | None:
    """The glyph on white, `size` x `size` x 3, or None where the font has no single glyph for it."""
    if font.getlength(sequence) > 140:
        return None
    canvas = Image.new("RGB", (136, 136), (255, 255, 255))
    ImageDraw.Draw(canvas).text((0, 4), sequence, font=font, embedded_color=True)
    if (np.asarray(canvas).min(-1) < 250).sum() < 500:  # blank, or a sliver such as a dash
        return None
    return np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS))


def render(font_path: Path, cldr: Path, size: int) -> tuple[list[Glyph], Pixels]:
    """All wanted glyphs and their pixels; glyphs that look exactly alike become one with more keywords."""
    font = ImageFont.truetype(str(font_path), STRIKE)
    missing = draw("\U0010fffe", font, size)
    glyphs: dict[bytes, Glyph] = {}
    taken: dict[str, str] = {}
    pictures: dict[bytes, Pixels] = {}
    for sequence, (name, keywords) in sorted(read_annotations(cldr).items()):
        picture = draw(sequence, font, size) if is_wanted(sequence) else None
        if picture is None or (missing is not None and np.array_equal(picture, missing)):
            continue
        key = picture.tobytes()
        if key in glyphs:
            twin = glyphs[key]
            glyphs[key] = Glyph(twin.sequence, twin.name, (*twin.keywords, name, *keywords))
        elif name in taken:
            raise ValueError(f"{sequence!r} and {taken[name]!r} are both named {name!r}: two pictures, one name")
        else:
            taken[name] = sequence
            glyphs[key], pictures[key] = Glyph(sequence, name, keywords), picture
    return list(glyphs.values()), np.stack(list(pictures.values()))


def save_glyphs(path: Path, glyphs: list[Glyph], pixels: Pixels) -> None:
    """One compressed file: `pixels` (n, size, size, 3) uint8 and `glyphs`, JSON in the same order."""
    rows = [[glyph.sequence, glyph.name, list(glyph.keywords)] for glyph in glyphs]
    np.savez_compressed(path, pixels=pixels, glyphs=np.array(json.dumps(rows)))


def load_glyphs(path: Path) -> tuple[list[Glyph], Pixels]:
    """What `save_glyphs` wrote."""
    hint = f"make one with: python -m dfdask.bundled.render {path}"
    if not path.is_file():
        raise GlyphFileError(f"no glyph file at {path}; {hint}")
    try:
        with path.open("rb") as file, np.load(file) as archive:  # numpy leaves a broken file open
            rows = json.loads(str(archive["glyphs"]))
            return [Glyph(sequence, name, tuple(keywords)) for sequence, name, keywords in rows], archive["pixels"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise GlyphFileError(f"{path} is no glyph file ({error}); {hint}") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Render Noto Color Emoji with CLDR names to one file.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--cldr", type=Path, default=CLDR)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args(arguments)
    for source in (
        options.font,
        options.cldr / "annotations" / "en.xml",
        options.cldr / "annotationsDerived" / "en.xml",
    ):
        if not source.is_file():
            raise SystemExit(f"error: no file {source}; --font and --cldr say where else to look")
    glyphs, pixels = render(options.font, options.cldr, options.size)
    save_glyphs(options.output, glyphs, pixels)
    print(f"{len(glyphs)} glyphs, {pixels.shape[1]} pixels, to {options.output}")


if __name__ == "__main__":
    main()
