"""Bugs planted in the kernels are found, each by the check that is there to find it."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import building
import pytest
import small
import torch
from building import CSRC
from cases import ONE, SQUARE, Case
from emulated import Emulated, Executor, Host, load
from ptx.parser import PtxError
from ptx_launch import Ptx
from sanitized import Sanitized, SanitizerError

PLACE = [CSRC / "cuda" / name for name in ("place.cu", "moments.cu")]
TILE_WRITTEN = (
    "= load(x + offsets[pixel] + channel * step, step, left, in.whole);\n                    });\n  __syncthreads();"
)


def patched(source: Path, old: str, new: str, folder: Path) -> Path:
    text = source.read_text()
    assert old in text, f"{source.name} has no {old!r}"
    copy = folder / source.name
    copy.write_text(text.replace(old, new, 1))
    return copy


def place(executor: Executor) -> None:
    """Two tiles of pixels, the last one ragged, and moments."""
    x = torch.randn(1, 8, 1, 7, 11).permute(0, 2, 3, 4, 1)
    out, mean, var = torch.empty(1, 1, 7, 11, 8), torch.empty(8), torch.empty(8)
    Emulated(executor).place(x, out, mean, var)
    assert torch.equal(out, x)
    torch.testing.assert_close(mean, x.mean((0, 1, 2, 3)))


def run_place(change: tuple[str, str], check: str, folder: Path) -> None:
    sources = [patched(PLACE[0], *change, folder), PLACE[1]]
    if check == "runner":
        return place(Host(load(building.build(sources))))
    if check == "PTX":
        return place(Ptx("80", tuple(sources), load(building.build(sources))))
    program = Sanitized(check, sources)
    try:
        place(program)
    finally:
        program.close()


BARRIER = (TILE_WRITTEN, TILE_WRITTEN.replace("  __syncthreads();", ""))
DIVERGENT = (TILE_WRITTEN, TILE_WRITTEN.replace("__syncthreads", "if (threadIdx.x < 64) __syncthreads"))
STORE = ("store(to + (first + pixel) * f.out.ld", "store(to + (first + pixel + 1) * f.out.ld")
LOAD = ("load(x + offsets[pixel] + channel", "load(x + offsets[pixel] + f.x.stride[3] + channel")
SHARED = ("offsets[threadIdx.x] =", "offsets[threadIdx.x + 1] =")


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        pytest.param(BARRIER, "thread", "data race", id="removed barrier, thread sanitizer"),
        pytest.param(BARRIER, "PTX", "shared-memory race", id="removed barrier, PTX"),
        pytest.param(DIVERGENT, "runner", "other threads of the block wait", id="barrier for some threads, runner"),
        pytest.param(DIVERGENT, "PTX", "barrier not reached", id="barrier for some threads, PTX"),
        pytest.param(STORE, "runner", "bytes beside the results", id="store one pixel too far, runner"),
        pytest.param(STORE, "address", "heap-buffer-overflow", id="store one pixel too far, address sanitizer"),
        pytest.param(STORE, "PTX", "store out of bounds", id="store one pixel too far, PTX"),
        pytest.param(LOAD, "address", "heap-buffer-overflow", id="load one pixel too far, address sanitizer"),
        pytest.param(LOAD, "PTX", "load out of bounds", id="load one pixel too far, PTX"),
        pytest.param(SHARED, "address", "out of bounds", id="shared index one too far, address sanitizer"),
    ],
)
def test_a_bug_in_a_kernel_is_found(change: tuple[str, str], check: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, RuntimeError, PtxError, SanitizerError), match=message):
        run_place(change, check, tmp_path)


def _without_barriers(text: str) -> str:
    return re.sub(r"bar\.sync[^;]*;", "", text)


def _without_waits(text: str) -> str:
    return re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 9", text)


def _swapped_operands(text: str) -> str:
    """The two halves of the first operand of every matrix product."""
    fragment = r"(mma\.sync\S+\s*\{[^}]*\},\s*)\{([^,]*),([^,]*),([^,]*),([^}]*)\}"
    return re.sub(fragment, r"\1{\4,\5,\2,\3}", text)


KERNELS = {"1x1": Case((1, 1, 1, 131), 64, 48, ONE), "3x3": Case((1, 1, 7, 11), 64, 16, SQUARE)}
PRIMITIVES = {"forward": small.forward, "backward": small.backward}


@pytest.mark.parametrize("change", [_without_barriers, _without_waits, _swapped_operands])
@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bug_in_the_ptx_is_found(kernel: str, primitive: str, change: Callable[[str], str]) -> None:
    """Of the kernels that multiply; the others are left as they are."""

    def planted(text: str) -> str:
        return change(text) if "mma.sync" in text else text

    expected = PRIMITIVES[primitive](KERNELS[kernel], "bfloat16", None)
    for correct in (True, False):
        expectation = contextlib.nullcontext() if correct else pytest.raises(AssertionError)
        ptx = Ptx("80", change=str if correct else planted)
        with expectation:
            for found, wanted in zip(PRIMITIVES[primitive](KERNELS[kernel], "bfloat16", ptx), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
