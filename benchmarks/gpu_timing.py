"""Time on the device: events around work that was warmed up, interleaved rounds, and the rates a floor is made of."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from gpu_run import Run

Work = Callable[[], object]


def milliseconds(work: Work, device: torch.device, repeat: int = 1) -> float:
    """Of one of ``repeat`` calls in a row: by events of the device, on a CPU by the clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeat):
            work()
        return (time.perf_counter() - start) * 1e3 / repeat
    module = torch.get_device_module(device)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat


def interleaved(works: dict[str, Work], run: Run, seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each, from rounds A B C ... A B C ... that take about ``seconds`` together; all are warm.

    Short work is repeated within a sample, so that an event's own microseconds do not count.
    """
    repeats, rounds = dict.fromkeys(works, 1), 1
    if works and not run.smoke:
        once = {name: max(milliseconds(work, run.device), 1e-3) for name, work in works.items()}
        repeats = {name: min(10, max(1, round(10 / t))) for name, t in once.items()}
        one_round = sum(once[name] * repeats[name] for name in works) / 1e3
        rounds = max(least, min(30, int(seconds / one_round)))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(milliseconds(work, run.device, repeats[name]))
    return times


def graph_of(work: Work, run: Run) -> Work:
    """``work`` captured in a CUDA graph, so that nothing of the host is timed; the work itself on a CPU.

    The work runs beforehand on a stream of its own: what it compiles or allocates once is not captured.
    """
    if run.device.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """torch's switches for float32, of convolutions and of matrix products."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


class Rates(NamedTuple):
    """What this device was seen to do: bytes read and written per second, FLOPs per second by arithmetic."""

    copy: float
    products: dict[str, float]

    def floor(self, moved: float, flops: float, arithmetic: str) -> float:
        """Milliseconds that moving every byte once and all multiplications take at least."""
        return 1e3 * max(moved / self.copy, flops / self.products[arithmetic])


ARITHMETICS = {"bfloat16": torch.bfloat16, "tf32": torch.float32}


def measure_rates(run: Run) -> Rates:
    """A copy of 1 GiB counted twice, read and written, and products of square matrices of random numbers."""
    size, side = (2**16, 64) if run.smoke else (2**30, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    works: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    for name, dtype in ARITHMETICS.items():
        a = torch.randn(side, side, device=run.device).to(dtype)
        works[name] = lambda a=a: torch.matmul(a, a)
    for work in works.values():
        work()
    times = {name: statistics.median(values) / 1e3 for name, values in interleaved(works, run, 1.5).items()}
    return Rates(2 * size / times.pop("copy"), {name: 2 * side**3 / seconds for name, seconds in times.items()})
