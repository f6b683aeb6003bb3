"""What the processes of gpu_report.py have in common: rows in one file, and how a process is started and stopped.

A row is a JSON object on a line, written as soon as it is known by whoever knows it; what was written counts, whatever
happens afterwards.
"""

import contextlib
import ctypes
import functools
import json
import os
import pathlib
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from checkout import REPOSITORY

ROWS, SUITE = "GPU_REPORT_ROWS", "GPU_REPORT_SUITE"
"""What gpu_tests.py reads: the file, and what its rows call the tests."""
POISONED = 3
"""The exit status of a phase whose device answers every call with an error."""

Row = dict[str, Any]
IDENTITY = {
    "primitive": ("primitive", "arithmetic", "backend"),
    "blocks": ("backend", "batch"),
    "kernelbench": ("problem", "variant"),
    "network": ("network", "mode", "precision", "batch", "compiled", "variant"),
    "where": (),
}
"""By kind, what a row is about: of several rows about the same, the last counts."""


class Run:
    """What a phase knows: its device, whether it only shows that it works (``smoke``), and when it must end."""

    def __init__(self, rows: pathlib.Path, seconds: float, smoke: bool) -> None:
        self.rows = rows
        self.end = time.monotonic() + seconds
        self.smoke = smoke
        self.failures = 0
        self.device = torch.device("cpu" if smoke else "cuda")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, kind: str, **row: Any) -> None:
        add_row(self.rows, kind, **row)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``; None where it fails, which becomes a row. Memory that ran out is freed for others.

        Raises:
            SystemExit: the device failed, not only the call; its status is :data:`POISONED`.
        """
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.failures += 1
            text = f"{type(error).__name__}: {error}".split("\n", 1)[0][:300]
            self.add("failed", what=what, error="out of memory" if is_out_of_memory(error) else text)
        if self.device.type == "cuda":
            self._recover()
        return None

    def _recover(self) -> None:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:  # an illegal access, or a capture that was not closed: it stays so
            traceback.print_exc()
            raise SystemExit(POISONED) from error


def add_row(file: pathlib.Path, kind: str, **row: Any) -> None:
    """In one write, so that the lines of several processes do not mix."""
    with file.open("ab", buffering=0) as rows:
        rows.write(json.dumps({"kind": kind, **row}).encode() + b"\n")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


def read_rows(file: pathlib.Path) -> list[Row]:
    """Whatever was killed while it wrote left half a line."""
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Without the rows about the same thing as a later one (:data:`IDENTITY`)."""
    kept: dict[object, Row] = {}
    for index, row in enumerate(rows):
        identity = IDENTITY.get(row["kind"])
        kept[index if identity is None else (row["kind"], *(row[key] for key in identity))] = row
    return list(kept.values())


@functools.cache
def nvidia_smi(what: str) -> str | None:
    """A property of the first GPU; None where there is no such tool, or no answer."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def search_path() -> str:
    """PYTHONPATH with which a process finds this checkout's package before any that is installed."""
    return os.pathsep.join(
        filter(None, [str(REPOSITORY), str(REPOSITORY / "benchmarks"), os.environ.get("PYTHONPATH")])
    )


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Process:
    """A command in a session of its own, its output at the end of a file; stopped with all it started when time is up,
    and ended by the system if this process is."""

    running: ClassVar[set["Process"]] = set()

    def __init__(self, command: Sequence[str], log: pathlib.Path, **variables: str) -> None:
        self.log = log
        self.began = time.monotonic()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": search_path(), "PYTHONUNBUFFERED": "1", **variables},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        Process.running.add(self)

    def tell(self, **what: Any) -> None:
        """One JSON object on a line of its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its status says
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it still runs after ``seconds``."""
        try:
            status = self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        self.stop()
        return status

    def stop(self) -> None:
        """It, and what it started and left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        Process.running.discard(self)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_lines(self, count: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def ending(status: int) -> str:
    """In words."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
