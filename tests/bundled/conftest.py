"""A few drawn glyphs, so that the training scripts are tested without the font."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dfdask.bundled.render import Glyph, Pixels, save_glyphs

SIZE = 32
SHAPES = {
    "red apple": ("#dd2e2e", "ellipse", ("fruit", "red")),
    "blue book": ("#2e62dd", "rectangle", ("library", "read", "red apple")),
    "car": ("#e08a1e", "rectangle", ("automobile", "vehicle")),
    "leaf": ("#3cb043", "ellipse", ("plant", "green")),
}
"""Colour, shape and keywords by name."""


@pytest.fixture(scope="session")
def glyphs() -> list[Glyph]:
    return [Glyph(chr(0x1F300 + place), name, words) for place, (name, (*_, words)) in enumerate(SHAPES.items())]


@pytest.fixture(scope="session")
def pixels() -> Pixels:
    pictures = []
    for place, (colour, shape, _) in enumerate(SHAPES.values()):
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        getattr(ImageDraw.Draw(picture), shape)((4 + place, 6, 24, 26), fill=colour)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


@pytest.fixture(scope="session")
def glyph_file(glyphs: list[Glyph], pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glyphs") / "glyphs.npz"
    save_glyphs(path, glyphs, pixels)
    return path


@pytest.fixture(scope="module", autouse=True)
def torch_settings() -> Iterator[None]:
    """Training sets how matrices are multiplied in the whole process; a module's first fixture needs this too."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)  # as dask's workers have; several wait for one another on a busy machine
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
