"""What the kernels of a primitive do to memory, counted where their PTX is executed: bytes by tensor, bank conflicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import small
from cases import Case
from ptx.machine import Machine
from ptx_launch import Ptx


class Traffic(NamedTuple):
    """Bytes requested, and different bytes touched: ``loaded / read`` says how often a byte was loaded."""

    loaded: int
    read: int
    stored: int
    written: int


FORWARD = ["x", "mean", "var", "gamma", "beta", "weight", "out", "out_mean", "out_var", "workspace"]
BACKWARD = [
    *("stored", "value", "value_mean", "value_correction", "x", "mean", "var", "gamma", "beta", "weight"),
    *("dx", "dweight", "dgamma", "dbeta", "correction", "workspace"),
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


def bank_conflicts(
    primitive: str, case: Case, arithmetic: str, sources: tuple[Path, ...] | None = None
) -> dict[str, tuple[int, int]]:
    """Of the kernels that multiply: passes that conflicts add, and loads and stores, counted once for all warps.

    On a device of one multiprocessor, so that a block's main loop takes many turns.
    """
    ptx = Ptx("80", sources, measure=True)
    small.PRIMITIVES[primitive](case, arithmetic, ptx, multiprocessors=1)
    return {
        name: (machine.conflicts.total(), sum(machine.counts[op] for op in ("ld", "st", "ldmatrix")))
        for name, machine in ptx.machines
        if name.startswith(("conv", "backward"))
    }
