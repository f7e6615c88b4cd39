"""What the glyphs are called while training: their exact names, variations, and the colours of other paint.

Nothing here is random but through the `random.Random` that is passed in.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, replace

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
_SIGN_WORDS = (
    "button keycap square circle sign symbol arrow mark prohibited no flag hexagram o’clock clock diamond triangle "
    "input suit dot divide multiply minus plus"
)
_SIGNS = set(_SIGN_WORDS.split())
"""Names with one of these words are left out of the pictures of two things."""
_FACE_NAMES = (
    "cat face|dog face|fox|lion|tiger face|panda|bear|koala|rabbit face|mouse face|hamster|monkey face|pig face|"
    "cow face|wolf|polar bear|robot|grinning face|alien|jack-o-lantern|sun with face|full moon face|clown face|"
    "old man|unicorn|chicken|penguin|baby chick"
)
_FACES = _FACE_NAMES.split("|")
"""Of all faces those on which the dark pixels are the eyes."""
_SUNGLASSES = "sunglasses"
_ARTICLES = ("", "a ", "the ")
_HALF, _MAIN, _EXTRA = 0.5, 0.8, 0.44
"""Shares of the side that a glyph takes: beside another, with another at its corner, at the corner."""
_PAIR_TEXTS = 4
_PREFIXES = ("a ", "a ", "the ", "an ", "a photo of a ", "a picture of a ", "an image of a ", "an emoji of a ")
_PREFIXES_OF_ONE = ("a drawing of ", "a small ", "one ", "emoji of ", "icon of ")
_JOINTS = (" ", " ", " ", " and ", " with ", " of ")
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
    """The glyph with its main colour turned into the middle of another; other colours and shadows stay."""
    hsv = np.array(Image.fromarray(pixels).convert("HSV"))
    hue = hsv[..., 0] * (360 / 255)
    apart = (hue - HUES[old] + 180) % 360 - 180
    near = np.abs(apart) < 45
    main = np.median(apart[near & (hsv[..., 1] > 90)]) if (near & (hsv[..., 1] > 90)).any() else 0.0
    turned = ((HUES[new] + 0.7 * (apart - main)) % 360 * (255 / 360)).round().astype(np.uint8)
    hsv[..., 0] = np.where(near, turned, hsv[..., 0])
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
        for new in (word for word in HUES if word != old):
            texts += [f"{new} {name}" for name in names]
            pictures += [len(copies)] * len(names)
            copies.append(repaint(picture, old, new))
    return Captions(texts, pictures), np.stack(copies) if copies else pixels[:0]


def unambiguous(glyphs: list[Glyph]) -> list[Glyph]:
    """Without the keywords that are another glyph's name: "lion" is the animal, and not the sign leo."""
    names = {glyph.name for glyph in glyphs}
    return [replace(glyph, keywords=tuple(word for word in glyph.keywords if word not in names)) for glyph in glyphs]


def paired(glyphs: list[Glyph], pixels: Pixels, count: int, rng: random.Random) -> tuple[Captions, Pixels]:
    """Two glyphs in one picture, side by side or one at the other's corner, for "a cat with sunglasses"."""
    things = [index for index, glyph in enumerate(glyphs) if not _words(glyph.name) & _SIGNS]
    frequency = Counter(word for glyph in glyphs for word in glyph.keywords)
    size = pixels.shape[1]
    texts: list[str] = []
    pictures = np.full((count, *pixels.shape[1:]), 255, np.uint8)
    scaled = {share: _scaled(pixels, round(size * share)) for share in (_HALF, _MAIN, _EXTRA)}
    for picture in pictures:
        one, two = rng.choice(things), rng.choice(things)
        beside = rng.random() < 0.5
        for index, share, place in (
            ((one, _HALF, (0.0, 0.25)), (two, _HALF, (0.5, 0.25)))
            if beside
            else ((one, _MAIN, (0.0, 0.0)), (two, _EXTRA, (1 - _EXTRA, 1 - _EXTRA)))
        ):
            part, left, top = scaled[share][index], round(place[0] * size), round(place[1] * size)
            under = picture[top : top + len(part), left : left + len(part)]
            np.copyto(under, part, where=part.min(-1, keepdims=True) < 250)
        for _ in range(_PAIR_TEXTS):
            first, second = (_called(glyphs[index], frequency, rng) for index in (one, two))
            joint = " and " if beside else " with "
            texts.append(f"{rng.choice(_ARTICLES)}{first}{joint}{rng.choice(_ARTICLES)}{second}")
    return Captions(texts, [index for index in range(count) for _ in range(_PAIR_TEXTS)]), pictures


def dressed(glyphs: list[Glyph], pixels: Pixels) -> tuple[Captions, Pixels]:
    """Faces that wear sunglasses over their eyes; none where the glyphs lack faces or sunglasses."""
    index = {glyph.name: place for place, glyph in enumerate(glyphs)}
    faces = [name for name in _FACES if name in index and _SUNGLASSES in index]
    texts: list[str] = []
    for name in faces:
        short = name.removesuffix(" face") if name != "grinning face" else "face"
        texts += [
            f"{article}{short} {joint} sunglasses" for article in _ARTICLES for joint in ("with", "wearing", "in")
        ]
    pictures = [_wear(pixels[index[name]], pixels[index[_SUNGLASSES]]) for name in faces]
    each = len(texts) // max(1, len(faces))
    captions = Captions(texts, [place for place in range(len(faces)) for _ in range(each)])
    return captions, np.stack(pictures) if pictures else pixels[:0]


def _wear(face: Pixels, sunglasses: Pixels) -> Pixels:
    """The eyes are the dark pixels between a fifth and three fifths of the way down the face."""
    worn, drawn = face.copy(), face.min(-1) < 235
    rows = np.flatnonzero(drawn.any(1))
    dark = face.max(-1) < 90
    dark[: int(rows[0] + 0.2 * np.ptp(rows))] = dark[int(rows[0] + 0.62 * np.ptp(rows)) :] = False
    eyes = int(np.median(np.nonzero(dark)[0] if dark.sum() > 10 else rows))
    columns = np.flatnonzero(drawn[eyes])
    width = int(0.86 * np.ptp(columns))
    left = int(columns[0] + columns[-1] - width) // 2
    shape = np.argwhere(sunglasses.min(-1) < 235)
    (top_edge, left_edge), (bottom, right) = shape.min(0), shape.max(0) + 1
    cut = Image.fromarray(sunglasses[top_edge:bottom, left_edge:right])
    pair = np.asarray(cut.resize((width, max(1, width * cut.height // cut.width))))
    top = eyes - len(pair) // 2
    under = worn[top : top + len(pair), left : left + width]
    np.copyto(under, pair, where=pair.min(-1, keepdims=True) < 200)
    return worn


def sample(captions: Captions, pictures: Pixels, count: int, rng: random.Random) -> tuple[Captions, Pixels]:
    """At most `count` of the pictures, with their captions."""
    chosen = sorted(rng.sample(range(len(pictures)), min(count, len(pictures))))
    places = {index: place for place, index in enumerate(chosen)}
    kept = [
        (text, places[index]) for text, index in zip(captions.texts, captions.pictures, strict=True) if index in places
    ]
    return Captions([text for text, _ in kept], [place for _, place in kept]), pictures[chosen]


def _scaled(pixels: Pixels, side: int) -> Pixels:
    return np.stack([np.asarray(Image.fromarray(picture).resize((side, side))) for picture in pixels])


def _called(glyph: Glyph, frequency: Counter[str], rng: random.Random) -> str:
    if glyph.keywords and rng.random() < 0.25:
        return rng.choices(glyph.keywords, [1 / frequency[word] for word in glyph.keywords])[0]
    return re.sub(r"\b(face|person)\b", "", glyph.name).strip() or glyph.name


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
    if kind < 0.15:
        text = name
    elif kind < 0.3:
        text = re.sub(r"\b(face|button|person|symbol|sign)\b", "", name).strip() or name
    elif kind < 0.5:
        text = keyword
    elif kind < 0.68:
        text = f"{keyword}{rng.choice(_JOINTS)}{other}" if other != keyword else keyword
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
