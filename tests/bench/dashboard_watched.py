"""Whether a watcher slows a job: the page closed, open, open in many browsers, read by nobody, gone.

python tests/bench/dashboard_watched.py [--items 480] [--workers 4] [--rounds 3]

Prints the seconds of the same job for each, best and median of the rounds, and whether its data were the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from distributed import Client

import dfdask
from dfdask.cluster import LocalFleet

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import open_page  # noqa: E402
from watcher import Watcher  # noqa: E402

STAGES = {"encode": 0.01, "denoise": 0.06, "decode": 0.02}  # seconds per item
MANY = 10


@contextlib.contextmanager
def watching(how: str, url: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if how == "ten pages":
            for _ in range(MANY):
                stack.enter_context(Watcher(url))
        elif how != "closed":
            page = stack.enter_context(open_page(url))
            time.sleep(2)
            sent = {"frozen": signal.SIGSTOP, "killed": signal.SIGKILL}.get(how)
            for process in page.processes() if sent else []:
                os.kill(process.pid, sent)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=480)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ways = ("closed", "open", "ten pages", "frozen", "killed")
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    same = True
    fleet = LocalFleet(options.workers)
    with tempfile.TemporaryDirectory() as folder, Client(fleet.address, set_as_default=False) as client:
        client.wait_for_workers(options.workers)
        url = str(client.dashboard_link).replace("/status", "/dfdask")
        prompts = [f"prompt {number}" for number in range(options.items)]

        def job(name: str) -> np.ndarray:
            model = {"fake": {"stages": STAGES, "handoff_bytes": 100_000, "width": 32, "height": 32}}
            fields = {"model": model, "batch": 4, "shard": 8, "seed": 1, "output": f"{folder}/{name}"}
            pixels: np.ndarray = dfdask.submit(fields, prompts=prompts, client=client).wait().dataset().image.values
            return pixels

        expected = job("warm")
        for number in range(options.rounds):
            for how in ways:
                with watching(how, url):
                    began = time.perf_counter()
                    pixels = job(f"{how.replace(' ', '-')}-{number}")
                    seconds[how].append(time.perf_counter() - began)
                same = same and np.array_equal(pixels, expected)
    fleet.close()
    for how in ways:
        print(f"{how:12} best {min(seconds[how]):6.2f} s, median {statistics.median(seconds[how]):6.2f} s")
    print(f"same data    {same}")


if __name__ == "__main__":
    main()
