"""What a stage may be run as: from numbers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfdask.options import SLOTS, Hint, Link, Needs, Variant, kept_bytes, streamed_blocks, variants

GIB = 2**30
# FLUX.1 at 1024 x 1024, 28 steps: bytes of its blocks in bf16, seconds of a step on an H100 at batch 1, 2, 4.
FLUX_BLOCKS = [679_600_000] * 19 + [283_200_000] * 38
FLUX = Needs({"transformer": 23_800_000_000}, FLUX_BLOCKS, 28, 100_000_000, 800_000_000)


def flux_seconds(batch: int) -> float:
    return 28 * (0.004 + 0.180 * batch)


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


def test_a_large_device_keeps_all_and_batches_only_for_profit() -> None:
    found = variants(FLUX, Link(80 * GIB, 54e9), flux_seconds)
    assert {variant.hint.mode for variant in found} == {"resident"}
    assert found[0].hint.batch in (1, 2) and all(variant.option.seconds_per_item > 0 for variant in found)
    gains = variants(FLUX, Link(80 * GIB, 54e9), lambda batch: 1.0 + 0.1 * batch)
    assert gains[0].hint.batch is not None and gains[0].hint.batch >= 16


def test_a_small_device_streams_as_much_as_it_must() -> None:
    found = variants(FLUX, Link(24 * GIB, 54e9), flux_seconds)
    best = found[0]
    assert best.option.seconds_per_item < 1.08 * 5.25
    tight = variants(FLUX, Link(12 * GIB, 54e9), flux_seconds)
    assert {variant.hint.mode for variant in tight} == {"streamed"}
    assert (tight[0].hint.batch or 0) >= 2, "a larger batch hides the transfers"
    assert all(sum(v.option.weights.values()) + v.option.working_bytes <= 12 * GIB + 64 for v in tight)
    slow = variants(FLUX, Link(12 * GIB, 5e9), flux_seconds)
    assert slow[0].option.seconds_per_item > tight[0].option.seconds_per_item
    assert variants(FLUX, Link(2 * GIB, 54e9), flux_seconds) == ()


def test_a_decoder_is_tiled_where_memory_is_short() -> None:
    vae = Needs({"vae": 170_000_000}, (), 1, 0, 4 * GIB, tiled_bytes=GIB)
    large = variants(vae, Link(80 * GIB), lambda batch: 0.09 * batch)
    assert large[0].hint == Hint("resident", 1, False, 4 * GIB)
    small = variants(vae, Link(3 * GIB), lambda batch: 0.09 * batch)
    assert [variant.hint for variant in small] == [Hint("resident", 1, True, GIB)]
    assert small[0].option.seconds_per_item > large[0].option.seconds_per_item


def test_a_stage_says_how_many_items_it_takes() -> None:
    found = variants(Needs({"part": 1}, most_items=4), Link(100), lambda batch: 1.0)
    assert max(variant.hint.batch or 0 for variant in found) == 4


@pytest.mark.parametrize("hint", [Hint(), Hint("streamed", 4, True, 7), Hint("resident", 1)])
def test_a_hint_travels_as_plain_values(hint: Hint) -> None:
    assert Hint.of(hint.values()) == hint
    assert Hint.of({**hint.values(), "of a later version": 1}) == hint
    assert Hint.of(None) == Hint()


def test_variants_are_options_that_a_placement_takes() -> None:
    from dfdask.placement import Device, StageWork, place

    chosen = variants(FLUX, Link(24 * GIB, 54e9), flux_seconds)
    work = StageWork("job", "denoise", 64, {"gpu": [variant.option for variant in chosen]})
    (role,) = place([work], [Device("w", "gpu", 24 * GIB)]).roles["w"]
    assert role.option == chosen[0].option and isinstance(chosen[0], Variant)
