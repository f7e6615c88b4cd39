"""What dfdask itself costs: fake stages that take no time, so that all CPU seconds are overhead.

python tests/bench/overhead.py [--items 100000] [--batch 8] [--workers 2]

Prints CPU milliseconds per item and stage, who spent them, and the memory of scheduler and client (one process).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from distributed import Client

import dfdask
from dfdask.cluster import LocalFleet

STAGES = 3


def cpu_seconds(path: str) -> float:
    fields = Path(path).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker_cpu_seconds(client: Client) -> float:
    pids: dict[str, int] = client.run(os.getpid)
    return sum(cpu_seconds(f"/proc/{pid}/stat") for pid in pids.values())


def measure(items: int, batch: int, workers: int, folder: str) -> dict[str, Any]:
    fleet = LocalFleet(workers)
    client = Client(fleet.address, set_as_default=False)
    client.wait_for_workers(workers)
    job: dict[str, Any] = {
        "model": {"fake": {}},
        "seed": 1,
        "batch": batch,
        "output": f"{folder}/run",
    }
    dfdask.submit(job, prompts=["warm"] * 64, output=f"{folder}/warm", client=client).wait()
    prompts = [f"prompt {number}" for number in range(items)]
    memory = []
    own, theirs, began = cpu_seconds("/proc/self/stat"), worker_cpu_seconds(client), time.perf_counter()
    ask: Any = client.scheduler
    gate = client.sync(ask.dfdask_progress, run="")["gate_seconds"]
    run = dfdask.submit(job, prompts=prompts, client=client)
    prepared = cpu_seconds("/proc/self/stat")
    driver = next(thread for thread in threading.enumerate() if thread.name == "dfdask-driver")
    driver_seconds = 0.0
    while run.progress.phase == "running":
        with contextlib.suppress(OSError):  # it may have ended by now
            driver_seconds = cpu_seconds(f"/proc/self/task/{driver.native_id}/stat")
        memory.append(resident_bytes())
        time.sleep(0.5)
    run.wait()
    wall = time.perf_counter() - began
    gate = client.sync(ask.dfdask_progress, run="")["gate_seconds"] - gate
    process, worker = cpu_seconds("/proc/self/stat") - own, worker_cpu_seconds(client) - theirs
    failed = run.progress.failed_items
    client.close()
    fleet.close()
    per = 1000 / (items * STAGES)
    quarter = max(len(memory) // 4, 1)
    return {
        "items": items,
        "batch": batch,
        "workers": workers,
        "failed": failed,
        "wall_seconds": round(wall, 1),
        "items_per_second": round(items / wall, 1),
        "cpu_ms_per_item_stage": round((process + worker) * per, 4),
        "of_which_workers": round(worker * per, 4),
        "of_which_preparing": round((prepared - own) * per, 4),
        "of_which_driver": round(driver_seconds * per, 4),
        "of_which_gate": round(gate * per, 4),
        "of_which_dask_scheduler_and_client": round((process - (prepared - own) - driver_seconds - gate) * per, 4),
        "memory_mb_first_quarter": round(max(memory[:quarter]) / 2**20),
        "memory_mb_peak": round(max(memory) / 2**20),
        "memory_mb_last_quarter": round(max(memory[-quarter:]) / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, value in measure(options.items, options.batch, options.workers, folder).items():
            print(f"{name:36} {value}")


if __name__ == "__main__":
    main()
