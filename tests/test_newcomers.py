"""What waiting jobs and a cluster that starts workers tell each other."""

from __future__ import annotations

from dfdask.newcomers import STALE_SECONDS, Newcomers


def test_a_word_holds_until_it_is_stale() -> None:
    told = Newcomers()
    assert told.tell(3, 0.0) is False, "nobody has asked"
    assert told.want(0.0) == told.starting(0.0) == 3
    assert told.tell(2, STALE_SECONDS - 1) is True
    assert told.tell(1, STALE_SECONDS + 1) is False, "who asked has given up or is served"
    assert told.starting(STALE_SECONDS + 1) == 1
    assert told.starting(2 * STALE_SECONDS + 1) == 0, "nobody starts workers any more"
