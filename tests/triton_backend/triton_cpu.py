"""Triton's interpreter, repaired and watched. Import before triton: it turns the interpreter on.

As shipped (3.6, 3.7) the interpreter multiplies the bit patterns of bfloat16 in ``tl.dot`` and in arithmetic, truncates
where a GPU rounds, keeps NaN where a GPU's maximum loses it, and lets any access and any race pass. Here bfloat16
computes in float32 and rounds to nearest even; a maximum keeps NaN only where it is told to;
a load's masked lanes without ``other`` are NaN, as they are undefined on a GPU; and inside :func:`watch` every access
must belong to an argument, no two programs may touch one element unless all of them read it, and bytes are counted.
What it does again and again, to a multiple of its time, is done once.
"""

import contextlib
import dataclasses
import functools
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to the nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _repair_conversion() -> None:
    shipped = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return widen(np.asarray(data)).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return narrow(np.asarray(data))
        return shipped(data, source, target, rounding)

    interpreter._convert_float = convert


def _repair_arithmetic(name: str, operands: int) -> None:
    shipped = getattr(Builder, name)

    def apply(self: Any, *arguments: Any) -> Any:
        values, operator = arguments[:operands], arguments[operands]
        if operator is np.where or not any(_is_bfloat16(v) for v in values):
            return shipped(self, *arguments)
        result = operator(*(widen(v.data) if _is_bfloat16(v) else v.data for v in values))
        return Handle(narrow(result), tl.bfloat16) if result.dtype == np.float32 else Handle(result, tl.int1)

    setattr(Builder, name, apply)


def _repair_dot() -> None:
    shipped = Builder.create_dot

    def exact(handle: Any) -> Any:
        if _is_bfloat16(handle):
            return Handle(widen(handle.data), tl.float32)
        if handle.dtype.scalar == tl.float16:
            return Handle(handle.data.astype(np.float32), tl.float32)
        return handle

    Builder.create_dot = lambda self, a, b, d, *options: shipped(self, exact(a), exact(b), d, *options)


def _repair_loop_bounds() -> None:
    """A scalar is an array of one element, which numpy 2.4 does not take for an index (triton 3.6)."""
    shipped = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any, *rest: Any) -> None:
        shipped(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch


def _do_once() -> None:
    """The language is patched for good, not at every call of a device function, and numpy's dtypes are looked up in a table
    that stays. Integers are not checked for overflow: an address made of one that did belongs to no argument."""
    patched, shipped = functools.cache(interpreter._patch_lang), interpreter._get_np_dtype
    scalar = functools.cache(shipped)

    def patch(function: Any) -> Any:
        patched(function)
        return interpreter._LangPatchScope()

    def np_dtype(dtype: Any) -> Any:
        element = dtype.scalar
        return shipped(dtype) if element.is_ptr() else scalar(element)

    interpreter._patch_lang, interpreter._get_np_dtype = patch, np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


class AccessError(AssertionError):
    """An access out of bounds, a race between programs, or one element stored twice by one program."""


@dataclasses.dataclass
class Traffic:
    """Bytes that a kernel asked for, by argument; ``distinct`` counts an element once in all programs."""

    loaded: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    distinct_loaded: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))


_NOBODY, _MANY = -1, -2


class _Storage:
    """The memory behind one or more arguments: per element, which argument it belongs to and who touched it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.base = tensor.untyped_storage().data_ptr()
        self.item = tensor.element_size()
        elements = tensor.untyped_storage().nbytes() // self.item
        self.owner = np.full(elements, -1, np.int32)
        self.writer, self.reader = np.full(elements, _NOBODY, np.int32), np.full(elements, _NOBODY, np.int32)
        self._place = np.empty(elements, np.int64)

    def once(self, index: np.ndarray) -> np.ndarray:
        """Elements without those that come again."""
        places = np.arange(index.size)
        self._place[index] = places
        return index[self._place[index] == places]

    def add(self, number: int, tensor: torch.Tensor) -> None:
        index = np.array([tensor.storage_offset()], np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = np.unique((index[:, None] + np.arange(size) * stride).reshape(-1))
        self.owner[index] = np.where(self.owner[index] == -1, number, self.owner[index])


class Watch:
    """What :func:`watch` gives: ``launches``, the kernels run with their traffic, in order."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, Traffic]] = []
        self.program = 0
        self._names: list[str] = []
        self._storages: list[_Storage] = []

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.launches.append((kernel, Traffic()))
        self._names = []
        storages: dict[int, _Storage] = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.numel():
                storage = storages.setdefault(value.untyped_storage().data_ptr(), _Storage(value))
                storage.add(len(self._names), value)
                self._names.append(name)
        self._storages = sorted(storages.values(), key=lambda s: s.base)

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask].astype(np.int64)
        if not addresses.size:
            return
        bases = np.array([s.base for s in self._storages])
        which = np.searchsorted(bases, addresses, side="right") - 1
        for number in np.flatnonzero(np.bincount(which + 1)) - 1:
            self._access_storage(kind, self._storages[number] if number >= 0 else None, addresses[which == number])

    def _access_storage(self, kind: str, storage: _Storage | None, addresses: np.ndarray) -> None:
        if storage is None:
            raise AccessError(f"{kind} out of bounds: below every argument, program {self.program}")
        index = (addresses - storage.base) // storage.item
        outside = index >= storage.owner.size
        outside[~outside] |= storage.owner[index[~outside]] == -1
        if outside.any():
            raise AccessError(
                f"{kind} out of bounds: {int(outside.sum())} elements of no argument, program {self.program}"
            )
        unread = storage.reader[index] == _NOBODY
        other_writer = (storage.writer[index] != _NOBODY) & (storage.writer[index] != self.program)
        other_reader = ~unread & (storage.reader[index] != self.program)
        if (other_writer | (other_reader if kind == "store" else False)).any():
            raise AccessError(f"race: {kind} by program {self.program} of an element that another touched")
        if kind == "store":
            if storage.once(index).size != index.size:
                raise AccessError(f"an element stored twice by program {self.program}")
            storage.writer[index] = self.program
        else:
            alone = unread | (storage.reader[index] == self.program)
            storage.reader[index] = np.where(alone, self.program, _MANY)
        self._count(kind, storage, index, unread)

    def _count(self, kind: str, storage: _Storage, index: np.ndarray, unread: np.ndarray) -> None:
        traffic = self.launches[-1][1]
        self._add(traffic.stored if kind == "store" else traffic.loaded, storage, index)
        if kind == "load":
            self._add(traffic.distinct_loaded, storage, storage.once(index[unread]))

    def _add(self, total: dict[str, int], storage: _Storage, index: np.ndarray) -> None:
        counts = np.bincount(storage.owner[index])
        for owner in np.flatnonzero(counts):
            total[self._names[owner]] += int(counts[owner]) * storage.item


_watch: list[Watch] = []


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Checks and counts every access of the kernels run inside; raises AccessError (wrapped by the interpreter)."""
    _watch.append(Watch())
    try:
        yield _watch[-1]
    finally:
        _watch.pop()


def _watch_memory() -> None:
    load, store, set_grid_idx = Builder.create_masked_load, Builder.create_masked_store, Builder.set_grid_idx
    init_arguments = interpreter.GridExecutor._init_args_hst

    def watched_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        if _watch:
            _watch[-1].access("load", pointers.data, mask.data)
        if other is None and not np.all(mask.data):
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            poison: Any = np.uint16(0x7FC0) if element == tl.bfloat16 else np.nan if dtype.kind == "f" else 0
            other = Handle(np.full(pointers.data.shape, poison, dtype=dtype), element)
        return load(self, pointers, mask, other, *options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        if _watch:
            _watch[-1].access("store", pointers.data, mask.data)
        return store(self, pointers, value, mask, *options)

    def numbered_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, x, y, z)
        if _watch:
            _watch[-1].program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    def known_arguments(self: Any, arguments: Any, keywords: Any) -> Any:
        hosted, hosted_keywords = init_arguments(self, arguments, keywords)
        if _watch:
            _watch[-1].begin(self.fn.__name__, dict(zip(self.arg_names, hosted, strict=False)))
        return hosted, hosted_keywords

    Builder.create_masked_load, Builder.create_masked_store = watched_load, watched_store
    Builder.set_grid_idx = numbered_grid_idx
    interpreter.GridExecutor._init_args_hst = known_arguments


def _repair() -> None:
    _repair_conversion()
    for name, operands in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3)):
        _repair_arithmetic(name, operands)
    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value], np.float32)), tl.bfloat16)
    _repair_dot()
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    _repair_loop_bounds()
    _do_once()
    _watch_memory()


_repair()
