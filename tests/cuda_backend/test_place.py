"""The block's input into its buffer and the gradient out of it, for images of any strides."""

import pytest
import torch
from emulated import Emulated
from primitives import Guarded, check_moments, load, load_magnitude, loaded_gradient, vector
from tolerances import assert_entries, tolerance
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["channels first", "channels last", "expanded", "reversed"]
IMAGES = [(2, 1, 7, 9, 64), (1, 3, 5, 7, 13), (3, 1, 8, 8, 72), (1, 1, 1, 1, 5), (2, 1, 1, 67, 130), (1, 1, 40, 1, 1)]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_images = pytest.mark.parametrize("shape", IMAGES, ids=str)
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def image(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    n, d, h, w, c = shape
    return {
        "channels first": torch.randn(n, c, d, h, w).permute(0, 2, 3, 4, 1),
        "channels last": torch.randn(n, d, h, w, c),
        "expanded": torch.randn(1, d, 1, w, c).expand(n, d, h, w, c),
        "reversed": torch.randn(c, w, h, d, 2 * n).permute(4, 3, 2, 1, 0)[::2],
    }[layout].to(dtype)


@all_layouts
@all_dtypes
@all_images
def test_place(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = image(shape, layout, dtype)
    out = Guarded(shape, dtype, 8, -shape[-1] % 8)
    mean, var = (vector(shape[-1], dtype) for _ in range(2))
    backend = Emulated()
    backend.place(x, out.data, mean.data, var.data)
    assert torch.equal(out.data, x)
    out.check("out")
    check_moments(x, mean, var)
    only_mean, only_var = (torch.empty(shape[-1]) for _ in range(2))
    backend.place(x, None, only_mean, only_var)
    assert torch.equal(only_mean, mean.data) and torch.equal(only_var, var.data)
    copy = torch.empty(shape, dtype=dtype)
    backend.place(x, copy, None, None)
    assert torch.equal(copy, x)


@all_layouts
@all_dtypes
@all_images
@pytest.mark.parametrize("plain", [False, True], ids=["owing", "plain"])
def test_place_backward(plain: bool, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    grad = loaded_gradient(shape[:-1], shape[-1], dtype, plain)
    if layout == "expanded":
        out = torch.empty(*shape[:-1], shape[-1] + 3, dtype=dtype)[..., 1 : 1 + shape[-1]]
    else:
        out = torch.empty_like(image(shape, layout, dtype))
    expected, magnitude = load(grad), load_magnitude(grad)
    Emulated().place_backward(grad, out)
    assert_entries(out, expected, magnitude, dtype, "out")
    Emulated().place_backward(grad, grad.stored)
    assert torch.equal(grad.stored, out)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_variance_of_a_distant_channel(seed: int) -> None:
    """Mean 1000, deviation 1, tiles of few pixels among them: what rounding of a tile's mean to float would lose."""
    x = torch.randn(3, 1, 11, 13, 16) + 1000
    mean, var = torch.empty(16), torch.empty(16)
    Emulated(seed=seed).place(x, None, mean, var)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance("variance"), atol=0)
    assert torch.equal(mean, exact_mean.float())


def test_moments_of_what_is_not_finite() -> None:
    x = torch.randn(2, 1, 9, 9, 4)
    x[0, 0, 0, 0, 1] = float("nan")
    mean, var = torch.empty(4), torch.empty(4)
    Emulated().place(x, None, mean, var)
    expected = torch.tensor([False, True, False, False])
    assert torch.equal(mean.isnan(), expected) and torch.equal(var.isnan(), expected)


def test_the_same_bits_every_run() -> None:
    x = torch.randn(3, 1, 11, 13, 70)
    first, second = (torch.empty(2, 70) for _ in range(2))
    Emulated().place(x, None, first[0], first[1])
    Emulated(seed=5).place(x, None, second[0], second[1])
    assert torch.equal(first, second)
