"""Everything that a GPU can tell, in one command and at most eight minutes.

    python benchmarks/gpu_report.py --output results

It builds the package in this checkout, runs the tests marked ``gpu`` and, where it is installed, compute-sanitizer; then
it times every primitive of every backend against its floor, DenseNet-121's dense blocks alone, and training and
inference steps of whole networks beside torchvision's (eager, channels-last, memory_efficient, torch.compile). Times are
medians of interleaved rounds by the device's events. report.md and report.json name the GPU, the driver, the versions
and the commit. What there is no time for is dropped from the end of each list, and the report says so; memory that runs
out and whatever else fails is a line of the report.

``--smoke`` goes the same way on the CPU, with Triton's interpreter, in tiny sizes.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import torch
from gpu_run import REPOSITORY, Process, Run, nvidia_smi, read_rows

PHASES = ("build", "tests", "sanitizer", "primitives", "networks")
LIMITS = {"build": 110, "tests": 100, "sanitizer": 70, "primitives": 80, "networks": 480}
"""Seconds at most; what a phase leaves goes to the ones after it."""
CLOSING = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("gpu_report"), metavar="FOLDER")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, to show that the report works")
    parser.add_argument("--minutes", type=float, default=8.0, help="the report is written before they are over")
    parser.add_argument("--skip", nargs="+", default=[], choices=PHASES, help="phases to leave out")
    parser.add_argument("--phase", nargs=3, metavar=("NAME", "ROWS", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        interpret()
    if args.phase:
        name, rows, seconds = args.phase
        run_phase(name, Run(pathlib.Path(rows), float(seconds), args.smoke))
        return
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("gpu_report.py: torch sees no GPU; --smoke shows on the CPU that the report works")
    report = make_report(args.smoke, args.minutes * 60, [phase for phase in PHASES if phase not in args.skip])
    from gpu_text import markdown

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (args.output / "report.md").write_text(text)
    print(text)
    failed = [row["check"] for row in report["rows"] if row["kind"] == "check" and "failed" in row["outcome"]]
    if failed:
        raise SystemExit(f"gpu_report.py: failed: {', '.join(failed)}; the report is in {args.output}")


def interpret() -> None:
    """Triton's interpreter, with the repairs that the tests make to it."""
    sys.path.append(str(REPOSITORY / "tests" / "triton_backend"))
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton_cpu")


def run_phase(name: str, run: Run) -> None:
    import gpu_checks
    import gpu_networks
    import gpu_primitives
    from gpu_timing import measure_rates, tf32

    with tf32(True):
        if name == "primitives":
            rates = measure_rates(run)
            run.add("rates", **rates._asdict())
            gpu_primitives.phase(run, rates)
        elif name == "warm":
            if not run.smoke:
                gpu_checks.small_run(run)  # the sanitizers find its kernels compiled
            gpu_networks.warm(run)
        else:
            {"networks": gpu_networks.phase, "small": gpu_checks.small_run}[name](run)


def make_report(smoke: bool, seconds: float, phases: list[str]) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run = Run(folder / "report.jsonl", seconds - CLOSING, smoke)
        warming = start_phase("warm", folder, run) if "networks" in phases else None
        for phase in phases:
            allowed = run.left() if smoke else min(LIMITS[phase], run.left())
            if allowed < 3:
                run.add("dropped", what=phase)
            elif phase in ("primitives", "networks"):
                if warming is not None:
                    warming.stop()  # nothing is timed beside it
                measured(phase, folder, run, allowed)
            elif phase == "sanitizer":
                sanitize(folder, run, allowed)
            else:
                checked(phase, folder, run, allowed)
        files = [run.rows, *(folder / f"{phase}.jsonl" for phase in ("primitives", "networks"))]
        rows = [row for file in files for row in read_rows(file)]
    return {**where(run), "smoke": smoke, "seconds": time.monotonic() - began, "rows": rows}


def phase_command(name: str, folder: pathlib.Path, run: Run, seconds: float) -> list[str]:
    script = [sys.executable, str(pathlib.Path(__file__).resolve()), *(["--smoke"] if run.smoke else [])]
    return [*script, "--phase", name, str(folder / f"{name}.jsonl"), str(seconds)]


def start_phase(name: str, folder: pathlib.Path, run: Run) -> Process:
    return Process(phase_command(name, folder, run, run.left()), folder / f"{name}.log")


def measured(name: str, folder: pathlib.Path, run: Run, seconds: float) -> None:
    """Runs a phase, which should be done a little before it is stopped."""
    process = Process(phase_command(name, folder, run, seconds - 3), folder / f"{name}.log")
    status = process.wait(seconds)
    if status is None:
        run.add("dropped", what=f"the end of {name}: it was stopped after {seconds:.0f} s, in what is not listed")
    elif status != 0:
        run.add("failed", what=name, error=process.last_lines(15))


def checked(name: str, folder: pathlib.Path, run: Run, seconds: float) -> None:
    from gpu_checks import check, commands

    command, variables = commands(run.smoke)[name]
    run.add("check", **check(name, command, variables, seconds, folder))


def sanitize(folder: pathlib.Path, run: Run, seconds: float) -> None:
    from gpu_checks import SANITIZER_TOOLS, check, sanitizer, sanitizer_command

    program = sanitizer()
    if program is None:
        run.add("check", check="compute-sanitizer", outcome="not installed")
        return
    for tool in SANITIZER_TOOLS:
        command = phase_command("small", folder, run, seconds)
        arguments, variables = sanitizer_command(program, tool, command)
        run.add("check", **check(tool, arguments, variables, seconds / len(SANITIZER_TOOLS), folder))


def where(run: Run) -> dict[str, Any]:
    from common import environment

    found = environment(run.device, torch.float32)
    found["machine"]["driver"] = None if run.smoke else nvidia_smi("driver_version")
    for package in ("triton", "torchvision"):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][package] = None
    return found


if __name__ == "__main__":
    main()
