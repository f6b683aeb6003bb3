"""What comes before any figure: the build, the tests that need a GPU, and compute-sanitizer on a small run."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import Any, NamedTuple

from checkout import REPOSITORY
from gpu_run import ROWS, SUITE, Process, Row, Run, ending

MOST_FAILURES = 20
MOST_WORKERS = 8
GPU_TESTS, AUTOTUNED = "tests/test_gpu.py", "tests/triton_backend/test_autotuned.py"
SANITIZERS = ("memcheck", "racecheck")


class Check(NamedTuple):
    """A command with the variables that it gets besides, and the seconds that it may take."""

    name: str
    command: list[str]
    variables: dict[str, str]
    seconds: float


def build(run: Run, seconds: float) -> Check:
    """Fails where the kernels cannot be compiled: for the GPU that is there, whatever the environment lists.

    What an earlier build left is removed, so that it is not measured in the place of one that failed.
    """
    variables = {"FUSED_DENSENET_BUILD": "required", "FUSED_DENSENET_CUDA": "required", "TORCH_CUDA_ARCH_LIST": ""}
    if run.smoke:
        variables = {"FUSED_DENSENET_BUILD": os.environ.get("FUSED_DENSENET_BUILD", "off")}
    if variables["FUSED_DENSENET_BUILD"] != "off":
        for file in (REPOSITORY / "fused_densenet").glob("*.so"):
            file.unlink()
    return Check("build", [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], variables, seconds)


def tests(run: Run, suite: str, seconds: float) -> Check:
    """``suite`` is "CUDA" (with what is of no backend) or "Triton"; nothing is loaded that the tests do not need."""
    chosen = [GPU_TESTS, "-k", "not triton"] if suite == "CUDA" else [GPU_TESTS, AUTOTUNED, "-k", "triton or autotuned"]
    options = ["-p", "gpu_tests", "-p", "no:cacheprovider", "-m", "gpu", "-q", "--no-header", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None and not run.smoke:
        workers = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))
        options += ["-p", "xdist.plugin", "-n", str(workers)]
    command = [sys.executable, "-m", "pytest", *options, f"--maxfail={MOST_FAILURES}", *chosen]
    variables = {ROWS: str(run.rows.absolute()), SUITE: suite, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Check(f"tests, {suite}", command, variables, seconds)


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(pathlib.Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitized(program: str, tool: str, phase: list[str], seconds: float) -> Check:
    """The phase "small" under a tool; every tensor an allocation of its own, so that an overrun is seen.

    Errors that calls of the driver return are not counted: libraries try what a driver has, and handle them.
    """
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "10", "--report-api-errors", "no"]
    command = [program, *options, *phase, "--order", json.dumps({"first": 0, "seconds": seconds})]
    return Check(tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, seconds)


def start(check: Check, folder: pathlib.Path) -> Process:
    return Process(check.command, folder / f"{check.name}.log", **check.variables)


def result(check: Check, process: Process, status: int | None, rows: list[Row]) -> Row:
    """What came of it; ``status`` is None where it was stopped."""
    outcome = "passed" if status == 0 else "failed" if status is not None else "stopped"
    row: dict[str, Any] = {"check": check.name, "outcome": outcome, "seconds": round(process.seconds(), 1)}
    tail = process.last_lines(40)
    if check.name.startswith("tests"):
        row["closing"] = counted([r for r in rows if r.get("suite") == check.variables[SUITE]])
        if status == 0 and "passed" not in row["closing"]:
            row["outcome"] = "ran nothing"
    else:
        row["closing"] = "nothing compiled" if check.variables.get("FUSED_DENSENET_BUILD") == "off" else ""
        row["closing"] += (re.findall(r"^=+ (.*SUMMARY.*)$", tail, re.MULTILINE) or [""])[-1].strip("= ")
    if status != 0:
        why = f"after {process.seconds():.0f} s" if status is None else ending(status)
        row["closing"] = "; ".join(filter(None, [why, row["closing"]]))
        row["output"] = tail
    return row


def counted(rows: list[Row]) -> str:
    """``12 passed, 1 failed, 193 not run``."""
    outcomes: dict[str, str] = {}
    for row in rows:
        if row["kind"] == "test" and outcomes.get(row["test"]) != "failed":
            outcomes[row["test"]] = row["outcome"]
    collected = max((row["count"] for row in rows if row["kind"] == "collected"), default=0)
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    counts["not run"] = max(0, collected - len(outcomes))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def tools() -> dict[str, str | None]:
    """What the build and the checks need, by name: a version, or a place, or None where it is missing."""
    python_h = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    nvcc = next(filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes if home)), shutil.which("nvcc"))
    return {
        "g++": said(os.environ.get("CXX", "g++"), "-dumpfullversion"),
        "Python.h": str(python_h) if python_h.exists() else None,
        "nvcc": said(nvcc, "--version", r"release ([\d.]+)"),
        "ninja": said("ninja", "--version"),
        "setuptools": setuptools(),
        "pytest": version("pytest"),
        "pytest-xdist": version("pytest-xdist"),
        "compute-sanitizer": sanitizer(),
    }


def setuptools() -> str | None:
    """An older one than pyproject.toml asks for does not read it."""
    found = version("setuptools")
    return f"{found} (too old, 77 is needed)" if found and int(found.partition(".")[0]) < 77 else found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(program: str | None, option: str, pattern: str = r"(\d+(?:\.\d+)*)") -> str | None:
    try:
        command = [*(program or "").split(), option]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        found = re.search(pattern, run.stdout)
    except (OSError, subprocess.SubprocessError):
        return None
    return found[1] if found else None
