"""Text encoders compute each text once, and return what they would for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARGUMENTS

from dfdask.items import Item
from dfdask.stages import rows_once
from dfdask.stages.adapters import AdapterRef
from dfdask.stages.cut import PipelineStage
from dfdask.stages.model import ModelRef, digest
from dfdask.stages.rows_once import RowsOnce

Tiny = Callable[[str], Path]
SMALL = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 99}


def clip() -> Any:
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**SMALL, projection_dim=8))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


def language_model() -> Any:
    return transformers.Qwen2Model(transformers.Qwen2Config(**SMALL, num_key_value_heads=2))


class Counting:
    """A forward that notes how many rows it was given."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        self._forward = model.eval().forward
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.rows.append(len(ids))
        return self._forward(*args, **kwargs)


def rows_of(texts: str, length: int = 6) -> torch.Tensor:
    return torch.tensor([[ord(text) % 99] * length for text in texts])


@pytest.mark.parametrize("make", [clip, t5, language_model])
@torch.no_grad()
def test_each_row_is_computed_once_and_all_come_back(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    counting = Counting(make())
    once, plain = RowsOnce(counting), counting._forward
    for texts in ("abca", "----", "a-d", "dcba", "dcba"):
        ids, mask = rows_of(texts), torch.ones(len(texts), 6, dtype=torch.int64)
        mask[:, 4:] = 0
        found = once(ids, attention_mask=mask, output_hidden_states=True)
        expected = plain(ids, attention_mask=mask, output_hidden_states=True)
        assert type(found) is type(expected)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        assert found[0].shape == expected[0].shape
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(one, other)
    assert counting.rows == [4, 1, 1, 3], "all at first, -, d, those that came once only, and then nothing"
    once(rows_of("ab"), attention_mask=torch.ones(2, 6, dtype=torch.int64))
    assert counting.rows[4:] == [2], "another mask is another text"
    once(rows_of("ab", length=5))
    assert counting.rows[5:] == [2]


@torch.no_grad()
def test_what_is_remembered_keeps_to_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(t5())
    once = RowsOnce(counting, most_bytes=3 * 6 * 16 * 4)
    monkeypatch.setattr(rows_once, "MOST_ROW_BYTES", 6 * 16 * 4)
    once(rows_of("aabbccdd"))
    once(rows_of("bcd"))
    assert counting.rows == [8]
    once(rows_of("a"))
    once(rows_of("a"))
    once(rows_of("cd"))
    assert counting.rows == [8, 1], "b was used longest ago"
    once(rows_of("ee", length=7))
    once(rows_of("ee", length=7))
    assert counting.rows == [8, 1, 1, 1], "too large to keep: once in each call"
    forgetful = RowsOnce(counting, most_bytes=0)
    for _ in range(3):
        forgetful(rows_of("gg"))
    assert counting.rows[4:] == [2, 1, 1]


@torch.no_grad()
def test_a_negative_prompt_is_not_pushed_out_by_the_prompts() -> None:
    counting = Counting(t5())
    once = RowsOnce(counting, most_bytes=4 * 6 * 16 * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_once, "MOST_ROW_BYTES", 6 * 16 * 4)
        once(rows_of("nn"))
        for number in range(20):
            once(rows_of(chr(ord("A") + number) * 2))
            once(rows_of("nnnn"))
    assert sum(counting.rows) == 2 + 20


@torch.no_grad()
def test_a_text_that_comes_alone_is_computed_no_more_from_its_third_time_on() -> None:
    """As the negative prompt of a video job does, whose batches are of one item."""
    counting = Counting(t5())
    once, plain = RowsOnce(counting), counting._forward
    for texts in "anbncndn":
        torch.testing.assert_close(once(rows_of(texts)), plain(rows_of(texts)))
    assert counting.rows == [1, 1, 1, 2, 1, 1], "a, n, b, n twice, c, d"


@torch.no_grad()
def test_other_calls_are_passed_on() -> None:
    model = t5()
    once = RowsOnce(model.eval().forward)
    embeds = model.shared(rows_of("aa"))
    assert once(inputs_embeds=embeds).last_hidden_state.shape == (2, 6, 16)
    broadcast = once(rows_of("aa"), attention_mask=torch.ones(1, 6))
    assert broadcast.last_hidden_state.shape == (2, 6, 16) and not once._rows


def test_an_encoder_that_has_no_part_for_each_row_is_left_alone() -> None:
    calls = []

    def forward(input_ids: Any) -> Any:
        calls.append(len(input_ids))
        return input_ids.sum(0, keepdim=True)

    once = RowsOnce(forward)
    for texts in ("a", "aab", "ccc"):
        assert torch.equal(once(rows_of(texts)), rows_of(texts).sum(0, keepdim=True))
    assert calls == [1, 3, 3, 3]
    calls.clear()
    once = RowsOnce(forward)
    for _ in range(3):
        assert torch.equal(once(rows_of("a")), rows_of("a"))
    assert calls == [1, 2, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=6), st.sampled_from([0, 2, 4, 1 << 20]))
def test_any_calls_return_what_the_encoder_would(calls: list[str], row_limit: int) -> None:
    once = RowsOnce(lambda input_ids: (input_ids * 2.0, None), most_bytes=row_limit * 6 * 4)
    for texts in calls:
        values, nothing = once(rows_of(texts))
        assert nothing is None and torch.equal(values, rows_of(texts) * 2.0)
        assert sum(row.nbytes for row in once._rows.values()) <= row_limit * 6 * 4


@pytest.mark.parametrize(("adapted", "remembers"), [(False, True), (True, False)])
def test_adapters_whose_weight_may_change_keep_texts_from_being_remembered(
    tiny: Tiny, adapted: bool, remembers: bool
) -> None:
    folder = tiny("wan")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    pipeline = PipelineStage(ref, "encode").pipeline
    encoder = pipeline.text_encoder
    encoder.__dict__.pop("forward")
    rows_once.encode_rows_once(
        pipeline, replace(ref, adapters=(AdapterRef("a", None, None, 1.0, "digest"),) if adapted else ())
    )
    assert (encoder.forward._most_bytes > 0) == remembers


def test_a_pipeline_that_listens_inside_an_encoder_hears_every_text(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("wan")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    assert "forward" in PipelineStage(ref, "encode").pipeline.text_encoder.__dict__
    monkeypatch.setattr("inspect.getsource", lambda _: "encoder.layers[-1].register_forward_hook(keep)")
    pipeline = SimpleNamespace(components={"text_encoder": t5()})
    rows_once.encode_rows_once(pipeline, ref)
    assert "forward" not in pipeline.components["text_encoder"].__dict__


def test_a_pipeline_has_its_negative_prompt_encoded_once(tiny: Tiny) -> None:
    folder = tiny("wan")
    seen: list[int] = []

    def stage(strict: bool) -> PipelineStage:
        made = PipelineStage(ModelRef(str(folder), digest(folder), "float32", "cpu", strict), "encode")
        made.pipeline.text_encoder.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        return made

    arguments = {**ARGUMENTS["wan"], "negative_prompt": "blurry"}
    items = [Item(row, f"i{row}", f"picture {row}", row, arguments) for row in range(6)]
    tapes = []
    for strict, rows in ((False, [1, 1, 2, 1, 5]), (True, [1, 1, 2, 2, 6, 6])):
        encoder = stage(strict)
        seen.clear()
        tapes.append(encoder.run(items, None))
        assert seen == rows, "an item and the negative to learn from, then the others"
        encoder.run([Item(9, "i9", "another", 9, {**arguments, "num_inference_steps": 3})], None)
        assert seen[len(rows) :] == ([1] if not strict else [1, 1])
    (one,), (other,) = (tape["encode_prompt"] for tape in tapes)
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(getattr(found, "value", found), getattr(expected, "value", expected))
