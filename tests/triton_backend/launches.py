"""Every launch that the primitives can make: each kernel with each tile that tuning may choose for a family of GPUs."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import ALL, PLAIN, RESIDUAL, float32_products
from forms import Form

from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Gradient, Norm, Owed
from fused_densenet.backends.triton import launch, plans, tuning
from fused_densenet.backends.triton.launch import Launch
from fused_densenet.backends.triton.problem import power
from fused_densenet.backends.triton.tiles_on_disk import Tile
from fused_densenet.backends.triton.tuning import ShapeClass

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
class Recorded:
    """One launch: what was asked for in words, the launch and its arguments."""

    name: str
    launch: Launch
    arguments: tuple[Any, ...]


@contextmanager
def recording() -> Iterator[list[tuple[Launch, tuple[Any, ...]]]]:
    """Inside the context the primitives launch nothing; what they would have is collected."""
    launches: list[tuple[Launch, tuple[Any, ...]]] = []
    with mock.patch.object(launch, "execute", lambda it, tensors: launches.append((it, (*tensors, *it.numbers)))):
        yield launches


@contextmanager
def tile_in_use(family: str, tile: Tile | None) -> Iterator[None]:
    """As on a GPU of a family, with a tile for all kernels, or the fixed choices."""
    plans.forget()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tuning, "family", return_value=family))
        if tile is not None:
            stack.enter_context(mock.patch.object(tuning, "tile", return_value=tile))
        yield
    plans.forget()


def arithmetics(family: str) -> tuple[str, ...]:
    return ("half", "ieee") if family.startswith("gfx") else ("half", "tf32", "ieee")


class Variant(NamedTuple):
    """Of a convolution; the first of each is what a training step of a network has most of."""

    aligned: bool = True
    accumulate: bool | None = None
    dweight: bool = True
    moments: bool = True
    pool: bool = False
    form: Form = PLAIN

    def __str__(self) -> str:
        words = {"unaligned": not self.aligned, "pooled": self.pool}
        words |= {"no moments": not self.moments, "no dweight": not self.dweight}
        words |= {"stored": self.accumulate is False, "accumulated": self.accumulate is True}
        words[str(self.form)] = self.form != PLAIN
        return " ".join(word for word, there in words.items() if there)


ALIGNED, UNALIGNED = Variant(), Variant(aligned=False)
VARIANTS: dict[tuple[str, int], list[Variant]] = {
    ("norm_relu_conv", 16): [Variant(form=RESIDUAL)],
    ("norm_relu_conv", 32): [Variant(moments=False), Variant(form=RESIDUAL), Variant(form=ALL)],
    ("norm_relu_conv", 128): [Variant(moments=False), Variant(pool=True), Variant(form=ALL)],
    ("norm_relu_conv", 256): [Variant(pool=True)],
    ("backward_pointwise", 128): [
        Variant(accumulate=False),
        Variant(dweight=False),
        Variant(pool=True, accumulate=False),
        Variant(form=ALL),
        Variant(form=RESIDUAL),
    ],
    ("backward_pointwise", 256): [Variant(pool=True, accumulate=False)],
    ("backward_data", 32): [Variant(accumulate=True), Variant(form=ALL), Variant(accumulate=True, form=RESIDUAL)],
    ("backward_data", 256): [Variant(pool=True, accumulate=False)],
    ("backward_weight", 128): [Variant(pool=True), Variant(form=ALL), Variant(form=RESIDUAL)],
}
"""By kernel and output channels (tap rows of ``backward_weight``), for fixed choices; float32 data only pooled."""


def every_launch(family: str, fixed: bool = False) -> list[Recorded]:
    """Without repetition: tensors aligned as in networks with k a multiple of 8, and for fixed choices as with k = 12.

    Where ``fixed``, fixed choices and aligned tensors alone, and of TF32 the bottleneck's.
    """
    found: dict[tuple[Any, ...], Recorded] = {}
    for arithmetic in arithmetics(family):
        for function in MATRIX_KERNELS:
            if (function, arithmetic) == ("backward_pointwise", "ieee"):
                continue
            for k in KS if not fixed or arithmetic == "half" else {"tf32": (128,)}.get(arithmetic, ()):
                if function == "backward_weight" and k not in (64, 128):
                    continue
                more = [UNALIGNED] * (k in UNALIGNED_KS[function]) + VARIANTS.get((function, k), [])
                variants = [ALIGNED, *(v for v in more if arithmetic == "half" or v.pool)]
                if fixed:
                    variants = [v for v in variants if v.aligned and (v == ALIGNED or v.pool or v.form != PLAIN)]
                for variant in variants:
                    for recorded in _of_class(family, function, arithmetic, k, variant, fixed):
                        it = recorded.launch
                        key = (it.function, *it.constants.items(), *it.options.items(), variant.aligned)
                        found.setdefault((*key, DTYPES[arithmetic]), recorded)
    return list(found.values())


def _of_class(family: str, function: str, arithmetic: str, k: int, variant: Variant, fixed: bool) -> Iterator[Recorded]:
    taps = 1 if function == "backward_pointwise" or (function == "norm_relu_conv" and k > 64) or variant.pool else 9
    outputs = (k if variant.aligned else k - 4) if function != "backward_weight" else (32 if variant.aligned else 12)
    if variant.pool and function in ("backward_data", "backward_weight"):
        outputs = 512  # as many as need these kernels in a convolution of size 1
    weight = (outputs, 128 if variant.aligned else 132, 1, *((3, 3) if taps == 9 else (1, 1)))
    name = f"{function} {arithmetic} k{k} {variant}".rstrip()
    step = variant._replace(accumulate=taps == 1) if variant.accumulate is None else variant
    shape = ShapeClass(function, arithmetic, power(k), taps, 128, 256, variant.pool)
    for tile in tuning.candidates(shape, family)[: None if (variant == ALIGNED or variant.pool) and not fixed else 1]:
        with tile_in_use(family, tile):
            for it, arguments in _step(weight, arithmetic, step):
                kernel = it.function.__name__
                if kernel == function or (k == 16 and kernel not in MATRIX_KERNELS):
                    yield Recorded(name.replace(function, kernel), it, arguments)


def _step(weight_shape: tuple[int, ...], arithmetic: str, variant: Variant) -> list[tuple[Launch, tuple[Any, ...]]]:
    """What a forward and a backward pass of one convolution launch, on tensors that are never read."""
    k, c = weight_shape[:2]
    dtype = DTYPES[arithmetic]
    pixels, stride = (2, 1, 10, 12), 960 if variant.aligned else 444
    half = (2, 1, 5, 6) if variant.pool else pixels
    offset = 0 if variant.aligned else 4
    buffer, gradients = torch.empty(2, *pixels, stride, dtype=dtype)
    outputs, stored = torch.empty(2, *half, stride, dtype=dtype)[..., c : c + k]
    x, dx = buffer[..., offset : offset + c], gradients[..., offset : offset + c]
    norm, form = Norm(*torch.empty(4, c), 1e-5), variant.form
    owed = Owed(*torch.empty(2, c), torch.empty(2, c))
    weight = torch.empty(weight_shape)
    moments = torch.empty(2, k) if variant.moments else (None, None)
    grad = Gradient(stored, outputs, torch.empty(k), torch.empty(2, k))
    if form.out_slope != 1:
        grad = Gradient(stored, outputs, negative_slope=form.out_slope)
    given = (norm._replace(negative_slope=form.slope), owed) if form.norm else (None, None)
    bias, dbias = torch.empty(2, k) if form.bias else (None, None)
    dweight = torch.empty_like(weight) if variant.dweight else None
    with float32_products("tf32" if arithmetic == "tf32" else "ieee"), recording() as launches:
        backend.place(x, x, *torch.empty(2, c))
        backend.place_backward(Gradient(dx, x, norm.mean, torch.empty(2, c)), x)
        for pooled in (torch.empty(2, 1, 5, 6, c, dtype=dtype), x):
            backend.norm_relu_pool(x, norm, pooled)
            backend.norm_relu_pool_backward(pooled, x, norm, dx, owed)
        volume, pooled = torch.empty(2, 10, 6, 2, c, dtype=dtype), torch.empty(2, 5, 3, 1, c, dtype=dtype)
        backend.norm_relu_pool(volume, norm, pooled)
        backend.norm_relu_pool_backward(pooled, volume, norm, torch.empty_like(volume), owed)
        backend.norm_relu_conv(x, given[0], weight, outputs, *moments, bias, form.out_slope)
        backend.norm_relu_conv_backward(
            grad, x, given[0], weight, dx, bool(variant.accumulate), dweight, given[1], dbias
        )
    return launches
