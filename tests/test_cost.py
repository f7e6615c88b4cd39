"""The cost predictor: what it knows before any task, what one task teaches, and what cannot mislead it."""

from __future__ import annotations

import json
import math
import random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.cost import CostModel, DeviceRates, TaskWork, roofline_seconds

H100 = DeviceRates(6e14, 4e14, 3e12, 0.005)
KEY = ("model", "denoise", "h100")


def denoise(pixels: int, batch: int) -> TaskWork:
    """One step of a transformer of FLUX's size: operations grow with the tokens, attention with their square."""
    tokens = (pixels // 16) ** 2 + 512
    return TaskWork(batch, batch * tokens * 2.2e10, batch * tokens**2 * 7e5, 2.4e10)


def true_seconds(work: TaskWork) -> float:
    return 0.004 + work.linear_flops / 5.1e14 + work.attention_flops / 2.9e14


def taught(works: list[TaskWork], repeats: int = 3, noise: float = 0.01) -> CostModel:
    model, rng = CostModel({"h100": H100}), random.Random(7)
    for work in works * repeats:
        model.observe(*KEY, work, true_seconds(work) * rng.lognormvariate(0, noise))
    return model


def test_the_prior_is_the_roofline() -> None:
    work = TaskWork(1, 6e12, 4e12, 3e9)
    assert roofline_seconds(work, H100) == pytest.approx(0.02)
    assert roofline_seconds(TaskWork(1, 0, 0, 3e12), H100) == pytest.approx(1.0)
    assert roofline_seconds(TaskWork(1), H100) == 0.005
    cold = CostModel({"h100": H100}).predict(*KEY, denoise(1024, 1))
    assert cold.seconds == pytest.approx(true_seconds(denoise(1024, 1)), rel=0.35)
    assert cold.deviation_seconds > 0.1 * cold.seconds


def test_one_probe_is_enough_for_other_sizes() -> None:
    model = taught([denoise(1024, 1)], repeats=1)
    missed = [
        abs(model.predict(*KEY, work).seconds / true_seconds(work) - 1)
        for work in (denoise(512, 1), denoise(768, 2), denoise(1536, 1), denoise(2048, 1))
    ]
    assert mean(missed) < 0.15


def test_a_size_that_was_left_out_is_predicted() -> None:
    sizes = (256, 512, 768, 1024, 1536)
    missed = []
    for left in sizes:
        model = taught([denoise(pixels, batch) for pixels in sizes if pixels != left for batch in (1, 2)])
        for batch in (1, 2):
            work = denoise(left, batch)
            missed.append(abs(model.predict(*KEY, work).seconds / true_seconds(work) - 1))
    assert mean(missed) < 0.03


def test_without_any_prior_fixed_and_item_seconds_are_told_apart() -> None:
    model, rng = CostModel(), random.Random(3)
    for _ in range(60):
        batch = rng.choice((1, 2, 4))
        model.observe("m", "encode", "new", TaskWork(batch), (0.2 + 0.05 * batch) * rng.lognormvariate(0, 0.01))
    assert model.predict("m", "encode", "new", TaskWork(8)).seconds == pytest.approx(0.6, rel=0.05)


def test_a_straggler_changes_little_and_a_lasting_change_is_learnt() -> None:
    model = CostModel()
    work = TaskWork(4)
    for _ in range(30):
        model.observe("m", "s", "c", work, 1.0)
    model.observe("m", "s", "c", work, 20.0)
    assert model.predict("m", "s", "c", work).seconds == pytest.approx(1.0, rel=0.1)
    for _ in range(8):
        model.observe("m", "s", "c", work, 3.0)
    assert model.predict("m", "s", "c", work).seconds == pytest.approx(3.0, rel=0.1)


def test_noise_is_seen_as_noise_and_biases_little() -> None:
    """Tasks that differ by 30%: the mean is what counts, and six slow ones in a row are no change."""
    model, rng = CostModel(), random.Random(11)
    found = []
    for _ in range(600):
        model.observe("m", "s", "c", TaskWork(1), 2.0 * rng.lognormvariate(-(0.3**2) / 2, 0.3))
        found.append(model.predict("m", "s", "c", TaskWork(1)))
    seconds = [prediction.seconds for prediction in found[100:]]
    assert mean(seconds) == pytest.approx(2.0, rel=0.06)
    assert min(seconds) > 1.6 and max(seconds) < 2.4
    assert found[-1].deviation_seconds == pytest.approx(0.6, rel=0.4)


def test_a_slower_class_is_learnt_from_its_first_tasks() -> None:
    model = CostModel()
    for _ in range(200):
        model.observe("m", "s", "fast", TaskWork(4), 1.0)
    for _ in range(2):
        model.observe("m", "s", "slow", TaskWork(4), 3.0)
    assert model.predict("m", "s", "slow", TaskWork(4)).seconds == pytest.approx(3.0, rel=0.05)


def test_another_class_starts_from_what_is_known_with_more_doubt() -> None:
    model = CostModel()
    for _ in range(10):
        model.observe("m", "s", "fast", TaskWork(1), 2.0)
    other = model.predict("m", "s", "slow", TaskWork(1))
    assert other.seconds == pytest.approx(2.0, rel=0.05)
    assert other.deviation_seconds > 3 * model.predict("m", "s", "fast", TaskWork(1)).deviation_seconds
    model.observe("m", "s", "slow", TaskWork(1), 8.0)
    assert model.predict("m", "s", "slow", TaskWork(1)).seconds > 5
    assert model.predict("m", "s", "fast", TaskWork(1)).seconds == pytest.approx(2.0, rel=0.05)


def test_what_was_learnt_survives_a_file() -> None:
    model = taught([denoise(1024, 1), denoise(512, 4)])
    copy = CostModel({"h100": H100})
    copy.learn(json.loads(json.dumps(model.to_json())))
    work = denoise(768, 2)
    assert copy.predict(*KEY, work) == model.predict(*KEY, work)
    assert copy.count(*KEY) == 6 and copy.errors() == model.errors()


@pytest.mark.parametrize("damage", [{"mean": [1, 2]}, {"mean": None}, {"precision": [["x"]]}, {"count": "many"}])
def test_a_damaged_file_is_refused(damage: dict[str, object]) -> None:
    saved = taught([denoise(1024, 1)]).to_json()
    with pytest.raises(ValueError, match="not a saved cost"):
        CostModel().learn([{**saved[0], **damage}])


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1e3)), min_size=1, max_size=120))
@settings(max_examples=60, deadline=None)
def test_predictions_are_always_positive_and_finite(tasks: list[tuple[int, float]]) -> None:
    model = CostModel()
    for items, seconds in tasks:
        model.observe("m", "s", "c", TaskWork(items), seconds)
        predicted = model.predict("m", "s", "c", TaskWork(items))
        assert predicted.seconds > 0 and math.isfinite(predicted.seconds)
        assert predicted.deviation_seconds > 0 and math.isfinite(predicted.deviation_seconds)


@given(st.floats(1e-3, 100), st.sampled_from((1, 2, 8, 32)))
@settings(max_examples=40, deadline=None)
def test_one_task_teaches_its_like(seconds: float, items: int) -> None:
    model = CostModel()
    model.observe("m", "s", "c", TaskWork(items), seconds)
    assert model.predict("m", "s", "c", TaskWork(items)).seconds == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_is_not_learnt_from(seconds: float) -> None:
    model = CostModel()
    model.observe("m", "s", "c", TaskWork(1), seconds)
    assert model.count("m", "s", "c") == 0
