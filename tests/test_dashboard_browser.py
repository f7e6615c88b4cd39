"""The dashboard page in a real browser while real jobs run, against what the store says."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import WALK, Page, open_page
from distributed import Client
from fleet import until

from dfdask.cluster import LocalFleet
from dfdask.errors import JobStopped
from dfdask.run import Run, submit

pytestmark = pytest.mark.browser

SECONDS = {"encode": 0.01, "denoise": 0.06, "decode": 0.02}
SIZES = {"apples": 240, "posters": 320, "night-sky": 160}
FAILS = ["item-5", "item-17"]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Of four workers that take any role."""
    fleet = LocalFleet(4)
    with Client(fleet.address, set_as_default=False) as client:
        client.wait_for_workers(4, timeout=60)
        yield client
    fleet.close()


@pytest.fixture
def url(client: Client) -> str:
    return str(client.dashboard_link).replace("/status", "/dfdask")


def start(client: Client, output: Path, items: int, **fake: Any) -> Run:
    prompts = [{"prompt": f"prompt {number}", "id": f"item-{number}"} for number in range(items)]
    model = {"fake": {"stages": SECONDS, "handoff_bytes": 100_000, "width": 16, "height": 16, **fake}}
    return submit(
        {"model": model, "seed": 1, "batch": 4, "shard": 8, "output": str(output)}, prompts=prompts, client=client
    )


def stored(run: Run) -> tuple[int, int]:
    """How many rows the store holds, and how many of them carry an error."""
    status = run.dataset().status.values
    return int((status > 0).sum()), int((status == 2).sum())


def shown(page: Page, run: Run) -> dict[str, Any]:
    """The job's head on the page, empty while it is not there."""
    name = Path(run.progress.output).name
    return next((one for one in page.read("tr.job") if one.get("name") == name), {})


def test_three_jobs_as_the_store_has_them(client: Client, url: str, tmp_path: Path) -> None:
    with open_page(url) as page:
        until(lambda: page.read("[data-fact=workers]"), 20, "the page to show workers")
        assert page.fact("workers") == "4 workers"
        runs = {
            name: start(client, tmp_path / name, items, fail=FAILS if name == "posters" else [])
            for name, items in SIZES.items()
        }
        until(lambda: page.fact("jobs") == "3 jobs", 30, "the page to show three jobs")
        until(lambda: all(int(shown(page, run).get("committed", 0)) for run in runs.values()), 60, "first commits")
        for name, run in runs.items():
            before, _ = stored(run)
            until(lambda run=run, least=before: int(shown(page, run)["committed"]) >= least, 10, "the page to follow")
            committed = int(shown(page, run)["committed"])
            assert committed <= stored(run)[0], "the page must not claim more than the store holds"
            assert int(shown(page, run)["items"]) == SIZES[name]
        stages = [(one["stage"], int(one["done"])) for one in page.read("tr[data-stage]")]
        assert [name for name, _ in stages] == list(SECONDS) * 3
        assert all(done >= 0 for _, done in stages)
        assert set(page.column("timeline", "stage")) == set(SECONDS)
        check_reasons(page)
        for run in runs.values():
            run.wait()
        until(lambda: len(page.read("tr.ended")) == 3, 20, "the page to show three ended jobs")
        ended = " ".join(one["text"] for one in page.read("tr.ended"))
        for name, run in runs.items():
            committed, failed = stored(run)
            assert (committed, failed) == (SIZES[name], len(FAILS) if name == "posters" else 0)
            assert f"{committed} of {SIZES[name]} items" in ended
        check_plots(page, sum(SIZES.values()))
        failures = page.read("[data-failure]")
        errors = set(runs["posters"].dataset().error.values) - {""}
        assert len(errors) == len(FAILS) == len(failures)
        for error in errors:
            assert any(error in one["text"] for one in failures), (error, failures)
        assert not page.errors()


def check_reasons(page: Page) -> None:
    """A change of roles says why, under the mouse and in the list."""
    until(lambda: page.read("[data-mark=retag]"), 10, "a change of roles")
    newest = page.read("[data-mark=retag]")[0]["text"]
    assert "\N{RIGHTWARDS ARROW}" in newest

    def explained() -> bool:
        page.hover("timeline", "when", "worker")
        return any("\N{RIGHTWARDS ARROW}" in one["text"] for one in page.read(".bk-Tooltip, .bk-tooltip-content"))

    until(explained, 20, "the reason under the mouse")


def check_plots(page: Page, items: int) -> None:
    """The bars hold each item once in each stage; the pictures are there."""

    def drawn() -> dict[str, int]:
        totals = dict.fromkeys(SECONDS, 0)
        for stage, number in zip(page.column("timeline", "stage"), page.column("timeline", "items"), strict=True):
            totals[stage] += number
        return totals

    # An item that fails goes through its stage again with its neighbours, in the same call.
    until(lambda: drawn() == dict.fromkeys(SECONDS, items), 10, f"{items} items in each stage's bars, not {drawn()}")
    assert set(page.column("timeline", "worker")) <= {"0", "1", "2", "3"}
    pictures = page.read("img[data-row]")
    assert len(pictures) == 48 and all(one["width"] == 16 for one in pictures)
    predicted, measured = page.column("costs", "predicted"), page.column("costs", "measured")
    assert predicted and all(value > 0 for value in predicted + measured)
    assert max(page.column("held", "slot1")) > 0, "what was drawn waited for its decoding"


@pytest.mark.parametrize("width", [1400, 800])
def test_nothing_is_cut_or_sticks_out(client: Client, url: str, tmp_path: Path, width: int) -> None:
    with open_page(url) as page:
        window = {"width": width, "height": 1650, "deviceScaleFactor": 1, "mobile": False}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        run = start(client, tmp_path / "a-name-of-a-run-that-is-forty-letters-long", 400, fail=FAILS)
        until(lambda: len(page.read("img[data-row]")) == 48, 60, "as many pictures as are shown")
        until(lambda: page.read("[data-failure]"), 20, "a failure")
        assert page.driver.execute_script(FITS) == [], "the page does not scroll sideways, no picture is cut"
        assert all(one["text"].endswith(tuple(FAILS)) for one in page.read("[data-failure]"))
        run.stop()
        with suppress(JobStopped):
            run.wait(60)


FITS = (
    WALK.replace("arguments[0]", "'.lanes, .pictures img, [data-failure]'")
    + """
const page = document.documentElement, right = document.querySelector("#dfdask").getBoundingClientRect().right;
const cut = found.filter(one => {
  const box = one.getBoundingClientRect(), around = one.parentElement.getBoundingClientRect();
  const isShown = box.top < around.bottom - 1;
  return isShown && (box.right > right || box.bottom > around.bottom + 1 || one.matches("li") &&
    one.scrollWidth > one.clientWidth);
});
return [...cut.map(one => one.outerHTML.slice(0, 200)), ...page.scrollWidth > page.clientWidth ? ["the page"] : []]
"""
)


def test_light_and_dark(url: str) -> None:
    def paper(page: Page) -> str:
        script = "return getComputedStyle(document.documentElement).backgroundColor"
        until(lambda: page.driver.execute_script(script) != "rgba(0, 0, 0, 0)", 20, "the page to have its styles")
        return str(page.driver.execute_script(script))

    def ink(page: Page) -> str:
        script = "return getComputedStyle(document.documentElement).getPropertyValue('--bk-major-label-text-color')"
        return str(page.driver.execute_script(script))

    with open_page(url, "light") as page:
        light = paper(page), ink(page)
    with open_page(url, "dark") as page:
        dark = paper(page), ink(page)
        page.driver.find_element("css selector", "#dfdask button").click()
        assert (paper(page), ink(page)) == light, "the button changes the scheme"
    assert light[0] == "rgb(250, 250, 250)" and dark[0] == "rgb(20, 23, 27)" and light[1] != dark[1]


def test_the_tab_is_on_dasks_own_pages(url: str) -> None:
    with open_page(url.replace("/dfdask", "/status")) as page:
        page.driver.find_element("link text", "Dfdask").click()
        until(lambda: page.read("[data-fact=workers]"), 20, "the page to show workers")


def freeze(page: Page) -> None:
    for process in page.processes():
        process.suspend()


def vanish(page: Page) -> None:
    for process in page.processes():
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("trouble", [None, freeze, vanish], ids=["open", "frozen", "killed"])
def test_a_watcher_changes_nothing(
    client: Client, url: str, tmp_path: Path, trouble: Callable[[Page], None] | None
) -> None:
    """A page that is open, one whose browser stops reading, one whose browser is gone: the same data."""
    alone = start(client, tmp_path / "alone", 120).wait().dataset()
    with open_page(url) as page:
        until(lambda: page.read("[data-fact=workers]"), 20, "the page to show workers")
        run = start(client, tmp_path / "watched", 120)
        until(lambda: run.progress.committed_items >= 16, 60, "the job to be in its middle")
        if trouble is not None:
            trouble(page)
        watched = run.wait().dataset()
    assert np.array_equal(alone.image.values, watched.image.values)
    assert (watched.status.values == 1).all()
    assert run.progress.committed_shards == run.progress.shards
