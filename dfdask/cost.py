"""How long a stage takes: a prior from operations and bytes, and what finished tasks teach.

A task's seconds are modelled as ``fixed + per_item * items + linear_flops / a + attention_flops / b``. What each term
would take by the prior is a feature; the model learns one factor for each by Bayesian linear regression on
relative errors (Bishop, Pattern Recognition and Machine Learning, 2006, section 3.3), with exponential
forgetting, Student-t weights against outliers (Lange, Little and Taylor, JASA 84, 1989) and a fresh start where
several tasks in a row disagree. Pure: no clock, no files but the rates that come with the package.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from statistics import mean, median
from typing import Any

from dfdask.four import Matrix, Vector, diagonal, dot, matrix, scaled, solve, vector

NOISE = 0.03
"""The relative deviation of equal tasks on an idle device."""
_FREEDOM = 4.0
_FORGETTING = 0.98
_WINDOW = 6
_CHANGED = 0.12
_FLOOR_SECONDS = 1e-6
_UNKNOWN_FIXED_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a class of devices reaches, in operations, bytes and seconds."""

    linear_flops_per_second: float
    attention_flops_per_second: float
    bytes_per_second: float
    floor_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TaskWork:
    """What one call of a stage has to do: all of it, not per item. Zeros where nothing is known.

    ``calls`` are the forwards of its models, each of which takes the device's floor at least.
    """

    items: int
    linear_flops: float = 0.0
    attention_flops: float = 0.0
    bytes_moved: float = 0.0
    calls: int = 1


@dataclass(frozen=True, slots=True)
class ItemWork:
    """What one item of a stage has to do; ``call_bytes`` are moved once a call, however many items it has."""

    linear_flops: float
    attention_flops: float
    item_bytes: float
    call_bytes: float
    calls: int

    def work(self, items: int) -> TaskWork:
        """Of a call of so many such items."""
        moved = self.call_bytes + items * self.item_bytes
        return TaskWork(items, items * self.linear_flops, items * self.attention_flops, moved, self.calls)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a task, and one standard deviation of what is not known of them."""

    seconds: float
    deviation_seconds: float


_MIDDLING = DeviceRates(4e13, 5e13, 3e11)


@cache
def known_rates() -> dict[str, DeviceRates]:
    """By words of the device's name, such as ``H100``; ``device_rates.json`` says where each comes from."""
    table = json.loads(files("dfdask").joinpath("device_rates.json").read_text(encoding="utf-8"))
    return {
        name: DeviceRates(**{key: float(value) for key, value in entry.items() if key != "source"})
        for name, entry in table.items()
    }


def roofline_seconds(work: TaskWork, rates: DeviceRates) -> float:
    """The prior: the slower of computing and moving bytes (Williams, Waterman and Patterson, CACM 52, 2009)."""
    computing = (
        work.linear_flops / rates.linear_flops_per_second + work.attention_flops / rates.attention_flops_per_second
    )
    return max(rates.floor_seconds * work.calls, computing, work.bytes_moved / rates.bytes_per_second)


def terms(work: TaskWork, rates: DeviceRates | None) -> Vector:
    """Prior seconds of each term, (4,): fixed, per item, linear operations, attention.

    Where bytes or the floor are the limit, the operations' terms are stretched to it: learning scales what counts.
    """
    if rates is None or not (work.linear_flops or work.attention_flops or work.bytes_moved):
        return _UNKNOWN_FIXED_SECONDS, float(work.items), 0.0, 0.0
    linear = work.linear_flops / rates.linear_flops_per_second
    attention = work.attention_flops / rates.attention_flops_per_second
    limit = roofline_seconds(work, rates)
    stretch = limit / (linear + attention) if linear + attention else 0.0
    fixed = max(rates.floor_seconds * work.calls, 1e-3) if stretch else limit
    return fixed, 0.0, linear * stretch, attention * stretch


@dataclass
class StageModel:
    """The factors of one stage of one model on one class of devices."""

    mean: Vector
    precision: Matrix
    prior_precision: Matrix
    count: int = 0
    error: float = math.nan
    recent: deque[tuple[Vector, float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @classmethod
    def prior(cls, known: bool) -> StageModel:
        """With ``known`` operations factors are near 1, else anything goes."""
        if known:
            precision = diagonal(4.0, 4.0, 10.0, 10.0)
            return cls((0.2, 1.0, 1.0, 1.0), precision, precision)
        precision = diagonal(1.0, 1e-4, 1.0, 1.0)
        return cls((0.0, 1.0, 1.0, 1.0), precision, precision)

    def seconds(self, features: Vector) -> float:
        """What is predicted without how sure it is: a fraction of the work."""
        return max(dot(features, self.mean), _FLOOR_SECONDS)

    def predict(self, features: Vector) -> Prediction:
        seconds = self.seconds(features)
        spread = dot(features, solve(self.precision, features))
        return Prediction(seconds, math.sqrt(max(spread, 0.0) + (self._noise * seconds) ** 2))

    @property
    def _noise(self) -> float:
        """The relative deviation of equal tasks: what is seen, if that is more than an idle device has."""
        return max(NOISE, 1.25 * self.error) if self.count > _WINDOW and math.isfinite(self.error) else NOISE

    def observe(self, features: Vector, seconds: float) -> None:
        """Learn from one task that took ``seconds``; anything but a positive number is ignored."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        expected = self.predict(features)
        missed = math.log(seconds / expected.seconds)
        if self.count:
            rate = max(1 / (self.count + 1), 0.05)
            known = self.error if math.isfinite(self.error) else abs(missed)
            self.error = known + rate * (min(abs(missed), 1.0) - known)
        self.recent.append((features, seconds, missed))
        self.count += 1
        if self._has_changed():
            recent = list(self.recent)
            self.recent.clear()
            # What held before says where to start and no more: the tasks of the new kind outweigh it. Its error
            # says nothing of them; how much they differ from each other does.
            middle = median(missed for *_, missed in recent)
            self.precision = scaled(self.prior_precision, 0.01)
            self.error = mean(abs(missed - middle) for *_, missed in recent)
            for old, took, _ in recent:
                self._update(old, took, 1.0, took)
            return
        # In units of what is expected: in those of what is seen, quick tasks would count for more than slow ones.
        unit = expected.seconds if self.count > _WINDOW else seconds
        self._update(features, seconds, self._weight(seconds, expected) if self.count > 2 else 1.0, unit)

    def _has_changed(self) -> bool:
        missed = [error for *_, error in self.recent]
        least = max(_CHANGED, self.error) if math.isfinite(self.error) else _CHANGED
        return len(missed) == _WINDOW and (min(missed) > least or max(missed) < -least)

    @staticmethod
    def _weight(seconds: float, expected: Prediction) -> float:
        distance = (seconds - expected.seconds) / expected.deviation_seconds
        return (_FREEDOM + 1) / (_FREEDOM + distance**2)

    def _update(self, features: Vector, seconds: float, weight: float, unit: float) -> None:
        u0, u1, u2, u3 = features[0] / unit, features[1] / unit, features[2] / unit, features[3] / unit
        gain = weight / self._noise**2
        # What is forgotten gives way to the prior's doubt, or what is never observed would become singular.
        rows: list[Vector] = []
        right: list[float] = []
        for u, (p0, p1, p2, p3), (q0, q1, q2, q3) in zip(
            (u0, u1, u2, u3), self.precision, self.prior_precision, strict=True
        ):
            h0, h1 = p0 * _FORGETTING + q0 * (1 - _FORGETTING), p1 * _FORGETTING + q1 * (1 - _FORGETTING)
            h2, h3 = p2 * _FORGETTING + q2 * (1 - _FORGETTING), p3 * _FORGETTING + q3 * (1 - _FORGETTING)
            seen = gain * u
            right.append(dot((h0, h1, h2, h3), self.mean) + seen * (seconds / unit))
            rows.append((h0 + seen * u0, h1 + seen * u1, h2 + seen * u2, h3 + seen * u3))
        self.precision = rows[0], rows[1], rows[2], rows[3]
        a, b, c, d = solve(self.precision, (right[0], right[1], right[2], right[3]))
        self.mean = max(a, 0.0), max(b, 0.0), max(c, 0.0), max(d, 0.0)


class CostModel:
    """Predictions for all stages; ``rates`` are the prior's, by words of the device class's name.

    They are those that come with the package unless others are given.
    """

    def __init__(self, rates: Mapping[str, DeviceRates] | None = None) -> None:
        self.rates = dict(known_rates() if rates is None else rates)
        self._rates_of: dict[str, DeviceRates | None] = {}
        self._models: dict[tuple[str, str, str], StageModel] = {}

    def rates_of(self, device_class: str) -> DeviceRates | None:
        """The prior's rates, or None where nothing is known of such a device."""
        if device_class not in self._rates_of:
            named = (rates for name, rates in self.rates.items() if _is_named(name, device_class))
            self._rates_of[device_class] = next(named, None)
        return self._rates_of[device_class]

    def predict(self, model: str, stage: str, device_class: str, work: TaskWork) -> Prediction:
        """``model`` is what the stage's time depends on beside its work: a digest, a dtype."""
        features = terms(work, self.rates_of(device_class))
        return self._model(model, stage, device_class, features).predict(features)

    def seconds(self, model: str, stage: str, device_class: str, work: TaskWork) -> float:
        """As ``predict``, where nobody asks how sure that is."""
        features = terms(work, self.rates_of(device_class))
        return self._model(model, stage, device_class, features).seconds(features)

    def first_seconds(self, model: str, stage: str, device_class: str, work: TaskWork) -> float:
        """What a class is believed to take that has not run the stage yet.

        Its prior, times what classes that have run it took of theirs. Of a class of unknown rates, what others took;
        where there are none, the prior of a middling device: what matters is how the stages compare.
        """
        rates = self.rates_of(device_class)
        others = [other for one, same, other in self._models if (one, same) == (model, stage)]
        taken = {other: self.rates_of(other) for other in others if self.count(model, stage, other)}
        if rates is None and taken:
            return self.seconds(model, stage, device_class, TaskWork(work.items))
        ratios = [
            self.seconds(model, stage, other, TaskWork(work.items)) / roofline_seconds(work, known)
            for other, known in taken.items()
            if known is not None
        ]
        return roofline_seconds(work, rates or _MIDDLING) * (median(ratios) if ratios else 1.0)

    def observe(self, model: str, stage: str, device_class: str, work: TaskWork, seconds: float) -> None:
        """A task of this work took ``seconds`` on the device, transfers left out."""
        features = terms(work, self.rates_of(device_class))
        self._model(model, stage, device_class, features).observe(features, seconds)

    def count(self, model: str, stage: str, device_class: str) -> int:
        """How many tasks were learnt from."""
        known = self._models.get((model, stage, device_class))
        return known.count if known else 0

    def errors(self) -> dict[tuple[str, str, str], float]:
        """The running mean of the predictions' relative errors, each made before its task was learnt from."""
        return {key: model.error for key, model in self._models.items() if math.isfinite(model.error)}

    def to_json(self) -> list[dict[str, Any]]:
        """What was learnt, for `learn`."""
        return [
            {
                "model": key[0],
                "stage": key[1],
                "device_class": key[2],
                "mean": list(model.mean),
                "precision": [list(row) for row in model.precision],
                "prior_precision": [list(row) for row in model.prior_precision],
                "count": model.count,
                "error": model.error if math.isfinite(model.error) else None,
            }
            for key, model in self._models.items()
        ]

    def learn(self, saved: list[dict[str, Any]]) -> None:
        """Take over what `to_json` wrote. Raises ValueError where it is not that."""
        for entry in saved:
            try:
                mean, precision = vector(entry["mean"]), matrix(entry["precision"])
                prior = matrix(entry["prior_precision"])
                key = str(entry["model"]), str(entry["stage"]), str(entry["device_class"])
                count, error = int(entry["count"]), entry["error"]
                error = math.nan if error is None else float(error)
            except (KeyError, TypeError, ValueError, OverflowError) as problem:
                raise ValueError(f"not a saved cost: {entry!r} ({problem})") from problem
            self._models[key] = StageModel(mean, precision, prior, count, error)

    def _model(self, model: str, stage: str, device_class: str, features: Vector) -> StageModel:
        key = model, stage, device_class
        if key not in self._models:
            self._models[key] = self._akin(model, stage, device_class) or StageModel.prior(any(features[2:]))
        return self._models[key]

    def _akin(self, model: str, stage: str, device_class: str) -> StageModel | None:
        """Another class's factors to begin with: a slower device is slower at everything, at first sight."""
        for (other, same_stage, _), known in self._models.items():
            if (other, same_stage) == (model, stage) and known.count:
                # As if from one task, and that half off: what many tasks made sure of there, nobody knows here.
                counted = min(known.count, 1 / (1 - _FORGETTING))
                doubt = scaled(known.precision, (NOISE / 0.5) ** 2 / counted)
                return StageModel(known.mean, doubt, known.prior_precision)
        return None


def _is_named(name: str, device_class: str) -> bool:
    """Whether ``name`` is among the words of the class, whatever their case: L4 is not L40S."""
    return re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])", device_class.lower()) is not None
