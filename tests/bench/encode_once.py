"""What encoding equal prompts once saves: PartiPrompts, four images each, with the bundled model's encoder.

    python tests/bench/encode_once.py [PROMPTS]

Prints CPU seconds of the encode stage with and without it, and how many items were computed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dfdask.batching import micro_batches
from dfdask.items import Item
from dfdask.prompts import read_items
from dfdask.spec import JobSpec
from dfdask.stages.cut import PipelineStage
from dfdask.stages.model import model_ref, with_defaults

ROOT = Path(__file__).parents[2]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1632
    spec = JobSpec.from_yaml(ROOT / "jobs" / "partiprompts.yaml", overrides={"images_per_prompt": 4, "strict": False})
    spec = with_defaults(spec.limited(count))
    items = list(read_items(spec))
    calls: list[list[Item]] = [[items[row] for row in micro.items] for micro in micro_batches(0, items, 8)]
    stage = PipelineStage(model_ref(spec), "encode")
    stage.run(calls[0], None)
    before = stage.encoder.computed_items
    started = time.process_time()
    for call in calls:
        stage.run(call, None)
    once = time.process_time() - started
    computed = stage.encoder.computed_items - before
    started = time.process_time()
    for call in calls:
        stage._encoded(call)
    always = time.process_time() - started
    print(f"{len(items)} items of {count} prompts in calls of 8")
    print(f"each encoded: {always:.2f} s; equal ones once: {once:.2f} s, {computed} computed; {always / once:.2f}x")


if __name__ == "__main__":
    main()
