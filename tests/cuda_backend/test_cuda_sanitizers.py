"""The kernels under the thread sanitizer (no race) and under the address and undefined-behaviour sanitizers."""

from collections.abc import Iterator

import pytest
import small
import torch
from cases import ALL, ONE, SQUARE, Case
from emulated import Emulated
from primitives import loaded_gradient
from sanitized import Sanitized


@pytest.fixture(scope="module", params=["thread", "address"])
def program(request: pytest.FixtureRequest) -> Iterator[Sanitized]:
    started = Sanitized(request.param)
    yield started
    started.close()


@pytest.mark.parametrize("arithmetic", small.ARITHMETIC)
@pytest.mark.parametrize("case", small.CASES, ids=str)
def test_norm_relu_conv(case: Case, arithmetic: str, program: Sanitized) -> None:
    small.run(case, arithmetic, program)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 9, 31), 1100, 48, ONE),  # channels in two splits
        Case((1, 1, 9, 131), 1100, 80, ONE, form=ALL),
        Case((2, 1, 15, 17), 70, 100, SQUARE),
        Case((2, 1, 21, 25), 70, 33, ONE, accumulate=False, pool=True),
    ],
    ids=str,
)
def test_several_tiles_a_block(case: Case, program: Sanitized) -> None:
    """What a block keeps in shared memory of one tile is read before the next one's is written."""
    small.run(case, "float32", program, multiprocessors=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_place(dtype: torch.dtype, program: Sanitized) -> None:
    backend = Emulated(program)
    x = torch.randn(2, 13, 1, 7, 11).permute(0, 2, 3, 4, 1).to(dtype)
    out, mean, var = torch.empty(2, 1, 7, 11, 13, dtype=dtype), torch.empty(13), torch.empty(13)
    backend.place(x, out, mean, var)
    assert torch.equal(out, x)
    backend.place_backward(loaded_gradient(x.shape[:-1], 13, dtype), torch.empty_like(x))
