"""No byte, tensor-core product or pass over shared memory more than a shape needs, and the same bits every run."""

import ctypes
import math
from pathlib import Path

import building
import numpy as np
import pytest
import report
import small
import torch
import traffic
from cases import CUBE, ONE, SQUARE, Case
from emulated import Host, load
from ptx.memory import bank_conflicts
from ptx_launch import Ptx

WHOLE_TILES = [
    Case((1, 1, 1, 1024), 64, 128, ONE),
    Case((1, 1, 32, 32), 64, 32, SQUARE),
    Case((1, 1, 32, 32), 128, 48, SQUARE),
]


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize("case", WHOLE_TILES, ids=str)
@pytest.mark.parametrize("primitive", small.PRIMITIVES)
def test_products(primitive: str, case: Case, arithmetic: str) -> None:
    """As many matrix instructions as there are blocks of 16 x 8 x 16 (8 for TF32); ldmatrix without bank conflicts."""
    host = Host()
    host.statistics()
    small.PRIMITIVES[primitive](case, arithmetic, host)
    depth = 8 if arithmetic == "tf32" else 16
    products = math.prod(case.pixels) // 16 * case.K // 8 * case.C // depth * math.prod(case.kernel)
    found = host.statistics()
    assert found["mma"] == products * (2 if primitive == "backward" else 1)
    assert found["ldmatrix"] > 0 and found["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("arithmetic", small.ARITHMETIC)
@pytest.mark.parametrize("case", [Case((2, 1, 7, 9), 36, 12, ONE), Case((1, 3, 7, 5), 20, 12, CUBE)], ids=str)
@pytest.mark.parametrize("primitive", small.PRIMITIVES)
def test_the_same_bits_every_run(primitive: str, case: Case, arithmetic: str) -> None:
    """Whatever the schedule of the warps."""
    first, *others = (small.PRIMITIVES[primitive](case, arithmetic, Host(seed=seed)) for seed in (0, 1, 2))
    for results in others:
        for found, expected in zip(results, first, strict=True):
            assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


ONCE = {  # what every image is, how often a byte of it may be loaded, and stored
    "forward": {"x": (1, 0), "out": (0, 1)},
    "backward": {"x": (1, 0), "dx": (1, 1), "stored": (1, 0), "value": (1, 0)},
}
HALO = {ONE: 1, SQUARE: 1.75, CUBE: 3.25}  # tiles are read with their neighbours; small images have small tiles
HALO_OF_FLOATS = {**HALO, CUBE: 4.75}  # of whose windows in three dimensions few fit in sm_80's shared memory


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1, 300), 64, 128, ONE),
        Case((1, 1, 20, 20), 64, 32, SQUARE),
        Case((1, 1, 20, 20), 64, 32, ONE, pool=True),
        Case((1, 6, 9, 8), 24, 12, CUBE),
    ],
    ids=str,
)
@pytest.mark.parametrize("primitive", small.PRIMITIVES)
def test_bytes(primitive: str, case: Case, arithmetic: str) -> None:
    """In nvcc's PTX: each byte of an image is loaded once, but for halos, and stored once; every byte of a result is.

    On a device of one multiprocessor: for more of them, few tiles are divided among blocks that read the same pixels.
    """
    ptx = Ptx("80")
    small.PRIMITIVES[primitive](case, arithmetic, ptx, multiprocessors=1)
    machines = [machine for _, machine in ptx.machines]
    found = traffic.by_name(machines, traffic.FORWARD if primitive == "forward" else traffic.BACKWARD)
    report.sections["CUDA kernels: bytes loaded (of which different), stored (of which different)"] += [
        f"{primitive:8} {case!s:28} {arithmetic:8} {name:15} {t.loaded:8} ({t.read:7}) {t.stored:8} ({t.written:7})"
        for name, t in found.items()
    ]
    halo = (HALO if arithmetic == "bfloat16" else HALO_OF_FLOATS)[case.kernel]
    for name, (loads, stores) in ONCE[primitive].items():
        seen = found[name]
        assert seen.loaded <= loads * halo * seen.read and seen.stored <= stores * seen.written, f"{name}: {seen}"
    wholes = (
        ["out", "out_mean", "out_var"] if primitive == "forward" else ["dx", "dweight", "dgamma", "dbeta", "correction"]
    )
    for name in wholes:
        assert found[name].stored == found[name].written > 0, name


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize(
    ("primitive", "few", "more"), [(name, *pair) for name, pairs in small.TURNS.items() for pair in pairs], ids=str
)
def test_main_loops_have_no_bank_conflicts(primitive: str, few: Case, more: Case, arithmetic: str) -> None:
    """Turns of the main loop add none: normalising, fragments, and in backward all that is done for a box of pixels.

    Those that there are belong to what a block does once: a tile's moments, the weights of backward.
    """
    first, second = (traffic.bank_conflicts(primitive, case, arithmetic) for case in (few, more))
    report.sections[
        "CUDA kernels: passes over shared memory that bank conflicts add, all before or after a main loop"
    ] += [
        f"{primitive:8} {more!s:28} {arithmetic:8} {name:58} {conflicts:5}"
        for name, (conflicts, accesses) in second.items()
    ]
    for name, (conflicts, accesses) in second.items():
        assert accesses > first[name][1] and conflicts == first[name][0], name


BOXES = {  # two problems, how many boxes the second has more, and the most instructions of a warp for one
    "1x1": (Case((1, 1, 1, 128), 128, 128, ONE), Case((1, 1, 1, 256), 128, 128, ONE), 2, 1940),
    "3x3": (Case((1, 1, 28, 8), 64, 32, SQUARE), Case((1, 1, 56, 8), 64, 32, SQUARE), 2, 2410),
}


@pytest.mark.parametrize("kernel", BOXES)
def test_instructions_of_a_box(kernel: str) -> None:
    """Of backward's large kernels, branches aside: 128 and 284 of them are products. None divides."""
    few, more, boxes, most = BOXES[kernel]
    source = {"1x1": "conv1x1_backward.cu", "3x3": "conv3_backward.cu"}[kernel]
    counts = []
    for case in (few, more):
        ptx = Ptx("90a", tuple(building.CSRC / "cuda" / name for name in (source, "partials.cu")))
        small.backward(case, "bfloat16", ptx, multiprocessors=1)
        counts += [machine.counts for name, machine in ptx.machines if name.startswith("backward")]
    found = {op: (counts[1][op] - counts[0][op]) / boxes for op in counts[1]}
    report.sections["CUDA kernels: PTX instructions of a warp for a box of backward, products among them"] += [
        f"{kernel} {sum(found.values()):6.0f} {found['mma']:4.0f}"
    ]
    assert found.get("div", 0) == found.get("rem", 0) == 0
    assert sum(found.values()) <= most


def test_bank_conflicts_are_counted() -> None:
    lanes = np.arange(32)
    assert bank_conflicts(4 * lanes, 4, lanes) == 0
    assert bank_conflicts(0 * lanes, 4, lanes) == 0
    assert bank_conflicts(8 * lanes, 4, lanes) == 1
    assert bank_conflicts(128 * lanes, 4, lanes) == 31
    assert bank_conflicts(2 * lanes, 2, lanes) == 0
    assert bank_conflicts(16 * lanes, 16, lanes) == 0
    assert bank_conflicts(128 * lanes, 16, lanes) == 4 * 7
    assert bank_conflicts(144 * lanes, 16, lanes) == 0


@pytest.mark.parametrize(("pad", "conflicts"), [(8, False), (0, True)])
def test_a_layout_with_bank_conflicts_is_found(pad: int, conflicts: bool, tmp_path: Path) -> None:
    """The example's rows of 16 numbers, one after the other."""
    text = (building.HERE / "examples" / "product.cu").read_text()
    source = tmp_path / "product.cu"
    source.write_text(text.replace("kPad = 8", f"kPad = {pad}"))
    library = load(building.build([source]))
    a, b, out = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16(), torch.empty(16, 8)
    host = Host(library)
    host.statistics()
    assert library.example_product(0, *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, out)), 32) == 0
    assert (host.statistics()["ldmatrix_conflicts"] > 0) == conflicts
