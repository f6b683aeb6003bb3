"""What a call costs on the host, whatever else the processor does meanwhile.

Other work on a core slows everything on it, by two and more. So the calls take turns with some of torch's own, whose
cost on a quiet processor is known, and what counts is how many of those a call is worth.
"""

import statistics
import time
from collections.abc import Callable

import torch

QUIET = 1.3
"""Microseconds of :func:`_known` on one core of an AMD EPYC that has nothing else to do."""

BATCHES, CALLS = 40, 50
_tensor = torch.ones(4, 8)


def _known() -> None:
    _tensor.narrow(1, 2, 4)


def microseconds(call: Callable[[], object]) -> float:
    """Of processor time of this thread, as on the quiet processor: the median over batches."""
    for _ in range(20):
        call()
    return QUIET * statistics.median(_batch(call) / _batch(_known) for _ in range(BATCHES))


def _batch(call: Callable[[], object]) -> int:
    start = time.thread_time_ns()
    for _ in range(CALLS):
        call()
    return time.thread_time_ns() - start
