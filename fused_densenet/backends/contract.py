"""What a backend is: four functions over channels-last pixels.

Data is ``(N, D, H, W, C)``, sizes that a network does not have equal to 1, channel stride 1, the same stride between
any two neighbouring pixels; a slice of channels of a wider buffer is such a tensor. A convolution weight is
``(K, C, kd, kh, kw)`` in any strides, in the data's dtype or in float32, with odd kernel sizes and "same" zero padding.
Vectors have one entry per channel, in float32 (float64 for float64 data).

``place(x, out, mean, var)``
    ``out = x`` for any strides of ``x``; the mean and biased variance per channel of ``out`` go to ``mean`` and ``var``
    unless they are None.
``place_backward(grad, out)``
    ``out = g``, the loaded gradient, in any strides of ``out``.
``norm_relu_conv(x, norm, weight, out, mean, var)``
    ``out = conv(a, weight)`` with ``a = relu((x - norm.mean) * norm.scale + norm.shift)``, zero padding after the ReLU;
    ``mean`` and ``var`` as above, of the values as stored.
``norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, sum_dz, sum_dz_centered)``
    With ``dz`` the gradient of the loss by ReLU's input: ``dx = dz``, or ``dx += norm.scale * dz`` where ``accumulate``;
    ``dweight`` (skipped if None) the weight's gradient; ``sum_dz`` and ``sum_dz_centered`` the sums over pixels of
    ``dz`` and ``dz * (x - norm.mean)``.

``unavailable(device, dtype)`` says why the backend cannot run there, or None.
"""

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


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, per-channel vectors and sums for data of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
