"""Shapes that are small enough for every way of executing a kernel, and still cross the edges of its tiles."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cases
import torch
from cases import ALL, CUBE, IMAGE, LEAKY, LINE, ONE, RESIDUAL, RESIDUAL_RELU, ROW, SQUARE, VOLUME, Case
from emulated import Emulated, Executor
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from primitives import LAYOUTS, draw_norm
from strategies import margins, shapes
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed

ARITHMETIC = {  # dtype of the data, whether products are TF32, dtype of the rounding
    "bfloat16": (torch.bfloat16, False, torch.bfloat16),
    "float16": (torch.float16, False, torch.float16),
    "tf32": (torch.float32, True, torch.float16),
    "float32": (torch.float32, False, torch.float32),
}
LARGEST = [(5, 5, 1), (1, 11, 11), (3, 3, 15), (1, 1, 193)]  # kernels of choice.MOST_HALO
CASES = [
    Case(LINE, 36, 48, ONE),
    Case((2, 1, 5, 7), 70, 33, ONE, accumulate=False),
    Case(IMAGE, 48, 12, SQUARE, accumulate=False),
    Case(LINE, 36, 12, ROW),
    Case(VOLUME, 24, 12, CUBE),
    Case((2, 1, 1, 1), 17, 5, SQUARE),
    Case((2, 1, 9, 13), 70, 33, ONE, accumulate=False, pool=True),
    Case((1, 3, 4, 5), 36, 12, ONE, pool=True),
    Case(LINE, 36, 48, ONE, form=ALL),
    Case(LINE, 36, 12, ONE, form=RESIDUAL_RELU),
    Case(IMAGE, 48, 12, SQUARE, accumulate=False, form=RESIDUAL),
    Case((2, 1, 9, 13), 70, 33, ONE, accumulate=False, pool=True, form=LEAKY),
]


def any_case(kind: Callable[..., Any], **fields: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """A case, of a test's ``kind``, of any small shape: on any device, in any layout, with the fields that are its own."""
    return st.builds(
        kind,
        shapes(),
        multiprocessors=st.sampled_from([1, 2, 132]),
        layout=st.sampled_from(LAYOUTS),
        weight_in_float32=st.booleans(),
        before=margins,
        after=margins,
        shared=st.sampled_from([64 << 10, 99 << 10, 227 << 10]),
        **fields,
    )


@contextlib.contextmanager
def no_conflicts(backend: Emulated, image: Sequence[int]) -> Iterator[None]:
    """Inside, ldmatrix reads without bank conflicts; but for images (N, D, H, W) one pixel wide.

    There the rows of a fragment are further apart than one pixel.
    """
    backend.statistics()
    yield
    assert backend.statistics()["ldmatrix_conflicts"] == 0 or image[3] == 1


def run(case: Case, arithmetic: str, executor: Executor | None, multiprocessors: int = 4) -> None:
    """The case's forward and backward primitive against float64."""
    dtype, tf32, rounding = ARITHMETIC[arithmetic]
    backend = Emulated(executor, tf32=tf32, multiprocessors=multiprocessors)
    cases.run_case(case, dtype, rounding=rounding, backend=backend)


def forward(case: Case, arithmetic: str, executor: Executor | None, multiprocessors: int = 4) -> list[Tensor]:
    """Results of the forward primitive for dense, aligned tensors, the same numbers every time."""
    backend, dtype, x, norm, weight = _start(case, arithmetic, executor, multiprocessors)
    results = [torch.empty(*case.out_pixels, case.K, dtype=dtype), torch.empty(case.K), torch.empty(case.K)]
    backend.norm_relu_conv(x, norm, weight, *results)
    return results


def backward(case: Case, arithmetic: str, executor: Executor | None, multiprocessors: int = 4) -> list[Tensor]:
    """Results of the backward primitive, the data gradient and the correction accumulated."""
    backend, dtype, x, norm, weight = _start(case, arithmetic, executor, multiprocessors)
    stored, value = (torch.randn(*case.out_pixels, case.K).to(dtype) for _ in range(2))
    grad = Gradient(stored, value, torch.randn(case.K), torch.randn(2, case.K))
    dx, dweight = torch.randn(x.shape).to(dtype), torch.empty_like(weight)
    owed = Owed(torch.empty(case.C), torch.empty(case.C), torch.randn(2, case.C))
    backend.norm_relu_conv_backward(grad, x, norm, weight, dx, True, dweight, owed)
    return [dx, dweight, *(t for t in owed if t is not None)]


PRIMITIVES = {"forward": forward, "backward": backward}
TURNS = {  # two problems, for the second a block's main loop takes more turns: over channels, over boxes of pixels
    "forward": [
        (Case((1, 1, 1, 256), 64, 128, ONE), Case((1, 1, 1, 256), 160, 128, ONE)),
        (Case((1, 1, 16, 16), 64, 32, SQUARE), Case((1, 1, 16, 16), 160, 32, SQUARE)),
        (Case((1, 1, 16, 16), 36, 12, SQUARE), Case((1, 1, 16, 16), 132, 12, SQUARE)),
    ],
    "backward": [
        (Case((1, 1, 1, 64), 128, 128, ONE), Case((1, 1, 1, 192), 128, 128, ONE)),
        (Case((1, 1, 14, 8), 64, 32, SQUARE), Case((1, 1, 28, 8), 64, 32, SQUARE)),
        (Case((1, 1, 14, 8), 36, 12, SQUARE), Case((1, 1, 28, 8), 36, 12, SQUARE)),
    ],
}


def _start(
    case: Case, arithmetic: str, executor: Executor | None, multiprocessors: int
) -> tuple[Emulated, torch.dtype, Tensor, Norm, Tensor]:
    torch.manual_seed(0)
    dtype, tf32, _ = ARITHMETIC[arithmetic]
    norm = draw_norm(case.C, torch.float32)
    weight = torch.randn(case.K, case.C, *case.kernel).to(dtype)
    backend = Emulated(executor, tf32=tf32, multiprocessors=multiprocessors)
    return backend, dtype, torch.randn(*case.pixels, case.C).to(dtype), norm, weight
