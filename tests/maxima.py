"""A stem's primitives against autograd in float64, for any backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from primitives import Guarded, affine, clear_of_zero, source, vector
from tolerances import assert_entries
from torch import Tensor

from fused_densenet.backends.contract import Norm


@dataclass
class Case:
    """``pixels`` is (N, D, H, W); a buffer's channels ``before`` and ``after`` are others'."""

    pixels: tuple[int, int, int, int]
    channels: int
    pool: bool = True
    before: int = 8
    after: int = 0

    @property
    def out_pixels(self) -> tuple[int, ...]:
        n, *sizes = self.pixels
        return (n, *((size + 1) // 2 if self.pool else size for size in sizes))

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.pixels))
        return f"{sizes}-C{self.channels}{'-pool' if self.pool else ''}-at{self.before}+{self.after}"


CASES = [
    Case((2, 1, 7, 9), 64),
    Case((1, 1, 35, 18), 24),
    Case((1, 1, 16, 33), 72, before=0),
    Case((2, 1, 1, 131), 16),
    Case((1, 7, 9, 10), 20),
    Case((1, 3, 1, 5), 8),
    Case((3, 1, 1, 1), 5),
    Case((2, 1, 6, 5), 13, before=3, after=2),
    Case((2, 1, 9, 7), 96, pool=False),
    Case((1, 2, 3, 5), 13, pool=False, before=1),
]


def run(case: Case, dtype: torch.dtype, backend: Any, device: str = "cpu") -> None:
    """Forward and backward, in buffers whose other channels must not change."""
    norm = affine(case.channels, dtype)
    values = clear_of_zero(torch.randn(*case.pixels, case.channels).to(dtype), norm)
    grad = torch.randn(*case.out_pixels, case.channels).to(dtype)
    out, dx = (Guarded((*p, case.channels), dtype, case.before, case.after) for p in (case.out_pixels, case.pixels))
    sums = [vector(case.channels, dtype) for _ in range(2)]
    if device == "cpu":
        x = source(values, case.before, case.after)
        backend.norm_relu_pool(x, norm, out.data)
        backend.norm_relu_pool_backward(grad, x, norm, dx.data, *(s.data for s in sums))
    else:
        x, d_grad, d_norm = values.to(device), grad.to(device), Norm(*(v.to(device) for v in norm))
        results = [torch.empty_like(t.data, device=device) for t in (out, dx, *sums)]
        backend.norm_relu_pool(x, d_norm, results[0])
        backend.norm_relu_pool_backward(d_grad, x, d_norm, *results[1:])
        for ours, theirs in zip((out, dx, *sums), results, strict=True):
            ours.set(theirs.cpu())
    check(case, values, norm, grad, out, dx, sums)


def check(case: Case, x: Tensor, norm: Norm, grad: Tensor, out: Guarded, dx: Guarded, sums: Sequence[Guarded]) -> None:
    dtype = x.dtype
    mean, scale, shift = (v.double() for v in norm)
    z = ((x.double() - mean) * scale + shift).requires_grad_()
    exact = maxima(z.relu(), case.pool)
    (dz,) = torch.autograd.grad(exact, z, grad.double())
    size = maxima(((x.double() - mean) * scale).abs() + shift.abs(), case.pool)
    assert_entries(out.data, exact.detach(), size, dtype, "output")
    w = z.detach().requires_grad_()
    (dz_size,) = torch.autograd.grad(maxima(w.relu(), case.pool), w, grad.double().abs())
    assert_entries(dx.data, dz, dz_size, dtype, "input's gradient")
    pixels, centred = (0, 1, 2, 3), x.double() - mean
    assert_entries(sums[0].data, dz.sum(pixels), dz_size.sum(pixels), torch.float32, "sum of dz")
    magnitude = (dz_size * centred.abs()).sum(pixels)
    assert_entries(sums[1].data, (dz * centred).sum(pixels), magnitude, torch.float32, "sum of dz (x - mean)")
    for name, guarded in zip(("output", "input's gradient", "sum", "sum"), (out, dx, *sums), strict=True):
        guarded.check(name)


def maxima(a: Tensor, pool: bool) -> Tensor:
    """Of (N, D, H, W, C), over windows of 3, stride 2, padding 1 in every dimension that is not 1."""
    if not pool:
        return a
    wide = [size > 1 for size in a.shape[1:4]]
    window, stride, padding = ([3 if w else 1 for w in wide], [2 if w else 1 for w in wide], [int(w) for w in wide])
    return F.max_pool3d(a.movedim(4, 1), window, stride, padding).movedim(1, 4)
