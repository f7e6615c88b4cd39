"""Which glyphs are rendered, and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dfdask.bundled.render import Glyph, GlyphFileError, Pixels, is_wanted, load_glyphs, main, read_annotations

DERIVED = '<annotation cp="\U0001f44b\U0001f3fb">wave</annotation>'


def annotations(folder: Path, body: str) -> None:
    folder.mkdir()
    (folder / "en.xml").write_text(f"<ldml><annotations>{body}</annotations></ldml>", "utf-8")


def test_names_and_keywords_come_from_cldr(tmp_path: Path) -> None:
    apple = '<annotation cp="\U0001f34e">apple | Fruit | red</annotation>'
    annotations(tmp_path / "annotations", apple + '<annotation cp="\U0001f34e" type="tts">Red Apple</annotation>')
    annotations(tmp_path / "annotationsDerived", '<annotation cp="\u2b50" type="tts">star</annotation>' + DERIVED)
    assert read_annotations(tmp_path) == {
        "\U0001f34e": ("red apple", ("apple", "fruit", "red")),
        "\u2b50": ("star", ()),
    }


@pytest.mark.parametrize(
    ("sequence", "wanted"),
    [
        ("\U0001f34e", True),
        ("a", False),
        ("\U0001f44b\U0001f3fb", False),  # a skin tone
        ("\U0001f1e9\U0001f1ea", False),  # a country's flag
        ("\U0001f1e9", False),
        ("\U0001f469\u200d\U0001f680", False),  # a woman astronaut
        ("\U0001f9d1\u200d\U0001f680", True),  # an astronaut
    ],
)
def test_near_duplicates_and_flags_are_left_out(sequence: str, wanted: bool) -> None:
    assert is_wanted(sequence) is wanted


def test_a_glyph_file_reads_back_as_it_was(glyph_file: Path, glyphs: list[Glyph], pixels: Pixels) -> None:
    loaded, pictures = load_glyphs(glyph_file)
    assert loaded == glyphs
    assert np.array_equal(pictures, pixels)


def test_a_missing_or_broken_file_says_how_to_make_one(glyph_file: Path, tmp_path: Path) -> None:
    with pytest.raises(GlyphFileError, match="no glyph file .*dfdask.bundled.render"):
        load_glyphs(tmp_path / "none.npz")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(glyph_file.read_bytes()[:200])
    with pytest.raises(GlyphFileError, match="is no glyph file .*dfdask.bundled.render"):
        load_glyphs(broken)


def test_a_missing_font_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: no file .*font\.ttf; --font and --cldr"):
        main([str(tmp_path / "out.npz"), "--font", str(tmp_path / "font.ttf")])
