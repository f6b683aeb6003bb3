"""A stem's primitives against autograd in float64, for any backend."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from primitives import OWED, Debts, Guarded, clear_of_zero, draw_norm, scale_of, source
from tolerances import assert_entries
from torch import Tensor

from fused_densenet.backends.contract import Norm, Owed


@dataclass
class Case:
    """``pixels`` is (N, D, H, W); a buffer's channels ``before`` and ``after`` are others'."""

    pixels: tuple[int, int, int, int]
    channels: int
    pool: bool = True
    before: int = 8
    after: int = 0
    slope: float = 0.0

    @property
    def out_pixels(self) -> tuple[int, ...]:
        n, *sizes = self.pixels
        return (n, *((size + 1) // 2 if self.pool else size for size in sizes))

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.pixels))
        return f"{sizes}-C{self.channels}{'-pool' if self.pool else ''}{f'-{self.slope}' if self.slope else ''}-at{self.before}+{self.after}"


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
    Case((2, 1, 7, 7), 40, pool=False, slope=1.0),
    Case((1, 1, 9, 5), 16, pool=False, slope=0.25),
]


def run(case: Case, dtype: torch.dtype, backend: Any, device: str = "cpu", narrow: bool = False) -> None:
    """Forward and backward, in buffers whose other channels must not change; ``narrow`` parameters are in ``dtype``."""
    norm = draw_norm(case.channels, dtype, dtype if narrow else None)._replace(negative_slope=case.slope)
    values = clear_of_zero(torch.randn(*case.pixels, case.channels).to(dtype), norm)
    grad = torch.randn(*case.out_pixels, case.channels).to(dtype)
    out, dx = (Guarded((*p, case.channels), dtype, case.before, case.after) for p in (case.out_pixels, case.pixels))
    debts = Debts(norm, True)
    if device == "cpu":
        x = source(values, case.before, case.after)
        backend.norm_relu_pool(x, norm, out.data)
        backend.norm_relu_pool_backward(grad, x, norm, dx.data, debts.owed())
    else:
        x, on_device = values.to(device), Norm(*(v.to(device) for v in norm[:4]), *norm[4:])
        ours = [out.data, dx.data, *debts.owed()[:3]]
        theirs = [torch.empty_like(t, device=device) for t in ours]
        backend.norm_relu_pool(x, on_device, theirs[0])
        backend.norm_relu_pool_backward(grad.to(device), x, on_device, theirs[1], Owed(*theirs[2:]))
        for mine, found in zip(ours, theirs, strict=True):
            mine.copy_(found)
    check(case, values, norm, grad, out, dx, debts)


def check(case: Case, x: Tensor, norm: Norm, grad: Tensor, out: Guarded, dx: Guarded, debts: Debts) -> None:
    dtype, scale, bias = x.dtype, scale_of(norm), norm.bias.double()
    centred = x.double() - norm.mean.double()
    z = (centred * scale + bias).requires_grad_()
    exact = maxima(F.leaky_relu(z, case.slope), case.pool)
    (dz,) = torch.autograd.grad(exact, z, grad.double())
    size = maxima((centred * scale).abs() + bias.abs(), case.pool)
    assert_entries(out.data, exact.detach(), size, dtype, "output")
    w = z.detach().requires_grad_()
    (dz_size,) = torch.autograd.grad(maxima(F.leaky_relu(w, case.slope), case.pool), w, grad.double().abs())
    assert_entries(dx.data, dz * scale, dz_size * scale.abs(), dtype, "input's gradient")
    found = debts.found(False)
    for name, (total, magnitude) in owed(dz, dz_size, centred, norm).items():
        assert_entries(found[name], total, magnitude, found[name].dtype, name)
    for name, guarded in (("output", out), ("input's gradient", dx)):
        guarded.check(name)


def owed(dz: Tensor, dz_size: Tensor, centred: Tensor, norm: Norm) -> dict[str, tuple[Tensor, Tensor]]:
    """What a norm is owed, and the sums of the absolute values of what it adds up."""
    rstd, pixels = (norm.var.double() + norm.eps).rsqrt(), centred[..., 0].numel()
    share = scale_of(norm) / pixels
    both = []
    for d, c in ((dz, centred), (dz_size, centred.abs())):
        dgamma, dbeta = (d * c).flatten(0, 3).sum(0) * rstd, d.flatten(0, 3).sum(0)
        both.append([dgamma, dbeta, -share * dbeta, -share * dgamma * rstd])
    return {name: (total, size.abs()) for name, total, size in zip(OWED, *both, strict=True)}


def maxima(a: Tensor, pool: bool) -> Tensor:
    """Of (N, D, H, W, C), over windows of 3, stride 2, padding 1 in every dimension that is not 1."""
    if not pool:
        return a
    wide = [size > 1 for size in a.shape[1:4]]
    window, stride, padding = ([3 if w else 1 for w in wide], [2 if w else 1 for w in wide], [int(w) for w in wide])
    return F.max_pool3d(a.movedim(4, 1), window, stride, padding).movedim(1, 4)
