"""The command line: ``dfdask`` with a command for everything that one does with jobs, runs and clusters.

Nothing heavy is imported before a command needs it: ``dfdask --help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dfdask import __version__
from dfdask.cli_options import check_address, read_bytes, read_class, read_settings, read_stage_names
from dfdask.errors import DfdaskError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from dfdask.progress import Look
    from dfdask.spec import JobSpec
    from dfdask.store import RunStore

INTERRUPTED = 130
_RUN_HELP = "RUN is a job file, TARGET/NAME, or the path of a run."


class _Commands(click.Group):
    """Turns everything that a user can mend into ``Error: ...`` and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DfdaskError as error:
            _fail(ctx, str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; everything committed is kept", INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `dfdask show RUN | head`: click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{where}{error.strerror or error}", StorageError.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dfdask")
def main() -> None:
    """Make images and videos in bulk with diffusers pipelines on a Dask cluster.

    Exit codes: 0 the run is complete; 1 every item failed; 2 the command, the job, its prompts or its model
    are not valid; 3 storage; 4 the cluster; 130 stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a prompt in a script that it lacks


@main.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--scheduler", metavar="ADDRESS", help="Use the cluster of this scheduler, e.g. tcp://10.0.0.1:8786.")
@click.option("--workers", type=click.IntRange(min=1), help="Local worker processes [default: the job's].")
@click.option("--output", metavar="TARGET/NAME", help="Where the run goes, instead of the job's `output`.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts to use instead of the job's.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first prompts.")
@click.option("--new-run", is_flag=True, help="Start a run of its own where one of that name exists.")
@click.option("--retry-failed", is_flag=True, help="Do items that failed again, with the others of their shards.")
@click.option("--plain", is_flag=True, help="Lines instead of the live view, as for logs.")
@click.option("--json", "as_json", is_flag=True, help="Progress as JSON lines, for programs.")
def run(
    job: Path,
    scheduler: str | None,
    workers: int | None,
    output: str | None,
    prompts: Path | None,
    limit: int | None,
    new_run: bool,
    retry_failed: bool,
    plain: bool,
    as_json: bool,
) -> None:
    """Run JOB, a YAML file, or go on with it where it was.

    A local cluster is started unless --scheduler names one. Ctrl-C stops with all finished work saved.
    """
    if scheduler and workers:
        raise click.UsageError("--workers sizes a local cluster; with --scheduler, start workers there.")
    spec = _job(job, {"workers": workers, "output": output, "prompts": prompts})
    if limit is not None:
        spec = spec.limited(limit)
    console = _console()
    look = _look(console, plain, as_json)
    from dfdask.progress import SAME_COMMAND, follow, header, print_rows, summary

    if not as_json:
        _say(console, f"dfdask {__version__}: preparing {job}")
    from dfdask.prompts import unused_columns
    from dfdask.run import submit

    _hush_dask()
    started = submit(spec, scheduler=scheduler, new_run=new_run, retry_failed=retry_failed)
    if not as_json:
        print_rows(console, header(started.progress, _model(spec), look == "lines"))
        if uncut := started.store.attributes["dfdask"].get("uncut"):
            print_rows(console, [("stages", f"one, the whole pipeline: {uncut}")])
        if unused := unused_columns(spec):
            print_rows(console, [("not used", f"columns {', '.join(unused)}; `columns` in the job says what they are")])
    again = f"go on with --output {started.location.address}, without --new-run" if new_run else SAME_COMMAND
    progress = follow(started, console, look, again)
    sheet = _sheet(started.store)
    if not as_json:
        print_rows(console, [*summary(progress), *([("pictures", sheet)] if sheet else [])])
    if progress.all_failed:
        raise DfdaskError(f"every item failed; see why with: dfdask show {progress.output}")


@main.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--workers", metavar="FLEET", help="The fleet, e.g. 8xh100:80GB,4xl4:24GB [default: this machine's].")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts to use instead of the job's.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first prompts.")
def plan(job: Path, workers: str | None, prompts: Path | None, limit: int | None) -> None:
    """Forecast JOB: time, roles and why, before any device is used. Nothing is run and no weight is loaded."""
    spec = _job(job, {"prompts": prompts})
    if limit is not None:
        spec = spec.limited(limit)
    from dfdask.cost import CostModel
    from dfdask.cost_file import load_costs
    from dfdask.plan import forecast
    from dfdask.progress import print_rows

    costs = CostModel()
    costs.learn(load_costs())
    print_rows(_console(), forecast(spec, workers, costs).rows())


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option("--watch", "watching", is_flag=True, help="Stay until the run has ended; Ctrl-C leaves, the job goes on.")
@click.option("--scheduler", metavar="ADDRESS", help="With --watch: show the stages on this cluster too.")
@click.option("--plain", is_flag=True, help="With --watch: lines instead of the live view, as for logs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with --watch one a line, for programs.")
def status(run: str, watching: bool, scheduler: str | None, plain: bool, as_json: bool) -> None:
    """How far RUN is, from its store alone: no cluster is asked unless you name one."""
    from dfdask.summary import status_of

    store, seen = _store(run), None
    if watching:
        from dfdask.progress import watch
        from dfdask.watch import states

        console = _console()
        seen = watch(states(store, scheduler), console, _look(console, plain, as_json))
    elif scheduler or plain:
        raise click.UsageError("--scheduler and --plain go with --watch.")
    found = status_of(store)
    if as_json and not watching:
        click.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    elif not as_json:
        from dfdask.progress import print_rows

        print_rows(_console(), found.rows())
    if seen is not None and (seen.phase in ("stopped", "failed") or seen.all_failed):
        sys.exit(1)


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option(
    "--failures",
    "limit",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many failed items to list.",
)
def show(run: str, limit: int) -> None:
    """What RUN was made from and how: spec, model, versions, timings, failures."""
    from dfdask.summary import print_details

    print_details(_console(), _store(run), limit)


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option("--repair", is_flag=True, help="Have the next `dfdask run` make what is damaged again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def check(run: str, repair: bool, as_json: bool) -> None:
    """Read all of RUN and compare it with what was committed; exit code 3 where something is lost or damaged."""
    from dfdask.cli_check import check_run

    check_run(_store(run), repair, as_json)


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def explain(run: str, as_json: bool) -> None:
    """What the scheduler decided while RUN was made: who moved, why, what it expected and what came of it."""
    from dfdask.explain import as_dict, print_history
    from dfdask.history import History

    store = _store(run)
    history = History.of(store.events(), store.attributes["dfdask"].get("stages", ()))
    if as_json:
        click.echo(json.dumps(as_dict(history), ensure_ascii=False))
    else:
        print_history(_console(), store, history)


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="A file of yours [default: in RUN]."
)
def report(run: str, output: Path | None) -> None:
    """Write one HTML page about RUN: what was made, how fast, at what cost, what was decided, pictures.

    It needs nothing else: no network, no scripts.
    """
    from dfdask.report import write_report

    click.echo(write_report(_store(run), output))


@main.command(epilog=_RUN_HELP)
@click.argument("run")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["png", "webdataset", "parquet", "mp4"]),
    help="[default: png for pictures, mp4 for videos]",
)
@click.option("--fps", type=click.IntRange(1, 240), default=16, show_default=True, help="Frames per second of videos.")
@click.option("--overwrite", is_flag=True, help="Replace what is at DESTINATION.")
def export(
    run: str, destination: Path, form: Literal["png", "webdataset", "parquet", "mp4"] | None, fps: int, overwrite: bool
) -> None:
    """Write the pictures of RUN to DESTINATION for other programs.

    png: files with metadata.jsonl, a Hugging Face imagefolder. webdataset: tar files. parquet: a Hugging Face
    dataset with the pictures inside. mp4: the videos of a run of videos, with metadata.jsonl.
    """
    from dfdask.export import export_run
    from dfdask.words import count

    store = _store(run)
    chosen = form or ("mp4" if store.layout.kind == "video" else "png")
    done = export_run(store, chosen, destination, overwrite=overwrite, frames_per_second=fps)
    click.echo(f"wrote {count(done.items, 'item')} in {count(done.files, 'file')} to {destination}")
    if done.skipped:
        waiting = done.skipped - done.failed
        click.echo(f"left out {count(done.skipped, 'item')}: {done.failed:,} failed, {waiting:,} not there yet")


@main.command()
@click.argument("model")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the pipeline call, e.g. --set height=512; several times for several.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def inspect(model: str, dtype: str, settings: tuple[str, ...], as_json: bool) -> None:
    """The stages and components of MODEL and what an item costs, without loading weights.

    MODEL is `bundled`, a directory or a hub id.
    """
    from dfdask.inspection import inspected, print_inspected

    found = inspected(model, dtype, read_settings(settings))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_inspected(_console(), found)


@main.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Who reaches it can run code: trusted networks only.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8786, show_default=True)
@click.option("--dashboard-address", default="127.0.0.1:8787", show_default=True, metavar="HOST:PORT")
def scheduler(host: str, port: int, dashboard_address: str) -> None:
    """Start a scheduler that workers and `dfdask run --scheduler` connect to. Ctrl-C ends it."""
    check_address(dashboard_address)
    from dfdask.cluster import run_scheduler

    run_scheduler(host=host, port=port, dashboard_address=dashboard_address)


@main.command()
@click.argument("address")
@click.option(
    "--stages", metavar="NAME,NAME", help="Bind these workers to stages [default: what there is to do, as it changes]."
)
@click.option("--count", type=click.IntRange(min=1), help="Worker processes [default: one for each GPU, or one].")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--device-class", metavar="NAME", help="What the workers compute on, e.g. h100 [default: found out].")
@click.option("--memory", metavar="BYTES", help="Device memory that each may use, e.g. 24GB [default: what is free].")
def worker(
    address: str,
    stages: str | None,
    count: int | None,
    device: Literal["auto", "cpu", "cuda"],
    device_class: str | None,
    memory: str | None,
) -> None:
    """Start workers for the scheduler at ADDRESS. Ctrl-C ends them."""
    names, kind, size = read_stage_names(stages), read_class(device_class), read_bytes(memory)
    from dfdask.cluster import run_worker

    run_worker(address, names, count, device, kind, size)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    ctx.exit(code)


def _hush_dask() -> None:
    """Dask's client logs tracebacks when its scheduler goes away; the command says what happened in one line."""
    import logging

    import distributed  # noqa: F401  sets its loggers' levels when it is imported

    for name in ("distributed.client", "distributed.batched"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _look(console: Console, plain: bool, as_json: bool) -> Look:
    if plain and as_json:
        raise click.UsageError("--plain and --json are two ways to print; choose one.")
    return "json" if as_json else "lines" if plain or not console.is_terminal else "live"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _job(path: Path, overrides: dict[str, Any]) -> JobSpec:
    from dfdask.spec import JobSpec

    given = {key: value for key, value in overrides.items() if value is not None}
    return JobSpec.from_yaml(path, overrides=given)


def _model(spec: JobSpec) -> str:
    model = spec.model if isinstance(spec.model, str) else "fake stages"
    return f"{model} ({spec.dtype})"


def _store(run: str) -> RunStore:
    """The store that RUN means. A job file means the run that it writes to."""
    from dfdask.store import RunStore
    from dfdask.targets import resolve_output

    output: str | None = run
    if run.lower().endswith((".yaml", ".yml")):
        output = _job(Path(run), {}).output
    return RunStore.open(resolve_output(output or run), quick=True)


def _sheet(store: RunStore) -> str | None:
    """Write the contact sheet. The pictures are safe by now: a sheet that fails is only a remark."""
    from dfdask.sheet import write_sheet

    try:
        return str(write_sheet(store))
    except (DfdaskError, OSError) as error:
        click.echo(f"No contact sheet: {error}", err=True)
        return None
