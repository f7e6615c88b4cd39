"""Seeds: which random numbers an item gets, whatever runs beside it.

A seed depends on the job's base seed, on the item's own text and on how many equal texts come before it, so
reordering, inserting or removing other prompts changes nothing for this one. Seeds have 32 bits because the
CPU generator of torch (mt19937) uses only the low 32 bits of what it is given.
"""

from __future__ import annotations

from hashlib import blake2b

SEEDS = 2**32


def text_key(text: str) -> int:
    """A 64-bit number that stands for ``text``; equal on every machine and in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"dfdask text").digest(), "little")


def seed_from_key(base: int, key: int, occurrence: int, image_index: int) -> int:
    """``item_seed`` for a text whose ``text_key`` is known."""
    message = f"{base}/{key}/{occurrence}".encode()
    first = int.from_bytes(blake2b(message, digest_size=4, person=b"dfdask seed").digest(), "little")
    return (first + image_index) % SEEDS


def item_seed(base: int, text: str, occurrence: int = 0, image_index: int = 0) -> int:
    """The seed in [0, 2**32) of image ``image_index`` of ``text``, seen ``occurrence`` times before.

    The images of one item have consecutive seeds, as in ``explicit_seed``.
    """
    return seed_from_key(base, text_key(text), occurrence, image_index)


def explicit_seed(seed: int, image_index: int) -> int:
    """The seed of image ``image_index`` of an item that names its own ``seed``."""
    return (seed + image_index) % SEEDS
