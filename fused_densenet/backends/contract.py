"""What a backend is: functions over channels-last pixels.

Data is ``(N, D, H, W, C)``, sizes that a network does not have equal to 1, channel stride 1, the same stride between
any two neighbouring pixels; a slice of channels of a wider buffer is such a tensor. A convolution weight is
``(K, C, kd, kh, kw)`` in any strides, in the data's dtype or in float32, with odd kernel sizes and "same" zero padding.
Vectors have one entry per channel and stride 1, in float32 (float64 for float64 data); a norm's weight and bias, a
convolution's bias, and their gradients, may be in the data's dtype. ``leaky(z, slope)`` is ``z`` where ``z > 0``, else
``slope * z``, with a slope from 0 to 1; of slope 0 it is ReLU exactly, an infinity included.

``place(x, out, mean, var)``
    ``out = x`` for any strides of ``x``; the mean and biased variance per channel of ``out`` go to ``mean`` and ``var``
    unless they are None. Where ``out`` is None nothing is copied and the moments are those of ``x``.
``place_backward(grad, out)``
    ``out = g``, the loaded gradient, in any strides of ``out``; ``out`` may be ``grad.stored`` itself.
``norm_relu_conv(x, norm, weight, out, mean, var, bias=None, negative_slope=1.0)``
    ``out = leaky(conv(a, weight) + bias, negative_slope)`` with ``a = leaky((x - norm.mean) * scale + norm.bias,
    norm.negative_slope)``, ``scale`` that of :class:`Norm`, zero padding after the activation; ``a = x`` where ``norm`` is
    None. ``mean`` and ``var`` as above, of the values as stored.
``norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, owed, dbias=None)``
    With ``dz`` the gradient of the loss by the activation's input: ``dx = scale * dz``, or ``dx += scale * dz`` where
    ``accumulate``; ``dweight`` (skipped if None) the weight's gradient; ``owed`` (:class:`Owed`) the norm's; ``dbias``
    (skipped if None) the bias's, the sum of ``g`` over the pixels. Where ``norm`` is None, ``owed`` is, too, and
    ``scale`` is 1.

A convolution of kernel size 1 also pools, where ``out`` (in backward: ``grad``) has the sizes of :func:`pooled` of
``x``'s and not ``x``'s own: then ``a`` is averaged over windows of two in every dimension before it is multiplied,
``a[p] = mean of leaky(...) over x[2p], x[2p + 1]``, so that a convolution and the average pooling that follows it, which
commute, cost a pooled convolution. ``dx`` and all sums are over all pixels of ``x``; a last pixel that an odd size
leaves without a window has ``dz = 0``.

Two more serve a network's stem; the norm's ``negative_slope`` is 0 there:

``norm_relu_pool(x, norm, out)``
    ``out`` the activations ``a`` of ``x``, as above; or, where ``out`` has other sizes than ``x``, the maxima of
    ``relu(norm(x))`` over windows of 3 with stride 2 in every dimension that is not 1, one pixel of padding:
    ``(size + 1) // 2``.
``norm_relu_pool_backward(grad, x, norm, dx, owed)``
    ``dx = scale * dz`` and its sums, as above, for the gradient ``grad`` of ``out``, a plain tensor. A maximum's gradient
    goes to the first of its window's pixels that has it.

Two more serve a network's begin and end, in inference; a backend may have none:

``strided_conv(x, weight, out, *stride, *padding)``
    ``out = conv(x, weight)`` of three strides and three numbers of zeros on either side, of depth, height and width. The
    weight, of any sizes, is in the data's dtype and channels-last in memory: ``(K, kd, kh, kw, C)`` without gaps.
``norm_relu_mean(x, norm, out)``
    ``out`` of one pixel, the means of the activations ``a`` over all pixels of each image.

``unavailable(device, dtype)`` says why the backend cannot run there, or None.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """Batch normalisation: ``(x - mean) * scale + bias`` with ``scale = weight / sqrt(var + eps)``, vectors per channel.

    arXiv 1502.03167, algorithm 1; the fields as ``nn.BatchNorm`` has them, the variance biased. And the slope of the
    activation that follows it for negative numbers.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    negative_slope: float = 0.0


class Gradient(NamedTuple):
    """A gradient as it is loaded: ``g = stored + (correction[1] * (value - mean) + correction[0])``.

    ``stored`` is the accumulated gradient of the activation ``value``, ``mean`` a vector, ``correction`` ``(2, C)`` what
    the batch statistics of every reader still owe (batch normalisation's backward, deferred). These three are None
    where nothing is owed: ``g = stored``. Where ``value`` was stored behind an activation of ``negative_slope`` instead,
    ``mean`` and ``correction`` are None and ``g = stored * (1 where value > 0, else negative_slope)``.
    """

    stored: Tensor
    value: Tensor | None = None
    mean: Tensor | None = None
    correction: Tensor | None = None
    negative_slope: float = 1.0


class Owed(NamedTuple):
    """Where a backward primitive leaves what is summed over the pixels; arXiv 1502.03167, section 3.

    Attributes:
        dweight: the norm's weight gradient, ``sum(dz * (x - mean)) / sqrt(var + eps)``.
        dbias: the norm's bias gradient, ``sum(dz)``.
        correction: ``(2, C)``, what the norm's statistics add to the gradient of ``x`` beside ``scale * dz``, per 1 and
            per ``x - mean``: ``-scale * dbias / pixels`` and ``-scale * dweight / (pixels * sqrt(var + eps))``. Stored,
            or added where ``dx`` accumulates. None where the statistics are constants.
        pixels: ``(1,)``, how many values the statistics are of; None where they are those of ``x`` itself.
    """

    dweight: Tensor
    dbias: Tensor
    correction: Tensor | None = None
    pixels: Tensor | None = None


def pooled(sizes: Sequence[int]) -> tuple[int, ...]:
    """Image sizes after average pooling of window and stride 2; a size of 1 (a missing dimension) stays."""
    return tuple(max(size // 2, 1) for size in sizes)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, per-channel vectors and sums for data of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def uses_tf32(x: Tensor) -> bool:
    """Whether products of ``x`` run in TF32: float32 on an NVIDIA GPU, by torch's switch for convolutions."""
    if x.dtype != torch.float32 or torch.version.hip is not None or x.device.type == "xpu":
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
