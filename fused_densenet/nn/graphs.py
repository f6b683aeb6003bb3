"""CUDA graphs of a function of one image: captured once for each shape, replayed from then on."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

GRAPHS = 8
"""That are kept, the last ones used."""
_capturing = threading.Lock()
"""torch allows one capture at a time in a process."""


class Graphs:
    """By an image's shape, dtype and device; one call at a time, on whichever stream.

    A graph reads and writes memory of its own: an image is copied there, and the result copied out, on the caller's
    stream, so that it is the caller's. A call waits for the one before it, whose stream may be another.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()

    def __call__(self, x: Tensor) -> Any:
        key = x.shape, x.stride(), x.dtype, x.device
        with self._lock, torch.cuda.device(x.device):
            captured = self._captured.pop(key, None) or _Captured(self._function, x)
            self._captured[key] = captured
            result = captured.replay(x)
            if len(self._captured) > GRAPHS:
                _, oldest = self._captured.popitem(last=False)
                oldest.wait()
            return result


class _Captured:
    def __init__(self, function: Callable[[Tensor], Any], x: Tensor) -> None:
        with torch.inference_mode(False):  # else an image could be copied there in inference mode alone
            self._input = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are chosen and compiled, and weights prepared, outside of the graph
            function(self._input)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # The stream is named: torch's own is on the device that captured first.
        with _capturing, torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            self._result = function(self._input)
        self._done = torch.cuda.Event()
        self._done.record()

    def replay(self, x: Tensor) -> Any:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        self._input.copy_(x)
        self._graph.replay()
        result = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._result)
        self._done.record(stream)
        return result

    def wait(self) -> None:
        """Until nothing of it runs."""
        self._done.synchronize()
