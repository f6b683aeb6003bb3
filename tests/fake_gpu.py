"""Traces a fused DenseNet by dynamo with tensors of a GPU that is not there: fake ones, with a guard that switches nothing.

``python fake_gpu.py BACKEND GUARD KERNELS`` prints the operators of each graph; GUARD and KERNELS are libraries made of
:data:`GUARD` and :data:`KERNELS`.
"""

import ctypes
import sys
import types
import warnings
from typing import Any

GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>) }
"""
KERNELS = """
const char* fused_densenet_cuda_architectures(void) { return "8.0:9.0"; }
const char* fused_densenet_cuda_problem(int device) { return device == 0 ? 0 : "no such device"; }
"""


def trace(backend: str, guard: str, kernels: str) -> list[list[str]]:
    """The fused operators of each graph, with the backend that each is to run on."""
    import torch
    from networks import torchvisions
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from fused_densenet import backends, fuse, strict
    from fused_densenet.backends import cuda, extension, triton

    class Torch(types.ModuleType):
        """What the backends see of torch: one with a GPU of compute capability 9.0."""

        cuda = types.SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: (9, 0))
        version = types.SimpleNamespace(hip=None)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    cuda.torch = triton.torch = Torch("torch")  # type: ignore[attr-defined]
    extension.cuda = ctypes.CDLL(kernels)
    torch.ops.load_library(guard)
    mode, graphs = FakeTensorMode(), []

    def on_gpu(t: torch.Tensor) -> torch.Tensor:
        return FakeTensor(mode, torch.empty_like(t.detach(), device="meta"), torch.device("cuda", 0))

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    network = fuse(torchvisions().float())._apply(on_gpu)
    with mode, backends.use_backend(backend), strict():
        torch.compile(network, backend=keep, fullgraph=True)(on_gpu(torch.empty(2, 3, 32, 32)))
    calls = [[node for node in graph.nodes if "fused_densenet" in str(node.target)] for graph in graphs]
    return [[f"{node.target} on {node.args[-2]}" for node in nodes] for nodes in calls]


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(trace(*sys.argv[1:]))
