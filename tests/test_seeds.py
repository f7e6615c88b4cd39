"""Seeds depend on the item alone, and never change between releases."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dfdask.prompts import read_items
from dfdask.seeds import SEEDS, explicit_seed, item_seed, text_key
from dfdask.spec import JobSpec

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def seeds_of(prompts: list[str]) -> dict[tuple[str, int], int]:
    """Seed by prompt and how many equal ones came before."""
    seen: dict[str, int] = {}
    found = {}
    for item in read_items(JobSpec(model="bundled", prompts=prompts)):
        occurrence = seen[item.prompt] = seen.get(item.prompt, -1) + 1
        found[item.prompt, occurrence] = item.seed
    return found


def test_known_values_stay() -> None:
    """A stored run can be reproduced only if these never change."""
    assert text_key("red apple") == 889069155263096606
    assert [item_seed(0, "red apple", 0, k) for k in range(2)] == [2645357071, 2645357072]
    assert item_seed(1, "red apple") == 2100267452


@given(st.integers(0, SEEDS - 1), texts, st.integers(0, 9), st.integers(0, 65535))
def test_range_and_consecutive_images(base: int, text: str, occurrence: int, image: int) -> None:
    seed = item_seed(base, text, occurrence, image)
    assert 0 <= seed < SEEDS
    assert seed == (item_seed(base, text, occurrence, 0) + image) % SEEDS
    assert 0 <= explicit_seed(seed, image) < SEEDS


@given(st.lists(texts, min_size=1, max_size=12), st.randoms())
def test_order_does_not_matter(prompts: list[str], random: object) -> None:
    shuffled = list(prompts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert seeds_of(shuffled) == seeds_of(prompts)


@given(st.lists(texts, min_size=1, max_size=12), texts, st.integers(0, 12))
def test_inserting_changes_nothing_else(prompts: list[str], new: str, place: int) -> None:
    before = seeds_of(prompts)
    after = seeds_of(prompts[:place] + [new] + prompts[place:])
    assert after.items() >= before.items()


@given(st.lists(texts, unique=True, min_size=2, max_size=40))
def test_different_texts_get_different_seeds(prompts: list[str]) -> None:
    assert len(set(seeds_of(prompts).values())) == len(prompts)


def test_equal_prompts_differ_and_ids_are_no_prompts() -> None:
    table = read_items(JobSpec(model="bundled", prompts=["a", "a", {"prompt": "b", "id": "a"}, "b"]))
    assert len({item.seed for item in table}) == 4
    assert table[2].seed == read_items(JobSpec(model="bundled", prompts=[{"prompt": "c", "id": "a"}]))[0].seed


def test_the_base_seed_changes_all() -> None:
    one, two = (read_items(JobSpec(model="bundled", prompts=["a", "b"], seed=s)) for s in (1, 2))
    assert all(x.seed != y.seed for x, y in zip(one, two, strict=True))
