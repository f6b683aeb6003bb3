"""Global and shared memory of executed PTX, and the checks of every access: bounds, alignment, races.

Two threads race on shared memory if no barrier is between their accesses and one of them writes; two blocks race on
global memory if one of them writes and the other does not see it (:mod:`.order`). Shared memory starts as NaN, and stays so where an asynchronous copy has not been
waited for.
"""

from typing import NamedTuple

import numpy as np

from .order import Order

_WARP = 32
_NOBODY, _MANY = -1, -(2**30)


class AccessError(Exception):
    """What is wrong with an access, and which of the accessing lanes did it."""

    def __init__(self, message: str, lane: int) -> None:
        super().__init__(message)
        self.lane = lane


def _check_alignment(addresses: np.ndarray, size: int) -> None:
    wrong = addresses % size != 0
    if wrong.any():
        raise AccessError(f"misaligned {size}-byte access", int(wrong.argmax()))


def bank_conflicts(addresses: np.ndarray, size: int, lanes: np.ndarray) -> int:
    """How many passes more than without conflicts: 32 banks of 4 bytes, each gives one word to all who want it.

    8-byte accesses are served half a warp at a time, 16-byte accesses a quarter.
    """
    group = lanes // min(_WARP, 128 // size)
    words = addresses.astype(np.int64)[:, None] // 4 + np.arange(max(size // 4, 1))
    once = np.unique(group[:, None] * 2**32 + words)
    banks, passes = np.unique(once >> 32 << 5 | once % 32, return_counts=True)
    most = np.zeros(group.max(initial=0) + 1, np.int64)
    np.maximum.at(most, banks >> 5, passes)
    return int((most[most > 0] - 1).sum())


class GlobalMemory:
    """The tensors given to a launch; other addresses do not exist. ``read`` and ``written`` are bytes by tensor."""

    def __init__(self, tensors: list[np.ndarray], blocks: int) -> None:
        self.order = Order(blocks)
        self.tensors = sorted(tensors, key=lambda t: t.ctypes.data)
        self.bases = np.array([t.ctypes.data for t in self.tensors], np.int64)
        self.bytes = [t.view(np.uint8).reshape(-1) for t in self.tensors]
        self.read, self.written = ([0] * len(tensors) for _ in range(2))
        self.writer = [np.full(b.size, _NOBODY, np.int32) for b in self.bytes]
        self.reader = [np.full(b.size, _NOBODY, np.int32) for b in self.bytes]
        self.release = [np.zeros(b.size, np.int32) for b in self.bytes]  # of the writer, when it wrote

    def load(self, addresses: np.ndarray, size: int, blocks: np.ndarray, align: int | None = None) -> np.ndarray:
        """``(lanes, size)`` bytes; ``blocks`` is the block of each lane."""
        result = np.zeros((addresses.size, size), np.uint8)
        for tensor, lanes, where in self._locate(addresses, size, "load", align):
            self._check_race(tensor, where, blocks[lanes], lanes, write=False)
            result[lanes] = self.bytes[tensor][where]
            self.read[tensor] += where.size
        return result

    def store(self, addresses: np.ndarray, data: np.ndarray, blocks: np.ndarray) -> None:
        for tensor, lanes, where in self._locate(addresses, data.shape[1], "store"):
            self._check_race(tensor, where, blocks[lanes], lanes, write=True)
            self.bytes[tensor][where] = data[lanes]
            self.written[tensor] += where.size

    def add(self, address: int, value: int, block: int, fenced: bool) -> int:
        """Adds to 32 bits atomically, and returns what they were. Atomic accesses do not race with each other."""
        ((tensor, _, where),) = self._locate(np.array([address]), 4, "atomic access")
        self.order.access(block, address, fenced)
        before = int(self.bytes[tensor][where].view(np.uint32)[0, 0])
        self.bytes[tensor][where] = np.array([(before + value) % 2**32], np.uint32).view(np.uint8)
        return before

    def touched(self, tensor: int) -> tuple[int, int]:
        """How many different bytes of a tensor were read and written."""
        return int((self.reader[tensor] != _NOBODY).sum()), int((self.writer[tensor] != _NOBODY).sum())

    def _locate(
        self, addresses: np.ndarray, size: int, kind: str, align: int | None = None
    ) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(tensor, lanes, byte positions) for each tensor that is accessed."""
        if not addresses.size:
            return []
        addresses = addresses.astype(np.int64)
        _check_alignment(addresses, align or size)
        tensor = np.searchsorted(self.bases, addresses, side="right") - 1
        offset = addresses - self.bases[tensor]
        outside = (tensor < 0) | (offset + size > np.array([b.size for b in self.bytes])[tensor])
        if outside.any():
            raise AccessError(f"global {kind} out of bounds", int(outside.argmax()))
        return [
            (int(t), np.flatnonzero(tensor == t), offset[tensor == t][:, None] + np.arange(size))
            for t in np.unique(tensor)
        ]

    def _check_race(self, tensor: int, where: np.ndarray, blocks: np.ndarray, lanes: np.ndarray, write: bool) -> None:
        writer, reader, me = self.writer[tensor], self.reader[tensor], blocks[:, None]
        race = (writer[where] != _NOBODY) & (writer[where] != me)
        if write:
            race |= (reader[where] != _NOBODY) & (reader[where] != me)
        for i, byte in zip(*np.nonzero(race), strict=True):
            at, block = where[i, byte], int(blocks[i])
            read = write and reader[at] not in (_NOBODY, block)
            if read or not self.order.sees(block, int(writer[at]), int(self.release[tensor][at])):
                raise AccessError("race between blocks", int(lanes[i]))
        if write:
            writer[where] = me
            self.release[tensor][where] = self.order.releases[me]
        else:
            reader[where] = np.where((reader[where] == _NOBODY) | (reader[where] == me), me, _MANY)


class SharedMemory:
    """The shared memory of all blocks that execute together, ``size`` bytes each.

    Per byte the last writer and the readers since are known with the barriers that their block and warp had passed.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        self.data = np.full(blocks * size, 0xFF, np.uint8)
        self.epoch = np.zeros(blocks, np.int32)
        self.warp_epoch = np.zeros(blocks * threads // _WARP, np.int32)
        self.writes, self.reads = _Accesses(blocks * size), _Accesses(blocks * size)

    def load(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        where, now = self._locate(addresses, size, lanes)
        self.writes.check(where, now)
        self.reads.add(where, now)
        return self.data[where]

    def store(self, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        self.claim(addresses, data.shape[1], lanes)
        where, _ = self._locate(addresses, data.shape[1], lanes)
        self.data[where] = data
        differs = self.data[where] != data
        if differs.any():
            raise AccessError("two threads store different values to one address", int(differs.any(1).argmax()))

    def claim(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """Notes a write by these lanes now, whenever the data arrives."""
        where, now = self._locate(addresses, size, lanes)
        self.writes.check(where, now)
        self.reads.check(where, now)
        self.writes.set(where, now)

    def put(self, addresses: np.ndarray, data: np.ndarray | int, size: int, lanes: np.ndarray) -> None:
        """Changes data without an access: an asynchronous copy begins (NaN) or arrives."""
        self.data[self._locate(addresses, size, lanes)[0]] = data

    def _locate(self, addresses: np.ndarray, size: int, lanes: np.ndarray) -> "tuple[np.ndarray, _Now]":
        addresses = addresses.astype(np.int64)
        _check_alignment(addresses, size)
        outside = addresses + size > self.size
        if outside.any():
            raise AccessError(f"shared access out of bounds, {self.size} bytes", int(outside.argmax()))
        block = lanes // self.threads
        where = (block * self.size + addresses)[:, None] + np.arange(size)
        thread = (lanes % self.threads).astype(np.int32)
        return where, _Now(thread[:, None], self.epoch[block][:, None], self.warp_epoch[lanes // _WARP][:, None])


class _Now(NamedTuple):
    """Who accesses, after how many barriers of the block and of the warp; columns, one row per lane."""

    thread: np.ndarray
    epoch: np.ndarray
    warp_epoch: np.ndarray


class _Accesses:
    """Per byte the latest access: a thread, several of one warp (-2 - warp) or of several warps (``_MANY``)."""

    def __init__(self, size: int) -> None:
        self.who, self.epoch, self.warp_epoch = (np.full(size, -1, np.int32) for _ in range(3))

    def check(self, where: np.ndarray, now: _Now) -> None:
        who = self.who[where]
        same_warp = _warp_of(who) == now.thread // _WARP
        race = (self.epoch[where] == now.epoch) & (who != now.thread)
        race &= ~same_warp | (self.warp_epoch[where] == now.warp_epoch)
        if race.any():
            lane = int(race.any(1).argmax())
            raise AccessError(f"shared-memory race of thread {int(now.thread[lane, 0])} with another", lane)

    def set(self, where: np.ndarray, now: _Now) -> None:
        self.who[where], self.epoch[where], self.warp_epoch[where] = now

    def add(self, where: np.ndarray, now: _Now) -> None:
        before = self.who[where]
        fresh = (self.epoch[where] != now.epoch) | (before == now.thread)
        self.set(where, _Now(np.where(fresh, now.thread, _join(before, now.thread)), now.epoch, now.warp_epoch))
        lost = self.who[where] != np.where(fresh, now.thread, _join(before, now.thread))  # by lanes of the same load
        self.who[where[lost]] = _join(self.who[where], np.broadcast_to(now.thread, where.shape))[lost]


def _warp_of(who: np.ndarray) -> np.ndarray:
    return np.where(who >= 0, who // _WARP, np.where(who == _MANY, -1, -2 - who))


def _join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    warp = _warp_of(first)
    return np.where(warp == _warp_of(second), -2 - warp, _MANY).astype(np.int32)
