"""Several GPUs, one process on each: dfdask's job against resident replicas of the plain pipeline.

python tests/bench/gpus.py --model flux --folder /dev/shm/flux [--prompts 64] [--seconds 560] [--out RESULTS]

Weights are random, at the shapes of the real model. Every variant has processes of its own, each of which sees one
GPU; the scheduler and the workers are dfdask's own commands. Rows are printed and written as they come, and what does
not fit into the seconds that are left is skipped, and said so. Rates are items per second; the bound is what the
GPUs would do without a gap at the stages' own measured seconds, loading left out.
``--tiny --device cpu --gpus 2`` runs all of it on a CPU with the tests' tiny models, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import gpu_job  # noqa: E402
from fleet import family, until  # noqa: E402
from gpu_job import GIB, arguments, call_arguments, dtype, row, run_all, stage_times, visible_gpus  # noqa: E402

ITEM_SECONDS = {"flux": 5.2, "sdxl": 2.0, "sd35": 4.0, "wan": 12.0}  # of 28 steps on one H100; to plan the time only
LATE_STEPS = 4  # of the items after the shift
Row = dict[str, Any]


def needs(options: argparse.Namespace) -> dict[str, float]:
    """The seconds of each variant, about: starting, and the items at their expected seconds."""
    start = 60.0 + 10 * options.gpus
    work = options.prompts * ITEM_SECONDS[options.model] * options.steps / 28 / options.gpus
    return {
        "ucx": 5,
        "plain": start + work,
        "job": start + work,
        "kill": start + work,  # half the items, two thirds of them on one GPU less
        "shift": start + work * (1 + LATE_STEPS / options.steps) / 2,
        "job_capped": start + 1.15 * work,
        "offload": start + 30,
        "split": start + work / 2 * options.gpus / (options.gpus - 1),
    }


def prompt(number: int) -> str:
    return f"a photo of {number} red apples on a table"


# -- plain diffusers, a process for each GPU


def spawn(options: argparse.Namespace, target: Callable[..., None], *arguments: Any) -> tuple[list[Any], Any]:
    context = multiprocessing.get_context("spawn")
    if options.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # as Dask has it for its workers
    results: Any = context.Queue()
    processes = []
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    for gpu, devices in enumerate(visible_gpus(options.gpus)):
        if options.device == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = devices  # torch reads it when the process first imports it
        processes.append(context.Process(target=target, args=(options, gpu, results, *arguments), daemon=True))
        processes[-1].start()
    if before is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
    return processes, results


def take(processes: list[Any], results: Any) -> Any:
    """The next result; SystemExit where a process died instead of giving one."""
    import queue

    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("a process died") from None


def replica(options: argparse.Namespace, gpu: int, results: Any, work: Any, go: Any) -> None:
    """Loads, calls once, and then makes what the queue holds, one by one."""
    gpu_job.quiet()
    began = time.time()
    made = gpu_job.pipeline(options).to(options.device)
    gpu_job.timed_call(made, options, 1, 2)
    results.put(time.time() - began)
    go.wait()
    while work.get() is not None:
        started = time.time()
        gpu_job.timed_call(made, options, 1, options.steps)
        results.put((gpu, started, time.time()))


def plain(options: argparse.Namespace) -> None:
    """(a) One resident pipeline on each GPU, batch 1, prompts from a shared queue."""
    context = multiprocessing.get_context("spawn")
    work, go = context.Queue(), context.Event()
    for entry in [*range(options.prompts), *[None] * options.gpus]:
        work.put(entry)
    processes, results = spawn(options, replica, work, go)
    loads = [take(processes, results) for _ in processes]
    go.set()
    began = time.time()
    calls = [take(processes, results) for _ in range(options.prompts)]
    wall = time.time() - began
    for process in processes:
        process.join()
    each = [stop - start for _, start, stop in calls]
    row(
        variant="plain, a resident replica on each GPU, batch 1",
        rate=options.prompts / wall,
        prompts=options.prompts,
        wall_seconds=wall,
        item_seconds=sum(each) / len(each),
        items_by_gpu=[sum(call[0] == gpu for call in calls) for gpu in range(options.gpus)],
        idle_share=1 - sum(each) / options.gpus / wall,
        load_seconds=max(loads),
    )


def offloading(options: argparse.Namespace, gpu: int, results: Any) -> None:
    gpu_job.quiet()
    gpu_job.cap(options)
    made = gpu_job.pipeline(options)
    gpu_job.offload_groups(made, options, stream=options.device == "cuda", record=options.device == "cuda")
    gpu_job.timed_call(made, options, 1, 2)
    few, more = (gpu_job.timed_call(made, options, 1, steps) for steps in (2, 6))
    step = (more - few) / 4
    results.put((few + (options.steps - 2) * step, step))


def offload(options: argparse.Namespace) -> None:
    """(c) Plain batch-1 group offload with a stream under the cap, on all GPUs at once; a few steps, scaled to all."""
    processes, results = spawn(options, offloading)
    calls = [take(processes, results) for _ in processes]
    seconds, steps = [[call[part] for call in calls] for part in (0, 1)]
    row(
        variant="plain, group offload, capped, batch 1",
        rate=sum(1 / each for each in seconds),
        item_seconds=seconds,
        step_seconds=steps,
        scaled=True,
    )


# -- dfdask: its commands, a worker for each GPU


@contextmanager
def fleet(options: argparse.Namespace, stages: Sequence[str], cap: bool) -> Iterator[tuple[Any, list[Any], Path]]:
    """A client, the worker commands and a folder; ``stages`` for each worker, empty: the gate decides."""
    import psutil
    from distributed import Client

    home = Path(__file__).parents
    host_bytes = int(min(60 * GIB, psutil.virtual_memory().total * 0.6 / options.gpus))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.environ["DFDASK_CACHE"] = f"{name}/cache"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, home[:3]), os.environ.get("PYTHONPATH", "")])),
        }
        environment["DFDASK_HOST_MEMORY_BYTES"] = str(host_bytes)
        if cap and options.device == "cuda":
            environment["DFDASK_MEMORY_BYTES"] = str(int(options.cap_gib * GIB))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = f"tcp://127.0.0.1:{port}"
        dfdask = [sys.executable, "-m", "dfdask"]
        begun = []
        try:
            with (Path(name) / "log").open("wb") as log:
                told: dict[str, Any] = {"stdout": log, "stderr": log, "cwd": name}
                command = [*dfdask, "scheduler", "--port", str(port), "--dashboard-address", "127.0.0.1:0"]
                begun.append(subprocess.Popen(command, env=environment, **told))
                until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 60, "the scheduler to listen")
                for devices, bound in zip(visible_gpus(options.gpus), stages, strict=True):
                    own = {**environment, **({"CUDA_VISIBLE_DEVICES": devices} if options.device == "cuda" else {})}
                    command = [*dfdask, "worker", address, "--device", options.device]
                    begun.append(subprocess.Popen([*command, *(["--stages", bound] if bound else [])], env=own, **told))
            client = Client(address, set_as_default=False)
            client.wait_for_workers(options.gpus, timeout=120)
            client.register_plugin(gpu_job.trace_plugin())
            yield client, begun[1:], Path(name)
            client.close()
        except BaseException:
            print((Path(name) / "log").read_text(errors="replace")[-3000:], flush=True)
            raise
        finally:
            end([one for process in begun for one in family(process.pid)])


def trace(client: Any) -> list[Row]:
    found: list[Row] = client.run_on_scheduler(gpu_job._rows)
    return found


def transfers(dask_worker: Any) -> list[tuple[int, float]]:
    """Bytes and seconds of what the worker fetched from others."""
    log = dask_worker.transfer_incoming_log
    return [(entry["total"], entry["duration"]) for entry in log]


def job(
    options: argparse.Namespace,
    name: str = "dfdask, uncapped",
    stages: Sequence[str] = (),
    cap: bool = False,
    shift: bool = False,
    kill: bool = False,
    share: float = 1.0,
) -> None:
    """(b)-(f) The prompts, or a ``share`` of them, as a job; two-step runs before it until every worker has loaded."""
    import dfdask

    count = max(int(options.prompts * share), 2 * options.gpus)
    prompts: list[Any] = [prompt(number) for number in range(count)]
    with fleet(options, stages or [""] * options.gpus, cap) as (client, workers, folder):
        call = call_arguments(options)
        spec: Row = {"model": options.folder, "dtype": dtype(options), "device": options.device}
        began = time.time()
        spec["arguments"] = {**call, "num_inference_steps": 2}
        some = [prompt(number) for number in range(8 * options.gpus)]
        for warm in range(4):  # one by one, so that nobody is left without
            single = {**spec, "batch": 1, "shard": 1}
            dfdask.submit(single, prompts=some, output=f"{folder}/warm{warm}", client=client).wait()
            if len({told["worker"] for told in trace(client)}) == options.gpus:
                break
        dfdask.submit(spec, prompts=some, output=f"{folder}/warm", client=client).wait()
        loaded = {told["worker"] for told in trace(client) if stages or told["stage"] == "denoise"}
        row(
            variant=f"{name}: start, load, first calls",
            seconds=time.time() - began,
            warm_runs=warm + 2,
            workers_that_worked=len(loaded),
        )
        client.run_on_scheduler(gpu_job._clear)
        moved = {worker: len(log) for worker, log in client.run(transfers).items()}
        spec["arguments"] = {**call, "num_inference_steps": options.steps}
        if shift:
            prompts[count // 2 :] = [
                {"prompt": text, "num_inference_steps": LATE_STEPS} for text in prompts[count // 2 :]
            ]
            spec["shard"] = math.gcd(count // 2, max(count // 8, 1))
        sampled = [gpu_job.Utilisation(gpu) for gpu in range(options.gpus)]
        began = time.time()
        run = dfdask.submit(spec, prompts=prompts, output=f"{folder}/run", client=client)
        killed = kill_one(run, client, workers[-1], count) if kill else None
        run.wait()
        wall = time.time() - began
        for one in sampled:
            one.stop()
        rows = trace(client)
        fetched = [log[moved.get(worker, 0) :] for worker, log in client.run(transfers).items()]
        decisions = [event for event in run.store.events() if event["event"] == "RolesChanged"]
        facts = figures(rows, options.gpus, stages)
        if kill:  # not so many GPUs for all of the time
            facts = {key: value for key, value in facts.items() if "bound" not in key}
        row(
            variant=name,
            rate=count / wall,
            prompts=count,
            committed=run.progress.committed_items,
            failed=run.progress.failed_items,
            wall_seconds=wall,
            **facts,
            handoff_bytes=sum(told["nbytes"] for told in rows if told["stage"] != "decode"),
            handoff_seconds=sum(told["transfer_seconds"] for told in rows),
            # Between workers, what the writers of shards fetch included.
            fetched_bytes=sum(size for log in fetched for size, _ in log),
            fetches=sum(len(log) for log in fetched),
            fetch_seconds=sum(seconds for log in fetched for _, seconds in log),
            first_roles=sum(not event["before"] for event in decisions),
            retags=sum(bool(event["before"]) for event in decisions),
            # By the last decision, from the job's start on.
            forecast_seconds=decisions[-1]["when"] - began + decisions[-1]["predicted_seconds"] if decisions else None,
            gpu_busy_share=[one.figures().get("gpu_busy_share") for one in sampled],
            stages=stage_times(rows)["stages"],
        )
        if shift:
            for half, steps in enumerate((options.steps, LATE_STEPS)):
                mine = [told for told in rows if (told["key"][1] * spec["shard"] >= count // 2) == bool(half)]
                row(variant=f"{name}: the half of {steps} steps", **figures(mine, options.gpus, stages))
        if killed:
            row(variant=f"{name}: after the kill", **recovery(rows, killed))
        if options.out:
            path = Path(options.out) / f"trace-gpus-{options.model}-{options.variant}.json"
            path.write_text(json.dumps(rows))


def figures(rows: list[Row], gpus: int, stages: Sequence[str]) -> Row:
    """Rate between the first task's start and the last one's end, each worker's idle share, the measured bound."""
    first = min(told["start"] - told["load_seconds"] for told in rows)
    span = max(told["start"] + told["seconds"] for told in rows) - first
    made = sum({tuple(told["key"]): told["items"] for told in rows if told["stage"] == "decode"}.values())
    names = dict.fromkeys(told["stage"] for told in rows)
    costs, busy = dict.fromkeys(names, 0.0), dict.fromkeys((told["worker"] for told in rows), 0.0)
    done = dict.fromkeys(names, 0)
    for told in rows:
        costs[told["stage"]] += told["seconds"]
        done[told["stage"]] += told["items"]
        busy[told["worker"]] += told["seconds"] + told["load_seconds"]
    each = {stage: costs[stage] / done[stage] for stage in names}
    bound = gpus / sum(each.values())
    if stages:  # bound to stages: the slowest group
        groups = {group: sum(each[stage] for stage in group.split(",")) for group in stages}
        bound = min(stages.count(group) / seconds for group, seconds in groups.items())
    return {
        "span_rate": made / span,
        "span_seconds": span,
        "bound_rate": bound,
        "share_of_bound": made / span / bound,
        "idle_shares": [round(1 - seconds / span, 4) for seconds in [*busy.values(), *[0.0] * gpus][:gpus]],
        "load_seconds": sum(told["load_seconds"] for told in rows),
        "stage_seconds": {stage: round(seconds, 4) for stage, seconds in each.items()},
    }


def kill_one(run: Any, client: Any, command: Any, count: int) -> tuple[float, set[str]]:
    """SIGKILL of a worker and the command that would start it again, once a third is made; when, and who is left."""

    def third() -> bool:
        made = sum(told["items"] for told in trace(client) if told["stage"] == "denoise")
        return made * 3 >= count or run.progress.phase != "running"

    until(third, 3600, "a third of the items")
    addresses = set(client.scheduler_info(n_workers=-1)["workers"])
    doomed = family(command.pid)
    pids = client.run(os.getpid)
    end(doomed)  # the command first: it would start another
    gone = {one.pid for one in doomed}
    return time.time(), {address for address in addresses if pids[address] not in gone}


def end(processes: Sequence[Any]) -> None:
    import psutil

    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)


def recovery(rows: list[Row], killed: tuple[float, set[str]]) -> Row:
    """Seconds from the kill until those who are left work at 0.95 of their own rate before it, over a window.

    An item's stages count by their mean seconds, and a task's items evenly over its time: an item of all stages is 1.
    """
    when, left = killed
    tasks = [told for told in rows if told["worker"] in left]
    stages = {told["stage"] for told in tasks}
    mean = {
        stage: sum(told["seconds"] for told in tasks if told["stage"] == stage)
        / sum(told["items"] for told in tasks if told["stage"] == stage)
        for stage in stages
    }

    def rate(start: float, stop: float) -> float:
        made = 0.0
        for told in tasks:
            common = min(stop, told["start"] + told["seconds"]) - max(start, told["start"])
            part = max(common, 0) / max(told["seconds"], 1e-9)
            made += told["items"] * part * mean[told["stage"]] / sum(mean.values())
        return made / (stop - start)

    window = 3 * max((told["seconds"] for told in tasks), default=1.0)
    end = max((told["start"] + told["seconds"] for told in tasks), default=when)
    before = rate(min((told["start"] for told in tasks), default=when - 1), when)
    step, found = window / 60, None
    for tick in range(max(int((end - window - when) / step), 0) + 1):
        began = when + tick * step
        if began + window <= end and rate(began, began + window) >= 0.95 * before:
            found = tick * step
            break
    after = rate(when, end) if end > when else 0.0
    return {
        "seconds_until_share": found if found is not None else "not seen",
        "rate_before": before,
        "rate_after": after,
        "window_seconds": window,
        "seconds_after_kill": end - when,
    }


def split(options: argparse.Namespace) -> None:
    """(d) One worker encodes and decodes, the others denoise."""
    job(options, "dfdask, static split", ["encode,decode", *["denoise"] * (options.gpus - 1)], share=0.5)


def ucx(options: argparse.Namespace) -> None:
    try:
        import ucxx

        row(variant="ucxx", available=True, version=ucxx.__version__)
    except ImportError as error:
        row(variant="ucxx", available=False, why=str(error))


RUNS: dict[str, Callable[[argparse.Namespace], None]] = {
    "ucx": ucx,
    "plain": plain,
    "job": job,
    "kill": lambda options: job(options, "dfdask, a worker killed", kill=True, share=0.5),
    "shift": lambda options: job(options, "dfdask, shift", shift=True),
    "job_capped": lambda options: job(options, "dfdask, capped", cap=True),
    "offload": offload,
    "split": split,
}


def main() -> None:
    parser = arguments(__doc__, RUNS, RUNS)
    parser.add_argument("--gpus", type=int, default=0, help="processes, one on each [default: all there are]")
    options = parser.parse_args()
    if not options.gpus:
        import torch

        options.gpus = torch.cuda.device_count()
    if options.gpus < 2:
        parser.error(f"needs 2 GPUs or more, found {options.gpus}; on a CPU say --device cpu --gpus 2")
    options.folder = str(Path(options.folder).resolve())
    if options.variant:
        gpu_job.quiet()
        RUNS[options.variant](options)
    else:
        run_all(options, needs(options), __file__)


if __name__ == "__main__":
    main()
