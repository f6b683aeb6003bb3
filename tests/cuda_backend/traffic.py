"""Bytes that the kernels of a primitive load and store, by what they are, counted where their PTX is executed."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ptx.machine import Machine
from ptx.parser import Kernel


class Traffic(NamedTuple):
    """Bytes requested, and different bytes touched: ``loaded / read`` says how often a byte was loaded."""

    loaded: int
    read: int
    stored: int
    written: int


FORWARD = ["x", "mean", "scale", "shift", "weight", "out", "out_mean", "out_var", "workspace"]
BACKWARD = [
    *("stored", "value", "grad_scale", "slope", "grad_mean", "offset", "x", "mean", "scale", "shift", "weight"),
    *("dx", "dweight", "sum_dz", "sum_dz_centered", "workspace"),
]


def by_name(machines: Sequence[Machine], names: Sequence[str]) -> dict[str, Traffic]:
    """Summed over the launches of a primitive, of which ``names`` are the buffers."""
    found: dict[str, Traffic] = {}
    for machine in machines:
        memory = machine.memory
        for name, i in zip(names, range(len(memory.tensors)), strict=False):
            now = Traffic(memory.read[i], memory.touched(i)[0], memory.written[i], memory.touched(i)[1])
            found[name] = Traffic(*map(sum, zip(found.get(name, (0,) * 4), now, strict=True)))
    return found


def main_loop_conflicts(machine: Machine) -> dict[str, int]:
    """Bank conflicts of the instructions that every turn of an innermost multiplying loop executes, by instruction.

    Accesses without conflicts are there too. What only some turns execute, the last one of a tile say, is not.
    """
    kernel, next_of = machine.kernel, _successors(machine.kernel)
    loops = [(loop, ends) for loop, ends in _loops(next_of) if _multiplies(kernel, loop)]
    innermost = [(loop, ends) for loop, ends in loops if not any(other < loop for other, _ in loops)]
    return {
        f"line {kernel.instructions[at].line}: {kernel.instructions[at].text}": conflicts
        for at, conflicts in sorted(machine.conflicts.items())
        for loop, ends in innermost
        if at in loop and not any(_reaches(next_of, min(loop), end, without=at) for end in ends)
    }


def conflicts_of(machine: Machine, op: str) -> list[int]:
    """Of each executed instruction of that name."""
    return [n for at, n in machine.conflicts.items() if machine.kernel.instructions[at].op == op]


def _multiplies(kernel: Kernel, loop: set[int]) -> bool:
    """Matrix products, or many multiplications of what shared memory holds."""
    ops = Counter(kernel.instructions[at].op for at in loop)
    return ops["mma"] > 0 or ops["fma"] >= 64


def _successors(kernel: Kernel) -> list[list[int]]:
    result = []
    for at, it in enumerate(kernel.instructions):
        after = [] if it.op in ("ret", "exit") and it.predicate is None else [at + 1]
        if it.op == "bra":
            target = kernel.labels[it.operands[0].name]  # type: ignore[union-attr]
            after = [target] if it.predicate is None else [at + 1, target]
        result.append([n for n in after if n < len(kernel.instructions)])
    return result


def _loops(next_of: list[list[int]]) -> list[tuple[set[int], list[int]]]:
    """The natural loops and their ends: what reaches a jump back to an instruction that dominates it, not through it.

    Aho, Lam, Sethi, Ullman, Compilers, 9.6.
    """
    before: list[list[int]] = [[] for _ in next_of]
    for at, after in enumerate(next_of):
        for n in after:
            before[n].append(at)
    loops: dict[int, tuple[set[int], list[int]]] = {}
    for at, after in enumerate(next_of):
        for head in after:
            if head <= at and not _reaches(next_of, 0, at, without=head):
                body, ends = loops.setdefault(head, ({head}, []))
                ends.append(at)
                rest = [at]
                while rest:
                    if (here := rest.pop()) not in body:
                        body.add(here)
                        rest += before[here]
    return list(loops.values())


def _reaches(next_of: list[list[int]], start: int, end: int, without: int) -> bool:
    seen, rest = {without}, [start]
    while rest:
        here = rest.pop()
        if here not in seen:
            if here == end:
                return True
            seen.add(here)
            rest += next_of[here]
    return False
