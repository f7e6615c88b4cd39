"""What waiting jobs and a cluster that starts workers tell each other."""

from __future__ import annotations

from dfdask.newcomers import STALE_SECONDS, Newcomers


def test_a_word_holds_until_it_is_stale() -> None:
    told = Newcomers()
    assert not told.wanted(0.0)
    told.tell(3, 0.0)
    assert told.want(0.0) == told.starting(0.0) == 3
    assert told.wanted(STALE_SECONDS - 1)
    assert not told.wanted(STALE_SECONDS + 1), "who asked has given up or is served"
    told.tell(1, STALE_SECONDS + 1)
    assert told.starting(STALE_SECONDS + 1) == 1
    assert told.starting(2 * STALE_SECONDS + 1) == 0, "nobody starts workers any more"
