"""dfdask against the plain diffusers loop, the same prompts, model and cores, in one run.

python tests/bench/throughput.py [--items 256] [--repeats 3] [--job jobs/partiprompts.yaml]

The loop is ``pipeline(prompts[i : i + batch], ...)`` in one process with all cores, at the batch size that is best
for it here. dfdask's rate counts from the first commit, so that neither side's imports and loading count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import dfdask
from dfdask.batching import micro_batches
from dfdask.items import Item
from dfdask.prompts import read_items
from dfdask.spec import JobSpec
from dfdask.stages.call import pipeline_call
from dfdask.stages.model import locate, with_defaults
from dfdask.stages.pixels import to_pixels

BATCHES = (1, 4, 8, 16, 32)


def load(spec: JobSpec) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pipeline = DiffusionPipeline.from_pretrained(locate(str(spec.model), spec.revision))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_rate(pipeline: Any, items: list[Item], batch: int) -> float:
    """Items per second of the loop, pixels converted to uint8 as any user would."""
    began = time.perf_counter()
    for micro in micro_batches(0, items, batch):
        to_pixels(pipeline(**pipeline_call(pipeline, [items[row] for row in micro.items]))[0])
    return len(items) / (time.perf_counter() - began)


def dfdask_rate(spec: JobSpec, folder: Path) -> tuple[float, float]:
    """(items per second between the first and the last commit, seconds from the call to the first commit)."""
    commits: list[tuple[float, int]] = []
    began = time.perf_counter()
    run = dfdask.submit(
        spec, output=str(folder), on_commit=lambda event: commits.append((time.perf_counter(), event.items))
    )
    run.wait()
    first, last = commits[0], commits[-1]
    items = sum(count for when, count in commits if when > first[0])
    return items / (last[0] - first[0]), first[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default=str(Path(__file__).parents[2] / "jobs/partiprompts.yaml"))
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    spec = with_defaults(JobSpec.from_yaml(options.job).limited(options.items))
    items = read_items(spec).items(0, options.items)
    pipeline = load(spec)
    plain_rate(pipeline, items[:8], 8)  # the first call is never typical
    sample = items[: min(64, len(items))]
    rates = {batch: plain_rate(pipeline, sample, batch) for batch in BATCHES}
    best = max(rates, key=lambda batch: rates[batch])
    print("plain loop, items/s by batch:", {batch: round(rate, 2) for batch, rate in rates.items()}, flush=True)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            plain = plain_rate(pipeline, items, best)
            ours, first = dfdask_rate(spec, Path(folder) / f"run-{repeat}")
            ratios.append(ours / plain)
            print(
                f"plain at batch {best}: {plain:.2f} items/s; dfdask: {ours:.2f} items/s, "
                f"first commit after {first:.1f} s; ratio {ours / plain:.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f} over {options.items} items")


if __name__ == "__main__":
    main()
