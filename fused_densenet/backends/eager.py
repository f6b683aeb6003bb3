"""The primitives in plain ATen calls: any device, any floating dtype, float64 included.

Every function follows the contract of :mod:`fused_densenet.backends`. Arithmetic on values is done in float32
(float64 for float64 data) and rounded once when stored, as the kernels do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Gradient, Norm, Owed, accumulate_dtype

_PIXELS = (0, 1, 2, 3)
_CHUNKS = 8  # of a batch, one after the other where all at once would take several times the memory of what is kept


def _product_dtype(x: Tensor) -> torch.dtype:
    # ATen's bfloat16 weight gradient of a 3x3x3 convolution over depth two reads unwritten memory on the CPU, at any
    # number of channels, in either memory format.
    return accumulate_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating dtype"


def place(x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
    if out is not None:
        out.copy_(x)
    _moments(x, mean, var)


def place_backward(grad: Gradient, out: Tensor) -> None:
    out.copy_(_load(grad))


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
    dtype = _product_dtype(x)
    a = _average(_activation(x, norm), out.shape).to(x.dtype)
    product = _channels_last(_convolve(a.to(dtype), weight.to(x.dtype).to(dtype)))
    if bias is not None:
        product = product.to(accumulate_dtype(x.dtype)) + bias
    out.copy_(product if negative_slope == 1 else _leaky(product, negative_slope))
    _moments(out, mean, var)


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
    dtype = _product_dtype(x)
    a = _activation(x, norm)
    loaded = _load(grad)
    if dbias is not None:
        dbias.copy_(loaded.to(accumulate_dtype(x.dtype)).sum(_PIXELS))
    g = loaded.to(x.dtype)
    da, dw, _ = torch.ops.aten.convolution_backward(
        _channels_first(g.to(dtype)),
        _channels_first(_average(a, g.shape).to(x.dtype).to(dtype)),
        weight.to(x.dtype).to(dtype),
        None,
        (1, 1, 1),
        [size // 2 for size in weight.shape[2:]],
        (1, 1, 1),
        False,
        (0, 0, 0),
        1,
        (True, dweight is not None, False),
    )
    if dweight is not None:
        dweight.copy_(dw)
    dz = _spread(_channels_last(da).to(a.dtype), a.shape)
    if norm is not None and owed is not None:
        dz = _masked(dz, a, norm.negative_slope)
        _settle(dz.sum(_PIXELS), (dz * (x - norm.mean)).sum(_PIXELS), x, norm, accumulate, owed)
        dz *= _scale(norm)
    dx.copy_(dx + dz if accumulate else dz)


def norm_relu_pool(x: Tensor, norm: Norm, out: Tensor) -> None:
    for images, maxima in zip(x.chunk(_CHUNKS), out.chunk(_CHUNKS), strict=True):
        a = _activation(images, norm)
        maxima.copy_(a if out.shape == x.shape else _channels_last(_max_pool(_channels_first(a))[0]))


def norm_relu_mean(x: Tensor, norm: Norm, out: Tensor) -> None:
    out.copy_(_activation(x, norm).mean((1, 2, 3), keepdim=True))


def norm_relu_pool_backward(grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
    scale = _scale(norm)
    sum_dz, sum_dz_centered = torch.zeros_like(scale), torch.zeros_like(scale)
    for dout, images, gradient in zip(grad.chunk(_CHUNKS), x.chunk(_CHUNKS), dx.chunk(_CHUNKS), strict=True):
        a = _activation(images, norm)
        dz = dout.to(a.dtype)
        if grad.shape != x.shape:
            dz = _channels_last(_max_pool_backward(_channels_first(dz).contiguous(), _channels_first(a).contiguous()))
        dz = _masked(dz, a, norm.negative_slope)
        sum_dz += dz.sum(_PIXELS)
        sum_dz_centered += (dz * (images - norm.mean)).sum(_PIXELS)
        gradient.copy_(dz * scale)
    _settle(sum_dz, sum_dz_centered, x, norm, False, owed)


def _scale(norm: Norm) -> Tensor:
    return norm.weight.to(norm.var.dtype) * torch.rsqrt(norm.var + norm.eps)


def _settle(sum_dz: Tensor, sum_dz_centered: Tensor, x: Tensor, norm: Norm, accumulate: bool, owed: Owed) -> None:
    rstd = torch.rsqrt(norm.var + norm.eps)
    owed.dbias.copy_(sum_dz)
    owed.dweight.copy_(sum_dz_centered * rstd)
    if owed.correction is None:
        return
    pixels = x.numel() // x.shape[-1] if owed.pixels is None else owed.pixels
    both = torch.stack([sum_dz, sum_dz_centered * rstd * rstd]) * (_scale(norm) / -pixels)
    owed.correction.copy_(owed.correction + both if accumulate else both)


def _max_pool(image: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and where they are; windows of 3, stride 2 and padding 1 where the size is not 1."""
    kernel, stride, padding = _window(image)
    return torch.ops.aten.max_pool3d_with_indices(image.contiguous(), kernel, stride, padding)


def _max_pool_backward(grad: Tensor, image: Tensor) -> Tensor:
    kernel, stride, padding = _window(image)
    if image.shape[2] > 1:
        arguments = (kernel, stride, padding, [1, 1, 1], False, _max_pool(image)[1])
        return torch.ops.aten.max_pool3d_with_indices_backward(grad, image, *arguments)
    # On a GPU this one adds in a fixed order, that of volumes does not.
    flat, window = image.squeeze(2), (kernel[1:], stride[1:], padding[1:])
    places = torch.ops.aten.max_pool2d_with_indices(flat, *window)[1]
    dz = torch.ops.aten.max_pool2d_with_indices_backward(grad.squeeze(2), flat, *window, [1, 1], False, places)
    return dz.unsqueeze(2)


def _window(image: Tensor) -> tuple[list[int], list[int], list[int]]:
    pooled = [size > 1 for size in image.shape[2:]]
    return [3 if p else 1 for p in pooled], [2 if p else 1 for p in pooled], [int(p) for p in pooled]


def _activation(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x.to(accumulate_dtype(x.dtype))
    return _leaky((x - norm.mean) * _scale(norm) + norm.bias.to(norm.var.dtype), norm.negative_slope)


def _leaky(z: Tensor, slope: float) -> Tensor:
    """In place."""
    return z.relu_() if slope == 0 else F.leaky_relu_(z, slope)


def _masked(g: Tensor, a: Tensor, slope: float) -> Tensor:
    """A gradient before an activation of ``slope`` whose result, or what has its sign, is ``a``."""
    return g.masked_fill(a <= 0, 0) if slope == 0 else torch.where(a > 0, g, slope * g)


def _average(a: Tensor, shape: Sequence[int]) -> Tensor:
    """Means over windows of two in every dimension in which ``shape`` is pooled."""
    for dim in (1, 2, 3):
        if a.shape[dim] != shape[dim]:
            a = a.narrow(dim, 0, 2 * shape[dim]).unflatten(dim, (shape[dim], 2)).mean(dim + 1)
    return a


def _spread(da: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of :func:`_average`: a gradient of ``shape``."""
    for dim in (1, 2, 3):
        if da.shape[dim] != shape[dim]:
            da = (da / 2).repeat_interleave(2, dim)
            da = F.pad(da, [0, 0] * (4 - dim) + [0, shape[dim] - da.shape[dim]])
    return da


def _load(grad: Gradient) -> Tensor:
    if grad.value is not None and grad.negative_slope != 1:
        return _masked(grad.stored, grad.value, grad.negative_slope)
    if grad.value is None or grad.mean is None or grad.correction is None:
        return grad.stored
    return grad.stored + (grad.correction[1] * (grad.value - grad.mean) + grad.correction[0])


def _moments(out: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    if mean is None or var is None or not out.numel():  # an empty batch has none; other ranks may
        return
    batch_var, batch_mean = torch.var_mean(out.to(accumulate_dtype(out.dtype)), _PIXELS, correction=0)
    mean.copy_(batch_mean)
    var.copy_(batch_var)


def _convolve(a: Tensor, weight: Tensor) -> Tensor:
    padding = tuple(size // 2 for size in weight.shape[2:])
    if a.shape[1] == 1 and weight.shape[2] == 1:
        return torch.conv2d(_channels_first(a).squeeze(2), weight.squeeze(2), padding=padding[1:]).unsqueeze(2)
    return torch.conv3d(_channels_first(a), weight, padding=padding)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1)
