"""Everything that a GPU can tell, in one command that ends within nine minutes.

    python3 benchmarks/gpu_report.py --output results

A checkout is enough, with torch, triton, numpy and pytest. It builds the package there, kernels required; runs the tests
that need a GPU and, where it is installed, compute-sanitizer on the CUDA kernels; then it times every primitive of every
backend against its floor and beside what gpu_model.py predicted, DenseNet-121's dense blocks alone, KernelBench's problems
with dense blocks, and training and inference steps of whole networks beside torchvision's (eager, channels-last,
memory_efficient, torch.compile). Times are medians of interleaved rounds by the
device's events. report.md and report.json name the GPU, the driver, the versions and the commit.

The report is on disk from the first seconds on and holds what is known, whatever is killed: every figure is a line of
rows.jsonl as soon as it is measured, a case that fails or takes its process with it is a line of the report, the next
has a process of its own. What there is no time for is dropped from the end of each list; the report and the last line
name what failed, was stopped or dropped, and then the exit status is 1.

``--smoke`` goes the same way on the CPU, with Triton's interpreter, in tiny sizes.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import gpu_checks
import torch
from checkout import command, commit
from gpu_checks import Check
from gpu_phase import ALONE
from gpu_run import POISONED, Process, Row, Run, ending, latest, nvidia_smi, read_rows
from gpu_text import markdown, plain
from options import folder, minutes

STAGES = ("build", "tests", "sanitizers", "primitives", "kernelbench", "networks")
MEASURING = STAGES[3:]
LIMITS = {"build": 150, "CUDA": 75, "Triton": 110, "memcheck": 60, "racecheck": 50, "primitives": 80, "kernelbench": 35}
"""Seconds at most; what a stage leaves goes to the ones after it, and the networks have all that is left."""
CLOSING = 6
ASKED = (("gpu", "name"), ("driver", "driver_version"))
"""Of nvidia-smi, until the package has told more."""
LEAST = 3
"""Seconds without which nothing is begun."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """By a signal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=folder, default=pathlib.Path("gpu_report"), metavar="FOLDER")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, to show that the report works")
    parser.add_argument("--minutes", type=minutes, default=8.5, help="the report is complete before they are over")
    parser.add_argument("--skip", nargs="+", default=[], choices=STAGES, help="stages to leave out")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("gpu_report.py: torch sees no GPU; --smoke shows on the CPU that the report works")
    report, status = None, "complete"
    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        try:
            report = Report(args.output, args.minutes * 60, args.smoke, args.commit)
            make(report, [stage for stage in STAGES if stage not in args.skip])
            status = "incomplete" if report.undone() else "complete"
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    except Stopped as stopped:
        status = str(stopped)
    except BaseException as error:  # whatever it is, what is known must be written
        status = f"{type(error).__name__}: {error}"
        raise
    finally:
        for process in list(Process.running):
            process.stop()
        if report is not None:
            report.close(status)
    if status != "complete":
        undone = [] if report is None else report.undone()
        raise SystemExit(f"gpu_report.py: {'; '.join([status, *undone])}; see {args.output}")


def stop(number: int, _: object) -> None:
    raise Stopped(f"stopped by {signal.Signals(number).name}")


class Report:
    """The output folder: rows.jsonl, report.json and report.md made from it again and again, and what was printed."""

    def __init__(self, folder: pathlib.Path, seconds: float, smoke: bool, commit_given: str | None) -> None:
        self.folder, self.commit, self.began = folder, commit_given or commit(), time.monotonic()
        self.logs = pathlib.Path(tempfile.mkdtemp(prefix="gpu_report"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").unlink(missing_ok=True)
        self.run = Run((folder / "rows.jsonl").absolute(), seconds - CLOSING, smoke)
        self.written, self.started = 0.0, 0
        self.write("in progress")

    def rows(self) -> list[Row]:
        return read_rows(self.run.rows)

    def undone(self) -> list[str]:
        """What failed, was stopped or dropped, or should have run and did not: without a GPU its tests need not."""
        bad = {"failed", "stopped"} if self.run.smoke else {"failed", "stopped", "ran nothing"}
        rows = self.rows()
        checks = [
            f"{row['outcome']}: {row['check']}" for row in rows if row["kind"] == "check" and row["outcome"] in bad
        ]
        return checks + [f"{row['kind']}: {row['what']}" for row in rows if row["kind"] in ("failed", "dropped")]

    def write(self, status: str) -> None:
        rows = latest(self.rows())
        where: dict[str, Any] = next((row for row in rows if row["kind"] == "where"), {})
        found = {
            "machine": {
                "processor": None,
                **{name: None if self.run.smoke else nvidia_smi(asked) for name, asked in ASKED},
            },
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda},
            "backend": None,
            **{key: value for key, value in where.items() if key != "kind"},
            "commit": self.commit,
            "command": command(),
            "smoke": self.run.smoke,
            "status": status,
            "seconds": time.monotonic() - self.began,
            "rows": [row for row in rows if row["kind"] != "where"],
        }
        try:
            text = markdown(found)
        except Exception as error:
            text = plain(found, f"the tables cannot be made: {type(error).__name__}: {error}")
        logs = sorted(self.logs.iterdir(), key=lambda file: file.stat().st_mtime)
        printed = "\n".join(f"===== {file.name}\n{file.read_text(errors='replace')}" for file in logs)
        contents = {"report.json": json.dumps(found, indent=1) + "\n", "report.md": text, "logs.txt": printed}
        for name, content in contents.items():
            new = self.folder / f".{name}"
            new.write_text(content)
            new.replace(self.folder / name)
        self.written = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def tick(self) -> None:
        if time.monotonic() - self.written > 2.0:
            self.write("in progress")

    def close(self, status: str) -> None:
        self.write(status)
        shutil.rmtree(self.logs)
        print((self.folder / "report.md").read_text(), flush=True)


def make(report: Report, stages: list[str]) -> None:
    run = report.run
    run.add("tools", **gpu_checks.tools())
    warming = start_warming(report, ["warm kernels", "warm peers"], stages)
    if "build" in stages:
        check(report, [[gpu_checks.build(run, allowed(report, "build"))]])
    warming += start_warming(report, ["warm networks"], stages)
    work_through(report, "where", min(60.0, run.left()))
    if "tests" in stages:
        check(report, [[gpu_checks.tests(run, "CUDA", allowed(report, "CUDA"))]])
    # What is not timed may run side by side.
    lanes = []
    if "tests" in stages:
        lanes.append([gpu_checks.tests(run, "Triton", allowed(report, "Triton"))])
    if "sanitizers" in stages:
        lanes.append(sanitizers(report))
    check(report, lanes)
    for process in warming:
        if run.smoke:
            process.wait(run.left())
        process.stop()
    for stage in MEASURING:
        if stage in stages:
            work_through(report, stage, allowed(report, stage))


def allowed(report: Report, name: str) -> float:
    return report.run.left() if report.run.smoke else min(LIMITS.get(name, float("inf")), report.run.left())


def phase_command(report: Report, name: str) -> list[str]:
    script = pathlib.Path(__file__).resolve().with_name("gpu_phase.py")
    return [sys.executable, str(script), name, str(report.run.rows), *(["--smoke"] if report.run.smoke else [])]


def start_phase(report: Report, name: str) -> Process:
    report.started += 1
    return Process(phase_command(report, name), report.logs / f"{name}, {report.started}.log")


def start_warming(report: Report, names: list[str], stages: list[str]) -> list[Process]:
    processes = []
    for name in names if set(MEASURING) & set(stages) else []:
        processes.append(start_phase(report, name))
        processes[-1].tell(first=0, seconds=report.run.left())
    return processes


def sanitizers(report: Report) -> list[Check]:
    program = gpu_checks.sanitizer()
    if program is None:
        report.run.add("check", check="compute-sanitizer", outcome="not installed")
        return []
    phase = phase_command(report, "small")
    return [gpu_checks.sanitized(program, tool, phase, allowed(report, tool)) for tool in gpu_checks.SANITIZERS]


def check(report: Report, lanes: list[list[Check]]) -> None:
    """The lanes side by side, the checks of a lane one after the other."""
    waiting = [iter(lane) for lane in lanes]
    current: dict[int, tuple[Check, Process]] = {}
    while True:
        for lane, checks in enumerate(waiting):
            if lane not in current:
                with contextlib.suppress(StopIteration):
                    current[lane] = begin(report, checks)
        if not current:
            return
        for lane, (here, process) in list(current.items()):
            status = process.wait(0.1)
            late = process.seconds() > here.seconds or report.run.left() < 0
            if status is not None or late:
                process.stop()
                row = gpu_checks.result(here, process, status, report.rows())
                report.run.add("check", **row)
                report.say(f"{row['check']}: {row['outcome']} {row['closing']}")
                del current[lane]
        report.tick()


def begin(report: Report, checks: Iterator[Check]) -> tuple[Check, Process]:
    """The next for which there is time.

    Raises:
        StopIteration: there is none.
    """
    while True:
        here = next(checks)
        if report.run.left() > LEAST:
            return here, gpu_checks.start(here, report.logs)
        report.run.add("dropped", what=here.name)


def work_through(report: Report, name: str, seconds: float) -> None:
    """A phase, with a new process behind every item that ended the one before, and for a phase of :data:`ALONE` every
    item; that process imports what it needs while the one before works."""
    run, end = report.run, time.monotonic() + seconds
    first, spare = 0, start_phase(report, name)
    while end - time.monotonic() > LEAST:
        process, spare = spare, start_phase(report, name) if name in ALONE else None
        process.tell(first=first, seconds=end - time.monotonic() - LEAST)
        status = None
        while status is None and time.monotonic() < end:
            status = process.wait(0.5)
            report.tick()
        process.stop()
        rows = [row for row in report.rows() if row.get("phase") == name]
        begun = next((row for row in reversed(rows) if row["kind"] == "begun"), {"index": -1, "what": name})
        if status is None:
            run.add("dropped", what=f"{name}: from {begun['what']} on")
            break
        if status not in (0, POISONED):
            last = process.last_lines(1)
            run.add(
                "failed",
                what=begun["what"],
                error=f"its process {ending(status)}: {last}",
                output=process.last_lines(30),
            )
            report.say(f"{begun['what']}: its process {ending(status)}: {last}")
        if any(row["kind"] == "finished" for row in rows) or begun["index"] < first:
            break
        if name in ALONE:
            report.say(begun["what"])
        first, spare = begun["index"] + 1, spare or start_phase(report, name)
    else:
        run.add("dropped", what=f"{name}: from item {first} on" if first else f"{name}: all of it")
    if spare is not None:
        spare.stop()
    report.say(f"{name}: done")


if __name__ == "__main__":
    main()
