"""The matrix tile (csrc/cpu/tile.h) as the compiler made it: its innermost loop must touch no memory but its operands."""

import re


def tiles(disassembly: str, name: str, arithmetic: str, reduction: int, rows: int, vectors: int) -> dict[str, str]:
    """The functions of a size of tile in an instruction set's namespace, by where they leave it."""
    space = f"fused_densenet::{name}"
    begin = f"<void {space}::tile<{space}::{arithmetic}, ({space}::Reduce){reduction}, "
    symbol = re.compile(f"{re.escape(begin)}(.*), {rows}, {vectors}>")
    functions = disassembly.split("\n\n")
    matches = [(symbol.search(function.partition("\n")[0]), function) for function in functions]
    return {match[1].replace(f"{space}::", ""): function for match, function in matches if match}


def inner_loop(function: str, product: str, products: int) -> list[str]:
    """The instructions of the innermost loop that has all products: B's vectors and A's numbers of one step."""
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*)$", function, re.MULTILINE)
    code = [(int(address, 16), instruction) for address, instruction in lines]
    jump = re.compile(r"(?:b\S*|cbn?z|tbn?z|j\S+)\s.*?\b([0-9a-f]+) <")
    jumps = [(address, jump.match(text)) for address, text in code]
    loops = [(int(to[1], 16), address) for address, to in jumps if to and int(to[1], 16) <= address]
    bodies = [[text for address, text in code if begin <= address <= end] for begin, end in loops]
    return min((b for b in bodies if sum(text.startswith(product) for text in b) >= products), key=len)
