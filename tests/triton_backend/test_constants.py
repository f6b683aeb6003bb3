"""What Triton's kernels read that is made once: whose memory it is, and how long it stays."""

import threading

import launches
import pytest
import torch

from fused_densenet.backends.triton import constants, plans

CPU = torch.device("cpu")


def test_another_thread_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the caller's memory a CUDA graph may be the owner."""
    threads = []
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: threads.append(threading.current_thread()) or make(*a, **k))
    with torch.inference_mode():
        values = constants.constant((1.5, 2.0), torch.float32, CPU)
    assert threads != [] and threading.current_thread() not in threads
    assert values.tolist() == [1.5, 2.0] and values.dtype == torch.float32 and not values.is_inference()


def test_a_table_outlives_its_plan() -> None:
    arguments = (((8, 16, 3, 3),), ((144, 9, 3, 1),), (torch.float32, torch.float32), False, CPU)
    with launches.recording():
        kept = plans.pack(*arguments).table
        plans.forget()
        assert plans.pack(*arguments).table is kept
