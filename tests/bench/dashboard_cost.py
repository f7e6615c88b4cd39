"""What the page and the metrics cost the scheduler: 400 simulated workers, three jobs, real tasks.

python tests/bench/dashboard_cost.py [--workers 400] [--pages 1] [--rounds 6] [--seconds 8]

A scheduler process; one process with all workers, whose fake stages sleep; three jobs. The page is closed and open (and
the metrics scraped every two seconds) in turns while the jobs go on. Prints the scheduler's CPU share in both, the
difference, the page's own account, and what one update costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Worker

import dfdask

sys.path.insert(0, str(Path(__file__).parents[1]))
from watcher import Watcher  # noqa: E402

STAGES = {"encode": 0.1, "denoise": 2.0, "decode": 0.3}  # seconds per item
BATCH = 4
SCRAPE_SECONDS = 2.0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def serve_workers(address: str, count: int) -> None:
    """All in one process and event loop: they only sleep, and look after themselves less often than real ones."""
    dask.config.set(
        {
            "distributed.admin.tick.interval": "10s",
            "distributed.admin.system-monitor.interval": "30s",
            "distributed.worker.profile.enabled": False,
        }
    )
    workers = [
        Worker(address, nthreads=1, memory_limit=0, name=number, silence_logs="ERROR") for number in range(count)
    ]
    for start in range(0, count, 20):
        await asyncio.gather(*workers[start : start + 20])
    await asyncio.gather(*(worker.finished() for worker in workers))


@contextlib.contextmanager
def watched(url: str, pages: int) -> Iterator[list[Watcher]]:
    """Open pages, and a Prometheus that asks often."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(SCRAPE_SECONDS):
            urllib.request.urlopen(url.replace("/dfdask", "/metrics"), timeout=20).read()

    thread = threading.Thread(target=scrape)
    with contextlib.ExitStack() as stack:
        watchers = [stack.enter_context(Watcher(url)) for _ in range(pages)]
        thread.start()
        yield watchers
        done.set()
        thread.join()


def account(client: Client) -> tuple[float, int]:
    """CPU seconds of the page by its own account, and its looks."""

    def read(dask_scheduler: Any) -> tuple[float, int]:
        sampler = dask_scheduler.plugins["dfdask-dashboard"].sampler
        return sampler.spent.seconds, sampler.looks

    spent: tuple[float, int] = client.run_on_scheduler(read)
    return spent


def measure(options: argparse.Namespace, folder: str, scheduler: int, client: Client, url: str) -> dict[str, Any]:
    seconds = options.rounds * 2 * (options.seconds + 4) + 30
    items = int(options.workers / sum(STAGES.values()) * seconds / 3)
    runs = [
        dfdask.submit(
            {"model": {"fake": {"stages": STAGES, "handoff_bytes": 1000}}, "batch": BATCH, "shard": 32, "seed": number},
            prompts=[f"{number} {item}" for item in range(items)],
            output=f"{folder}/job-{number}",
            client=client,
        )
        for number in range(3)
    ]
    began = time.perf_counter()
    while any(run.progress.committed_items < 1 for run in runs):
        time.sleep(1)
    print(f"{'seconds_until_all_jobs_commit':40} {time.perf_counter() - began:.0f}", flush=True)
    shares: dict[str, list[float]] = {"closed": [], "open": []}
    rates: dict[str, list[float]] = {"closed": [], "open": []}
    own, looks, pushed = 0.0, 0, 0
    for number in range(2 * options.rounds):
        name = ("closed", "open")[number % 2]
        with watched(url, options.pages) if name == "open" else contextlib.nullcontext([]) as watchers:
            if name == "open":  # what it costs to open a page is another matter
                _, opened_at = account(client)
                while account(client)[1] < opened_at + 2:
                    time.sleep(0.5)
            page, looked = account(client)
            taken = sum(watcher.taken_bytes for watcher in watchers)
            cpu, began = cpu_seconds(scheduler), time.perf_counter()
            committed = sum(run.progress.committed_items for run in runs)
            time.sleep(options.seconds)
            wall = time.perf_counter() - began
            shares[name].append((cpu_seconds(scheduler) - cpu) / wall)
            rates[name].append((sum(run.progress.committed_items for run in runs) - committed) / wall)
            if name == "open":
                after, now = account(client)
                own, looks = own + after - page, looks + now - looked
                pushed += sum(watcher.taken_bytes for watcher in watchers) - taken
    assert all(run.progress.phase == "running" for run in runs), "the jobs ended too early: fewer --rounds"
    for run in runs:
        run.stop()
    closed, opened = statistics.mean(shares["closed"]), statistics.mean(shares["open"])
    differences = [after - before for before, after in zip(shares["closed"], shares["open"], strict=True)]
    return {
        "workers": options.workers,
        "jobs": len(runs),
        "pages": options.pages,
        "items_per_second_closed": round(statistics.mean(rates["closed"]), 1),
        "items_per_second_open": round(statistics.mean(rates["open"]), 1),
        "scheduler_cpu_percent_closed": round(100 * closed, 2),
        "scheduler_cpu_percent_open": round(100 * opened, 2),
        "difference_percent": round(100 * (opened - closed), 2),
        "its_standard_error": round(100 * statistics.stdev(differences) / len(differences) ** 0.5, 2),
        "page_cpu_percent_by_its_own_account": round(100 * own / (options.rounds * options.seconds), 2),
        "cpu_ms_per_update": round(1000 * own / max(looks, 1), 2),
        "kilobytes_per_update_and_page": round(pushed / max(looks, 1) / max(options.pages, 1) / 1000, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=400)
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_workers(options.serve, options.workers))
        return
    port, web = free_port(), free_port()
    address = f"tcp://127.0.0.1:{port}"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["dfdask", "scheduler", "--port", str(port), "--dashboard-address", f"127.0.0.1:{web}"]
    scheduler = subprocess.Popen([sys.executable, "-m", *command], **quiet)
    crowd = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            time.sleep(5)
            serve = [sys.executable, __file__, "--serve", address, "--workers", str(options.workers)]
            crowd = subprocess.Popen(serve, **quiet)
            with Client(address, set_as_default=False, timeout=30) as client:
                began = time.perf_counter()
                client.wait_for_workers(options.workers, timeout=300)
                print(f"{'seconds_until_all_joined':40} {time.perf_counter() - began:.0f}", flush=True)
                url = f"http://127.0.0.1:{web}/dfdask"
                for name, value in measure(options, folder, scheduler.pid, client, url).items():
                    print(f"{name:40} {value}", flush=True)
    finally:
        for process in (crowd, scheduler):
            if process is not None:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
