"""The whole tile stays in registers: its inner loop, as the compiler made it, loads operands and multiplies."""

import re
from collections import Counter

import cross
import pytest
import report

ROWS, VECTORS = 14, 2  # kTileRows and kTileVectors of csrc/cpu/tile.h
TILES = [("neon", "Plain<float>"), ("neon", "Plain<double>"), ("neon_bf16", "Paired")]
REDUCTIONS = {"channels": 0, "pixels": 1}


def largest_tiles(name: str, arithmetic: str, reduction: int) -> dict[str, str]:
    """The largest tile's functions, by where they leave it."""
    space = f"fused_densenet::{name}"
    begin = f"<void {space}::tile<{space}::{arithmetic}, ({space}::Reduce){reduction}, "
    symbol = re.compile(f"{re.escape(begin)}(.*), {ROWS}, {VECTORS}>")
    functions = cross.disassembly(name).split("\n\n")
    matches = [(symbol.search(function.partition("\n")[0]), function) for function in functions]
    return {match[1].replace(f"{space}::", ""): function for match, function in matches if match}


def inner_loop(function: str, product: str) -> list[str]:
    """The instructions of the innermost loop with all products: B's vectors and A's numbers of one step."""
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*)$", function, re.MULTILINE)
    code = [(int(address, 16), instruction) for address, instruction in lines]
    jumps = [(address, re.match(r"(?:b\S*|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <", text)) for address, text in code]
    loops = [(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) <= address]
    bodies = [[text for address, text in code if begin <= address <= end] for begin, end in loops]
    return min((b for b in bodies if sum(text.startswith(product) for text in b) >= ROWS * VECTORS), key=len)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "arithmetic"), TILES, ids=[arithmetic for _, arithmetic in TILES])
def test_nothing_but_operands_is_loaded(name: str, arithmetic: str, reduction: str) -> None:
    tiles = largest_tiles(name, arithmetic, REDUCTIONS[reduction])
    assert any(to.startswith("ToMemory") for to in tiles)
    assert reduction == "pixels" or any("FromRegisters" in to for to in tiles)
    product = "bfdot" if arithmetic == "Paired" else "fmla"
    for to, function in tiles.items():
        loop = inner_loop(function, product)
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
