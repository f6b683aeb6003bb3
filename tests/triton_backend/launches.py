"""Every launch that the primitives can make: each kernel with each tile that tuning may choose for a family of GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from cases import float32_products

from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Gradient, Norm
from fused_densenet.backends.triton import launch, plans, tuning
from fused_densenet.backends.triton.launch import Kernel
from fused_densenet.backends.triton.tuning import ShapeClass, Tile

MATRIX_KERNELS = ("norm_relu_conv", "backward_pointwise", "backward_data", "backward_weight")
KS = (16, 32, 64, 128, 256)
UNALIGNED_KS = {
    "norm_relu_conv": (16, 64),
    "backward_pointwise": (64,),
    "backward_data": (16,),
    "backward_weight": (128,),
}
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


@dataclass
class Launch:
    """One launch: what was asked for in words, the kernel and its arguments."""

    name: str
    kernel: Kernel
    arguments: tuple[Any, ...]


@contextmanager
def recording() -> Iterator[list[tuple[Kernel, tuple[Any, ...]]]]:
    """Inside the context the primitives launch nothing; what they would have is collected."""
    launches: list[tuple[Kernel, tuple[Any, ...]]] = []
    with mock.patch.object(launch, "execute", lambda kernel, grid, arguments: launches.append((kernel, arguments))):
        yield launches


@contextmanager
def tile_in_use(family: str, shape: ShapeClass, tile: Tile) -> Iterator[None]:
    plans.forget()
    with (
        mock.patch.object(tuning, "family", return_value=family),
        mock.patch.dict(tuning._chosen, {(shape, torch.device("cpu")): tile}),
    ):
        yield
    plans.forget()


def arithmetics(family: str) -> tuple[str, ...]:
    return ("half", "ieee") if family == "gfx942" else ("half", "tf32", "ieee")


def every_launch(family: str) -> list[Launch]:
    """Without repetition. Tensors are 16-byte aligned, as in networks with k a multiple of 8, and in a second round,
    for fixed choices, not aligned, as with k = 12."""
    found: dict[tuple[Any, ...], Launch] = {}
    for arithmetic in arithmetics(family):
        for function in MATRIX_KERNELS:
            if (function, arithmetic) == ("backward_pointwise", "ieee"):
                continue
            for k in KS:
                if function == "backward_weight" and k not in (64, 128):
                    continue
                for aligned in (True, False):
                    if not aligned and (arithmetic != "half" or k not in UNALIGNED_KS[function]):
                        continue
                    for launched in _of_class(family, function, arithmetic, k, aligned):
                        kernel = launched.kernel
                        key = (kernel.function, *kernel.constants.items(), *kernel.options.items(), aligned)
                        found.setdefault((*key, DTYPES[arithmetic]), launched)
    return list(found.values())


def _of_class(family: str, function: str, arithmetic: str, k: int, aligned: bool) -> Iterator[Launch]:
    taps = 1 if function == "backward_pointwise" or (function == "norm_relu_conv" and k > 64) else 9
    outputs = (k if aligned else k - 4) if function != "backward_weight" else max(k // 9, 1)
    weight = (outputs, 128 if aligned else 132, 1, *((3, 3) if taps == 9 else (1, 1)))
    shape = plans.shape_class(function, weight, arithmetic)
    for tile in tuning.candidates(shape, family)[: None if aligned else 1]:
        with tile_in_use(family, shape, tile):
            for kernel, arguments in _step(weight, arithmetic, aligned, accumulate=function != "backward_weight"):
                name = kernel.function.__name__
                if name == function or (k == 16 and name not in MATRIX_KERNELS):
                    yield Launch(f"{name} {arithmetic} k{k}{'' if aligned else ' unaligned'}", kernel, arguments)


def _step(
    weight_shape: tuple[int, ...], arithmetic: str, aligned: bool, accumulate: bool
) -> list[tuple[Kernel, tuple[Any, ...]]]:
    """What a forward and a backward pass of one convolution launch, on tensors that are never read."""
    k, c = weight_shape[:2]
    dtype = DTYPES[arithmetic]
    pixels, stride = (2, 1, 9, 11), 448 if aligned else 444
    offset = 0 if aligned else 4
    buffer, gradients = torch.empty(2, *pixels, stride, dtype=dtype)
    x, out = buffer[..., offset : offset + c], buffer[..., c : c + k]
    norm = Norm(*torch.empty(3, c))
    weight = torch.empty(weight_shape)
    dx, stored = gradients[..., offset : offset + c], gradients[..., c : c + k]
    mean, var = torch.empty(2, k)
    grad = Gradient(stored, out, *torch.empty(4, k))
    with float32_products("tf32" if arithmetic == "tf32" else "ieee"), recording() as launches:
        backend.place(x, out[..., :1].expand_as(x), mean, var)
        backend.place_backward(Gradient(dx, x, *norm, norm.mean), x)
        backend.norm_relu_conv(x, norm, weight, out, mean, var)
        backend.norm_relu_conv_backward(
            grad, x, norm, weight, dx, accumulate, torch.empty(weight_shape), *torch.empty(2, c)
        )
    return launches
