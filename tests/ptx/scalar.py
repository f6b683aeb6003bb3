"""Instructions that work lane by lane: arithmetic, logic, conversion, loads and stores, asynchronous copies."""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import FLOAT, SIGNED, UNSIGNED, Machine, instruction
from .parser import Immediate, Instruction, Operand, PtxError, Vector

NAN = {16: np.uint16(0x7FFF), 32: np.uint32(0x7FFFFFFF)}
"""What arithmetic gives, whatever its operands' NaNs are: PTX ISA, add.f32 and the like."""


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@functools.cache
def _type(name: str) -> tuple[str, int]:
    """("u", "s", "f" or "b"; bits); bfloat16 is "bf", two packed numbers end in "x2"."""
    if name == "pred":
        return "p", 1
    match = re.fullmatch(r"(bf|[usfb])(\d+)(x2)?", name)
    if match is None:
        raise PtxError(f"type {name}")
    return match[1] + (match[3] or ""), int(match[2])


def read(machine: Machine, operand: Operand, kind: str, size: int) -> np.ndarray:
    """An operand as numbers of a type."""
    if kind.endswith("x2"):
        packed = machine.bits(operand, 2 * size)
        halves = np.ascontiguousarray(packed).view(UNSIGNED[size]).reshape(-1, 2)
        return _decode(halves, kind[:-2], size)
    return _decode(machine.bits(operand, size), kind, size)


def _decode(bits: np.ndarray, kind: str, size: int) -> np.ndarray:
    if kind == "bf":
        return from_bfloat16(bits)
    table: dict[int, Any] = {"f": FLOAT, "s": SIGNED}.get(kind, UNSIGNED)
    return bits if bits.dtype == bool else bits.view(table[size])


def _encode(values: np.ndarray, kind: str, size: int) -> np.ndarray:
    if kind == "bf":
        return to_bfloat16(values)
    if kind == "p":
        return values
    if kind == "f":
        bits = np.ascontiguousarray(values.astype(FLOAT[size], copy=False)).view(UNSIGNED[size])
        return np.where(np.isnan(values), NAN[size], bits) if size in NAN else bits
    return values.astype({"s": SIGNED}.get(kind, UNSIGNED)[size], copy=False)


def write(machine: Machine, operand: Operand, values: np.ndarray, kind: str, size: int, active: np.ndarray) -> None:
    if kind.endswith("x2"):
        halves = np.ascontiguousarray(_encode(values, kind[:-2], size))
        machine.put(operand, halves.view(UNSIGNED[2 * size]).reshape(-1), active)
    else:
        machine.put(operand, _encode(values, kind, size), active)


def _elementwise(names: str, function: Callable[..., np.ndarray]) -> None:
    @instruction(*names.split())
    def execute(machine: Machine, it: Instruction, active: np.ndarray) -> None:
        kind, size = _type(it.kind)
        values = [read(machine, operand, kind, size) for operand in it.operands[1:]]
        write(machine, it.operands[0], function(*values), kind, size, active)


def _fused(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
    if p.dtype == np.float32:
        return (p.astype(np.float64) * q + r).astype(np.float32)
    return p * q + r


def _divide(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    if p.dtype.kind == "f":
        return p / q
    q = np.where(q == 0, 1, q)
    quotient = np.abs(p.astype(np.int64)) // np.abs(q.astype(np.int64))
    return np.where((p < 0) != (q < 0), -quotient, quotient)


_elementwise("add", lambda p, q: p + q)
_elementwise("sub", lambda p, q: p - q)
_elementwise("neg", lambda p: -p)
_elementwise("abs", np.abs)
_elementwise("fma", _fused)
_elementwise("rcp", lambda p: 1 / p)
_elementwise("sqrt", np.sqrt)
_elementwise("rsqrt", lambda p: 1 / np.sqrt(p))
_elementwise("div", _divide)
_elementwise("rem", lambda p, q: np.fmod(p, np.where(q == 0, 1, q)))
_elementwise("and", lambda p, q: p & q)
_elementwise("or", lambda p, q: p | q)
_elementwise("xor", lambda p, q: p ^ q)
_elementwise("not", lambda p: ~p)


@instruction("min", "max")
def _extreme(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Of a number and NaN the number; NaN only where the instruction asks for it."""
    if not set(it.modifiers[:-1]) <= {"NaN", "ftz"}:
        raise machine.error(it, "unknown instruction")
    kind, size = _type(it.kind)
    numbers: dict[tuple[str, bool], Any] = {
        ("min", False): np.fmin,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("max", True): np.maximum,
    }
    values = [read(machine, operand, kind, size) for operand in it.operands[1:]]
    write(machine, it.operands[0], functools.reduce(numbers[it.op, it.has("NaN")], values), kind, size, active)


@instruction("mul", "mad")
def _multiply(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    kind, size = _type(it.kind)
    p, q = (read(machine, operand, kind, size) for operand in it.operands[1:3])
    out_size = size
    if kind not in ("s", "u", "b"):
        result = p * q
    elif it.has("wide"):
        out_size = 2 * size
        wide: Any = {"s": SIGNED}.get(kind, UNSIGNED)[out_size]
        result = p.astype(wide) * q.astype(wide)
    elif it.has("hi"):
        exact = p.astype(object) * q.astype(object)  # a 64-bit product has 128 bits
        result = (exact >> size).astype(p.dtype)
    else:
        result = p * q
    if it.op == "mad":
        result = result + read(machine, it.operands[3], kind, out_size)
    write(machine, it.operands[0], result, kind, out_size, active)


@instruction("shl", "shr")
def _shift(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    kind, size = _type(it.kind)
    value = read(machine, it.operands[1], kind, size)
    by = machine.bits(it.operands[2], 32)
    clipped = np.minimum(by, size - 1).astype(value.dtype)
    shifted = value << clipped if it.op == "shl" else value >> clipped
    if not (kind == "s" and it.op == "shr"):
        shifted = np.where(by >= size, value.dtype.type(0), shifted)
    write(machine, it.operands[0], shifted, kind, size, active)


@instruction("bfe")
def _extract_bits(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    kind, size = _type(it.kind)
    value = machine.bits(it.operands[1], size).astype(np.uint64)
    position, length = (machine.bits(o, 32).astype(np.uint64) & np.uint64(255) for o in it.operands[2:4])
    field = (value >> position) & ((np.uint64(1) << length) - np.uint64(1))
    if kind == "s":
        sign = field >> (np.maximum(length, np.uint64(1)) - np.uint64(1)) & np.uint64(1)
        field = np.where(sign == 1, field | ~((np.uint64(1) << length) - np.uint64(1)), field)
    machine.put(it.operands[0], field.astype(UNSIGNED[size]), active)


@instruction("bfi")
def _insert_bits(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    _, size = _type(it.kind)
    source, into = (machine.bits(operand, size).astype(np.uint64) for operand in it.operands[1:3])
    position, length = (machine.bits(o, 32).astype(np.uint64) & np.uint64(255) for o in it.operands[3:5])
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    machine.put(it.operands[0], (into & ~mask | source << position & mask).astype(UNSIGNED[size]), active)


@instruction("prmt")
def _permute_bytes(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Each of four bytes is chosen by four bits out of eight; the highest of them replicates the byte's sign."""
    low, high, chosen = (machine.bits(operand, 32) for operand in it.operands[1:4])
    pool = np.stack([low, high], 1).view(np.uint8)
    result = np.zeros((machine.lanes, 4), np.uint8)
    for i in range(4):
        choice = chosen >> np.uint32(4 * i)
        byte = pool[np.arange(machine.lanes), choice & np.uint32(7)]
        sign = np.where(byte >> 7, np.uint8(255), np.uint8(0))
        result[:, i] = np.where(choice & np.uint32(8), sign, byte)
    machine.put(it.operands[0], result.view(np.uint32).reshape(-1), active)


@instruction("selp")
def _select(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    _, size = _type(it.kind)
    first, second = (machine.bits(operand, size) for operand in it.operands[1:3])
    machine.put(it.operands[0], np.where(machine.bits(it.operands[3], 1), first, second), active)


_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda p, q: (p < q) | (p > q) if p.dtype.kind == "f" else p != q,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "hi": np.greater,
    "equ": lambda p, q: ~((p < q) | (p > q)),
    "neu": np.not_equal,
    "ltu": lambda p, q: ~(p >= q),
    "leu": lambda p, q: ~(p > q),
    "gtu": lambda p, q: ~(p <= q),
    "geu": lambda p, q: ~(p < q),
    "nan": lambda p, q: np.isnan(p) | np.isnan(q),
    "num": lambda p, q: ~(np.isnan(p) | np.isnan(q)),
}


@instruction("setp")
def _compare(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Into one predicate, or two: of both numbers of a pair, else the result and its opposite."""
    kind, size = _type(it.kind)
    p, q = (read(machine, operand, kind, size) for operand in it.operands[1:3])
    result, target = _COMPARE[it.modifiers[0]](p, q), it.operands[0]
    results = result.T if kind.endswith("x2") else (result, ~result)
    for into, found in zip(target.items if isinstance(target, Vector) else (target,), results, strict=False):
        if len(it.operands) > 3:
            combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[it.modifiers[1]]
            found = combine(found, machine.bits(it.operands[3], 1))
        machine.put(into, found, active)


@instruction("mov")
def _move(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Also packs a vector of registers into one, and unpacks."""
    target, source = it.operands
    _, size = _type(it.kind)
    if isinstance(source, Vector):
        part = size // len(source.items)
        parts = np.stack([machine.bits(item, part) for item in source.items], 1)
        machine.put(target, np.ascontiguousarray(parts).view(UNSIGNED[size]).reshape(-1), active)
    elif isinstance(target, Vector):
        part = size // len(target.items)
        parts = np.ascontiguousarray(machine.bits(source, size)).view(UNSIGNED[part]).reshape(-1, len(target.items))
        for i, item in enumerate(target.items):
            machine.put(item, parts[:, i], active)
    else:
        machine.put(target, machine.bits(source, size), active)


@instruction("cvta")
def _convert_address(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    machine.put(it.operands[0], machine.bits(it.operands[1], 64), active)


@instruction("cvt")
def _convert(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    if it.has("tf32"):  # rna: ties away from zero; NaN and infinity stay
        bits = machine.bits(it.operands[1], 32)
        rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        special = bits & np.uint32(0x7F800000) == np.uint32(0x7F800000)
        return machine.put(it.operands[0], np.where(special, bits, rounded), active)
    (to_kind, to_size), (from_kind, from_size) = _type(it.modifiers[-2]), _type(it.kind)
    if to_kind.endswith("x2"):  # the first source is the upper half
        high, low = (read(machine, operand, from_kind, from_size) for operand in it.operands[1:3])
        both = np.stack([low, high], 1)
        both = np.maximum(both, 0) if it.has("relu") else both
        return write(machine, it.operands[0], both, to_kind, to_size, active)
    value = read(machine, it.operands[1], from_kind, from_size)
    if value.dtype.kind == "f" and to_kind in ("s", "u"):
        value = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[it.modifiers[0]](value)
        limits = np.iinfo({"s": SIGNED}.get(to_kind, UNSIGNED)[to_size])
        value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
    if value.dtype.kind != "f" and to_kind in ("f", "bf"):
        value = value.astype(np.float64)
    write(machine, it.operands[0], value, to_kind, to_size, active)


def _registers(operand: Operand) -> list[Operand]:
    return list(operand.items) if isinstance(operand, Vector) else [operand]


@instruction("ld")
def _load(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    kind, size = _type(it.kind)
    targets = _registers(it.operands[0])
    lanes = np.flatnonzero(active)
    width = size // 8 * len(targets)
    addresses = machine.address(it.operands[1])[lanes]
    if any(m.startswith("shared") for m in it.modifiers):
        machine.count_conflicts(addresses, width, lanes)
        data = machine.shared.load(addresses, width, lanes)
    elif any(m.startswith("param") for m in it.modifiers):
        data = machine.parameters[addresses[:, None] + np.arange(width)]
    elif it.has("local"):
        data = machine.local[lanes[:, None], addresses[:, None] + np.arange(width)]
    else:
        data = machine.memory.load(addresses, width, machine.block[lanes])
    number = SIGNED[size] if kind == "s" else UNSIGNED[size]  # a wider register is filled with the sign
    values = np.ascontiguousarray(data).view(number).reshape(lanes.size, len(targets))
    for i, target in enumerate(targets):
        full = np.zeros(machine.lanes, number)
        full[lanes] = values[:, i]
        machine.put(target, full, active)


@instruction("st")
def _store(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    _, size = _type(it.kind)
    lanes = np.flatnonzero(active)
    addresses = machine.address(it.operands[0])[lanes]
    values = np.stack([machine.bits(source, size)[lanes] for source in _registers(it.operands[1])], 1)
    data = np.ascontiguousarray(values).view(np.uint8).reshape(lanes.size, -1)
    if any(m.startswith("shared") for m in it.modifiers):
        machine.count_conflicts(addresses, data.shape[1], lanes)
        machine.shared.store(addresses, data, lanes)
    elif it.has("local"):
        machine.local[lanes[:, None], addresses[:, None] + np.arange(data.shape[1])] = data
    else:
        machine.memory.store(addresses, data, machine.block[lanes])
        machine.unfenced[lanes] = True


@instruction("atom")
def _atomic(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Additions to 32 bits in global memory, one lane after the other."""
    if not it.has("add") or it.kind not in ("u32", "s32") or any(m.startswith("shared") for m in it.modifiers):
        raise machine.error(it, "an atomic access of this kind", int(active.argmax()))
    addresses, values = machine.address(it.operands[1]), machine.bits(it.operands[2], 32)
    before = np.zeros(machine.lanes, np.uint32)
    for lane in np.flatnonzero(active):
        block = machine.block[lane]
        fenced = not machine.unfenced[machine.block == block].any()
        before[lane] = machine.memory.add(int(addresses[lane]), int(values[lane]), int(block), fenced)
    machine.put(it.operands[0], before, active)


@instruction("cp")
def _copy(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Asynchronous copies: shared memory is NaN from the issue to the wait that covers it."""
    if it.has("commit_group"):
        machine.copy_groups.append(len(machine.copies))
        return
    if it.has("wait_group") or it.has("wait_all"):
        pending = it.operands[0].bits if isinstance(it.operands[0], Immediate) else 0
        if len(machine.copy_groups) > pending:
            arrived = machine.copy_groups[len(machine.copy_groups) - pending - 1]
            for addresses, data, lanes in machine.copies[:arrived]:
                machine.shared.claim(addresses, data.shape[1], lanes)
                machine.shared.put(addresses, data, data.shape[1], lanes)
            machine.copies = machine.copies[arrived:]
            kept = machine.copy_groups[len(machine.copy_groups) - pending :] if pending else []
            machine.copy_groups = [group - arrived for group in kept]
        return
    target, source, width, *taken = it.operands
    assert isinstance(width, Immediate)
    lanes = np.flatnonzero(active)
    into, addresses = machine.address(target)[lanes], machine.address(source)[lanes]
    wanted = machine.bits(taken[0], 32)[lanes] if taken else np.full(lanes.size, width.bits)
    data = np.zeros((lanes.size, width.bits), np.uint8)
    for length in np.unique(wanted[wanted > 0]):
        some = wanted == length
        data[some, :length] = machine.memory.load(addresses[some], int(length), machine.block[lanes[some]], width.bits)
    machine.shared.claim(into, width.bits, lanes)
    machine.shared.put(into, 0xFF, width.bits, lanes)
    machine.copies.append((into, data, lanes))
