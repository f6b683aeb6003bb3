"""The primitives as C++ kernels for NVIDIA GPUs (csrc/cuda): tensor cores, halo tiles in shared memory.

Every function follows the contract of :mod:`fused_densenet.backends.contract`. What the table of
:mod:`fused_densenet.backends.choice` gives to another backend runs there.
"""

import ctypes
import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import choice, eager, extension, triton
from .contract import Gradient, Norm, Owed, uses_tf32

MINIMUM_CAPABILITY = (7, 5)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OTHERS: dict[str, ModuleType] = {"triton": triton, "eager": eager}
_operators: Any = torch.ops.fused_densenet


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it serves NVIDIA GPUs, not {'AMD' if device.type == 'cuda' else device.type}"
    if dtype not in _DTYPES:
        return f"it has no kernels for {dtype}"
    if extension.cuda is None:
        return extension.cuda_missing
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _unfit(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _unfit(index: int) -> str | None:
    assert extension.cuda is not None
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 7.5, this GPU has {capability[0]}.{capability[1]}"
    compiled = architectures(extension.cuda)
    if not any(_runs(architecture, capability) for architecture in compiled):
        return (
            f"it was compiled for compute capability {', '.join(compiled)}, this GPU has {capability[0]}.{capability[1]}; "
            f"set TORCH_CUDA_ARCH_LIST and {extension.REBUILD}"
        )
    return problem(extension.cuda, index)


def architectures(library: ctypes.CDLL) -> list[str]:
    """What the kernels were compiled for, as TORCH_CUDA_ARCH_LIST writes it."""
    library.fused_densenet_cuda_architectures.restype = ctypes.c_char_p
    return library.fused_densenet_cuda_architectures().decode().split(":")


def problem(library: ctypes.CDLL, index: int) -> str | None:
    """Why the CUDA runtime in the library cannot use a device (a driver that is too old, say), or None."""
    library.fused_densenet_cuda_problem.restype = ctypes.c_char_p
    message = library.fused_densenet_cuda_problem(index)
    return None if message is None else message.decode()


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its major version from its minor on, PTX on everything newer, ``9.0a`` on that GPU alone.

    But 7.5's PTX, which has neither TF32's products nor bfloat16's, is for GPUs without them.
    """
    number, _, ptx = architecture.partition("+")
    if not number[-1].isdigit():
        return number[:-1] == f"{capability[0]}.{capability[1]}"
    major, minor = map(int, number.split("."))
    newer = ptx == "PTX" and (major, minor) <= capability and (major >= 8 or capability[0] < 8)
    return (major == capability[0] and minor <= capability[1]) or newer


def place(x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
    other = _other(x, "place", x.shape)
    if other is not None:
        other.place(x, out, mean, var)
    else:
        _operators.place.default(x, out, mean, var)


def place_backward(grad: Gradient, out: Tensor) -> None:
    other = _other(out, "place_backward", out.shape)
    if other is not None:
        other.place_backward(grad, out)
    else:
        _operators.place_backward.default(*grad, out)


def norm_relu_conv(
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    bias: Tensor | None = None,
    negative_slope: float = 1.0,
) -> None:
    other = _other(x, "norm_relu_conv", x.shape, weight.shape, out.shape)
    if other is not None:
        other.norm_relu_conv(x, norm, weight, out, mean, var, bias, negative_slope)
    else:
        terms = extension.NO_NORM if norm is None else norm
        _operators.norm_relu_conv.default(x, *terms, weight, out, mean, var, bias, negative_slope, uses_tf32(x))


def norm_relu_conv_backward(
    grad: Gradient,
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    dx: Tensor,
    accumulate: bool,
    dweight: Tensor | None,
    owed: Owed | None,
    dbias: Tensor | None = None,
) -> None:
    other = _other(x, "norm_relu_conv_backward", x.shape, weight.shape, grad.stored.shape)
    if other is not None:
        other.norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, owed, dbias)
    else:
        terms = extension.NO_NORM if norm is None else norm
        debts = extension.NO_OWED if owed is None else owed
        _operators.norm_relu_conv_backward.default(
            *grad, x, *terms, weight, dx, accumulate, dweight, *debts, dbias, uses_tf32(x)
        )


def norm_relu_pool(x: Tensor, norm: Norm, out: Tensor) -> None:
    other = _other(x, "norm_relu_pool", x.shape)
    if other is not None:
        other.norm_relu_pool(x, norm, out)
    else:
        _operators.norm_relu_pool.default(x, *norm, out)


def norm_relu_pool_backward(grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
    other = _other(x, "norm_relu_pool_backward", x.shape)
    if other is not None:
        other.norm_relu_pool_backward(grad, x, norm, dx, owed)
    else:
        _operators.norm_relu_pool_backward.default(grad, x, *norm, dx, *owed)


def runs_program(
    device: torch.device,
    dtype: torch.dtype,
    pixels: tuple[int, int],
    kinds: frozenset[tuple[str, tuple[int, ...], bool]],
) -> bool:
    """Whether the table leaves it all calls of a program on images of so few to so many ``pixels``: functions, kernel sizes,
    pooling."""
    return all(choice.only_cuda(device, dtype, many, kinds) for many in {size >= choice.FEW for size in pixels})


def run_program(code: Tensor, operands: list[Tensor]) -> None:
    """All calls of a recorded program (:mod:`fused_densenet.ops.program`), without Python between them."""
    _operators.run_program.default(code, operands, uses_tf32(operands[0]), [])


def update_running(
    stats: list[Tensor],
    inside: list[Tensor],
    groups: list[int],
    buffers: list[Tensor],
    momenta: list[float],
    unbiased: list[float],
) -> None:
    """As :func:`.cpu.update_running`."""
    _operators.update_running.default(stats, inside, groups, buffers, momenta, unbiased)


def _other(x: Tensor, primitive: str, *shapes: tuple[int, ...]) -> ModuleType | None:
    return _OTHERS.get(choice.backend(x.device, x.dtype, primitive, *shapes))
