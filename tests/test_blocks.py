"""Which blocks are streamed: from numbers alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dfdask.blocks import SLOTS, kept_bytes, streamed_blocks


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40), st.integers(0, 10**6), st.floats(0, 1.2))
def test_streamed_blocks_keep_to_what_is_allowed(sizes: list[int], core: int, part: float) -> None:
    total = core + sum(sizes)
    allowed = part * total
    found = streamed_blocks(sizes, core, allowed)
    if found is None:
        slots = kept_bytes(sizes, tuple(range(len(sizes))))
        assert core + slots > allowed and total > allowed
    else:
        assert core + kept_bytes(sizes, found) <= allowed and sorted(set(found)) == list(found)
        assert (not found) == (total <= allowed)
        assert len(found) in (0, len(sizes)) or len(found) % SLOTS == 0


def test_streamed_blocks_lie_apart() -> None:
    found = streamed_blocks([10] * 20, 0, 180)
    assert found is not None and len(found) == 4
    assert {later - earlier for earlier, later in zip(found, found[1:], strict=False)} == {5}
