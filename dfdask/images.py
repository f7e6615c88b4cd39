"""Pictures that items start from: checked where the job is submitted, sent on as the bytes of their files."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfdask.arguments import shown

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True)
class Picture:
    """An input picture. ``name`` is its path as the job has it, ``digest`` the SHA-256 of the file.

    ``data`` is the file itself on its way to the stages that look at it, empty elsewhere.
    """

    name: str
    digest: str
    width: int
    height: int
    data: bytes = b""

    def as_plain(self) -> dict[str, Any]:
        """What tells it from other pictures, as JSON-like data."""
        return {"digest": self.digest, "width": self.width, "height": self.height}

    def loaded(self, path: Path) -> Picture:
        """With its data. Raises ValueError where the file is another by now, OSError where it cannot be read."""
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ValueError(f"{path}: has changed since the job was submitted; submit it again")
        return replace(self, data=data)

    def open(self) -> Any:
        """A PIL image, RGB and upright as diffusers' ``load_image`` gives it; a black one where there is no data.

        Raises ValueError where the data is damaged.
        """
        from PIL import Image, ImageOps

        if not self.data:
            return Image.new("RGB", (self.width, self.height))
        try:
            with Image.open(io.BytesIO(self.data), formats=FORMATS) as image:
                upright: Image.Image = ImageOps.exif_transpose(image)
                return _eight_bits(upright).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"the picture {self.name!r} is damaged: {' '.join(str(error).split())}") from None


def _eight_bits(image: Any) -> Any:
    """Grey of 16 bits scaled to 8: PIL itself would cut every value off at 255."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 65535)
    return Image.fromarray((values / 257).round().astype(np.uint8))


def is_picture(name: str) -> bool:
    """Whether an argument of this name takes a picture, so that a text given for it is the path of a file."""
    words = name.split("_")
    return words[-1] in ("image", "images") or (words[0] == "image" and len(words) == 2 and words[1].isdigit())


def find_picture(text: str, home: Path, allowed: Sequence[Path] | None) -> tuple[Path, Picture]:
    """The picture file ``text``, relative to ``home``, and below one of the folders ``allowed`` if given.

    Raises ValueError that reads "must be ..., got ...; what to do".
    """
    if "://" in text:
        raise ValueError(f"must be a file, got the address {shown(text)}; download it first")
    path = (home / text).expanduser().resolve()
    if allowed is not None and not any(path.is_relative_to(folder.resolve()) for folder in allowed):
        raise ValueError(
            f"must lie in the folder of the job file or below the current directory, got {shown(text)} ({path}); "
            "move it there"
        )
    try:
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no file" if not path.exists() else "not a regular file"
            raise ValueError(f"must be a picture file, got {shown(text)}: {path} is {what}; check the path")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"must have at most {MAX_BYTES:,} bytes, got {size:,} in {shown(text)}; make it smaller")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"must be readable, got {shown(text)}: {error.strerror or error}; check the file's permissions"
        ) from None
    width, height = _size(text, data)
    return path, Picture(text, hashlib.sha256(data).hexdigest(), width, height)


def _size(text: str, data: bytes) -> tuple[int, int]:
    """(width, height) once upright, from the head of the file alone."""
    import warnings

    from PIL import Image

    orientation_tag, turned = 0x0112, (5, 6, 7, 8)  # EXIF 2.32: these stand on their side
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                known = image.format != "PNG" or "exif" in image.info  # a PNG is decoded to search it for more
                if known and image.getexif().get(orientation_tag) in turned:
                    width, height = height, width
    except Image.DecompressionBombError:
        raise ValueError(f"must have at most {MAX_PIXELS:,} pixels, got far more in {shown(text)}") from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(
            f"must be a picture ({', '.join(FORMATS)}), got {shown(text)}, which is none; convert it"
        ) from None
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"must have at most {MAX_PIXELS:,} pixels, got {width} x {height} in {shown(text)}; make it smaller"
        )
    return width, height
