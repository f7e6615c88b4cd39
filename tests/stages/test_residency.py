"""A stage is loaded once in a process, at its first use, whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dfdask.errors import ModelError
from dfdask.spec import FakeStages
from dfdask.stages import residency
from dfdask.stages.cut import PipelineStage
from dfdask.stages.fake import FakeStage
from dfdask.stages.model import ModelRef, digest
from dfdask.stages.residency import held_stage

FAKE = ModelRef("fake", "fake", "float32", "cpu", False, fake=FakeStages())


@pytest.fixture(autouse=True)
def empty_handed() -> Iterator[None]:
    residency._held.clear()
    yield
    residency._held.clear()


def test_a_stage_is_held_by_model_and_name() -> None:
    encode = held_stage(FAKE, "encode")
    assert isinstance(encode, FakeStage)
    assert held_stage(FAKE, "encode") is encode
    assert held_stage(FAKE, "denoise") is not encode
    assert held_stage(replace(FAKE, fake=FakeStages(handoff_bytes=1)), "encode") is not encode
    assert held_stage(replace(FAKE, fake=FakeStages()), "encode") is encode, "equal models are the same one"


def test_threads_that_ask_at_once_get_the_same(tiny: Callable[[str], Path]) -> None:
    folder = tiny("sd")
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    with ThreadPoolExecutor(4) as pool:
        stages = list(pool.map(lambda _: held_stage(ref, "decode"), range(4)))
    assert isinstance(stages[0], PipelineStage)
    assert all(stage is stages[0] for stage in stages)


def test_a_stage_that_cannot_be_loaded_is_tried_again(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    ref = ModelRef(str(folder), digest(tiny("sd")), "float32", "cpu", False)
    with pytest.raises(ModelError):
        held_stage(ref, "decode")
    folder.symlink_to(tiny("sd"))
    assert isinstance(held_stage(ref, "decode"), PipelineStage)
