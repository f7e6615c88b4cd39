"""``dfdask explain`` and ``dfdask report`` of stored runs, with events and without."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from stored import new_run, put
from told import later, told

from dfdask.cli import main
from dfdask.errors import StorageError
from dfdask.explain import as_dict, gain, print_history
from dfdask.history import History
from dfdask.report import write_report
from dfdask.store import RunStore
from dfdask.targets import Location


class Page(HTMLParser):
    """Checks that all is closed; collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def store(local: Location) -> RunStore:
    store = new_run(local)
    for shard in range(3):
        put(store, shard, failed=(4,) if shard == 1 else ())
    return store


def explained(store: RunStore, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_history(console, store, History.of(store.events(), ["encode", "denoise", "decode"]))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_explain(store: RunStore) -> None:
    store.append_events(told())
    text = explained(store)
    for part in (
        "2 decisions, 8 moves, 6 workers in 5 min 00 s",
        "encode is slower (shares)",
        "2 workers: denoise → encode 75%",
        "left: 3 min 20 s without it, 2 min 20 s predicted, 2 min 30 s as it came",
        "gain: +1 min 00 s predicted, +50 s as it came",
        "left: 4 min 50 s predicted, 5 min 00 s as it came",
        "item 17 was given up in denoise",
        "10.0.0.5:4000 left, its 2 tasks went elsewhere",
    ):
        assert part in text, text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["denoise"][1:3] == ["439", "1,756"]
    assert max(map(len, explained(store, width=60).splitlines())) <= 60


def test_explain_and_the_page_leave_out_the_time_between_starts(store: RunStore, tmp_path: Path) -> None:
    store.append_events(told(ended=False))
    store.append_events(later(7200.0))
    text = explained(store)
    assert "in 9 min 59 s (1 pause between starts left out, 1 h 55 min)" in text
    assert "4 min 59 s  demo began" in text, "the second start, after what the first did"
    assert "a thick line a new start" in Path(write_report(store, tmp_path / "page.html")).read_text()


def test_explain_says_so_where_there_is_nothing(store: RunStore) -> None:
    assert "No events are stored with this run" in explained(store)
    store.append_events([{"event": "JobStarted", "when": 1.0, "run": "r"}])
    assert "No roles were changed." in explained(store)


def test_explain_as_json(store: RunStore) -> None:
    store.append_events(told())
    result = CliRunner().invoke(main, ["explain", str(store.location.path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found == json.loads(json.dumps(as_dict(History.of(store.events()))))
    assert found["complete"] and len(found["workers"]) == 6
    assert [len(decision["moves"]) for decision in found["decisions"]] == [6, 2]
    assert found["decisions"][1]["predicted_gain_seconds"] == pytest.approx(60)
    assert [event["event"] for event in found["other"]] == ["ItemQuarantined", "WorkerLeft"]


@pytest.mark.parametrize(("seconds", "words"), [(None, "?"), (0.0, "0.0 s"), (61.0, "+1 min 01 s"), (-2.0, "−2.0 s")])
def test_gains(seconds: float | None, words: str) -> None:
    assert gain(seconds) == words


def test_the_page_says_everything_and_loads_nothing(store: RunStore) -> None:
    store.append_events(told())
    path = Path(write_report(store))
    assert path.name == "report.html" and path.parent.name == "report"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    addresses = [value for _, attrs in page.seen for name, value in attrs.items() if name in ("src", "href")]
    assert addresses and all(str(value).startswith("data:image/jpeg;base64,") for value in addresses)
    assert not re.search(r"url\(|@import", html)
    policy = next(attrs["content"] for tag, attrs in page.seen if tag == "meta" and "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    first = base64.b64decode(str(addresses[0]).partition(",")[2])
    assert Image.open(io.BytesIO(first)).size[1] == 168
    assert sum(tag == "figure" for tag, _ in page.seen) == 7 and len(addresses) == 6
    assert sum(tag == "svg" for tag, _ in page.seen) == 3
    text = " ".join(page.text)
    for part in ("of 7 items made", "complete", "prompt 3: café, 猫", "denoise: row 4 ✗", "encode is slower", "50 s",
                 "Versions", "seed", "Predicted against measured"):  # fmt: skip
        assert part in text, text


def test_a_run_without_events_has_a_page_too(local: Location, tmp_path: Path) -> None:
    store = new_run(local)
    output = tmp_path / "mine.html"
    assert write_report(store, output) == str(output)
    text = " ".join(Page(output.read_text(encoding="utf-8")).text)
    assert "Nothing is committed yet." in text and "No events are stored with this run" in text
    put(store, 1)
    text = " ".join(Page(Path(write_report(store)).read_text(encoding="utf-8")).text)
    assert "42%" in text


def test_texts_from_outside_do_not_become_markup(local: Location) -> None:
    import numpy as np

    evil = '"><script>alert(1)</script>'
    store = RunStore.create(
        local,
        new_run(local.__class__(local.kind, local.root, "other")).layout,
        {name: np.array([evil] * 7, dtype=np.dtypes.StringDType()) for name in ("id", "prompt")},
        {"dfdask": {"spec": {"model": evil, evil: evil}, "versions": {evil: evil}, "created": evil}},
    )
    put(store, 0, failed=(1,))
    events = told(2, seconds=20)
    for event in events:
        for name in ("worker", "reason", "policy", "stage"):
            if name in event:
                event[name] = evil
    store.append_events(events)
    html = Path(write_report(store)).read_text(encoding="utf-8")
    assert "<script" not in html and "alert(1)" in html
    Page(html)


def test_a_page_that_cannot_be_written(store: RunStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write .*nowhere"):
        write_report(store, tmp_path / "nowhere" / "report.html")


def test_the_command(store: RunStore, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(store.location.path), "-o", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(tmp_path / "page.html") and (tmp_path / "page.html").stat().st_size > 5000
