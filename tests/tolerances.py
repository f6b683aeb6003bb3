"""Every tolerance of the tests, with its reason, and the comparisons that use them.

The measure is backward error wherever a test knows it: the difference from a float64 computation in units of the sum
of the absolute values of the terms that were added. Cancellation does not loosen it and it holds entry by entry.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    value: float
    reason: str


TABLE: dict[str, Tolerance] = {
    "entry float64": Tolerance(32, "ulp of the magnitude: rounding of up to 5e3 products, added in blocks"),
    "entry float32": Tolerance(16, "ulp of the magnitude: rounding of up to 5e3 products, added in blocks"),
    "entry bfloat16": Tolerance(2, "ulp of the magnitude: activation, weight, gradient and result rounded once each"),
    "entry float16": Tolerance(2, "ulp of the magnitude: activation, weight, gradient and result rounded once each"),
    "bias": Tolerance(0.25, "ulp: two operands rounded to nearest; truncated, one takes 0.36 off on the average"),
    "bias of few": Tolerance(0.5, "ulp / sqrt(entries): what their rounding comes to by luck"),
    "error ratio": Tolerance(1.5, "the contract: error at most 1.5 times that of the operator-by-operator version"),
    "sampling": Tolerance(1.0, "ulp / sqrt(entries): how far the error of a few rounded entries differs by luck alone"),
    "flips": Tolerance(5e-3, "relative rms: float32 inputs of ReLU that rounding moves across zero, some per million"),
    "float32 whole block": Tolerance(2e-5, "of the largest entry: 2e-7 through ten operators, times conditioning"),
    "float32 few pixels": Tolerance(2e-4, "of the largest entry: normalising 3 values leaves little of a gradient"),
    "float64 whole block": Tolerance(1e-12, "of the largest entry: 2e-16 through fifty operators, times conditioning"),
    "torch.float32 over ranks": Tolerance(1e-6, "relative, in norm: the contract; sums of float32 in another order"),
    "torch.float64 over ranks": Tolerance(1e-13, "relative, in norm: sums of float64 in another order, and squares"),
    "float64 training": Tolerance(1e-8, "of the largest loss: rounding of 2e-16, amplified by twenty steps"),
    "float32 training": Tolerance(1e-2, "of the largest loss: rounding of 6e-8, amplified by twenty steps"),
    "variance": Tolerance(1e-5, "relative: the contract for a channel with mean 1000 and deviation 1 in float32"),
    "packed in float16": Tolerance(
        4e-3,
        "relative, in norm: 8 units of float16; a ReLU's mask is taken anew of the packed values, and may flip near 0",
    ),
    "mean": Tolerance(4, "ulp of the largest entry: float32 sums of at most 256 pixels, corrected and merged"),
    "squares": Tolerance(32, "ulp: 256 additions of float32 squares in a row, when all round the same way"),
    "sum of 4096": Tolerance(2, "ulp, rms: chains of 64 terms and 64 chains come to 1; one chain of all to 7"),
    "moments": Tolerance(2, "ulp, rms: deviations are taken from the mean of the rows before; 1.3 are seen"),
    "16-bit outputs rounded otherwise": Tolerance(
        0.02, "share: float32's error of 1e-6 moves so many of float16's results across the middle of two; 0.008 seen"
    ),
    "weight gradient of 16-bit data": Tolerance(2e-6, "relative, rms: in float32 by tiles of 4x4 1e-6 is seen"),
    "saved MiB": Tolerance(22.5, "per image: buffers 5.6 and bottlenecks 16.5 of DenseNet-121, and vectors"),
    "saved MiB, memory_efficient": Tolerance(6.3, "per image: buffers 5.6 of DenseNet-121, padding and vectors"),
    "torchvision's peak": Tolerance(3.3, "times ours: the aim"),
    "torchvision's peak, memory_efficient": Tolerance(5.0, "times ours: the aim"),
    "vectors MiB": Tolerance(0.02, "the stem's scale and shift, and the logits, beside the two largest buffers"),
    "torchvision's saved MiB": Tolerance(0.01, "relative: published with one decimal"),
}


def tolerance(name: str) -> float:
    return TABLE[name].value


def ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_entries(actual: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype, what: str) -> None:
    """Every entry within its rounding: ``|actual - exact| <= tolerance * ulp(dtype) * magnitude``."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    smallest = torch.finfo(dtype).smallest_normal * ulp(dtype)
    limit = tolerance(f"entry {_name(dtype)}") * (ulp(dtype) * magnitude + smallest)
    excess = (actual.double() - exact).abs() / limit
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 1, f"{what}: error is {worst:.3g} times the tolerance, {int((~(excess <= 1)).sum())} entries"


def assert_unbiased(actual: Tensor, exact: Tensor, dtype: torch.dtype, what: str) -> None:
    """The part of the error that is proportional to the result: truncated operands would make it smaller.

    Of products of 16 bits or TF32 (as float16), which has a bias of many times that of their sums in float32.
    """
    if dtype.itemsize > 2 or not exact.numel():
        return
    bias = ((actual.double() - exact) * exact).sum().item() / exact.square().sum().item() / ulp(dtype)
    limit = tolerance("bias") + tolerance("bias of few") / exact.numel() ** 0.5
    assert abs(bias) <= limit, f"{what}: it is {bias:+.3g} ulp too large as a whole, expected at most {limit:.3g}"


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def luck_of_few(dtype: torch.dtype, entries: int) -> float:
    """How far the relative rms errors of so many rounded entries may differ for no reason."""
    return tolerance("sampling") * ulp(dtype) / entries**0.5


def assert_error_ratio(
    ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype, what: str, magnitude: Tensor | None = None
) -> None:
    """rms error of ``ours`` at most 1.5 times that of ``theirs``, the operator-by-operator version in ``dtype``."""
    assert ours.shape == theirs.shape == exact.shape, f"{what}: shapes {ours.shape}, {theirs.shape}, {exact.shape}"
    if not exact.numel():
        return
    our_error, their_error = rms(ours.double() - exact), rms(theirs.double() - exact)
    luck = luck_of_few(dtype, exact.numel()) * rms(exact if magnitude is None else magnitude)
    limit = tolerance("error ratio") * their_error + luck
    assert our_error <= limit, f"{what}: error {our_error:.3g}, operator by operator {their_error:.3g}"


def assert_no_worse(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """The error ratio for a block's output and gradients, pooled over layers: a few entries' error is luck."""
    errors: dict[str, list[tuple[float, float]]] = {}
    entries: dict[str, int] = {}
    for name, value in exact.items():
        if name == "output" or name.endswith("gradient"):
            kind = name.partition(".")[2] or name
            relative = [rms(found[name] - value) / rms(value) for found in (ours, theirs)]
            errors.setdefault(kind, []).append((relative[0], relative[1]))
            entries[kind] = entries.get(kind, 0) + value.numel()
    for kind, pairs in errors.items():
        our_error, their_error = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        limit = tolerance("error ratio") * their_error + luck_of_few(ours["output"].dtype, entries[kind])
        assert our_error <= limit, f"{kind}: {our_error:.3g}, theirs {their_error:.3g}"


def assert_largest(actual: Tensor, expected: Tensor, name: str, what: str) -> None:
    """``max |actual - expected| <= tolerance * max |expected|``."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance(name) * expected.double().abs().max().item()
    assert error <= limit, f"{what}: error {error:.3g}, allowed {limit:.3g}"


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """:func:`assert_largest` for tensors by name; integers must be equal."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point():
            assert_largest(actual[key], value, name, key)
        else:
            assert torch.equal(actual[key], value), key
