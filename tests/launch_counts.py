"""A step of the whole fused DenseNet-121 on tensors without data, and every launch that it would make on a GPU.

Kernels of ours are counted by who calls :func:`counted` (what a binding launches); calls of ATen by a dispatch mode, one
launch each where they compute anything: views and uninitialised memory are none.

``python tests/launch_counts.py`` writes what is found to ``launches.json``, what the tests expect.
"""

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import report
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fused_densenet import densenet121, strict, use_backend
from fused_densenet.backends import BACKENDS
from fused_densenet.fallback import checks, reasons
from fused_densenet.nn import chain, transition
from fused_densenet.ops import operator, statistics

EXPECTED = Path(__file__).with_name("launches.json")
BATCH = 64
_UNINITIALISED = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "detach_"}


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
            launches = 1
            if name == "convolution_backward":  # a kernel for each gradient
                launches = sum(args[-1])
            elif name.startswith("_foreach_"):  # as many tensors as the parameters of a launch have room for
                lists = [argument for argument in args if isinstance(argument, list)]
                launches = -(-len(lists[0]) // {1: 110, 2: 64, 3: 48}[len(lists)])
            self.counts[f"aten::{name}"] += launches
        return result

    def _on_cpu(self, value: Any) -> Any:
        """Never read or written: all lie in one allocation, of which no page is ever touched."""
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return value
        return self.memory.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def count(backend: str, training: bool, counts: Counter[str], fused: Callable[..., None] | None = None) -> None:
    """Adds what a training step, or an inference, of DenseNet-121 calls to ``counts``.

    Data is bfloat16, 64 channels-last images of 224 by 224, weights of the blocks and transitions are float32, as under autocast.
    """
    network = densenet121().train(training).to("meta")
    for module in (network.features.conv0, network.classifier):
        module.bfloat16()
    images = torch.empty(BATCH, 224, 224, 3, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    labels = torch.empty(BATCH, dtype=torch.int64, device="meta")
    with calls(backend, counts, fused):
        if not training:
            with torch.inference_mode():
                network(images)
            return
        loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()


@contextlib.contextmanager
def calls(backend: str, counts: Counter[str], fused: Callable[..., None] | None) -> Iterator[None]:
    """Inside the context what is called on tensors without data is counted, as on a GPU."""
    with _as_on_a_gpu(backend), strict(), use_backend(backend), _Calls(counts, fused):
        yield


@contextlib.contextmanager
def _as_on_a_gpu(backend: str) -> Iterator[None]:
    """Under autocast to bfloat16, which tensors without data have not, and with the operators as they run on data."""
    answers: list[tuple[Any, str, Any]] = [
        (BACKENDS[backend], "unavailable", None),
        (operator, "is_plain", True),
        (statistics, "is_plain", True),
        (chain, "is_plain", True),
        (torch._C, "_len_torch_dispatch_stack", 0),
        (torch, "get_autocast_dtype", torch.bfloat16),
        (torch, "is_autocast_enabled", False),
        *[(module, "autocasts", True) for module in (transition, chain, reasons, checks)],
    ]
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with contextlib.ExitStack() as stack:
        for place, name, answer in answers:
            stack.enter_context(mock.patch.object(place, name, return_value=answer))
        torch.utils.deterministic.fill_uninitialized_memory = False
        yield
    torch.utils.deterministic.fill_uninitialized_memory = fills


KINDS = ("training", "inference")


def table(counts: Mapping[str, int]) -> dict[str, int]:
    """Sorted, with the sum."""
    return dict(sorted(counts.items())) | {"all": sum(counts.values())}


def check(backend: str, kind: str, found: Mapping[str, int], most: int) -> None:
    report.sections[f"{backend}: launches of DenseNet-121, {kind}"] += [f"{n:4} {name}" for name, n in found.items()]
    assert found == json.loads(EXPECTED.read_text())[f"{backend} {kind}"], f"python {__file__} writes what is found"
    assert found["all"] <= most


if __name__ == "__main__":
    sys.path += [str(EXPECTED.parent / folder) for folder in ("cuda_backend", "triton_backend")]
    import counted_cuda
    import counted_triton

    tables = {
        f"{backend} {kind}": module.count(kind)
        for backend, module in (("cuda", counted_cuda), ("triton", counted_triton))
        for kind in KINDS
    }
    EXPECTED.write_text(json.dumps(tables, indent=2) + "\n")
