"""What the glyphs are called while training: their exact names, variations, and the colours of other paint.

Nothing here is random but through the `random.Random` that is passed in.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dfdask.bundled.render import Glyph, Pixels

HUES = {"red": 0, "orange": 28, "yellow": 48, "green": 115, "blue": 212, "purple": 280, "pink": 335}
"""Degrees at the middle of what each word means."""
_UPPER = {"red": 14, "orange": 38, "yellow": 66, "green": 168, "blue": 255, "purple": 312, "pink": 345}
"""Degrees at which each colour ends; red goes on from pink's end through 360."""
_FIXED_WORDS = (
    "face person people man woman men women boy girl child baby hand hands skin hair family couple kiss flag "
    "square circle button keycap moon clock o’clock prohibited sign symbol black white brown gray grey globe "
    "sun rainbow map"
)
_FIXED = {*_FIXED_WORDS.split(), *HUES}
"""Names with one of these words keep their paint: it is what they mean, or there would be odd people."""
_PREFIXES = ("a ", "a ", "the ", "an ", "a photo of a ", "a picture of a ", "an image of a ", "an emoji of a ")
_PREFIXES_OF_ONE = ("a drawing of ", "a small ", "one ", "emoji of ", "icon of ")
VARIATIONS = 48
"""Captions made of each glyph besides its name."""


@dataclass(frozen=True)
class Captions:
    """Parallel lists: a text and the index of the picture that it describes."""

    texts: list[str]
    pictures: list[int]


def hue_and_share(pixels: Pixels) -> tuple[str, float]:
    """The colour word for most of a (size, size, 3) glyph, and its share of all that is not white."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV")), -1, 0)
    drawn = (pixels.min(-1) < 235).sum()
    strong = (saturation > 90) & (value > 70)
    words = np.array([*_UPPER, "red"])[np.digitize(hue[strong] * (360 / 255), list(_UPPER.values()))]
    if drawn == 0 or len(words) == 0:
        return "", 0.0
    word, count = Counter(words.tolist()).most_common(1)[0]
    if word == "orange" and np.median(value[strong]) < 165:
        word = "brown"
    return word, count / int(drawn)


def repaint(pixels: Pixels, old: str, new: str) -> Pixels:
    """The glyph with its main colour turned into another; other colours, white and shadows stay."""
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    hue = hsv[..., 0] * (360 / 255)
    apart = np.abs((hue - HUES[old] + 180) % 360 - 180)
    turned = ((hue + HUES[new] - HUES[old]) % 360 * (255 / 360)).round().astype(np.uint8)
    hsv[..., 0] = np.where(apart < 45, turned, hsv[..., 0])
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def repainted(glyphs: list[Glyph], pixels: Pixels) -> tuple[Captions, Pixels]:
    """Glyphs in other colours, captioned so, for "blue car" and "green apple"; indices count from 0."""
    texts: list[str] = []
    pictures: list[int] = []
    copies: list[Pixels] = []
    for glyph, picture in zip(glyphs, pixels, strict=True):
        old, share = hue_and_share(picture)
        if old not in HUES or share < 0.5 or _words(glyph.name) & _FIXED:
            continue
        names = [glyph.name, glyph.name, *(word for word in glyph.keywords if not _words(word) & _FIXED)][:5]
        for new in HUES.keys() - {old}:
            texts += [f"{new} {name}" for name in names]
            pictures += [len(copies)] * len(names)
            copies.append(repaint(picture, old, new))
    return Captions(texts, pictures), np.stack(copies) if copies else pixels[:0]


def variations(glyphs: list[Glyph], pixels: Pixels, rng: random.Random) -> Captions:
    """Other texts for the glyphs as they are, the same number for each."""
    frequency = Counter(word for glyph in glyphs for word in glyph.keywords)
    texts: list[str] = []
    for glyph, picture in zip(glyphs, pixels, strict=True):
        colour, share = hue_and_share(picture)
        texts += [_vary(glyph, colour if share > 0.5 else "", frequency, rng) for _ in range(VARIATIONS)]
    return Captions(texts, [index for index in range(len(glyphs)) for _ in range(VARIATIONS)])


def _vary(glyph: Glyph, colour: str, frequency: Counter[str], rng: random.Random) -> str:
    # A keyword of forty glyphs says little of any one of them: it is drawn a fortieth as often.
    keywords = [word for word in glyph.keywords if word != glyph.name] or [glyph.name]
    keyword, other = rng.choices(keywords, [1 / frequency.get(word, 1) for word in keywords], k=2)
    name = glyph.name
    kind = rng.random()
    if kind < 0.25:
        text = name
    elif kind < 0.4:
        text = re.sub(r"\b(face|button|person|symbol|sign)\b", "", name).strip() or name
    elif kind < 0.6:
        text = keyword
    elif kind < 0.7:
        text = f"{keyword} {other}" if other != keyword else keyword
    elif kind < 0.8:
        text = rng.choice((f"{name}, {keyword}", f"{keyword} {name}", f"{name} {keyword}"))
    else:
        text = name if not colour or colour in _words(name) else f"{colour} {rng.choice((name, name, keyword))}"
    if rng.random() < 0.3:  # as typed, or as a caption cleaner leaves it
        text = re.sub(r"[^\w\s]+", " ", text.replace("’", "'"))
    if rng.random() < 0.4:
        text = rng.choice(_PREFIXES + _PREFIXES_OF_ONE) + text
    return " ".join(text.split()) or name


def _words(text: str) -> set[str]:
    return set(re.findall(r"[\w’]+", text.lower()))
