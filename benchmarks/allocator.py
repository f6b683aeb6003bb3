"""The memory of one training step, or of one inference, exactly, from the allocator."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

MIB = 2**20
_KEPT = "kept for backward"


class StepMemory(NamedTuple):
    """Bytes of one training step above what was allocated when it began (parameters, the batch).

    Attributes:
        saved_bytes: still allocated after the forward pass, when nothing but the loss and its graph is held; the loss
            itself is not counted.
        peak_bytes: the most allocated at once, from the beginning of the forward to the end of the backward pass. The
            gradients of the parameters are allocated in it and count; an update by plain SGD allocates nothing.
    """

    saved_bytes: int
    peak_bytes: int


def step_memory(loss_of: Callable[[], Tensor], release: Callable[[], None], device: torch.device) -> StepMemory:
    """Runs ``loss_of().backward()`` once, and ``release()``, which lets go of the gradients, before and after it.

    On CUDA the figures are those of the caching allocator, which counts in blocks of 512 bytes. On the CPU every
    allocation and every release is an event of torch's profiler with its size in bytes; their running sum is the memory
    in use, and it must come back to zero once everything is released, or an event was missed. The operators' scratch
    memory (oneDNN's too) comes from the same allocator.

    Raises:
        RuntimeError: the events of the CPU do not add up to zero.
    """
    release()
    return _cuda(loss_of, release, device) if device.type == "cuda" else _cpu(loss_of, release)


def _cuda(loss_of: Callable[[], Tensor], release: Callable[[], None], device: torch.device) -> StepMemory:
    loss_of().backward()  # cuBLAS and cuDNN keep workspaces from their first use on
    release()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = loss_of()
    saved = torch.cuda.memory_allocated(device) - before - 512
    loss.backward()
    peak = torch.cuda.max_memory_allocated(device) - before
    release()
    return StepMemory(saved, peak)


def call_memory(call: Callable[[], Tensor]) -> int:
    """The most bytes that ``call()``, whose result is let go of, has allocated at once on the CPU, beside what it keeps."""
    call()
    return _events(lambda: (call(), None)[1])[1]


def _cpu(loss_of: Callable[[], Tensor], release: Callable[[], None]) -> StepMemory:
    loss_bytes = 0

    def step() -> None:
        nonlocal loss_bytes
        loss = loss_of()
        loss_bytes = loss.untyped_storage().nbytes()
        with record_function(_KEPT):
            pass
        loss.backward()
        del loss
        release()

    kept, peak = _events(step)
    return StepMemory(kept - loss_bytes, peak)


def _events(run: Callable[[], None]) -> tuple[int, int]:
    """Bytes allocated where ``run`` notes what is kept, and the most."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        run()
    finally:  # a process that ends while it records crashes
        with _silent_stderr():
            profiler.stop()
    result = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert result is not None
    allocated = peak = kept = 0
    for event in sorted(result.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
        elif event.name() == _KEPT:
            kept = allocated
    if allocated != 0:
        raise RuntimeError(f"allocation events: expected a sum of 0 at the end, got {allocated} bytes")
    return kept, peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what the profiler's start and stop write to the process's stderr, in the middle of a progress bar."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
