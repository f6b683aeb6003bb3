"""Snapshots with CUDA graphs, by a machine without a GPU."""

import contextlib
import functools
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_densenet.nn import graphs as module


class _FakeGraphs:
    """Of torch.cuda what capturing uses: a "graph" calls its function again, on the memory that it was captured with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays, self.capturing, self.most_capturing = 0, 0, 0
        self.streams: list[Any] = []
        fakes = {
            "CUDAGraph": lambda: types.SimpleNamespace(replay=self._replay),
            "graph": self._capture,
            "Stream": self._stream,
            "current_stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None),
            "stream": lambda _: _nothing(),
            "device": lambda _: _nothing(),
            "Event": lambda: types.SimpleNamespace(record=lambda *_: None, synchronize=lambda: None),
        }
        monkeypatch.setattr(module.torch, "cuda", types.SimpleNamespace(**fakes))

    def _replay(self) -> None:
        self.replays += 1

    def _stream(self) -> Any:
        self.streams.append(types.SimpleNamespace(wait_stream=lambda _: None))
        return self.streams[-1]

    @contextlib.contextmanager
    def _capture(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """``stream`` is needed: torch's own is on the device that captured first in the process."""
        assert any(stream is made for made in self.streams) and capture_error_mode == "thread_local"
        self.capturing += 1
        self.most_capturing = max(self.most_capturing, self.capturing)
        time.sleep(0.02)
        yield
        self.capturing -= 1


@functools.cache
def _nothing() -> Any:
    return contextlib.nullcontext()


def test_cuda_graphs_by_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each layout and shape, the oldest let go of; an image goes to the graph's memory and the result out of it."""
    fake = _FakeGraphs(monkeypatch)
    calls: list[Tensor] = []
    graphs = module.Graphs(lambda x: calls.append(x) or {"double": 2 * x})
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    one = graphs(first)
    assert len(calls) == 2 and calls[0] is calls[1] and calls[0] is not first
    two = graphs(second)
    assert len(calls) == 2 and fake.replays == 2
    assert torch.equal(calls[0], second)
    assert torch.equal(one["double"], 2 * first) and one["double"] is not two["double"]
    for size in range(1, 2 + module.GRAPHS):
        graphs(torch.randn(size, 5))
    assert len(graphs._captured) == module.GRAPHS
    graphs(first)
    assert len(calls) == 2 * (module.GRAPHS + 3)


def test_captured_in_inference_mode_called_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _FakeGraphs(monkeypatch)
    graphs = module.Graphs(lambda x: 2 * x)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    with torch.inference_mode():
        assert torch.equal(graphs(x), 2 * x)
    graphs(y)
    with torch.inference_mode():
        graphs(x)


def test_one_capture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process: of any snapshots, called by any threads."""
    fake = _FakeGraphs(monkeypatch)
    threads = [threading.Thread(target=module.Graphs(lambda x: 2 * x), args=(torch.randn(2, 3),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.replays == 3 and fake.most_capturing == 1
