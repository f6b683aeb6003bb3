"""The executor of PTX does what the PTX ISA says, and refuses what a driver refuses."""

import numpy as np
import pytest
from ptx.machine import launch
from ptx.parser import Kernel, PtxError

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def elementwise(instruction: str, first: list[float], second: list[float] | None) -> np.ndarray:
    """``instruction`` of two float32 numbers (or of the first) in each lane of a warp."""
    kernel = Kernel(
        HEADER
        + f""".entry kernel(.param .u64 kernel_0)
{{
  .reg .b32 %r<2>; .reg .f32 %v<4>; .reg .b64 %rd<4>;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd1, %r1, 4;
  ld.param.u64 %rd2, [kernel_0];
  add.s64 %rd3, %rd2, %rd1;
  ld.global.f32 %v1, [%rd3];
  ld.global.f32 %v2, [%rd3+128];
  {instruction} %v3, %v1{", %v2" if second else ""};
  st.global.f32 [%rd3], %v3;
  ret;
}}""",
        "kernel",
    )
    data = np.zeros(64, np.float32)
    data[: len(first)], data[32 : 32 + len(second or ())] = first, second or ()
    launch(kernel, (1, 1, 1), 32, 0, [data.ctypes.data], [data])
    return data[: len(first)]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("max.f32", [2, 1, 2, np.nan]),
        ("max.NaN.f32", [2, np.nan, np.nan, np.nan]),
        ("min.f32", [-3, 1, 2, np.nan]),
        ("min.NaN.f32", [-3, np.nan, np.nan, np.nan]),
        ("max.ftz.f32", [2, 1, 2, np.nan]),
    ],
)
def test_extremes_of_nan(instruction: str, expected: list[float]) -> None:
    """ReLU by ``max`` of sm_80 makes zero of NaN; by ``max.NaN`` it keeps it."""
    found = elementwise(instruction, [-3, 1, np.nan, np.nan], [2, np.nan, 2, np.nan])
    assert np.array_equal(found, np.array(expected, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("number", "rounded"),
    [(1 + 2.0**-11, 1 + 2.0**-10), (1 + 2.0**-12, 1), (-1 - 2.0**-11, -1 - 2.0**-10), (np.inf, np.inf)],
)
def test_tf32_rounds_ties_away_from_zero(number: float, rounded: float) -> None:
    assert elementwise("cvt.rna.tf32.f32", [number], None)[0] == rounded


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("setp.gt.f32 %p1|%p2, %v1, 0f40000000;", [2, 2, 1]),  # the opposite, too
        ("setp.gt.bf16x2 %p1|%p2, %b1, %b2;", [0, 1, 3]),  # of each half
    ],
)
def test_two_predicates(instruction: str, expected: list[int]) -> None:
    """1 where the first holds plus 2 where the second does, of 1.0, 2.0 and 3.0, as float32 and as pairs of bfloat16."""
    kernel = Kernel(
        HEADER
        + f""".entry kernel(.param .u64 kernel_0)
{{
  .reg .pred %p<3>; .reg .b32 %r<5>; .reg .b32 %b<3>; .reg .f32 %v<2>; .reg .b64 %rd<4>;
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd1, %r1, 4;
  ld.param.u64 %rd2, [kernel_0];
  add.s64 %rd3, %rd2, %rd1;
  ld.global.f32 %v1, [%rd3];
  ld.global.b32 %b1, [%rd3+128];
  mov.b32 %b2, 0x3F803F80;
  {instruction}
  selp.b32 %r2, 1, 0, %p1;
  selp.b32 %r3, 2, 0, %p2;
  add.s32 %r4, %r2, %r3;
  st.global.b32 [%rd3], %r4;
  ret;
}}""",
        "kernel",
    )
    data = np.zeros(64, np.uint32)
    data[:3] = np.array([1, 2, 3], np.float32).view(np.uint32)
    data[32:35] = [0x3F803F80, 0x3F804000, 0x40004000]  # (1, 1), (2, 1), (2, 2), the low half first
    launch(kernel, (1, 1, 1), 32, 0, [data.ctypes.data], [data])
    assert data[:3].tolist() == expected


BODY = "\n{\n  ret;\n}"


@pytest.mark.parametrize(
    ("directives", "grid", "threads", "shared", "message"),
    [
        ("", (1, 65536, 1), 32, 0, "65536 blocks in y, at most 65535"),
        ("", (1, 1, 65536), 32, 0, "65536 blocks in z, at most 65535"),
        ("", (2**31, 1, 1), 32, 0, "blocks in x"),
        ("", (0, 1, 1), 32, 0, "grid of"),
        ("", (1, 1, 1), 1056, 0, "1056 threads of a block, at most 1024"),
        (".maxntid 128, 1, 1", (1, 1, 1), 256, 0, "256 threads of a block, at most 128"),
        (".reqntid 64", (1, 1, 1), 96, 0, "96 threads of a block, at most 64"),
        ("", (1, 1, 1), 32, (163 << 10) + 1, "166913 bytes of shared memory, at most 166912 on sm_80"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(
    directives: str, grid: tuple[int, int, int], threads: int, shared: int, message: str
) -> None:
    kernel = Kernel(f"{HEADER}.entry kernel()\n{directives}{BODY}", "kernel")
    with pytest.raises(PtxError, match=message):
        launch(kernel, grid, threads, shared, [], [])


def test_the_largest_launch_is_not_refused() -> None:
    kernel = Kernel(f"{HEADER}.entry kernel()\n.maxntid 32, 1, 1{BODY}", "kernel")
    launch(kernel, (1, 4096, 1), 32, 163 << 10, [], [np.zeros(1, np.uint8)])
