"""How many bytes a thread takes at a time, read from the PTX of real launches."""

import re
from collections import Counter

import launches
import pytest
from launches import Variant
from triton_offline import compile_kernel

PRODUCTS = {
    "norm_relu_conv": (32, 128, 1, 3, 3),
    "backward_data": (32, 128, 1, 3, 3),
    "backward_pointwise": (128,) * 2 + (1,) * 3,
}


def loads(kernel: str, weight: tuple[int, ...], aligned: bool, target: str) -> Counter[int]:
    """Loads from global memory by their bytes, asynchronous copies included."""
    found: Counter[int] = Counter()
    with launches.tile_in_use(target, None):
        for it, arguments in launches._step(weight, "half", Variant(aligned=aligned, accumulate=weight[-1] == 1)):
            if it.function.__name__ == kernel:
                text = compile_kernel(it.function, *arguments, target=target, **it.constants, **it.options).asm["ptx"]
                for vector, bits in re.findall(r"ld\.global(?:\.v(\d))?\.[bu](\d+)", text):
                    found[int(vector or 1) * int(bits) // 8] += 1
                for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", text):
                    found[int(size, 16)] += 1
    assert found
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_weights_of_any_layout_come_by_16_bytes(kernel: str, target: str) -> None:
    """They are float32 and (K, C, 3, 3) here: 9 values apart. What is left below 8 bytes are the vectors per channel."""
    found = loads(kernel, PRODUCTS[kernel], True, target)
    assert found[16] >= 8 and found[1] == found[2] == 0
    assert found[16] + found[8] > found[4]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("kernel", "weight"),
    [
        ("norm_relu_conv", (12, 132, 1, 3, 3)),
        ("norm_relu_conv", (48, 132, 1, 1, 1)),
        ("backward_data", (12, 132, 1, 3, 3)),
        ("backward_weight", (12, 132, 1, 3, 3)),
        ("backward_pointwise", (48, 132, 1, 1, 1)),
    ],
)
def test_channels_of_k_12_come_by_8_bytes(kernel: str, weight: tuple[int, ...], target: str) -> None:
    """Not one by one, 2 bytes each, as multiples of 4 came where multiples of 16 alone are known."""
    found = loads(kernel, weight, False, target)
    assert found[2] == 0 and found[8] >= 4


def test_odd_channels_come_one_by_one() -> None:
    assert loads("norm_relu_conv", (12, 33, 1, 1, 1), False, "sm_80")[2] > 0
