"""Bugs planted in the kernels are found, each by the check that is there to find it."""

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import building
import pytest
import small
import torch
import traffic
from building import CSRC
from cases import ONE, SQUARE, Case
from emulated import Emulated, Executor, Host, load
from ptx_launch import Ptx
from sanitized import Sanitized

from fused_densenet.backends import eager
from fused_densenet.backends.contract import Norm, Owed

Change = tuple[str, str]  # text that occurs in a kernel or in its headers, and what stands there instead


def patched(source: Path, change: Change, folder: Path) -> Path:
    """A copy with the change, for which its headers are in it; of the forward kernels bfloat16's, to compile sooner."""
    old, new = change
    text = with_headers(source, set())
    assert old in text, f"{source.name} has no {old!r}"
    copy = folder / source.name
    copy.write_text(re.sub(r"Kind<Arithmetic::\w+>", "Kind<Arithmetic::bf16>", text.replace(old, new, 1)))
    return copy


def with_headers(source: Path, done: set[Path]) -> str:
    """The text with that of csrc/cuda's headers, of each where it is included first."""

    def header_of(include: re.Match[str]) -> str:
        header = CSRC / "cuda" / include[1]
        if header in done:
            return ""
        done.add(header)
        return with_headers(header, done) if header.exists() else include[0]

    return re.sub(r'#include "(\w+\.\w+)"', header_of, source.read_text().replace("#pragma once", ""))


def executor(check: str, sources: Sequence[Path]) -> AbstractContextManager[Executor]:
    """Of the kernels in ``sources``: the runner, PTX, or a sanitizer by its name."""
    if check == "runner":
        return contextlib.nullcontext(Host(load(building.build(sources))))
    if check == "PTX":
        return contextlib.nullcontext(Ptx("80", tuple(sources), measure=True))
    return contextlib.closing(Sanitized(check, sources))


PLACE = [CSRC / "cuda" / name for name in ("place.cu", "prepare.cu")]
TILE_WRITTEN = (
    f"= load_numbers(x + offsets[pixel] + channel * step, step, left, in.whole);\n{22 * ' '}}});\n    __syncthreads();"
)


def place(executor: Executor, images: int = 2) -> None:
    """Eight tiles of pixels for three blocks, the last one ragged, and moments; of one image pixels are even."""
    x = torch.randn(images, 8, 1, 30 // images, 17).permute(0, 2, 3, 4, 1)
    out, mean, var = torch.empty(x.shape), torch.empty(8), torch.empty(8)
    Emulated(executor, multiprocessors=1).place(x, out, mean, var)
    assert torch.equal(out, x)
    torch.testing.assert_close(mean, x.mean((0, 1, 2, 3)))


BARRIER = (TILE_WRITTEN, TILE_WRITTEN.replace("    __syncthreads();", ""))
TILES_BARRIER = ("__syncthreads();  // the tile has been read", "")
DIVERGENT = (TILE_WRITTEN, TILE_WRITTEN.replace("__syncthreads", "if (threadIdx.x < 64) __syncthreads"))
STORE = ("(to + (first + pixel) * f.out.ld", "(to + (first + pixel + 1) * f.out.ld")
LOAD = ("(x + offsets[pixel] + channel", "(x + offsets[pixel] + f.x.stride[3] + channel")
SHARED = ("of[threadIdx.x] =", "of[threadIdx.x + 1] =")
ARRIVAL = "__threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) *scratch"
NOTHING_SHOWN = (ARRIVAL, ARRIVAL.removeprefix("__threadfence();\n  "))
NOTHING_SEEN = ("if (last) __threadfence();", "")
BEFORE_THE_LAST = ("static_cast<unsigned>(blocks - 1)", "static_cast<unsigned>(blocks - 2)")


STEM = [CSRC / "cuda" / name for name in ("stem.cu", "partials.cu")]
PLACES_BARRIER = (
    "if (own_.left > 0) find_maxima(first);\n        __syncthreads();",
    "if (own_.left > 0) find_maxima(first);",
)
BOX_OF_PLACES_BARRIER = ("__syncthreads();  // the last box's places have been read", "")
LAST_OF_EQUALS = ("z > largest[j] ||", "(z >= largest[j] && z > 0) ||")
NEXT_WINDOW = ("in_box.w + next_w}", "in_box.w}")
POOL_PIXEL = ("if (inside(image, pixel)) body(", "body(")
DX_OF_STEM = ("dx_.store(at,", "dx_.store(at + 1,")
NAN_LOST = ("a > b || a != a ? a : b", "a > b ? a : b")
PLACES_CONFLICT = ("float sums[size][kThreads + kMostLanes];", "float sums[size][kThreads];")


def pool(executor: Executor) -> None:
    """Several boxes of windows, equal maxima and a NaN, against torch's operators."""
    torch.manual_seed(0)
    x = torch.randint(-1, 3, (1, 1, 35, 33, 64)).bfloat16()
    x[0, 0, 4, 4, 5] = float("nan")
    norm = Norm(torch.zeros(64), torch.ones(64), torch.ones(64), torch.zeros(64), 0.0)
    grad, results = torch.randn(1, 1, 18, 17, 64).bfloat16(), []
    for backend in (Emulated(executor, multiprocessors=1), eager):
        out, dx, sums = torch.empty_like(grad), torch.empty_like(x), torch.empty(4, 64)
        backend.norm_relu_pool(x, norm, out)
        backend.norm_relu_pool_backward(grad, x, norm, dx, Owed(sums[0], sums[1], sums[2:]))
        results.append([out, dx, sums])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2, equal_nan=True)
    if isinstance(executor, Ptx):
        assert not sum(machine.conflicts.total() for _, machine in executor.machines), "bank conflicts"


@pytest.mark.parametrize(
    ("primitive", "change", "check", "message"),
    [
        pytest.param("place", BARRIER, "thread", "data race", id="place: removed barrier, thread sanitizer"),
        pytest.param("place", BARRIER, "PTX", "shared-memory race", id="place: removed barrier, PTX"),
        pytest.param("even place", TILES_BARRIER, "thread", "data race", id="place: removed barrier between tiles"),
        pytest.param("even place", TILES_BARRIER, "PTX", "shared-memory race", id="place: between tiles, PTX"),
        pytest.param(
            "place",
            DIVERGENT,
            "runner",
            "other threads of the block wait",
            id="place: barrier for some threads, runner",
        ),
        pytest.param("place", DIVERGENT, "PTX", "barrier not reached", id="place: barrier for some threads, PTX"),
        pytest.param("place", STORE, "runner", "bytes beside the results", id="place: store one pixel too far, runner"),
        pytest.param(
            "place", STORE, "address", "heap-buffer-overflow", id="place: store one pixel too far, address sanitizer"
        ),
        pytest.param("place", STORE, "PTX", "store out of bounds", id="place: store one pixel too far, PTX"),
        pytest.param(
            "place", LOAD, "address", "heap-buffer-overflow", id="place: load one pixel too far, address sanitizer"
        ),
        pytest.param("place", LOAD, "PTX", "load out of bounds", id="place: load one pixel too far, PTX"),
        pytest.param(
            "place", SHARED, "address", "out of bounds", id="place: shared index one too far, address sanitizer"
        ),
        pytest.param("place", NOTHING_SHOWN, "PTX", "race between blocks", id="place: removed fence before arrival"),
        pytest.param("place", NOTHING_SEEN, "PTX", "race between blocks", id="place: removed fence after arrival"),
        pytest.param("place", BEFORE_THE_LAST, "PTX", "race between blocks", id="place: merged before the last block"),
        pytest.param("stem", PLACES_BARRIER, "thread", "data race", id="stem: removed barrier, thread sanitizer"),
        pytest.param("stem", PLACES_BARRIER, "PTX", "shared-memory race", id="stem: removed barrier, PTX"),
        pytest.param("stem", BOX_OF_PLACES_BARRIER, "thread", "data race", id="stem: removed barrier between boxes"),
        pytest.param("stem", LAST_OF_EQUALS, "runner", "not close", id="stem: the last of equals, runner"),
        pytest.param("stem", NEXT_WINDOW, "runner", "not close", id="stem: a window twice, runner"),
        pytest.param(
            "stem",
            POOL_PIXEL,
            "address",
            "heap-buffer-overflow",
            id="stem: pixels that do not exist, address sanitizer",
        ),
        pytest.param("stem", DX_OF_STEM, "PTX", "store out of bounds", id="stem: stored pixel one too far, PTX"),
        pytest.param("stem", NAN_LOST, "runner", "not close", id="stem: NaN lost, runner"),
        pytest.param("stem", PLACES_CONFLICT, "PTX", "bank conflicts", id="stem: sums in the same banks, PTX"),
    ],
)
def test_a_bug_in_moving_bytes_is_found(
    primitive: str, change: Change, check: str, message: str, tmp_path: Path
) -> None:
    even = functools.partial(place, images=1)
    run, sources = {"place": (place, PLACE), "even place": (even, PLACE), "stem": (pool, STEM)}[primitive]
    with (
        executor(check, [patched(sources[0], change, tmp_path), *sources[1:]]) as kernels,
        pytest.raises((AssertionError, RuntimeError), match=message),
    ):
        run(kernels)


@pytest.mark.parametrize("check", ["runner", "PTX", "thread", "address"])
def test_no_bug_in_a_stem_is_found(check: str) -> None:
    with executor(check, STEM) as kernels:
        pool(kernels)


def _nan_lost(text: str) -> str:
    return text.replace("max.NaN.f32", "max.f32")


def test_a_maximum_that_loses_nan_is_found() -> None:
    with pytest.raises(AssertionError, match="not close"):
        pool(Ptx("80", tuple(STEM), change=_nan_lost))


CASES = {
    "1x1": Case((1, 1, 1, 131), 64, 48, ONE),
    "pooled": Case((2, 1, 5, 7), 64, 48, ONE, pool=True),
    "3x3": Case((1, 1, 7, 11), 64, 16, SQUARE),
}
SOURCES = {  # the kernel that multiplies, and those that run with it
    "1x1 forward": ["conv1x1_forward.cu", "forward.cu", "prepare.cu"],
    "pooled forward": ["conv1x1_forward.cu", "forward.cu", "prepare.cu"],
    "3x3 forward": ["conv3_forward.cu", "forward.cu", "prepare.cu"],
    "1x1 backward": ["backward_small.cu", "conv1x1_backward.cu", "partials.cu"],
    "pooled backward": ["backward_small.cu", "conv1x1_backward.cu", "partials.cu"],
    "3x3 backward": ["conv3_backward.cu", "backward_small.cu", "partials.cu"],
}


def multiply(kernel: str, executor: Executor) -> None:
    """One of :data:`SOURCES` in bfloat16, against the runner; one multiprocessor, so that blocks take many steps."""
    case, primitive = kernel.split()
    expected, results = (small.PRIMITIVES[primitive](CASES[case], "bfloat16", it, 1) for it in (None, executor))
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
    if isinstance(executor, Host):
        assert not executor.statistics()["ldmatrix_conflicts"], "bank conflicts"


PREPARED = "if (i >= -1 && i + 1 < steps) prepare(current);"
TRANSFORMED = "if (last_pass && more) o_.locate(first_pixel(box = next_box(box)), buffer ^ 1, next_slot);"
STAGE_BARRIER = (f"{PREPARED}\n    __syncthreads();", PREPARED)
STAGE_WAIT = ("wait_for_all_but(stages - 2);", "")
STAGE_ROW = ("(to, bytes_behind(x,", "(to + kPitch, bytes_behind(x,")
STAGE_MISALIGNED = ("kPitch = 5 * kChunk", "kPitch = 5 * kChunk + 8")
STAGE_CONFLICTS = ("kPitch = 5 * kChunk", "kPitch = 4 * kChunk")
TABLE = ("row_places[i] =", "row_places[i + 1] =")
OUT_PIXEL = ("return p < f.pixels ? p : -1;", "return p < f.pixels ? p + 1 : -1;")
POOLED_PIXEL = ("if (out >= s.n * d * h * w) return;", "")
STAGE_WEIGHTS = ("(weights_to + at, from + at,", "(weights_to + at + kChunk, from + at,")
X_PIXEL = ("bytes_behind(x, p, f.pixel)", "bytes_behind(x, p + 1, f.pixel)")
SWAPPED = ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])')
BOX_BARRIER = (f"{TRANSFORMED}\n        __syncthreads();", TRANSFORMED)
BOX_WAIT = ("cp_async_wait<0>();\n        __syncthreads();", "__syncthreads();")
DX_PIXEL = ("(bytes_behind(to, p, step))", "(bytes_behind(to, p + 1, step))")
SPLITS = ("static_cast<int>(gridDim.z), scratch)", "1, scratch)")


@pytest.mark.parametrize(
    ("kernel", "change", "check", "message"),
    [
        pytest.param(*parameters, id=f"{name}, {parameters[0]}, {parameters[2]}")
        for name, *parameters in [
            ("removed barrier", "1x1 forward", STAGE_BARRIER, "thread", "data race"),
            ("removed barrier", "3x3 forward", STAGE_BARRIER, "PTX", "shared-memory race"),
            ("removed barrier", "3x3 backward", BOX_BARRIER, "thread", "data race"),
            ("removed barrier", "1x1 backward", BOX_BARRIER, "PTX", "shared-memory race"),
            ("missing wait", "3x3 forward", STAGE_WAIT, "runner", "difference: nan"),
            ("missing wait", "1x1 forward", STAGE_WAIT, "PTX", "difference: nan"),
            ("missing wait", "3x3 backward", BOX_WAIT, "runner", "difference: nan"),
            ("row of a stage one too far", "3x3 forward", STAGE_ROW, "runner", "not close"),
            ("entry of a table one too far", "3x3 forward", TABLE, "thread", "data race"),
            ("stored pixel one too far", "1x1 forward", OUT_PIXEL, "address", "heap-buffer-overflow"),
            ("stored pixel one too far", "1x1 backward", DX_PIXEL, "PTX", "store out of bounds"),
            ("pixels that do not exist", "pooled forward", POOLED_PIXEL, "PTX", "load out of bounds"),
            ("copied pixel one too far", "3x3 forward", X_PIXEL, "PTX", "load out of bounds"),
            ("copied weights one chunk too far", "3x3 forward", STAGE_WEIGHTS, "runner", "not in shared memory"),
            ("misaligned rows", "1x1 forward", STAGE_MISALIGNED, "runner", "not aligned to 16 bytes"),
            ("rows in the same banks", "3x3 forward", STAGE_CONFLICTS, "runner", "bank conflicts"),
            ("swapped operands of bfloat16's product", "1x1 forward", SWAPPED, "PTX", "not close"),
        ]
    ],
)
def test_a_bug_in_a_product_is_found(kernel: str, change: Change, check: str, message: str, tmp_path: Path) -> None:
    """And nothing is found in the kernel as it is."""
    first, *others = (CSRC / "cuda" / name for name in SOURCES[kernel])
    with executor(check, [first, *others]) as correct:
        multiply(kernel, correct)
    with (
        executor(check, [patched(first, change, tmp_path), *others]) as planted,
        pytest.raises((AssertionError, RuntimeError), match=message),
    ):
        multiply(kernel, planted)


def test_splits_that_are_added_too_early_are_found(tmp_path: Path) -> None:
    """By the first block to arrive, where the last one must."""
    first, *others = (CSRC / "cuda" / name for name in SOURCES["3x3 forward"])
    with pytest.raises(AssertionError, match="race between blocks"):
        small.forward(CASES["3x3"], "bfloat16", Ptx("80", (patched(first, SPLITS, tmp_path), *others)), 132)
    small.forward(CASES["3x3"], "bfloat16", Ptx("80", (first, *others)), 132)


@pytest.mark.parametrize("primitive", small.PRIMITIVES)
def test_bank_conflicts_of_a_main_loop_are_found(primitive: str, tmp_path: Path) -> None:
    """Of rows that are taken in their order, where neighbours share banks."""
    first, *others = (CSRC / "cuda" / name for name in SOURCES[f"3x3 {primitive}"])
    in_order = "return turn - in_block + together * (Block >> shift) + (in_block >> shift);", "return turn;"
    sources = (patched(first, in_order, tmp_path), *others)
    few, more = (traffic.bank_conflicts(primitive, case, "bfloat16", sources) for case in small.TURNS[primitive][1])
    assert all(more[name][0] > few[name][0] for name in more)


def _without_barriers(text: str) -> str:
    return re.sub(r"bar\.sync[^;]*;", "", text)


def _without_waits(text: str) -> str:
    return re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 9", text)


def _swapped_operands(text: str) -> str:
    """The two halves of the first operand of every matrix product."""
    fragment = r"(mma\.sync\S+\s*\{[^}]*\},\s*)\{([^,]*),([^,]*),([^,]*),([^}]*)\}"
    return re.sub(fragment, r"\1{\4,\5,\2,\3}", text)


@pytest.mark.parametrize("change", [_without_barriers, _without_waits, _swapped_operands])
@pytest.mark.parametrize("kernel", SOURCES)
def test_a_bug_in_the_ptx_is_found(kernel: str, change: Callable[[str], str]) -> None:
    """Of the kernels that multiply; the others are left as they are."""

    def planted(text: str) -> str:
        return change(text) if "mma.sync" in text else text

    multiply(kernel, Ptx("80"))
    with pytest.raises(AssertionError):
        multiply(kernel, Ptx("80", change=planted))


def _truncated_operands(text: str) -> str:
    """TF32 as the tensor core itself makes it of float32: without the lower bits."""
    return re.sub(r"cvt\.rna\.tf32\.f32", "mov.b32", text)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_operands_that_are_not_rounded_are_found(case: Case) -> None:
    """Entry by entry the error may be that of rounding; as a whole results are smaller."""
    with pytest.raises(AssertionError, match="ulp too large as a whole"):
        small.run(case, "tf32", Ptx("80", change=_truncated_operands))
