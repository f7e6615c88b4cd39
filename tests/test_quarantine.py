"""Quarantine: the item that kills is found by name, its neighbours are not blamed, and no job waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dfdask.items import Item
from dfdask.quarantine import KILLS_TO_BLAME, KILLS_TO_GIVE_UP, Quarantine
from dfdask.stages.batch import Batch, Rows, run_batch

KEY, OTHER = ("denoise-run", 0, 0, 4), ("denoise-run", 0, 1, 4)
DIED = "its worker died"


class Killed(BaseException):
    """The end of a worker's process."""


class Deadly:
    """A stage that ends its worker for the rows in ``poison`` and tells which single item it begins."""

    def __init__(self, poison: set[int], tell: Callable[[int], None]) -> None:
        self._poison, self._tell = poison, tell

    def run(self, items: Sequence[Item], state: Any) -> Any:
        if len(items) == 1:
            self._tell(items[0].index)
        if any(item.index in self._poison for item in items):
            raise Killed
        return state if state is not None else Rows([item.index for item in items])


def attempts(
    quarantine: Quarantine, key: Hashable, batch: Batch, poison: set[int], accidents: set[int]
) -> tuple[Batch | None, list[int], int]:
    """Run a task as gate and worker do until it ends or is given up: its result, who was blamed, deaths.

    ``accidents`` are attempts at which the worker dies before it begins, through no fault of an item.
    """
    blamed: list[int] = []
    for deaths in range(200):
        suspicion = quarantine.suspicion(key, deaths)
        note = suspicion.note or {}
        blamed += [suspicion.culprit] if suspicion.culprit is not None else []
        if note.get("give_up"):
            return None, blamed, deaths
        if deaths in accidents:
            continue
        todo = batch.without(note.get("poison", ()), DIED)
        careful = bool(note.get("careful"))

        def tell(row: int, listen: bool = careful) -> None:
            if listen:
                quarantine.began(key, row)

        try:
            return (
                run_batch("denoise", Deadly(poison, tell), todo.in_single_items() if careful else todo),
                blamed,
                deaths,
            )
        except Killed:
            continue
    raise AssertionError("neither done nor given up")


def batch_of(count: int, state: Any = None) -> Batch:
    (group,) = Batch.start([Item(row, f"item-{row}", "a cat", row, {}) for row in range(count)]).groups
    return Batch((type(group)(group.items, state),))


def rows(batch: Batch) -> list[int]:
    return [item.index for group in batch.groups for item in group.items]


BATCHES = st.integers(1, 8).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1))))


@given(BATCHES, st.booleans())
def test_the_guilty_are_blamed_and_nobody_else(drawn: tuple[int, set[int]], first: bool) -> None:
    count, poison = drawn
    batch = batch_of(count, None if first else Rows(list(range(count))))
    done, blamed, deaths = attempts(Quarantine(), KEY, batch, poison, set())
    assert done is not None and set(done.failures) == poison and set(done.failures.values()) <= {DIED}
    assert rows(done) == [row for row in range(count) if row not in poison]
    assert blamed == sorted(poison) and deaths == KILLS_TO_BLAME * len(poison)


@given(BATCHES, st.sets(st.integers(0, 30), max_size=6))
def test_deaths_of_other_causes_blame_no_innocent(drawn: tuple[int, set[int]], accidents: set[int]) -> None:
    count, poison = drawn
    done, blamed, _ = attempts(Quarantine(), KEY, batch_of(count), poison, accidents)
    assert set(blamed) <= poison and len(set(blamed)) == len(blamed)
    assert done is None or set(done.failures) == poison


def test_a_machine_that_kills_everything_is_given_up() -> None:
    done, blamed, deaths = attempts(Quarantine(), KEY, batch_of(4), set(), set(range(100)))
    assert done is None and not blamed and deaths == KILLS_TO_GIVE_UP


def test_what_cannot_be_parted_is_given_up_and_nobody_blamed() -> None:
    done, blamed, deaths = attempts(Quarantine(), KEY, batch_of(3, state="one for all"), {1}, set())
    assert done is None and not blamed and deaths == KILLS_TO_GIVE_UP


def test_without_deaths_nothing_is_special() -> None:
    found = Quarantine().suspicion(KEY, 0)
    assert (found.alone, found.note, found.culprit) == (False, None, None)


def test_after_one_death_alone_and_after_two_item_by_item() -> None:
    quarantine = Quarantine()
    one, two = quarantine.suspicion(KEY, 1), quarantine.suspicion(KEY, 2)
    assert one.alone and one.note == {"poison": [], "careful": False, "give_up": False}
    assert two.alone and two.note == {"poison": [], "careful": True, "give_up": False}


def test_a_culprit_is_named_once_and_left_out_from_then_on() -> None:
    quarantine = Quarantine()
    quarantine.suspicion(KEY, 2)
    quarantine.began(KEY, 5)
    found, again = quarantine.suspicion(KEY, 3), quarantine.suspicion(KEY, 3)
    assert (found.culprit, again.culprit) == (5, None)
    assert found.note == again.note == {"poison": [5], "careful": False, "give_up": False}


def test_what_began_at_an_earlier_attempt_is_no_evidence() -> None:
    quarantine = Quarantine()
    quarantine.suspicion(KEY, 1)
    quarantine.began(KEY, 5)
    quarantine.suspicion(KEY, 2)
    assert quarantine.suspicion(KEY, 3).culprit is None


def test_tasks_have_cases_of_their_own() -> None:
    quarantine = Quarantine()
    for key in (KEY, OTHER):
        quarantine.suspicion(key, 2)
    quarantine.began(KEY, 5)
    assert quarantine.suspicion(OTHER, 3).culprit is None
    assert quarantine.suspicion(KEY, 3).culprit == 5


def test_a_task_that_is_forgotten_begins_anew() -> None:
    quarantine = Quarantine()
    quarantine.suspicion(KEY, 2)
    quarantine.began(KEY, 5)
    quarantine.suspicion(KEY, 3)
    quarantine.forget_task(KEY)
    found = quarantine.suspicion(KEY, 1)
    assert found.note == {"poison": [], "careful": False, "give_up": False}


def test_word_of_an_unsuspected_task_is_nothing() -> None:
    quarantine = Quarantine()
    quarantine.began(KEY, 5)
    assert quarantine.suspicion(KEY, 3).culprit is None
