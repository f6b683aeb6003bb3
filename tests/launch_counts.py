"""A step of the whole fused DenseNet-121 on tensors without data, and every launch that it would make on a GPU.

Kernels of ours are counted by who calls :func:`counted` (what a binding launches); calls of ATen by a dispatch mode, one
launch each where they compute anything: views and uninitialised memory are none.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fused_densenet import densenet121, strict, use_backend
from fused_densenet.backends import BACKENDS
from fused_densenet.fallback import checks, reasons
from fused_densenet.nn import block, transition
from fused_densenet.ops import operator, statistics

EXPECTED = Path(__file__).with_name("launches.json")
BATCH = 64
_UNINITIALISED = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "lift_fresh"}


class _Calls(TorchDispatchMode):
    """Counts operators of torch by name; those of ``fused_densenet`` go to ``fused``, with CPU tensors of their sizes."""

    def __init__(self, counts: Counter[str], fused: Callable[..., None] | None) -> None:
        super().__init__()
        self.counts, self.fused, self.memory = counts, fused, torch.empty(1 << 30, dtype=torch.uint8)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fused_densenet":
            assert self.fused is not None
            return self.fused(function, *tree_map(self._on_cpu, args))
        name = function.overloadpacket.__name__
        result = function(*args, **kwargs or {})
        if not (function.is_view or name in _UNINITIALISED):
            # A convolution's backward is a kernel for each gradient; a list of tensors goes by tables of 4 KiB of parameters.
            launches = sum(wanted for wanted in args[-1]) if name == "convolution_backward" else 1
            self.counts[f"aten::{name}"] += launches
        return result

    def _on_cpu(self, value: Any) -> Any:
        """Never read or written: all lie in one allocation, of which no page is ever touched."""
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return value
        return self.memory.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def count(backend: str, training: bool, counts: Counter[str], fused: Callable[..., None] | None = None) -> None:
    """Adds what a training step, or an inference, of DenseNet-121 calls to ``counts``.

    Data is bfloat16, 64 images of 224 by 224, weights of the blocks and transitions are float32, as under autocast.
    """
    network = densenet121().train(training).to("meta")
    for module in (network.features.conv0, network.classifier):
        module.bfloat16()
    images = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(BATCH, dtype=torch.int64, device="meta")
    with _as_on_a_gpu(backend), strict(), use_backend(backend), _Calls(counts, fused):
        if not training:
            with torch.inference_mode():
                network(images)
            return
        loss = F.cross_entropy(network(images.to(memory_format=torch.channels_last)).float(), labels)
        loss.backward()


@contextlib.contextmanager
def _as_on_a_gpu(backend: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(BACKENDS[backend], "unavailable", lambda device, dtype: None))
        stack.enter_context(mock.patch.object(operator, "_is_plain", lambda x: True))
        stack.enter_context(mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0))
        for module in (block, transition, reasons, checks):
            if hasattr(module, "autocasts"):
                stack.enter_context(mock.patch.object(module, "autocasts", lambda x: True))
        stack.enter_context(mock.patch.object(torch, "get_autocast_dtype", lambda device: torch.bfloat16))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device: False))
        taken = statistics.channel_moments._init_fn
        stack.enter_context(mock.patch.object(statistics, "channel_moments", taken))  # as it runs, not as it is fake
        fills, torch.utils.deterministic.fill_uninitialized_memory = (
            torch.utils.deterministic.fill_uninitialized_memory,
            False,
        )
        yield
        torch.utils.deterministic.fill_uninitialized_memory = fills


def table(counts: Mapping[str, int]) -> dict[str, int]:
    """Sorted, with the sum."""
    return dict(sorted(counts.items())) | {"all": sum(counts.values())}


def expected(name: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(EXPECTED.read_text())[name]
    return found
