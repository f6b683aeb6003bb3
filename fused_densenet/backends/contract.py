"""What a backend is: functions over channels-last pixels, four above all.

Data is ``(N, D, H, W, C)``, sizes that a network does not have equal to 1, channel stride 1, the same stride between
any two neighbouring pixels; a slice of channels of a wider buffer is such a tensor. A convolution weight is
``(K, C, kd, kh, kw)`` in any strides, in the data's dtype or in float32, with odd kernel sizes and "same" zero padding.
Vectors have one entry per channel, in float32 (float64 for float64 data).

``place(x, out, mean, var)``
    ``out = x`` for any strides of ``x``; the mean and biased variance per channel of ``out`` go to ``mean`` and ``var``
    unless they are None. Where ``out`` is None nothing is copied and the moments are those of ``x``.
``place_backward(grad, out)``
    ``out = g``, the loaded gradient, in any strides of ``out``; ``out`` may be ``grad.stored`` itself.
``norm_relu_conv(x, norm, weight, out, mean, var)``
    ``out = conv(a, weight)`` with ``a = relu((x - norm.mean) * norm.scale + norm.shift)``, zero padding after the ReLU;
    ``mean`` and ``var`` as above, of the values as stored.
``norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, sum_dz, sum_dz_centered)``
    With ``dz`` the gradient of the loss by ReLU's input: ``dx = dz``, or ``dx += norm.scale * dz`` where ``accumulate``;
    ``dweight`` (skipped if None) the weight's gradient; ``sum_dz`` and ``sum_dz_centered`` the sums over pixels of
    ``dz`` and ``dz * (x - norm.mean)``.

A convolution of kernel size 1 also pools, where ``out`` (in backward: ``grad``) has the sizes of :func:`pooled` of
``x``'s and not ``x``'s own: then ``a`` is averaged over windows of two in every dimension before it is multiplied,
``a[p] = mean of relu(...) over x[2p], x[2p + 1]``, so that a convolution and the average pooling that follows it, which
commute, cost a pooled convolution. ``dx`` and both sums are over all pixels of ``x``; a last pixel that an odd size
leaves without a window has ``dz = 0``.

For four more a backend that has none of its own takes the eager one's.

``norm_scale(var, gamma, eps)``
    Returns ``gamma / sqrt(var + eps)``, a vector.
``norm_backward(sums, scale, var, eps, pixels, correction, accumulate)``
    Returns the gradient of gamma, a vector, from ``sums`` ``(2, C)``, of ``dz`` and ``dz * (x - mean)``, of a norm with
    that ``scale`` and ``var``. ``correction`` ``(2, C)`` is what the norm's statistics, taken of ``pixels`` values (a
    tensor of one entry), add to the gradient of ``x`` beside ``scale * dz``, per 1 and per ``x - mean``: stored, or
    added where ``accumulate``. Where ``pixels`` is None they are constants and add nothing. arXiv 1502.03167, section 3.

The other two serve a network's stem:

``norm_relu_pool(x, norm, out)``
    ``out`` the activations ``a`` of ``x``, as above; or, where ``out`` has other sizes than ``x``, their maxima over
    windows of 3 with stride 2 in every dimension that is not 1, one pixel of padding: ``(size + 1) // 2``.
``norm_relu_pool_backward(grad, x, norm, dx, sum_dz, sum_dz_centered)``
    ``dx = dz`` and its sums, as above, for the gradient ``grad`` of ``out``, a plain tensor. A maximum's gradient goes
    to the first of its window's pixels that has it.

``unavailable(device, dtype)`` says why the backend cannot run there, or None.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """Batch normalisation of ``x`` as one affine map: ``(x - mean) * scale + shift``, vectors per channel.

    ``scale = weight / sqrt(var + eps)`` and ``shift = bias``; arXiv 1502.03167, algorithm 1.
    """

    mean: Tensor
    scale: Tensor
    shift: Tensor


class Gradient(NamedTuple):
    """A gradient as it is loaded: ``g = scale * stored + (slope * (value - mean) + offset)``, vectors per channel.

    ``stored`` is the accumulated gradient of the activation ``value``; the other two terms are what the batch
    statistics of every reader still owe (batch normalisation's backward, deferred).
    """

    stored: Tensor
    value: Tensor
    scale: Tensor
    slope: Tensor
    mean: Tensor
    offset: Tensor


def pooled(sizes: Sequence[int]) -> tuple[int, ...]:
    """Image sizes after average pooling of window and stride 2; a size of 1 (a missing dimension) stays."""
    return tuple(max(size // 2, 1) for size in sizes)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, per-channel vectors and sums for data of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def uses_tf32(x: Tensor) -> bool:
    """Whether products of ``x`` run in TF32: float32 on an NVIDIA GPU, by torch's switch for convolutions."""
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
