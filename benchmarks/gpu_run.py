"""A phase of gpu_report.py: a process of its own, so that neither a crash nor a long compilation ends the report.

The phase writes one JSON object per line as soon as it has it; what was written counts, whatever happens afterwards.
"""

import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


class Run:
    """What a phase knows: its device, whether it only shows that it works (``smoke``), and when it must end."""

    def __init__(self, rows: pathlib.Path, seconds: float, smoke: bool) -> None:
        self.rows = rows
        self.end = time.monotonic() + seconds
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def add(self, kind: str, **row: Any) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps({"kind": kind, **row}) + "\n")

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``; None where it fails, which becomes a row. Memory that ran out is freed for others."""
        try:
            return work()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".split("\n", 1)[0][:300]
            self.add("failed", what=what, error="out of memory" if is_out_of_memory(error) else text)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


def read_rows(file: pathlib.Path) -> list[dict[str, Any]]:
    """The last line may be half of one."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def nvidia_smi(what: str) -> str | None:
    """A property of the first GPU; None where there is no such tool."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


class Process:
    """A command in a session of its own, its output in a file; stopped with all it started when time is up."""

    def __init__(self, command: Sequence[str], log: pathlib.Path, **variables: str) -> None:
        self.log = log
        self.began = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it was stopped after ``seconds``."""
        try:
            return self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self.stop()
            return None

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def last_lines(self, count: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
