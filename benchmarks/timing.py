"""What the benchmarks time with: rounds in turns, the machine's limits beside them, medians and quartiles."""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

COPIED = 2**24
"""Numbers that a copy moves."""
CPU = torch.device("cpu")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    timed: dict[Any, Callable[[], object]], rounds: int, advance: Callable[[str], None], pause: float = 0
) -> dict[Any, list[float]]:
    """Seconds of each in each round, on the CPU; ``pause`` seconds before each, where another's threads may still spin."""
    times: dict[Any, list[float]] = {key: [] for key in timed}
    gc.disable()
    for number in range(rounds + 1):
        for key, run in timed.items():
            time.sleep(pause)
            elapsed = seconds(run, CPU)
            if number > 0:  # the first round warms up
                times[key].append(elapsed)
        advance(f"round {number} of {rounds}")
    gc.enable()
    return times


def matrix_product(dtype: torch.dtype, size: int, device: torch.device = CPU) -> Callable[[], object]:
    """That of two matrices of so many rows and columns."""
    a = torch.randn(size, size, device=device).to(dtype)
    return functools.partial(torch.matmul, a, a)


@functools.cache
def product_size(dtype: torch.dtype, device: torch.device = CPU) -> int:
    """Rows and columns of the matrices whose product shows the machine's rate: 2048, or as many as take about a second.

    Where a CPU has no instructions for 16-bit numbers, torch multiplies them one by one, of any size at the same rate.
    """
    size = 256
    while size < 2048:
        run = matrix_product(dtype, size, device)
        if min(seconds(run, device) for _ in range(2)) > 0.1:  # the next takes 8 times as long
            break
        size *= 2
    return size


def limits(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What :func:`measure` takes, for :func:`rates`."""
    source, target = (torch.zeros(COPIED, dtype=dtype) for _ in range(2))
    return {
        "matrix product": matrix_product(dtype, product_size(dtype)),
        "copy": functools.partial(target.copy_, source),
    }


def rates(times: dict[Any, list[float]], dtype: torch.dtype) -> dict[str, float]:
    """FLOPs of a large product and bytes of a copy, read and written, per second."""
    product, copy = (statistics.median(times[key]) for key in ("matrix product", "copy"))
    return {"product": 2 * product_size(dtype) ** 3 / product, "copy": 2 * COPIED * dtype.itemsize / copy}


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles(values), strict=True))
