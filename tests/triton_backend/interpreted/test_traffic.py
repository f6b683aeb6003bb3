"""Bytes that the primitives move, counted from the kernels' loads and stores, against each operand moved once.

A program loads its channels of ``x`` and ``dx`` once. The gradient operands of the 1x1 backward are loaded by every
program of the same pixels and the weights by all: those run side by side and share a cache, so that memory sees a byte
once. Both counts are reported.
"""

import pytest
import report
import torch
import triton_cpu
from cases import ONE, SQUARE

from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Gradient, Norm, Owed

C, K = 128, 128
FLOOR_RATIO = 1.15


def measure(
    pixels: tuple[int, int, int, int], k: int, kernel: tuple[int, int, int], accumulate: bool
) -> dict[str, list]:
    """Per primitive (bytes that memory sees, bytes that programs ask for, floor)."""
    draw = {"dtype": torch.bfloat16}
    x, out, stored, dx = (torch.randn(*pixels, n).to(**draw) for n in (C, k, k, C))
    norm, weight = Norm(*torch.rand(4, C), 1e-5), torch.randn(k, C, *kernel)
    mean, var, owed = torch.empty(k), torch.empty(k), Owed(*torch.empty(2, C), torch.zeros(2, C))
    dweight = torch.empty_like(weight)
    with triton_cpu.watch() as forward:
        backend.norm_relu_conv(x, norm, weight, out, mean, var)
    with triton_cpu.watch() as backward:
        grad = Gradient(stored, out, torch.rand(k), torch.rand(2, k))
        backend.norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, owed)
    size = {name: t.nbytes for name, t in {"x": x, "out": out, "weight": weight}.items()}
    floors = {
        "norm_relu_conv": size["x"] + size["out"] + size["weight"],
        "norm_relu_conv_backward": (2 + accumulate) * size["x"] + 2 * size["out"] + 2 * size["weight"],
    }
    result = {}
    for (name, floor), watch in zip(floors.items(), (forward, backward), strict=True):
        traffic = [t for _, t in watch.launches]
        stores = sum(sum(t.stored.values()) for t in traffic)
        once = stores + sum(sum(t.distinct_loaded.values()) for t in traffic)
        asked = stores + sum(sum(t.loaded.values()) for t in traffic)
        result[name] = [once, asked, floor, traffic]
        what = f"{name} {C} to {k}, kernel {kernel[-1]}, {x[..., 0].numel()} pixels"
        line = f"{what:58} {once / floor:5.2f} of the floor, {asked / floor:5.2f} asked for by programs"
        report.sections["Bytes moved"].append(line)
    return result


def test_pointwise_moves_little_more_than_each_operand_once() -> None:
    result = measure((1, 1, 32, 64), K, ONE, accumulate=True)
    for once, _, floor, _ in result.values():
        assert once <= FLOOR_RATIO * floor
    [_, forward, _], [_, backward, _] = (result[name][3] for name in ("norm_relu_conv", "norm_relu_conv_backward"))
    x = 2 * C * 32 * 64
    assert forward.loaded["x"] == forward.distinct_loaded["x"] == x
    assert backward.loaded["x"] == backward.loaded["dx"] == backward.stored["dx"] == x


@pytest.mark.parametrize("k", [12, 32])
def test_growth_convolution(k: int) -> None:
    """Written down, not limited: neighbouring pixels are loaded once per tap, by way of the caches."""
    for once, asked, floor, _ in measure((1, 1, 16, 16), k, SQUARE, accumulate=False).values():
        assert floor <= once <= asked
