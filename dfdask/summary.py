"""What a stored run says about itself: how far it is, what made it, what failed. Reads the store only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dfdask.store_events import is_event
from dfdask.words import clipped, count, duration, percent, printable, size

if TYPE_CHECKING:
    from rich.console import Console

    from dfdask.store import RunStore

FAILED = 2  # the value of `status` in rows that carry an error


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far a run is. ``ok_items`` and ``failed_items`` are committed; the rest is still to do."""

    run: str
    output: str
    items: int
    ok_items: int
    failed_items: int
    shards: int
    committed_shards: int
    stored_bytes: int

    def as_dict(self) -> dict[str, str | int | bool]:
        return {**asdict(self), "complete": self.committed_shards == self.shards}

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values for people."""
        done = self.ok_items + self.failed_items
        return [
            ("run", self.run),
            ("items", f"{done:,} of {count(self.items, 'item')} committed ({percent(done, self.items)})"),
            ("ok", f"{self.ok_items:,}"),
            ("failed", f"{self.failed_items:,}"),
            ("shards", f"{self.committed_shards:,} of {self.shards:,} committed"),
            ("stored", size(self.stored_bytes)),
            ("dataset", self.output),
        ]


def status_of(store: RunStore) -> RunStatus:
    """Raises StorageError."""
    return run_status(store, store.commits())


def print_details(console: Console, store: RunStore, failures_limit: int) -> None:
    """Everything about a run for people: status, spec, versions, timings, the first failures."""
    from dfdask.progress import print_rows

    commits = store.commits()
    about: Mapping[str, Any] = store.attributes.get("dfdask", {})
    sections = [
        ("", run_status(store, commits).rows()),
        ("spec", flat(about.get("spec", {}))),
        ("model", flat(about.get("model", {}))),
        ("versions", [*flat(about.get("versions", {})), ("created", str(about.get("created", "unknown")))]),
        ("timings", timings(commits)),
        ("failures", list(failures(store, commits, failures_limit))),
    ]
    for title, rows in sections:
        if rows:
            if title:
                console.print(f"\n{title}", style="bold")
            print_rows(console, rows)
    hidden = sum(int(commit["failed"]) for commit in commits) - failures_limit
    if hidden > 0:
        console.print(f"... and {hidden:,} more; --failures lists more of them", style="dim")


def timings(commits: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Seconds per stage over all commits, in total and per item."""
    return [
        (stage, f"{duration(seconds)}, {seconds / max(items, 1):.4g} s an item")
        for stage, (seconds, items) in stage_seconds(commits).items()
    ]


def stage_seconds(commits: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """Device seconds and items of every stage over all commits."""
    found: dict[str, tuple[float, int]] = {}
    for commit in commits:
        for stage, seconds in commit.get("stage_seconds", {}).items():
            before, items = found.get(stage, (0.0, 0))
            found[stage] = before + float(seconds), items + int(commit["stop"]) - int(commit["start"])
    return found


def failures(store: RunStore, commits: list[dict[str, Any]], limit: int) -> Iterator[tuple[str, str]]:
    """Ids of failed items with prompt and error, at most ``limit``; only shards with failures are read."""
    with_failures = [commit for commit in commits if commit["failed"]]
    if not with_failures or not limit:
        return
    dataset = store.dataset()[["id", "prompt", "status", "error"]]
    for commit in sorted(with_failures, key=lambda entry: int(entry["start"])):
        rows = dataset.isel(item=slice(int(commit["start"]), int(commit["stop"]))).load()
        rows = rows.isel(item=rows["status"].values == FAILED)
        for name, prompt, error in zip(rows["id"].values, rows["prompt"].values, rows["error"].values, strict=True):
            yield printable(str(name)), f"{clipped(str(error), 160)}  [{clipped(str(prompt), 60)}]"
            limit -= 1
            if not limit:
                return


def run_status(store: RunStore, commits: list[dict[str, Any]]) -> RunStatus:
    items, shard_items = store.layout.items, store.layout.shard_items
    failed = sum(int(commit["failed"]) for commit in commits)
    done = sum(int(commit["stop"]) - int(commit["start"]) for commit in commits)
    return RunStatus(
        run=store.location.name,
        output=str(store.location),
        items=items,
        ok_items=done - failed,
        failed_items=failed,
        shards=-(-items // shard_items),
        committed_shards=len(commits),
        stored_bytes=_stored_bytes(store),
    )


def _stored_bytes(store: RunStore) -> int:
    import obstore

    listing = obstore.list(store.location.object_store())
    return sum(int(entry["size"]) for page in listing for entry in page if not is_event(entry["path"]))


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and texts; what is not set is left out."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.extend(flat(value, f"{prefix}{key}."))
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", clipped(text, 200)))
    return rows
