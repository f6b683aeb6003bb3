"""The whole tile stays in registers: its inner loop, as the compiler made it, loads operands and multiplies."""

from collections import Counter

import cross
import pytest
import report
from inner_loops import inner_loop, tiles

ROWS, VECTORS = 14, 2  # kTileRows and kTileVectors of csrc/cpu/tile.h
TILES = [("neon", "Plain<float>"), ("neon", "Plain<double>"), ("neon_bf16", "Paired")]
REDUCTIONS = {"channels": 0, "pixels": 1}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "arithmetic"), TILES, ids=[arithmetic for _, arithmetic in TILES])
def test_nothing_but_operands_is_loaded(name: str, arithmetic: str, reduction: str) -> None:
    found = tiles(cross.disassembly(name), name, arithmetic, REDUCTIONS[reduction], ROWS, VECTORS)
    assert "ToMemory" in found
    assert reduction == "pixels" or any("FromRegisters" in to for to in found)
    product = "bfdot" if arithmetic == "Paired" else "fmla"
    for to, function in found.items():
        loop = inner_loop(function, product, ROWS * VECTORS)
        kinds = Counter(instruction.split()[0] for instruction in loop)
        figure = f"{kinds[product]} {product} of {len(loop)} instructions"
        report.sections["aarch64's largest tile, its inner loop"].append(
            f"{arithmetic}, over {reduction}, to {to}: {figure}"
        )
        assert kinds[product] == ROWS * VECTORS, to
        operands = [instruction for instruction in loop if instruction.startswith("ld")]
        # Operands in pairs or alone, two addresses that go on, what is left of the reduction, the jump.
        assert len(operands) <= ROWS + VECTORS and len(loop) <= ROWS * VECTORS + len(operands) + 4, figure
        assert not any("[sp" in instruction or instruction.startswith("st") for instruction in loop), "\n".join(loop)
        assert kinds.keys() <= {product, "ldr", "ldur", "ldp", "add", "sub", "subs", "cbnz", "b.ne", "cmp"}, figure
