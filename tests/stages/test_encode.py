"""Inputs that say the same are encoded once, and nobody can tell from the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import make_picture
from tiny_families import ARGUMENTS as MORE
from tiny_models import ARGUMENTS, Pixels

from dfdask.items import Item
from dfdask.stages.batch import Batch, Rows, nbytes, run_batch
from dfdask.stages.cut import PipelineStage, stage_names
from dfdask.stages.encode import Encoder
from dfdask.stages.model import ModelRef, digest

Tiny = Callable[[str], Path]
ROUNDING = 2
"""uint8 steps: an embedding is rounded otherwise where it is computed beside fewer others."""


def items_of(texts: str, **arguments: Any) -> list[Item]:
    """An item for each letter; equal letters are equal prompts with seeds of their own."""
    return [Item(row, f"item-{row}", f"picture {text}", 10 + row, arguments) for row, text in enumerate(texts)]


class Texts:
    """Encodes a prompt to its bytes, as long as the longest of a call if ``padded``; notes its calls."""

    def __init__(self, padded: bool = False) -> None:
        self.calls: list[str] = []
        self._padded = padded

    def __call__(self, items: Sequence[Item]) -> tuple[dict[str, list[Any]], Any]:
        self.calls.append("".join(item.prompt[-1] for item in items))
        length = max(map(ord, self.calls[-1])) - 90 if self._padded else 8
        rows = torch.stack([torch.full((length,), float(ord(item.prompt[-1]))) for item in items])
        return {"encode_prompt": [(rows, None, torch.arange(3))]}, None


def rows(tape: dict[str, list[Any]]) -> str:
    (result,) = tape["encode_prompt"]
    assert isinstance(result[0], Rows) and not isinstance(result[2], Rows)
    return "".join(chr(int(value)) for value in result[0].value[:, 0])


def test_equal_prompts_are_encoded_once_in_a_call_and_from_call_to_call() -> None:
    run = Texts()
    encoder = Encoder(run, strict=False)
    assert rows(encoder.encode(items_of("aabbac"))) == "aabbac"
    learnt = ["a", "aa"]
    assert run.calls == [*learnt, "abc"]
    assert rows(encoder.encode(items_of("cdca"))) == "cdca"
    assert run.calls == [*learnt, "abc", "d"]
    assert rows(encoder.encode(items_of("dcba"))) == "dcba" and rows(encoder.encode(items_of("b"))) == "b"
    assert run.calls == [*learnt, "abc", "d"]
    assert (encoder.computed_items, encoder.reused_items) == (4, 3 + 3 + 4 + 1)


def test_lengths_that_depend_on_the_call_are_encoded_together() -> None:
    run = Texts(padded=True)
    encoder = Encoder(run, strict=False)
    encoder.encode(items_of("aba"))
    assert rows(encoder.encode(items_of("aca"))) == "aca"
    assert run.calls[-2:] == ["c", "ac"]


def test_other_arguments_are_other_inputs() -> None:
    run = Texts()
    encoder = Encoder(run, strict=False)
    encoder.encode(items_of("aa", negative_prompt="dark"))
    encoder.encode(items_of("aa", negative_prompt="blurry"))
    assert run.calls[-1] == "a" and encoder.computed_items == 2


def test_in_strict_mode_only_whole_calls_are_remembered() -> None:
    run = Texts()
    encoder = Encoder(run, strict=True)
    for texts in ("aab", "aab", "ab", "aab"):
        assert rows(encoder.encode(items_of(texts))) == texts
    assert run.calls[2:] == ["aab", "ab"]


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_remembered_is_bounded(strict: bool) -> None:
    run = Texts()
    encoder = Encoder(run, strict, cache_bytes=200)
    for texts in ("ab", "cd", "ef", "gh"):
        assert rows(encoder.encode(items_of(texts))) == texts
    assert sum(map(nbytes, encoder._cache._states.values())) <= 200
    before = len(run.calls)
    assert rows(encoder.encode(items_of("ab"))) == "ab" and len(run.calls) > before


def test_a_cache_too_small_for_a_call_does_no_harm() -> None:
    encoder = Encoder(Texts(), strict=False, cache_bytes=10)
    assert rows(encoder.encode(items_of("abab"))) == "abab"
    assert rows(encoder.encode(items_of("abab"))) == "abab"


def test_what_cannot_be_divided_is_encoded_as_it_is() -> None:
    class Mixed(Texts):
        def __call__(self, items: Sequence[Item]) -> tuple[dict[str, list[Any]], Any]:
            tape, _ = super().__call__(items)
            (result,) = tape["encode_prompt"]
            return {"encode_prompt": [torch.cat([result[0], result[0]])]}, None  # twice as many rows as items

    run = Mixed()
    tape = Encoder(run, strict=False).encode(items_of("aab"))
    assert run.calls[-1] == "aab" and tape["encode_prompt"][0].shape == (6, 8)


def pixels(ref: ModelRef, calls: Sequence[Sequence[Item]]) -> tuple[Pixels, PipelineStage]:
    stages = [(name, PipelineStage(ref, name)) for name in stage_names(Path(ref.source))]
    found: Pixels = []
    for items in calls:
        batch = Batch.start(items)
        for name, stage in stages:
            batch = run_batch(name, stage, batch)
        assert not batch.failures
        found.extend(picture for group in batch.groups for picture in group.state)
    return found, stages[0][1]


@pytest.mark.parametrize("family", ["sd", "sd_img2img"])
@pytest.mark.parametrize("strict", [True, False])
def test_the_pixels_are_the_same(tiny: Tiny, family: str, strict: bool) -> None:
    folder = tiny(family)
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", strict)
    arguments: dict[str, Any] = {"num_inference_steps": 3, **{**ARGUMENTS, **MORE}[family]}
    if family == "sd_img2img":
        arguments["image"] = make_picture(5)
    items = items_of("aabb", **arguments)
    once, stage = pixels(ref, [items, items])
    never = [pixels(replace(ref, strict=True), [items])[0]] * 2
    assert stage.encoder.computed_items == (4 if strict else 2) and stage.encoder.reused_items == (4 if strict else 6)
    for found, expected in zip(once, [picture for one in never for picture in one], strict=True):
        assert np.abs(found.astype(int) - expected).max() <= (0 if strict else ROUNDING)
    assert not np.array_equal(once[0], once[1]), "their seeds differ"
