"""Every kernel with every tile that tuning may choose, compiled for GPUs that are not there, and what it needs there."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import launches
import pytest
import report
import torch
import triton
import triton.language as tl
from triton import knobs
from triton_offline import FAMILIES, SHARED_LIMIT, TARGETS, Resources, compile_kernel, resources

from fused_densenet.backends.triton.launch import Launch

PROCESSES = 2
Row = tuple[str, str, Resources]


def compile_share(share: int) -> list[Row]:
    rows = []
    numbered = [
        (target, launch)
        for family, targets in FAMILIES.items()
        for target in targets
        for launch in launches.every_launch(family, fixed=target != family)
    ]
    for target, recorded in numbered[share::PROCESSES]:
        it = recorded.launch
        compiled = compile_kernel(it.function, *recorded.arguments, target=target, **it.constants, **it.options)
        blocks = " ".join(str(v) for n, v in it.constants.items() if n.startswith("BLOCK"))
        tile = f"{blocks} | {it.options['num_warps']} {it.options['num_stages']}"
        rows.append((target, f"{recorded.name} [{tile}]", resources(compiled)))
    return rows


@pytest.fixture(scope="module")
def table() -> list[Row]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        rows = [row for rows in pool.map(compile_share, range(PROCESSES)) for row in rows]
    rows.sort(key=lambda row: (list(TARGETS).index(row[0]), row[1]))
    lines = [
        f"{target:6} {name:66} {used.registers:3} registers {used.shared:6} B shared {used.stack} B stack"
        f" {used.tensor_instructions:3} matrix instructions"
        for target, name, used in rows
    ]
    report.sections[f"Compiled ahead of time by triton {triton.__version__}"] = lines
    return rows


def test_nothing_spills(table: list[Row]) -> None:
    """But by triton 3.6, which leaves up to four numbers a thread in 8 of 978 kernels."""
    allowed, share = (16, 0.01) if triton.__version__.startswith("3.6.") else (0, 0)
    spilled = [(target, name, used.stack) for target, name, used in table if used.stack]
    assert not [row for row in spilled if row[2] > allowed]
    assert len(spilled) <= share * len(table)


def test_shared_memory_fits(table: list[Row]) -> None:
    too_much = [(target, name, used.shared) for target, name, used in table if used.shared > SHARED_LIMIT[target]]
    assert not too_much


def test_matrix_products_use_matrix_instructions(table: list[Row]) -> None:
    """All but IEEE float32, for which only AMD's data center GPUs have such an instruction."""
    without = []
    for target, name, used in table:
        expected = name.startswith(launches.MATRIX_KERNELS) and not (" ieee " in name and not target.startswith("gfx9"))
        if (used.tensor_instructions > 0) != expected:
            without.append((target, name, used.tensor_instructions))
    assert not without


def test_tiles_of_64_pixels_use_the_instructions_of_their_gpu(table: list[Row]) -> None:
    """wgmma and tcgen05, which multiply 64 rows and more."""
    products = [row for row in table if row[0] in ("sm_90", "sm_100", "sm_103") and row[2].tensor_instructions]
    large = [row for row in products if int(row[1].partition("[")[2].split()[0]) >= 64]
    assert len(large) > len(products) / 2
    assert not [(target, name) for target, name, used in large if not used.own]


def test_every_kernel_is_there(table: list[Row]) -> None:
    names = {*launches.MATRIX_KERNELS, "place", "place_backward", "norm_relu_pool", "norm_relu_pool_backward"}
    names |= {"merge_moments", "add_partials", "pack", "sum_gradient", "add_biases"}
    for target in TARGETS:
        assert {name.split()[0] for row_target, name, _ in table if row_target == target} == names


@triton.jit
def _spills(a, b, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(a + i[:, None] * BLOCK + i[None, :])
    y = tl.load(b + i[:, None] * BLOCK + i[None, :])
    tl.store(c + i[:, None] * BLOCK + i[None, :], tl.dot(x, y, input_precision="ieee"))


def test_a_kernel_that_spills_is_found() -> None:
    tensors: list[Any] = [torch.empty(128, 128) for _ in range(3)]
    options = Launch(_spills, (1, 1, 1), (), 4, 1).options
    used = resources(compile_kernel(_spills, *tensors, target="sm_80", BLOCK=128, **options))
    assert used.stack > 0
    assert used.tensor_instructions == 0


def test_multiplications_and_additions_are_fused_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.language, "default_fp_fusion", False)
    options = Launch(_spills, (1, 1, 1), (), 4, 1).options
    for target in ("sm_80", "gfx942"):
        compiled = compile_kernel(_spills, *[torch.empty(16, 16)] * 3, target=target, BLOCK=16, **options)
        assert compiled.metadata.enable_fp_fusion
