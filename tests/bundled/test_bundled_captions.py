"""What the glyphs are called while training, and the pictures made of them."""

from __future__ import annotations

import random

import numpy as np

from dfdask.bundled.captions import (
    VARIATIONS,
    dressed,
    hue_and_share,
    paired,
    repaint,
    repainted,
    sample,
    unambiguous,
    variations,
)
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


def face_and_sunglasses() -> tuple[list[Glyph], Pixels]:
    pictures = np.full((2, 64, 64, 3), 255, np.uint8)
    pictures[0, 6:58, 6:58] = (250, 180, 40)
    pictures[0, 26:30, 18:22] = pictures[0, 26:30, 42:46] = 20  # eyes
    pictures[1, 24:40, 4:60] = 40
    return [Glyph("a", "cat face", ()), Glyph("b", "sunglasses", ())], pictures


def test_sunglasses_go_over_the_eyes() -> None:
    glyphs, pixels = face_and_sunglasses()
    captions, pictures = dressed(glyphs, pixels)
    assert "a cat with sunglasses" in captions.texts and set(captions.pictures) == {0}
    changed = np.argwhere((pictures[0] != pixels[0]).any(-1))
    assert 20 <= changed[:, 0].min() <= 26 and 29 <= changed[:, 0].max() <= 35
    assert (pictures[0, 26:30, 12:52] < 60).all()
    captions, pictures = dressed(glyphs[:1], pixels[:1])
    assert (captions.texts, captions.pictures, pictures.shape) == ([], [], (0, 64, 64, 3))


def test_a_sample_keeps_its_captions(glyphs: list[Glyph], pixels: Pixels) -> None:
    captions, pictures = repainted(glyphs, pixels)
    fewer, chosen = sample(captions, pictures, 5, random.Random(0))
    assert len(chosen) == 5 and set(fewer.pictures) == set(range(5))
    for text, index in zip(fewer.texts, fewer.pictures, strict=True):
        assert hue_and_share(chosen[index])[0] == text.split()[0]
    whole, same = sample(captions, pictures, 10**6, random.Random(0))
    assert whole == captions and np.array_equal(same, pictures)
