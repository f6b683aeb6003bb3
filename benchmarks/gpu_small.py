"""Every primitive once in a small size, for the sanitizers; and where the report was made."""

import functools
import importlib.metadata

import torch
from gpu_phase import Item
from gpu_primitives import BACKWARD, FORWARD, Problem, call
from gpu_run import Run, nvidia_smi
from provenance import environment

import fused_densenet
from fused_densenet.backends import BACKENDS

PIXELS = (2, 1, 7, 5)
SMALL = [
    Problem("place", PIXELS, 48, 48, 0),
    Problem(FORWARD, PIXELS, 48, 128, 1),
    Problem(FORWARD, PIXELS, 128, 32, 3),
    Problem(BACKWARD, PIXELS, 128, 32, 3),
    Problem(BACKWARD, PIXELS, 48, 128, 1, accumulate=True),
    Problem(FORWARD, PIXELS, 48, 24, 1, pool=True),
    Problem(BACKWARD, PIXELS, 48, 24, 1, pool=True),
    Problem("place_backward", PIXELS, 48, 48, 0),
]
DTYPES = (torch.bfloat16, torch.float32)


def items(run: Run) -> list[Item]:
    """Of the compiled kernels alone: a sanitizer is slow, and Triton's kernels are checked on the CPU."""
    compiled = "cpu" if run.smoke else "cuda"
    reason = BACKENDS[compiled].unavailable(run.device, torch.float32)
    if reason is not None:
        raise SystemExit(f"backend {compiled!r} cannot run: {reason}")
    return [
        Item(f"every primitive, {compiled}, {dtype}", functools.partial(run_small, compiled, dtype, run), 300.0)
        for dtype in DTYPES
    ]


def run_small(name: str, dtype: torch.dtype, run: Run) -> None:
    for problem in SMALL:
        run_on, _ = call(problem, dtype, run.device)
        run_on(BACKENDS[name])
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    run.add("small run", backend=name, dtype=str(dtype))


def where(run: Run) -> list[Item]:
    return [Item("where", lambda: run.add("where", **place(run)))]


def place(run: Run) -> dict:
    """The machine, the versions, the commit, and why a backend does not run."""
    found = environment(run.device, torch.float32)
    found["machine"]["driver"] = None if run.smoke else nvidia_smi("driver_version")
    for package in ("triton", "torchvision"):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][package] = None
    reasons = {name: backend.unavailable(run.device, torch.bfloat16) for name, backend in BACKENDS.items()}
    return {**found, "package": fused_densenet.__file__, "backends": reasons}
