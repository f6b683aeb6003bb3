"""Bugs planted in kernels and in the PTX that Triton emits are found by executing it."""

import re
from collections.abc import Callable

import cases
import pytest
import torch
import triton
import triton.language as tl
from cases import IMAGE, LINE, ONE, SQUARE, Case
from ptx.parser import Kernel, PtxError
from triton_ptx import executing_ptx, run

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def _add_one(x, out, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=(i < n) | (not MASKED), other=0.0) + 1, mask=i < n)


@triton.jit
def _accumulate(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(out + i) + tl.load(x + tl.program_id(0) * BLOCK + i))


def test_a_correct_kernel_runs() -> None:
    x, out = torch.randn(1000), torch.full((1000,), torch.nan)
    run(_add_one, (8, 1, 1), (x, out, 1000), "sm_80", {"MASKED": True, "BLOCK": 128, **OPTIONS})
    assert torch.equal(out, x + 1)


def test_an_access_out_of_bounds_is_found() -> None:
    x, out = torch.randn(1000), torch.empty(1000)
    with pytest.raises(PtxError, match="global load out of bounds"):
        run(_add_one, (8, 1, 1), (x, out, 1000), "sm_80", {"MASKED": False, "BLOCK": 128, **OPTIONS})


def test_a_race_between_blocks_is_found() -> None:
    with pytest.raises(PtxError, match="race between blocks"):
        run(_accumulate, (4, 1, 1), (torch.ones(512), torch.zeros(128)), "sm_80", {"BLOCK": 128, **OPTIONS})


def test_an_unknown_instruction_is_an_error() -> None:
    with (
        pytest.raises(PtxError, match="unknown instruction"),
        executing_ptx("sm_80", lambda t: t.replace("fma.", "fmx.")),
    ):
        cases.run_case(Case(LINE, 36, 48, ONE), torch.bfloat16)


def test_ptx_without_the_entry_is_an_error() -> None:
    with pytest.raises(PtxError, match="no entry"):
        Kernel(".visible .entry other() { ret; }", "kernel")


def _without_barrier(number: int) -> Callable[[str], str]:
    def change(text: str) -> str:
        barriers = list(re.finditer(r"bar\.sync[^;]*;", text))
        if number >= len(barriers):
            return text
        return text[: barriers[number].start()] + text[barriers[number].end() :]

    return change


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_barrier_is_found(number: int) -> None:
    with pytest.raises(AssertionError), executing_ptx("sm_80", _without_barrier(number)):
        cases.run_case(Case(IMAGE, 48, 12, SQUARE), torch.bfloat16)


def test_a_copy_that_is_not_waited_for_is_found() -> None:
    def change(text: str) -> str:
        return re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 9", text)

    with pytest.raises(AssertionError), executing_ptx("sm_80", change):
        cases.run_case(Case(LINE, 96, 128, ONE), torch.bfloat16)


@pytest.mark.parametrize(("target", "op"), [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async")])
def test_a_product_left_out_is_found(target: str, op: str) -> None:
    """The second matrix product of each kernel does nothing."""

    def change(text: str) -> str:
        products = list(re.finditer(rf"{re.escape(op)}[^;]*;", text))
        return text if len(products) < 2 else text[: products[1].start()] + text[products[1].end() :]

    with pytest.raises(AssertionError), executing_ptx(target, change):
        cases.run_case(Case(LINE, 96, 128, ONE), torch.bfloat16)
