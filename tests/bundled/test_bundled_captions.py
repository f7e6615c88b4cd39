"""What the glyphs are called while training, and the pictures made of them."""

from __future__ import annotations

import random

import numpy as np

from dfdask.bundled.captions import VARIATIONS, hue_and_share, paired, repaint, repainted, unambiguous, variations
from dfdask.bundled.render import Glyph, Pixels


def test_a_glyphs_main_colour_has_a_name(pixels: Pixels) -> None:
    found = [hue_and_share(picture) for picture in pixels]
    assert [word for word, _ in found] == ["red", "blue", "orange", "green"]
    assert all(share > 0.9 for _, share in found)
    assert hue_and_share(np.full_like(pixels[0], 255)) == ("", 0.0)


def test_repainting_changes_the_colour_and_nothing_else(pixels: Pixels) -> None:
    green = repaint(pixels[0], "red", "green")
    assert hue_and_share(green)[0] == "green"
    assert ((green == 255).all(-1) == (pixels[0] == 255).all(-1)).all()
    other = repaint(pixels[1], "red", "green")  # it has no red
    assert np.abs(other.astype(int) - pixels[1]).max() <= 3


def test_names_of_a_colour_keep_their_paint(glyphs: list[Glyph], pixels: Pixels) -> None:
    captions, pictures = repainted(glyphs, pixels)
    assert "purple car" in captions.texts and "red leaf" in captions.texts
    assert not [text for text in captions.texts if "apple" in text or "book" in text]
    for text, picture in zip(captions.texts, captions.pictures, strict=True):
        assert hue_and_share(pictures[picture])[0] == text.split()[0]


def test_a_keyword_that_is_anothers_name_is_dropped(glyphs: list[Glyph]) -> None:
    assert unambiguous(glyphs)[1].keywords == ("library", "read")
    assert [glyph.name for glyph in unambiguous(glyphs)] == [glyph.name for glyph in glyphs]


def test_variations_are_the_same_for_a_seed_and_speak_of_their_glyph(glyphs: list[Glyph], pixels: Pixels) -> None:
    captions = variations(glyphs, pixels, random.Random(5))
    assert captions == variations(glyphs, pixels, random.Random(5))
    assert captions.texts != variations(glyphs, pixels, random.Random(6)).texts
    assert captions.pictures == [index for index in range(len(glyphs)) for _ in range(VARIATIONS)]
    for text, index in zip(captions.texts, captions.pictures, strict=True):
        words = {word for part in (glyphs[index].name, *glyphs[index].keywords) for word in part.split()}
        assert words & set(text.replace(",", "").split())


def test_a_pair_shows_both_of_the_glyphs_that_it_names(glyphs: list[Glyph], pixels: Pixels) -> None:
    captions, pictures = paired(unambiguous(glyphs), pixels, 12, random.Random(1))
    colours = dict(zip((glyph.name for glyph in glyphs), ("red", "blue", "orange", "green"), strict=True))
    side, seen = pixels.shape[1], set()
    for text, index in zip(captions.texts, captions.pictures, strict=True):
        joint = " and " if " and " in text else " with "
        seen.add(joint)
        first, second = text.split(joint)
        top, bottom = (
            (slice(None), slice(None)) if joint == " and " else (slice(0, side // 2), slice(3 * side // 4, side))
        )
        left, right = (side // 2, side // 2) if joint == " and " else (side // 2, 3 * side // 4)
        for name, colour in colours.items():
            if name in first:
                assert hue_and_share(pictures[index][top, :left])[0] == colour
            if name in second:
                assert hue_and_share(pictures[index][bottom, right:])[0] == colour
    assert seen == {" and ", " with "}
