"""The primitives as C++ kernels for the CPU (csrc/cpu): threads, vectors, matrix tiles in cache.

Every function follows the contract of :mod:`fused_densenet.backends.contract`.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import extension
from .contract import Gradient, Norm, Owed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if extension.cpu is None:
        return extension.cpu_missing
    if device.type != "cpu":
        return f"it serves the CPU, not {device.type}"
    return None if dtype in _DTYPES else f"it has no kernels for {dtype}"


def instruction_set(library: ctypes.CDLL, dtype: torch.dtype) -> str:
    """That of the kernels for a dtype, under ATEN_CPU_CAPABILITY, by the name of its file in csrc/cpu."""
    library.fused_densenet_cpu_instruction_set.restype = ctypes.c_char_p
    return library.fused_densenet_cpu_instruction_set(ctypes.c_bool(dtype == torch.bfloat16)).decode()


def compiler(library: ctypes.CDLL) -> str:
    """The version of the compiler that made the library."""
    library.fused_densenet_cpu_compiler.restype = ctypes.c_char_p
    return library.fused_densenet_cpu_compiler().decode()


def empty_cache() -> None:
    """Gives the memory that is kept for the next images on the CPU back to the system, as ``torch.cuda.empty_cache`` does a GPU's.

    Large images (8 MiB and more) that blocks, transitions, stems and networks allocate while they train, or run in
    evaluation, come from pages that are kept when they are freed: never more, with those in use, than were in use at
    once. They are given back when a fused module is collected, and by this.
    """
    if extension.cpu is not None:
        extension.cpu.fused_densenet_release_pages()


def place(x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
    torch.ops.fused_densenet.place(x, out, mean, var)


def place_backward(grad: Gradient, out: Tensor) -> None:
    torch.ops.fused_densenet.place_backward(*grad, out)


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
    terms = extension.NO_NORM if norm is None else norm
    torch.ops.fused_densenet.norm_relu_conv(x, *terms, weight, out, mean, var, bias, negative_slope)


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
    terms = extension.NO_NORM if norm is None else norm
    debts = extension.NO_OWED if owed is None else owed
    torch.ops.fused_densenet.norm_relu_conv_backward(*grad, x, *terms, weight, dx, accumulate, dweight, *debts, dbias)


def norm_relu_pool(x: Tensor, norm: Norm, out: Tensor) -> None:
    torch.ops.fused_densenet.norm_relu_pool(x, *norm, out)


def norm_relu_mean(x: Tensor, norm: Norm, out: Tensor) -> None:
    torch.ops.fused_densenet.norm_relu_mean(x, *norm, out)


def strided_conv(x: Tensor, weight: Tensor, out: Tensor, *steps: int) -> None:
    torch.ops.fused_densenet.strided_conv(x, weight, out, steps[:3], steps[3:])


def norm_relu_pool_backward(grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
    torch.ops.fused_densenet.norm_relu_pool_backward(grad, x, *norm, dx, *owed)


def runs_program(
    device: torch.device,
    dtype: torch.dtype,
    pixels: tuple[int, int],
    kinds: frozenset[tuple[str, tuple[int, ...], bool]],
) -> bool:
    """Whether it runs all calls of a program on images of so few to so many ``pixels``: functions, kernel sizes, pooling."""
    return True


def bind(tensors: list[Tensor], constant: bool = False) -> Tensor | None:
    """What :func:`run_program` and :func:`update_running` take in place of tensors, without a Python object for each.

    Where their values are ``constant``, :func:`run_program` packs each weight once. None where something looks at single operators, or where tensors may have no data of their own: transforms of torch.func.
    """
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return None
    return torch.ops.fused_densenet.bind.default(tensors, constant)


def bind_like(bound: Tensor) -> Tensor:
    """Uninitialised, each laid out like its tensor."""
    return torch.ops.fused_densenet.bind_like.default(bound)


def bound_tensors(bound: Tensor) -> list[Tensor]:
    """What was given to :func:`bind`."""
    return torch.ops.fused_densenet.bound_tensors.default(bound)


def stand_ins(bound: list[Tensor]) -> list[Tensor]:
    """Of lists that were bound, a tensor each to differentiate by; none unless each tensor of all needs a gradient.

    The gradient of such a tensor is what is bound of gradients, in the same order.
    """
    return torch.ops.fused_densenet.stand_ins.default(bound)


def check_unchanged(stand_in: Tensor) -> None:
    """Raises RuntimeError where any tensor that was bound was changed in place since :func:`stand_ins` was called."""
    torch.ops.fused_densenet.check_unchanged.default(stand_in)


def run_program(code: Tensor, operands: list[Tensor], bound: Sequence[Tensor] = ()) -> None:
    """All calls of a recorded program (:mod:`fused_densenet.ops.program`), without Python between them.

    The last operands are those that are ``bound``.
    """
    torch.ops.fused_densenet.run_program.default(code, operands, False, bound)


def run_network(code: Tensor, x: Tensor, layout: Sequence[int], spent: bool, flat: bool, bound: Tensor) -> Tensor:
    """The last image of a recorded program whose other operands are an image ``x``, images as ``layout`` has them, and what is ``bound``.

    ``layout`` is that of :class:`fused_densenet.ops.network.Layout`. Memory of an ``x`` that is ``spent`` is used again. A
    result of one pixel may be ``flat``, ``(N, C)``.
    """
    return torch.ops.fused_densenet.run_network.default(code, x, layout, spent, flat, bound)


def update_running(
    stats: list[Tensor],
    inside: list[Tensor],
    groups: list[int],
    buffers: list[Tensor],
    momenta: list[float],
    unbiased: list[float],
    bound: Tensor | None = None,
) -> None:
    """Counts and running statistics of norms in the order of execution, in groups with a ``BatchMoments`` of ``ops.statistics``.

    Each group has in ``stats`` a tensor, in ``groups`` how many norms it is, the number of its tensor in ``inside`` or -1,
    and whether they read the end of ``stats``, in ``unbiased`` what variances are multiplied by. ``buffers``, which may
    be ``bound``, are means, variances and counts.
    """
    given = buffers if bound is None else []
    torch.ops.fused_densenet.update_running.default(stats, inside, groups, given, momenta, unbiased, bound)
