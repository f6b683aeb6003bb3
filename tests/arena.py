"""Copies of tensors between guard bytes, for kernels to work on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GUARD = 512  # bytes before and after every buffer; a multiple of the alignment that GPU memory has


class Buffer(NamedTuple):
    """A copy of a storage between guards: bytes ``begin`` to ``end`` of the arena."""

    begin: int
    end: int


class Arena:
    """Copies of all the storages of a call, one after the other, with guards of NaN bits."""

    def __init__(self, tensors: Sequence[Tensor], workspace: int) -> None:
        self._buffers: dict[int, Buffer] = {}
        at, sources = GUARD, []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._buffers:
                self._buffers[storage.data_ptr()] = Buffer(at, at + storage.nbytes())
                sources.append((at, storage))
                at += -(-storage.nbytes() // GUARD) * GUARD + GUARD
        self._workspace = Buffer(at, at + workspace)
        memory = torch.full((at + -(-workspace // GUARD) * GUARD + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        self.bytes = memory[-memory.data_ptr() % GUARD :]
        for begin, storage in sources:
            self.bytes[begin : begin + storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]

    def view(self, tensor: Tensor, memory: Tensor | None = None) -> Tensor:
        """The copy of ``tensor``, here or in a clone of the arena's bytes."""
        memory = self.bytes if memory is None else memory
        begin = memory.storage_offset() + self._buffers[tensor.untyped_storage().data_ptr()].begin
        empty = torch.empty(0, dtype=tensor.dtype)
        offset = begin // tensor.element_size() + tensor.storage_offset()
        return empty.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())  # type: ignore[call-overload]

    def address(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self.view(tensor).data_ptr()

    def workspace(self) -> int:
        return self.bytes.data_ptr() + self._workspace.begin

    def buffers(self) -> list[Tensor]:
        """The bytes of each buffer, the workspace last."""
        return [self.bytes[buffer.begin : buffer.end] for buffer in (*self._buffers.values(), self._workspace)]

    def finish(self, before: Tensor, results: Sequence[Tensor], what: str) -> None:
        """Checks that only ``results`` and the workspace differ from ``before``, and copies the results out."""
        before[self._workspace.begin : self._workspace.end] = self.bytes[self._workspace.begin : self._workspace.end]
        for tensor in results:
            self.view(tensor, before).copy_(self.view(tensor))
        changed = (before != self.bytes).nonzero()
        assert not changed.numel(), f"{what}: {len(changed)} bytes beside the results were written, first {changed[0]}"
        for tensor in results:
            tensor.copy_(self.view(tensor))
