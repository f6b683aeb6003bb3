"""Snapshots with CUDA graphs, by a machine without a GPU."""

import contextlib
import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_densenet.nn import graphs as module


class _FakeGraphs:
    """Of torch.cuda what capturing uses: a "graph" calls its function again, on the memory that it was captured with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures, self.replays = 0, 0
        self._capturing: Any = None
        fakes = {
            "CUDAGraph": lambda: types.SimpleNamespace(replay=self._replay),
            "graph": lambda graph, **_: _nothing(),
            "Stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None),
            "stream": lambda _: _nothing(),
            "device": lambda _: _nothing(),
            "Event": lambda: types.SimpleNamespace(record=lambda *_: None, synchronize=lambda: None),
        }
        monkeypatch.setattr(module.torch, "cuda", types.SimpleNamespace(**fakes))

    def _replay(self) -> None:
        self.replays += 1


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
