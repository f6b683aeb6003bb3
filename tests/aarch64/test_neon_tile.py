"""The whole tile stays in registers: its inner loop, as the compiler made it, loads operands and multiplies."""

import re
from collections import Counter

import cross
import pytest
import report

ROWS, VECTORS = 14, 2  # kTileRows and kTileVectors of csrc/cpu/tile.h
TILES = [("neon", "Plain<float>"), ("neon", "Plain<double>"), ("neon_bf16", "Paired")]
REDUCTIONS = {"channels": 0, "pixels": 1}


def inner_loop(name: str, arithmetic: str, reduction: int) -> list[str]:
    """The instructions of the largest tile's innermost loop; B's vectors and A's numbers of one step of the reduction."""
    space = f"fused_densenet::{name}"
    symbol = f"<void {space}::tile<{space}::{arithmetic}, ({space}::Reduce){reduction}, {ROWS}, {VECTORS}>"
    (function,) = (part for part in cross.disassembly(name).split("\n\n") if symbol in part.partition("\n")[0])
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*)$", function, re.MULTILINE)
    code = [(int(address, 16), instruction) for address, instruction in lines]
    jumps = [(address, re.match(r"(?:b\S*|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <", text)) for address, text in code]
    loops = [(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) <= address]
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    return [instruction for address, instruction in code if begin <= address <= end]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "arithmetic"), TILES, ids=[arithmetic for _, arithmetic in TILES])
def test_nothing_but_operands_is_loaded(name: str, arithmetic: str, reduction: str) -> None:
    loop = inner_loop(name, arithmetic, REDUCTIONS[reduction])
    kinds = Counter(instruction.split()[0] for instruction in loop)
    product = "bfdot" if arithmetic == "Paired" else "fmla"
    figure = f"{kinds[product]} {product} of {len(loop)} instructions"
    report.sections["aarch64's largest tile, its inner loop"].append(f"{arithmetic}, over {reduction}: {figure}")
    assert kinds[product] == ROWS * VECTORS
    operands = [instruction for instruction in loop if instruction.startswith("ld")]
    # Operands in pairs or alone, two addresses that go on, what is left of the reduction, the jump.
    assert len(operands) <= ROWS + VECTORS and len(loop) <= ROWS * VECTORS + len(operands) + 4, figure
    assert not any("[sp" in instruction or instruction.startswith("st") for instruction in loop), "\n".join(loop)
    assert kinds.keys() <= {product, "ldr", "ldur", "ldp", "add", "sub", "subs", "cbnz", "b.ne", "cmp"}, figure
