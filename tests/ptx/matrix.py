"""Instructions of whole warps, warp groups and blocks: barriers, shuffles, matrix loads and matrix products.

Fragment and shared-memory layouts are those of the PTX ISA, "Warp level matrix instructions" and "Asynchronous warpgroup
level matrix instructions".
"""

import re

import numpy as np

from .machine import UNSIGNED, WARP, Machine, instruction
from .parser import Immediate, Instruction, Operand, Vector
from .scalar import from_bfloat16

_GROUP = 4 * WARP


def _warps(machine: Machine, it: Instruction, active: np.ndarray) -> np.ndarray:
    """The warps that execute; all of their lanes must."""
    lanes = active.reshape(-1, WARP)
    warps = np.flatnonzero(lanes.any(1))
    if not lanes[warps].all():
        raise machine.error(it, "a warp's instruction without all of its lanes", int(warps[0]) * WARP)
    return warps


def _by_warp(machine: Machine, operand: Operand, warps: np.ndarray, bits: int = 32) -> np.ndarray:
    return np.ascontiguousarray(machine.bits(operand, bits).reshape(-1, WARP)[warps])


def _put_by_warp(machine: Machine, operand: Operand, warps: np.ndarray, values: np.ndarray, active: np.ndarray) -> None:
    full = np.zeros((machine.lanes // WARP, WARP), np.uint32)
    full[warps] = values
    machine.put(operand, full.reshape(-1), active)


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Matrix elements as float32 from raw bits; TF32 ignores the low 13."""
    if kind == "bf16":
        return from_bfloat16(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


@instruction("bar", "barrier")
def _barrier(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    if it.has("warp"):
        machine.shared.warp_epoch[_warps(machine, it, active)] += 1
        return
    arrived, alive = active.reshape(-1, machine.threads), machine.alive.reshape(-1, machine.threads)
    blocks = arrived.any(1)
    incomplete = blocks & (arrived != alive).any(1)
    if incomplete.any():
        raise machine.error(it, "barrier not reached by the whole block", int(incomplete.argmax()) * machine.threads)
    machine.shared.epoch[blocks] += 1


@instruction("fence", "membar")
def _fence(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """What a thread wrote is seen in order here; other blocks see it as :mod:`.order` says."""
    machine.unfenced &= ~active
    for block in np.unique(machine.block[active]):
        machine.memory.order.fence(int(block))


@instruction("shfl")
def _shuffle(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    target, *_ = _items(it.operands[0])
    value = machine.bits(it.operands[1], 32)
    by = machine.bits(it.operands[2], 32).astype(np.int64)
    clamp = machine.bits(it.operands[3], 32).astype(np.int64)
    lane = np.arange(machine.lanes) % WARP
    segment, last = clamp >> 8 & 31, clamp & 31
    low = lane & segment
    high = low | (last & ~segment)
    wanted = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": low | (by & ~segment)}[it.modifiers[1]]
    inside = wanted >= last if it.has("up") else wanted <= high
    source = np.arange(machine.lanes) - lane + np.where(inside, wanted, lane)
    absent = active & ~active[source]
    if absent.any():
        raise machine.error(it, "a shuffle reads a lane that does not take part", int(absent.argmax()))
    machine.put(target, value[source], active)


@instruction("vote")
def _vote(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """Of predicates, over a warp of which all lanes take part."""
    lanes = active.reshape(-1, WARP)
    if (lanes.any(1) & ~lanes.all(1)).any():
        raise machine.error(it, "a vote in which not all lanes of a warp take part")
    votes = machine.bits(it.operands[1], 1).reshape(-1, WARP)
    machine.put(it.operands[0], np.repeat({"all": votes.all(1), "any": votes.any(1)}[it.modifiers[1]], WARP), active)


@instruction("elect")
def _elect(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    leader = np.repeat(active.reshape(-1, WARP).argmax(1), WARP)
    lane, chosen = _items(it.operands[0])
    machine.put(lane, leader.astype(np.uint32), active)
    machine.put(chosen, np.arange(machine.lanes) % WARP == leader, active)


def _matrices(it: Instruction) -> int:
    return int(next(m for m in it.modifiers if re.fullmatch(r"x\d", m))[1])


@instruction("ldmatrix")
def _load_matrix(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """8x8 matrices of 16-bit numbers; lane i of each eight holds the address of row i."""
    warps, count = _warps(machine, it, active), _matrices(it)
    lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
    addresses = machine.address(it.operands[1])[lanes]
    for matrix in np.arange(lanes.size).reshape(-1, count, 8).swapaxes(0, 1):
        machine.count_conflicts(addresses[matrix].reshape(-1), 16, lanes[matrix].reshape(-1))
    rows = np.ascontiguousarray(machine.shared.load(addresses, 16, lanes)).view(np.uint16)
    rows = rows.reshape(warps.size, count, 8, 8)
    if it.has("trans"):
        rows = rows.swapaxes(2, 3)
    pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(warps.size, count, WARP)
    for i, target in enumerate(_items(it.operands[0])):
        _put_by_warp(machine, target, warps, pairs[:, i], active)


@instruction("stmatrix")
def _store_matrix(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    warps, count = _warps(machine, it, active), _matrices(it)
    pairs = np.stack([_by_warp(machine, source, warps) for source in _items(it.operands[1])], 1)
    rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(warps.size, count, 8, 8)
    if it.has("trans"):
        rows = np.ascontiguousarray(rows.swapaxes(2, 3))
    lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
    data = rows.reshape(-1, 8).view(np.uint8)
    machine.shared.store(machine.address(it.operands[0])[lanes], data, lanes)


@instruction("mma")
def _matrix_product(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """``mma.sync.m16n8kK``: D = A B + C per warp; 16 or 32 bytes of A and B along K."""
    warps = _warps(machine, it, active)
    kind = it.kind if it.kind != "f32" else it.modifiers[-2]
    k = int(next(m for m in it.modifiers if m.startswith("m16n8k")).removeprefix("m16n8k"))
    in_register = 1 if kind == "tf32" else 2
    half = 4 * in_register  # along K, of one register in each of four lanes
    if kind not in ("bf16", "f16", "tf32") or k not in (half, 2 * half):
        raise machine.error(it, "unknown instruction")
    targets, a_operands, b_operands, c_operands = (_items(operand) for operand in it.operands)

    def fragment(operand: Operand) -> np.ndarray:
        bits = _by_warp(machine, operand, warps).view(UNSIGNED[32 // in_register])
        return _numbers(bits, kind).reshape(warps.size, 8, half)

    a, b = np.zeros((warps.size, 16, k), np.float32), np.zeros((warps.size, k, 8), np.float32)
    for i, operand in enumerate(a_operands):
        a[:, 8 * (i % 2) : 8 * (i % 2) + 8, half * (i // 2) : half * (i // 2) + half] = fragment(operand)
    for i, operand in enumerate(b_operands):
        b[:, half * i : half * i + half] = fragment(operand).swapaxes(1, 2)
    product = a @ b
    for i, (target, addend) in enumerate(zip(targets, c_operands, strict=True)):
        rows = product[:, 8 * (i // 2) : 8 * (i // 2) + 8].reshape(warps.size, 8, 4, 2)[..., i % 2]
        total = rows.reshape(warps.size, WARP) + _by_warp(machine, addend, warps).view(np.float32)
        _put_by_warp(machine, target, warps, total.astype(np.float32).view(np.uint32), active)


@instruction("wgmma")
def _warp_group_product(machine: Machine, it: Instruction, active: np.ndarray) -> None:
    """``wgmma.mma_async.m64nNkK``: D = A B (+ D) per warp group; done at once, so commit and wait do nothing."""
    if it.modifiers[0] != "mma_async":
        return
    warps = _warps(machine, it, active)
    if warps.size % 4 or (warps[::4] % 4).any():
        raise machine.error(it, "a warp group's instruction without all of its warps", int(warps[0]) * WARP)
    groups = warps[::4] // 4
    n = int(re.fullmatch(r"m64n(\d+)k\d+", it.modifiers[3])[1])  # type: ignore[index]
    kind = it.kind
    size = 4 if kind == "tf32" else 2
    targets, a_operand, b_operand, use_d, *flags = it.operands
    scale_a, scale_b, *transposed = [f.bits for f in flags if isinstance(f, Immediate)]
    if isinstance(a_operand, Vector):
        a = _register_fragment(machine, a_operand, groups, kind, size)
        transpose_b = transposed[-1] if transposed else 0
    else:
        transpose_a, transpose_b = transposed or (0, 0)
        a = _numbers(_descriptor_tile(machine, it, a_operand, groups, 64, size, bool(transpose_a)), kind)
    b = _numbers(_descriptor_tile(machine, it, b_operand, groups, n, size, bool(transpose_b)), kind)
    product = (a * _signed(scale_a)) @ (b * _signed(scale_b)).swapaxes(1, 2)
    product = product.reshape(groups.size, 4, 2, 8, n // 8, 4, 2)  # warp, upper half, row, column eight, pair, column
    keep = machine.bits(use_d, 1).reshape(-1, _GROUP)[groups]
    for i, target in enumerate(_items(targets)):
        values = product[:, :, i // 2 % 2, :, i // 4, :, i % 2].reshape(groups.size, _GROUP)
        full = machine.bits(target, 32).reshape(-1, _GROUP).copy()
        before = np.ascontiguousarray(full[groups]).view(np.float32)
        full[groups] = (values + np.where(keep, before, np.float32(0))).astype(np.float32).view(np.uint32)
        machine.put(target, full.reshape(-1), active)


def _signed(bits: int) -> np.float32:
    return np.float32(1 if bits == 1 else -1)


def _register_fragment(machine: Machine, operand: Vector, groups: np.ndarray, kind: str, size: int) -> np.ndarray:
    k = 32 // size
    a = np.zeros((groups.size, 4, 16, k), np.float32)
    for i, item in enumerate(operand.items):
        bits = np.ascontiguousarray(machine.bits(item, 32).reshape(-1, _GROUP)[groups]).view(UNSIGNED[8 * size])
        rows, columns = slice(8 * (i % 2), 8 * (i % 2) + 8), slice(k // 2 * (i // 2), k // 2 * (i // 2) + k // 2)
        a[:, :, rows, columns] = _numbers(bits, kind).reshape(groups.size, 4, 8, k // 2)
    return a.reshape(groups.size, 64, k)


def _descriptor_tile(
    machine: Machine, it: Instruction, operand: Operand, groups: np.ndarray, rows: int, size: int, transposed: bool
) -> np.ndarray:
    """Raw bits (groups, rows, 32 bytes of K) behind a matrix descriptor, in any of the swizzled layouts."""
    descriptors = machine.bits(operand, 64).reshape(-1, _GROUP)[groups]
    if (descriptors != descriptors[:, :1]).any():
        raise machine.error(it, "a matrix descriptor differs within its warp group", int(groups[0]) * _GROUP)
    field = descriptors[:, :1, None].astype(np.int64)
    start, leading, stride = (field & 0x3FFF) << 4, (field >> 16 & 0x3FFF) << 4, (field >> 32 & 0x3FFF) << 4
    mode = int(descriptors[0, 0] >> np.uint64(62))
    row_bytes, mask = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[mode]
    in_core = 16 // size  # numbers in 16 bytes, a row of a core matrix
    row, k = np.arange(rows)[None, :, None], np.arange(2 * in_core)[None, None, :]
    if not transposed:
        along = k * size if mode else k // in_core * leading + k % in_core * size
        address = start + row % 8 * row_bytes + row // 8 * stride + along
    else:
        width = row_bytes // size  # numbers of a row within the swizzled atom
        blocks = row // width * leading + k // 8 * stride if mode else row // width * stride + k // 8 * leading
        address = start + row % width * size + k % 8 * row_bytes + blocks
    address = address ^ ((address >> 7 & mask) << 4)
    address = np.broadcast_to(address, (groups.size, rows, 2 * in_core)).reshape(groups.size, -1)
    lanes = groups[:, None] * _GROUP + np.arange(address.shape[1]) % _GROUP
    data = machine.shared.load(address.reshape(-1), size, lanes.reshape(-1))
    return np.ascontiguousarray(data).view(UNSIGNED[8 * size]).reshape(groups.size, rows, 2 * in_core)
