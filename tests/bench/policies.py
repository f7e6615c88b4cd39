"""dfdask's roles against other policies' on the same simulated fleet: 8 workers, several workloads.

python tests/bench/policies.py [--trace lora_request_trace.csv] [--only burst] [--tick 2]

Costs are those of the live benchmarks ten times: 0.5, 4 and 1.5 s an item (3, 1 and 2 s after a shift), 600 items
or as many. Workers hold one, two or all stages at once; loading one takes 0 or 2 s. All policies know the first
costs and what is left, and learn from the same finished tasks. Numbers are seconds until the last item is done.
"No roles", plain Dask, is for reference: where loading takes no time no role can better it.

The production trace is not part of this project: cluster-trace-v2026-GenAI of github.com/alibaba/clusterdata, free
for research and study (Lin et al., Understanding Diffusion Model Serving in Production, SoCC 2025). With --trace,
the first 600 requests of its busiest day arrive as they did, sped up to what the fleet can do; texts are encoded in
0.2 s, pictures decoded in 0.4 s each, the rest of a request's time is denoising.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import rivals

from dfdask.controller import JobFacts, StageFacts
from dfdask.cost import TaskWork
from dfdask.dispatch import Kind
from dfdask.placement import Device
from dfdask.simulate import Outcome, Seconds, Simulation

STAGES = ("encode", "denoise", "decode")
FIRST, SECOND = (0.5, 4.0, 1.5), (3.0, 1.0, 2.0)
WORKERS, ITEMS = 8, 600


@dataclass(frozen=True)
class Workload:
    """Costs of each job's items by stage; ``arrivals`` by job, all at the start where there are none."""

    name: str
    costs: Mapping[str, Sequence[tuple[float, ...]]]
    arrivals: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def seconds(self, kind: Kind, item: int, device_class: str, now: float) -> float:
        return self.costs[kind[0]][item][STAGES.index(kind[1])]

    @property
    def ideal_seconds(self) -> float:
        return sum(map(sum, (cost for costs in self.costs.values() for cost in costs))) / WORKERS


def workloads(trace: Path | None) -> list[Workload]:
    def mixed(part: float) -> tuple[float, ...]:
        return tuple(a + part * (b - a) for a, b in zip(FIRST, SECOND, strict=True))

    burst = 100
    found = [
        Workload("steady", {"a": [FIRST] * ITEMS}),
        Workload("step", {"a": [FIRST] * (ITEMS // 2) + [SECOND] * (ITEMS // 2)}),
        Workload("drift", {"a": [mixed(item / (ITEMS - 1)) for item in range(ITEMS)]}),
        # Each burst keeps the fleet busy for 75 s; they come every 70 s and take turns between the two mixes.
        Workload(
            "bursts",
            {"a": [(FIRST, SECOND)[item // burst % 2] for item in range(ITEMS)]},
            {"a": [70.0 * (item // burst) for item in range(ITEMS)]},
        ),
        Workload("two jobs", {"a": [FIRST] * (ITEMS // 2), "b": [SECOND] * (ITEMS // 2)}),
    ]
    return found + ([from_trace(trace)] if trace else [])


def from_trace(path: Path) -> Workload:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["predict_status"] == "SUCCEED"]
    days = Counter(row["gmt_create"][:10] for row in rows)
    busiest = max(days, key=lambda day: days[day])
    rows = sorted((row for row in rows if row["gmt_create"].startswith(busiest)), key=lambda row: row["gmt_create"])
    costs, times = [], []
    for row in rows[:ITEMS]:
        decode = 0.4 * float(row["num_images_per_prompt"] or 1)
        costs.append((0.2, max(float(row["exec_time_seconds"]) - 0.2 - decode, 1.0), decode))
        times.append(datetime.fromisoformat(row["gmt_create"]).timestamp())
    workload = Workload("trace", {"a": costs})
    speed = (times[-1] - times[0]) / workload.ideal_seconds
    return Workload("trace", {"a": costs}, {"a": [(time - times[0]) / speed for time in times]})


def simulate(
    workload: Workload, memory: int, switch_seconds: float, decide: rivals.OneStageEach | None, tick_seconds: float
) -> Outcome:
    jobs = [
        JobFacts(
            job,
            f"model {job}",
            tuple(StageFacts(stage, {f"{job}/{stage}": 1}, 0, {"gpu": switch_seconds}) for stage in STAGES),
            len(costs),
        )
        for job, costs in workload.costs.items()
    ]
    # "All" is all stages of all jobs.
    size = memory if memory < len(STAGES) else len(STAGES) * len(jobs)
    devices = [Device(f"worker {number}", "gpu", size) for number in range(WORKERS)]
    seconds: Seconds = workload.seconds
    simulation = Simulation(
        jobs,
        devices,
        seconds,
        decide,
        tick_seconds=tick_seconds,
        arrivals=workload.arrivals,
        restart_seconds=decide.restart_seconds if decide else 0.0,
    )
    for job, costs in workload.costs.items():
        for place, stage in enumerate(STAGES):
            mean = statistics.mean(cost[place] for cost in costs[: ITEMS // 10])
            simulation.controller.costs.observe(f"model {job}", stage, "gpu", TaskWork(1), mean)
    if decide is not None:
        decide.simulation = simulation
    return simulation.run()


def best_static(workload: Workload, memory: int, switch_seconds: float, tick_seconds: float) -> Outcome:
    kinds = [(job, stage) for job in workload.costs for stage in STAGES]
    found = (
        simulate(workload, memory, switch_seconds, rivals.Static(counts), tick_seconds)
        for counts in rivals.splits(kinds, WORKERS)
    )
    return min(found, key=lambda outcome: outcome.seconds)


def measure(workload: Workload, memory: int, switch_seconds: float, tick_seconds: float) -> dict[str, float]:
    def run(*deciders: rivals.OneStageEach | None) -> float:
        return min(simulate(workload, memory, switch_seconds, decide, tick_seconds).seconds for decide in deciders)

    policies: dict[str, Callable[[], float]] = {
        "dfdask": lambda: run(None),
        "static": lambda: best_static(workload, memory, switch_seconds, tick_seconds).seconds,
        "max-min": lambda: run(rivals.MaxMin()),
        "proportional": lambda: run(rivals.Proportional()),
        "threshold": lambda: run(rivals.Threshold(False), rivals.Threshold(True)),
        "no roles": lambda: run(rivals.NoRoles()),
    }
    return {name: policy() for name, policy in policies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--tick", type=float, default=2.0)
    options = parser.parse_args()
    names = ("dfdask", "static", "max-min", "proportional", "threshold", "no roles")
    print(f"{'workload':10}{'holds':>6}{'switch':>7}{'ideal':>8}" + "".join(f"{name:>14}" for name in names))
    ratios: dict[str, list[float]] = defaultdict(list)
    for workload in workloads(options.trace):
        if options.only not in workload.name:
            continue
        for memory in (1, 2, 3):
            for switch in (0.0, 2.0):
                seconds = measure(workload, memory, switch, options.tick)
                for name in names[1:]:
                    ratios[name].append(seconds["dfdask"] / seconds[name])
                worse = [name for name in names[1:-1] if ratios[name][-1] > 1.02]
                print(
                    f"{workload.name:10}{memory if memory < 3 else 'all':>6}{switch:7.0f}{workload.ideal_seconds:8.1f}"
                    + "".join(f"{seconds[name]:14.1f}" for name in names)
                    + (f"   worse than {', '.join(worse)}" if worse else ""),
                    flush=True,
                )
    print("\ndfdask's seconds to a rival's: mean, worst for dfdask, best for dfdask")
    for name, found in ratios.items():
        print(f"{name:14}{statistics.geometric_mean(found):8.3f}{max(found):8.3f}{min(found):8.3f}")
    if any(max(found) > 1.02 or min(found) >= 1 for name, found in ratios.items() if name != "no roles"):
        raise SystemExit("missed: never worse than any by more than 2%, better than each somewhere")


if __name__ == "__main__":
    main()
