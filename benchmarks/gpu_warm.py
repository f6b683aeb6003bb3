"""Compiles beforehand what is measured later, so that its code lies in Triton's and torch's caches on disk."""

import functools
import os
from collections.abc import Callable

import torch
from gpu_networks import CASES, SMOKE, Case, Subject, Variant, model_and_input
from gpu_phase import Item
from gpu_primitives import backends, call, dense_blocks, measured_problems, sizes
from gpu_run import Run
from gpu_small import DTYPES, run_small
from gpu_timing import ARITHMETICS

from fused_densenet.backends import BACKENDS


def kernels(run: Run) -> list[Item]:
    """Triton's."""
    os.nice(5)  # the build beside it comes first
    if "triton" not in backends(run, torch.bfloat16):
        return []
    found = [("small", functools.partial(run_small, "triton", dtype, run)) for dtype in DTYPES]
    if not run.smoke:
        found.append(("dense blocks", lambda: [block.step("triton") for block in dense_blocks(*sizes(run), run)]))
        steps = [case for case in CASES if not case.compiled and case.network == "densenet121"]
        found += [(str(case), functools.partial(step, case, Variant("triton"), run)) for case in steps[:2]]
        found += [(arithmetic, functools.partial(problems, arithmetic, run)) for arithmetic in ARITHMETICS]
        found += [(str(case), functools.partial(step, case, Variant("triton"), run)) for case in steps[2:]]
    return [compiling(name, work) for name, work in found]


def peers(run: Run) -> list[Item]:
    """torchvision's networks, by torch.compile."""
    return compiled_cases([None], run)


def networks(run: Run) -> list[Item]:
    """The fused networks, by torch.compile."""
    return compiled_cases([name for name in backends(run, torch.bfloat16) if name != "eager"], run)


def compiled_cases(names: list[str | None], run: Run) -> list[Item]:
    os.nice(5)
    cases = [case for case in (SMOKE if run.smoke else CASES) if case.compiled]
    return [
        compiling(f"{case}, {name or 'torchvision'}", functools.partial(step, case, Variant(name, compiled=True), run))
        for case in cases
        for name in names
    ]


def compiling(name: str, work: Callable[[], object]) -> Item:
    return Item(f"compiling beforehand: {name}", work, 300.0)


def step(case: Case, variant: Variant, run: Run) -> None:
    plain, x = model_and_input(case, run)
    Subject(case, variant, plain, x, run).step()


def problems(arithmetic: str, run: Run) -> None:
    for problem in measured_problems(run):
        run_on, _ = call(problem, ARITHMETICS[arithmetic], run.device)
        run_on(BACKENDS["triton"])
