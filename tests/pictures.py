"""Input pictures for tests."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image

from dfdask.images import Picture


def png(seed: int, size: tuple[int, int] = (32, 32), mask: bool = False) -> bytes:
    """A PNG file of soft colours, or of a white area on black; ``size`` is (width, height)."""
    if mask:
        small = np.zeros((4, 4, 3), np.uint8)
        small[1:3, seed % 3 :] = 255
    else:
        small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    kind = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
    Image.fromarray(small).resize(size, kind).save(file, "PNG")
    return file.getvalue()


def make_picture(seed: int, size: tuple[int, int] = (32, 32), mask: bool = False) -> Picture:
    """The same as a job's item has it."""
    data = png(seed, size, mask)
    return Picture(f"{seed}.png", hashlib.sha256(data).hexdigest(), *size, data)
