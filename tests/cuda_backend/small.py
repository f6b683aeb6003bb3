"""Shapes that are small enough for every way of executing a kernel, and still cross the edges of its tiles."""

import cases
import torch
from cases import CUBE, IMAGE, LINE, ONE, ROW, SQUARE, VOLUME, Case
from emulated import Emulated, Executor

ARITHMETIC = {  # dtype of the data, whether products are TF32, dtype of the rounding
    "bfloat16": (torch.bfloat16, False, torch.bfloat16),
    "float16": (torch.float16, False, torch.float16),
    "tf32": (torch.float32, True, torch.float16),
    "float32": (torch.float32, False, torch.float32),
}
CASES = [
    Case(LINE, 36, 48, ONE),
    Case((2, 1, 5, 7), 70, 33, ONE, accumulate=False),
    Case(IMAGE, 48, 12, SQUARE, accumulate=False),
    Case(LINE, 36, 12, ROW),
    Case(VOLUME, 24, 12, CUBE),
    Case((2, 1, 1, 1), 17, 5, SQUARE),
]


def run(case: Case, arithmetic: str, executor: Executor | None, multiprocessors: int = 4) -> None:
    """The case's forward and backward primitive against float64."""
    dtype, tf32, rounding = ARITHMETIC[arithmetic]
    backend = Emulated(executor, tf32=tf32, multiprocessors=multiprocessors)
    cases.run_case(case, dtype, rounding=rounding, backend=backend)
