"""A cluster of real dfdask processes, to be killed and restarted as an operator would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ROLES = ("encode", "denoise", "denoise", "decode")  # one `dfdask worker` each
TRACE = """
import os, time
from dfdask.stages.fake import FakeStage

def dask_setup(worker):
    run = FakeStage.run
    def traced(self, items, state):
        line = " ".join([repr(time.time()), self._name, *(item.id for item in items)])
        file = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, (line + "\\n").encode())
        os.close(file)
        return run(self, items, state)
    FakeStage.run = traced
"""


class Fleet:
    """A scheduler and workers by role. All that they and their clients compute is written to ``trace``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trace = folder / "trace.txt"
        (folder / "preload.py").write_text(TRACE.format(path=str(self.trace)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self._started: list[subprocess.Popen[bytes]] = []
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes] | None] = [None] * len(ROLES)

    def spawn(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DASK_DISTRIBUTED__WORKER__PRELOAD": f'["{self.folder / "preload.py"}"]',
        }
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "dfdask", *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def up(self) -> None:
        """Start the scheduler and every worker that is not running, and wait until all workers compute."""
        if self.scheduler is None or self.scheduler.poll() is not None:
            self.scheduler = self.spawn(
                "scheduler.log", "scheduler", "--port", str(self.port), "--dashboard-address", "127.0.0.1:0"
            )
            until(self._listens, 30, "the scheduler to listen")
        for place, role in enumerate(ROLES):
            process = self.workers[place]
            if process is None or process.poll() is not None:
                self.workers[place] = self.spawn("workers.log", "worker", self.address, "--stages", role)

    def by_role(self, role: str) -> list[subprocess.Popen[bytes]]:
        return [process for process, name in zip(self.workers, ROLES, strict=True) if process and name == role]

    def down(self) -> None:
        """End all that was started here, and what those started."""
        families = [one for process in self._started for one in family(process.pid)]
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        psutil.wait_procs(families, timeout=10)
        for one in families:
            if one.is_running():
                one.kill()
        for process in self._started:
            process.wait(10)

    def computed(self) -> list[tuple[float, str, str]]:
        """When a stage was begun for an item, the stage, the item's id."""
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        parts = [line.split() for line in lines]
        return [(float(when), stage, item) for when, stage, *items in parts for item in items]

    def log(self, name: str, characters: int = 3000) -> str:
        path = self.folder / name
        return path.read_text(errors="replace")[-characters:] if path.exists() else ""

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def worker_processes(processes: Iterable[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The processes that compute: what the nannies in ``processes`` started."""
    found = []
    for process in processes:
        for one in family(process.pid)[1:]:
            try:
                if any("spawn_main" in part for part in one.cmdline()):
                    found.append(one)
            except psutil.Error:
                continue
    return found


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


SEIZE = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
PTRACE_SEIZE = 0x4206
print(libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None), ctypes.get_errno(), flush=True)
sys.stdin.read()
"""


@contextmanager
def lingering(pid: int) -> Iterator[None]:
    """While it lasts, the process may be killed but does not go: its parent sees nothing until its tracer has.

    So does one whose device memory the system takes long to free.
    """
    import pytest  # benchmarks use this module too

    with subprocess.Popen(
        [sys.executable, "-c", SEIZE, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stdout is not None
        said = tracer.stdout.readline().split()
        try:
            if said[0] != "0":
                pytest.skip(f"may not trace processes here: {os.strerror(int(said[1]))}")
            yield
        finally:
            tracer.kill()
