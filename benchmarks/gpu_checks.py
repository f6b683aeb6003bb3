"""What comes before any figure: the build, the tests marked gpu, and compute-sanitizer on a small run."""

import os
import pathlib
import re
import shutil
import sys
from typing import Any

import torch
from gpu_primitives import BACKWARD, FORWARD, Problem, backends, call
from gpu_run import REPOSITORY, Process, Run

SANITIZER_TOOLS = ("memcheck", "racecheck")
SMALL = [
    Problem("place", (2, 1, 7, 5), 48, 48, 0),
    Problem(FORWARD, (2, 1, 7, 5), 48, 128, 1),
    Problem(FORWARD, (2, 1, 7, 5), 128, 32, 3),
    Problem(BACKWARD, (2, 1, 7, 5), 128, 32, 3),
    Problem(BACKWARD, (2, 1, 7, 5), 48, 128, 1, accumulate=True),
    Problem(FORWARD, (2, 1, 7, 5), 48, 24, 1, pool=True),
    Problem(BACKWARD, (2, 1, 7, 5), 48, 24, 1, pool=True),
    Problem("place_backward", (2, 1, 7, 5), 48, 48, 0),
]


def commands(smoke: bool) -> dict[str, tuple[list[str], dict[str, str]]]:
    """By name, the command and the variables that it gets besides: kernels are compiled for the GPU that is there.

    ``smoke`` compiles nothing and collects the tests of one file, which are all skipped where there is no GPU.
    """
    tests = [str(REPOSITORY / "tests" / "test_gpu.py")] if smoke else [str(REPOSITORY / "tests")]
    # Tests of packages that are missing cannot even be read; they are not those of a GPU.
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    build = {"FUSED_DENSENET_BUILD": "off"} if smoke else {"TORCH_CUDA_ARCH_LIST": ""}
    return {
        "build": ([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], build),
        "tests": ([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options, *tests], {}),
    }


def check(name: str, command: list[str], variables: dict[str, str], seconds: float, folder: pathlib.Path) -> dict:
    """Runs it; a row with what came of it."""
    process = Process(command, folder / f"{name}.log", **variables)
    status = process.wait(seconds)
    outcome = "passed" if status == 0 else f"stopped after {seconds:.0f} s" if status is None else f"failed ({status})"
    row: dict[str, Any] = {"check": name, "outcome": outcome, "seconds": round(process.seconds(), 1)}
    tail = process.last_lines(40)
    counted = re.findall(r"^.*\b\d+ (?:passed|failed|skipped|error)\b.*$", tail, re.MULTILINE)
    summary = re.findall(r"^=+ (.*SUMMARY.*)$", tail, re.MULTILINE)
    row["closing"] = (counted or summary or [""])[-1].strip("= ")
    if status != 0:
        row["output"] = tail
    return row


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(pathlib.Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer_command(program: str, tool: str, script: list[str]) -> tuple[list[str], dict[str, str]]:
    """``script`` under a tool; every tensor an allocation of its own, so that an overrun is seen."""
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "10", *script]
    return command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def small_run(run: Run) -> None:
    """Every primitive once on every backend of kernels."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, backend in backends(run, dtype).items():
            if name == "eager":
                continue
            for problem in SMALL:
                run_on, _ = call(problem, dtype, run.device)
                run_on(backend)
            run.add("small run", backend=name, dtype=str(dtype))
    if run.device.type == "cuda":
        torch.cuda.synchronize()
