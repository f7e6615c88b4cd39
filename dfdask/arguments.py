"""Values that a job may carry: JSON-like data, and the checks that every pipeline's arguments need.

All checks raise ValueError whose text reads "must be ..., got ...; what to do", without saying where: the
caller knows the file and the line.
"""

from __future__ import annotations

import json
import keyword
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

_SEED_ADVICE = "dfdask seeds every item: set the job's `seed`, or a seed per prompt"
_STAGE_ADVICE = "dfdask makes it in the encode stage"
_RESERVED = {
    "prompt": "it comes from the job's `prompts`",
    "generator": _SEED_ADVICE,
    "seed": _SEED_ADVICE,
    "output_type": "dfdask stores uint8 pixels",
    "return_dict": "dfdask stores uint8 pixels",
    "num_images_per_prompt": "set the job's `images_per_prompt`",
    "num_videos_per_prompt": "set the job's `images_per_prompt`",
    "latents": _SEED_ADVICE,
    "self": "it is not an argument of a pipeline call",
}
_POSITIVE_INTEGERS = {"num_inference_steps": 30, "height": 512, "width": 512, "num_frames": 49}
_NUMBERS = {"guidance_scale": 4.5}
USUAL_ARGUMENTS = frozenset({*_POSITIVE_INTEGERS, *_NUMBERS, "negative_prompt", "max_sequence_length"})
"""Arguments of nearly every pipeline: recognised when they stand where job keys belong."""


def shown(value: Any, length: int = 60) -> str:
    """``value`` for a message, cut to about ``length`` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' when something known is close, else ''."""
    by_lower = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def plain(value: Any) -> Any:
    """``value`` as JSON-like data (tuples become lists, NumPy scalars Python ones), or ValueError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked_text(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}; write a number or leave it out")
        return float(value)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"must have text keys, got the key {shown(wrong[0])}; put it in quotes")
        return {checked_text(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        return plain(value.item())
    raise ValueError(
        f"must be a number, text, true/false, null, a list or a mapping, got {shown(value)} of type "
        f"{type(value).__name__}; give it as plain data"
    )


def checked_text(value: str) -> str:
    """``value`` as an exact ``str`` that can be stored as UTF-8, or ValueError."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"must be valid Unicode, got a lone surrogate in {ascii(value)[:60]}") from None
    if "\0" in value:
        raise ValueError(f"must not contain NUL characters, got {shown(value)}; remove them")
    return str(value)


def check_argument_name(name: Any) -> str:
    """``name`` if it can be an argument of the pipeline call, else ValueError."""
    if not (isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)):
        raise ValueError("is not the name of a pipeline argument; use letters, digits and underscores")
    advice = _RESERVED.get(name)
    if name.startswith("callback"):
        advice = "callbacks are code; watch the run's progress instead"
    elif name.endswith(("_embeds", "_embeds_mask", "_attention_mask")) or name == "prompt_embeds":
        advice = _STAGE_ADVICE
    if advice:
        raise ValueError(f"cannot be set here: {advice}")
    return name


def check_argument(name: Any, value: Any) -> Any:
    """``value`` as plain data if the argument ``name`` may have it, else ValueError.

    Checks what holds for every pipeline; whether this pipeline has such an argument is for the model to say.
    """
    check_argument_name(name)
    value = plain(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _POSITIVE_INTEGERS and not (number and isinstance(value, int) and value >= 1):
        if value is None and name != "num_inference_steps":
            return None
        raise ValueError(
            f"must be a whole number of at least 1, got {shown(value)}; write e.g. {_POSITIVE_INTEGERS[name]}"
        )
    if name in _NUMBERS and not number:
        raise ValueError(f"must be a number, got {shown(value)}; write e.g. {_NUMBERS[name]}")
    return value


def canonical_json(value: Any) -> str:
    """One text for equal plain data: sorted keys, no spaces, 3.0 written as 3 (but true stays unlike 1)."""
    return json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _whole(value: Any) -> Any:
    if hasattr(value, "as_plain"):
        return value.as_plain()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _whole(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(entry) for entry in value]
    return value
