"""x86's largest tiles stay in registers, wherever they go in the end (aarch64/test_neon_tile.py: NEON's)."""

import functools
import pathlib
import platform
import re
import shutil

import pytest
import torch
from compiled import run
from inner_loops import inner_loop, tiles

import fused_densenet
from fused_densenet.backends import extension

pytestmark = pytest.mark.skipif(
    extension.cpu is None or platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="needs the compiled kernels of x86 and objdump",
)
VECTORS = 2
TILES = [
    ("avx512", "Plain<float>", 14, "vfmadd", 1),
    ("avx512", "Plain<double>", 14, "vfmadd", 1),
    ("avx512_bf16", "Paired", 14, "vdpbf16ps", 1),
    ("avx2", "Plain<float>", 6, "vfmadd", 8),
    ("avx2", "Plain<double>", 6, "vfmadd", 8),
]
"""Namespaces, arithmetic, kTileRows, the instruction that multiplies and adds, and kUnrolled."""


@functools.cache
def disassembly() -> str:
    library = pathlib.Path(fused_densenet.__file__).parent / extension.library_name(torch.__version__)
    return run(["objdump", "-d", "-C", "--no-show-raw-insn", library])


@pytest.mark.parametrize("reduction", ["channels", "pixels"])
@pytest.mark.parametrize(
    ("name", "arithmetic", "rows", "product", "turns"), TILES, ids=[f"{n}-{a}" for n, a, *_ in TILES]
)
def test_nothing_but_operands_is_in_memory(
    name: str, arithmetic: str, rows: int, product: str, turns: int, reduction: str
) -> None:
    found = tiles(disassembly(), name, arithmetic, ["channels", "pixels"].index(reduction), rows, VECTORS)
    assert "ToMemory" in found
    assert reduction == "pixels" or sum("FromRegisters" in to for to in found) >= 4  # forward; backward by activation
    for to, function in found.items():
        loop = inner_loop(function, product, turns * rows * VECTORS)
        assert sum(text.startswith(product) for text in loop) == turns * rows * VECTORS, to
        stored = [text for text in loop if re.search(r"%[xyz]mm\d+,[^%]*\(", text)]
        assert not stored and not any("(%rsp" in text or "(%rbp" in text for text in loop), (to, loop)
