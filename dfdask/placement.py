"""Which worker runs which stages, for how much of its time: a pure function of the fleet and the work left.

The fluid optimum (``dfdask.fluid``) says how much time of each class of workers every stage should get. Whole
workers go to single stages, what is left over is shared by the few others: side by side where a worker's memory
holds both stages, else in turns that repay their loads. The result competes with staying as it is, with whole
models on every worker and with whole workers only; all are judged by the same cost model.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dfdask.blocks import is_held
from dfdask.capacity import Device as Device  # part of this interface, as the next three
from dfdask.capacity import Option as Option
from dfdask.capacity import Role as Role
from dfdask.capacity import StageWork as StageWork
from dfdask.capacity import fits, load_seconds, usable
from dfdask.fluid import Demand, Flow, Group, best_flow, fastest_seconds

MARGIN = 0.03
"""The part by which a change must be better than none."""
_MOST_LOST = 0.999
"""Of a worker's time at most, by loads: a stage that nobody else runs must go on."""
_NOTHING = 1e-6


@dataclass(frozen=True, slots=True)
class Placement:
    """``seconds`` until each job ends by prediction; ``bound_seconds`` if time could be shared without loss.

    ``policy`` names the candidate that won; ``impossible`` are stages that no worker can run at all.
    """

    roles: dict[str, tuple[Role, ...]]
    policy: str
    seconds: dict[str, float]
    bound_seconds: dict[str, float]
    impossible: tuple[tuple[str, str], ...]
    score: float
    stay_score: float


@dataclass(frozen=True, slots=True)
class _Cell:
    """How a device runs a set of stages: an option each, and the seconds lost to turns until the end."""

    options: dict[int, Option]
    turns_seconds: float = 0.0


_Class = tuple[str, int]
_Key = tuple[_Class, tuple[int, ...]]
_Sets = list[tuple[int, ...]]


def place(works: Sequence[StageWork], devices: Sequence[Device], margin: float = MARGIN) -> Placement:
    """Roles for every device. Pure: the same input gives the same placement.

    No device is asked to hold more than its memory at once. Every stage with items left that some device can run
    gets a share. The placement is never judged worse than the best found split into whole workers, than whole
    models on each worker, or than the present roles.
    """
    fleet = _Fleet(works, devices)
    impossible = tuple(
        (work.job, work.stage)
        for place, work in enumerate(works)
        if work.items > 0 and not any(place in table for table in fleet.fastest.values())
    )
    stay = fleet.judge(fleet.present)
    if not any(fleet.fastest.values()):
        return Placement({device.name: () for device in devices}, "none", {}, {}, impossible, 0.0, 0.0)
    policy, best = "as it is", stay
    candidates: dict[str, Callable[[], _Sets | None]] = {  # of equals the first, which moves least later on
        "whole models": fleet.whole_models,
        "shared": fleet.shared,
        "whole workers": fleet.whole_workers,
    }
    for name, propose in candidates.items():
        if fleet.bound.score <= best.score * (1 + margin if policy == "as it is" else 1):
            break  # nothing can be better by enough
        sets = propose()
        if sets is not None:
            judged = fleet.judge(sets)
            needed = best.score * (1 + margin) if policy == "as it is" else best.score * (1 + 1e-9)
            if judged.score > needed:
                policy, best = name, judged
    return Placement(
        fleet.roles(best), policy, best.flow.seconds, fleet.bound.seconds, impossible, best.score, stay.score
    )


@dataclass(frozen=True, slots=True)
class _Judged:
    """A candidate: devices by class and stages, how each such group runs them, and what all achieve."""

    groups: dict[_Key, list[int]]
    cells: dict[_Key, _Cell]
    flow: Flow

    @property
    def score(self) -> float:
        return self.flow.score


class _Fleet:
    """Devices by class, with the fastest option of every stage that runs there, and the fluid bound."""

    def __init__(self, works: Sequence[StageWork], devices: Sequence[Device]) -> None:
        self.works, self.devices = works, devices
        self.demands = [Demand(work.job, work.items, work.weight) for work in works]
        self.classes: dict[_Class, list[int]] = defaultdict(list)
        for number, device in enumerate(devices):
            self.classes[_class(device)].append(number)
        self.fastest = {kind: self._fastest(kind) for kind in self.classes}
        whole = [
            Group(len(members), {place: option.seconds_per_item for place, option in self.fastest[kind].items()})
            for kind, members in self.classes.items()
        ]
        self._seconds = fastest_seconds(whole, self.demands)
        self.bound = best_flow(whole, self.demands, self._seconds)
        self.horizon_seconds = max((s for s in self.bound.seconds.values() if math.isfinite(s)), default=0.0)
        self._needs = {  # worker time a second, over all classes: what is scarce
            place: sum(shares.get(place, 0.0) for shares in self.bound.shares) for place in range(len(works))
        }
        self._places = {(work.job, work.stage): place for place, work in enumerate(works)}
        # Devices of a large fleet are of few kinds: what holds for one is looked up for the others.
        known: dict[tuple[_Class, tuple[tuple[str, str], ...], frozenset[str]], tuple[tuple[int, ...], ...]] = {}
        self.present: _Sets = []
        self._held: _Sets = []
        for device in devices:
            key = (_class(device), device.runs, device.holds)
            if key not in known:
                known[key] = self._present(device), self._holds(device)
            present, held = known[key]
            self.present.append(present)
            self._held.append(held)

    def _fastest(self, kind: _Class) -> dict[int, Option]:
        name, memory = kind
        found = {}
        for place, work in enumerate(self.works):
            fitting = usable(work.options.get(name, ()), memory)
            if work.items > 0 and fitting:
                found[place] = min(fitting, key=lambda option: option.seconds_per_item)
        return found

    def _present(self, device: Device) -> tuple[int, ...]:
        able = self.fastest[_class(device)]
        places = (self._places.get(pair) for pair in device.runs)
        return tuple(sorted(place for place in places if place is not None and place in able))

    # -- candidates: the stages of each device

    def shared(self) -> _Sets:
        """The fluid optimum: whole workers first, then the left-over parts wrapped around the others."""
        sets: _Sets = [()] * len(self.devices)
        for (kind, members), shares in zip(self.classes.items(), self.bound.shares, strict=True):
            wholes = {place: math.floor(share + _NOTHING) for place, share in shares.items()}
            free = self._seat(members, wholes, sets)
            parts = {place: share - wholes[place] for place, share in shares.items()}
            self._wrap(kind, free, {place: part for place, part in parts.items() if part > _NOTHING}, sets)
        return sets

    def whole_workers(self) -> _Sets | None:
        """Every worker one stage: the best split for one job on one class, a good one else.

        A worker goes where it helps most: to the stage that would end last; None where stages outnumber workers.
        """
        wanted = set().union(*self.fastest.values())
        if len(wanted) > len(self.devices):
            return None
        # The classes with the fewest abilities choose first, so that others are left for what only they can do.
        rates = dict.fromkeys(wanted, 0.0)
        counts: dict[_Class, dict[int, int]] = {}
        for kind, members in sorted(self.classes.items(), key=lambda entry: len(self.fastest[entry[0]])):
            counts[kind] = defaultdict(int)
            able = self.fastest[kind]
            lasting = [
                (-self._left(place, rates[place]), option.seconds_per_item, place) for place, option in able.items()
            ]
            heapq.heapify(lasting)
            for _ in members if able else ():
                _, seconds, place = lasting[0]
                rates[place] += 1 / seconds
                counts[kind][place] += 1
                heapq.heapreplace(lasting, (-self._left(place, rates[place]), seconds, place))
        sets: _Sets = [()] * len(self.devices)
        for kind, members in self.classes.items():
            self._seat(members, counts[kind], sets)
        return sets

    def _left(self, place: int, rate: float) -> float:
        work = self.works[place]
        return work.weight * work.items / rate if rate else math.inf

    def whole_models(self) -> _Sets | None:
        """Every stage on every worker that holds them all at once; None where no worker does."""
        whole = {kind: tuple(able) for kind, able in self.fastest.items() if able and self._together(kind, tuple(able))}
        if not whole:
            return None
        shared = self.shared()
        return [whole.get(_class(device), shared[number]) for number, device in enumerate(self.devices)]

    def _seat(self, members: Sequence[int], counts: Mapping[int, int], sets: _Sets) -> list[int]:
        """Give ``counts`` devices to each stage: those that run it, then those that hold it. Returns the others."""
        wanted = {place: count for place, count in counts.items() if count}
        free = list(members)
        for suits in (self._runs_only, self.present.__getitem__, self._held.__getitem__, lambda number: list(wanted)):
            left = []
            for number in free:
                for place in suits(number) if wanted else ():
                    if place in wanted:
                        sets[number] = (place,)
                        wanted[place] -= 1
                        if not wanted[place]:
                            del wanted[place]
                        break
                else:
                    left.append(number)
            free = left
        return free

    def _runs_only(self, number: int) -> Sequence[int]:
        present = self.present[number]
        return present if len(present) == 1 else ()

    def _holds(self, device: Device) -> tuple[int, ...]:
        able = self.fastest[_class(device)] if device.holds else {}
        return tuple(
            place
            for place, option in able.items()
            if option.weights and all(is_held(name, device.holds) for name in option.weights)
        )

    def _wrap(self, kind: _Class, free: list[int], parts: Mapping[int, float], sets: _Sets) -> None:
        """Lay the parts end to end and cut at every device: at most one more piece than there are devices."""
        if not parts:
            return
        room = max(sum(parts.values()) / len(free), _NOTHING)
        pieces: list[tuple[int, ...]] = [()]
        used = 0.0
        for place, part in sorted(parts.items()):
            while part > _NOTHING:
                if room - used <= _NOTHING and len(pieces) < len(free):
                    pieces.append(())
                    used = 0.0
                taken = min(part, room - used) if len(pieces) < len(free) else part
                pieces[-1] = (*pieces[-1], place)
                part -= taken
                used += taken
        for piece in pieces:
            chosen = max(free, key=lambda number: len({*piece} & {*self.present[number]}))
            sets[chosen] = piece
            free.remove(chosen)

    # -- judging

    def judge(self, sets: _Sets) -> _Judged:
        """What the devices achieve with these stages, loads and turns counted over the time that is left."""
        groups: dict[_Key, list[int]] = defaultdict(list)
        for number, places in enumerate(sets):
            groups[_class(self.devices[number]), places].append(number)
        together = {key: self._together(*key) for key in groups}
        cells = {key: cell or _Cell(self._options(*key)) for key, cell in together.items()}
        flow = self._flow(groups, cells)
        if not all(together.values()):
            rates: dict[int, float] = defaultdict(float)
            for key, shares in zip(groups, flow.shares, strict=True):
                for place, share in shares.items():
                    rates[place] += share / cells[key].options[place].seconds_per_item
            turning = {
                key: self._in_turns(key, shares, rates, len(members))
                for (key, members), shares in zip(groups.items(), flow.shares, strict=True)
                if together[key] is None
            }
            if any(cells[key] != cell for key, cell in turning.items()):  # else that is what the flow was made with
                cells.update(turning)
                flow = self._flow(groups, cells)
        return _Judged(groups, cells, flow)

    def _flow(self, groups: Mapping[_Key, list[int]], cells: Mapping[_Key, _Cell]) -> Flow:
        lost: dict[_Key, list[tuple[int, float]]] = {}  # how many of a group's devices lose how many seconds each
        for key, members in groups.items():
            cell = cells[key]
            held = Counter(self.devices[number].holds for number in members)
            lost[key] = [
                (count, load_seconds(cell.options.values(), holds) + cell.turns_seconds)
                for holds, count in held.items()
            ]
        # All work together until the end: W seconds of work and L of loads on n workers take (W + L) / n, and no less
        # than the load of a stage that nobody has ready. Who would still be loading by then is of no use.
        all_lost = sum(count * seconds for entries in lost.values() for count, seconds in entries)
        soonest: dict[int, float] = {}
        for key, entries in lost.items():
            least = min(seconds for _, seconds in entries)
            soonest.update((place, min(least, soonest.get(place, least))) for place in cells[key].options)
        wait = max(all_lost / max(len(self.devices), 1), *soonest.values(), 0.0)
        until_seconds = self.horizon_seconds + wait
        rows = []
        for key, entries in lost.items():
            parts = (count * min(seconds / until_seconds, _MOST_LOST) for count, seconds in entries if seconds)
            seconds_per_item = {place: option.seconds_per_item for place, option in cells[key].options.items()}
            rows.append(Group(len(groups[key]) - sum(parts), seconds_per_item))
        return best_flow(rows, self.demands, self._seconds)

    def _together(self, kind: _Class, places: tuple[int, ...]) -> _Cell | None:
        """All stages at once with their fastest options, or None where memory is short."""
        options = self._options(kind, places)
        return _Cell(options) if fits(options.values(), kind[1]) else None

    def _options(self, kind: _Class, places: tuple[int, ...]) -> dict[int, Option]:
        return {place: self.fastest[kind][place] for place in places}

    def _in_turns(self, key: _Key, shares: Mapping[int, float], rates: Mapping[int, float], members: int) -> _Cell:
        """One stage after another, each for as long as its results may wait for the next one."""
        options = self._options(*key)
        items = {  # of each member until the end: its part of the rate that all have together
            place: self.works[place].items * shares[place] / option.seconds_per_item / rates[place] / members
            if place in shares
            else 0.0
            for place, option in options.items()
        }
        cycles = max(
            (math.ceil(items[place] / self.works[place].ahead_items - _NOTHING) for place in options), default=1
        )
        once = sum(option.load_seconds for option in options.values())
        return _Cell(options, max(cycles - 1, 0) * once)

    # -- the result

    def roles(self, judged: _Judged) -> dict[str, tuple[Role, ...]]:
        """By device: its own stages by share, then those that it may help with."""
        alike: dict[tuple[_Key, frozenset[str]], tuple[Role, ...]] = {}
        key_of = {
            number: (key, group) for group, (key, members) in enumerate(judged.groups.items()) for number in members
        }
        found = {}
        for number, device in enumerate(self.devices):
            key, group = key_of[number]
            if (key, device.holds) not in alike:
                size = len(judged.groups[key])
                shares = {place: share / size for place, share in judged.flow.shares[group].items()}
                own = sorted(shares, key=lambda place: -shares[place])
                options = {place: judged.cells[key].options[place] for place in own}
                options = self._with_help(key[0], options, device.holds, judged.flow.seconds)
                alike[key, device.holds] = tuple(
                    Role(self.works[place].job, self.works[place].stage, shares.get(place, 0.0), option)
                    for place, option in options.items()
                )
            found[device.name] = alike[key, device.holds]
        served = {(role.job, role.stage) for roles in alike.values() for role in roles if role.share > 0}
        for place, work in enumerate(self.works):  # what is too little for the solver's tolerance must be done too
            pair = work.job, work.stage
            able = (device for device in self.devices if place in self.fastest[_class(device)])
            if pair not in served and (first := next(able, None)) is not None:
                others = [role for role in found[first.name] if (role.job, role.stage) != pair]
                found[first.name] = (*others, Role(*pair, _NOTHING, self.fastest[_class(first)][place]))
        return found

    def _with_help(
        self, kind: _Class, own: dict[int, Option], holds: frozenset[str], seconds: Mapping[str, float]
    ) -> dict[int, Option]:
        """And those stages that fit beside its ``own``, if it can load what it lacks of them before their job ends."""
        options = dict(own)
        for place in sorted(self.fastest[kind], key=lambda place: -self._needs[place]):
            option = self.fastest[kind][place]
            in_time = load_seconds([option], holds) < seconds.get(self.works[place].job, math.inf)
            if place not in options and in_time and fits([*options.values(), option], kind[1]):
                options[place] = option
        return options


def _class(device: Device) -> _Class:
    return device.device_class, device.memory_bytes
