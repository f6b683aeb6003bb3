"""Programs: what a schedule does, recorded once as a flat list of primitive calls over named operands.

What a block does depends on its structure and mode, never on data, sizes or dtype. So the schedule runs once for each
structure, on names instead of tensors, and what it asked for is executed many times: by Python here, one backend
function after the other, or whole by a compiled backend (``csrc/program.h``), which makes no tensor for a call.
"""

import contextlib
import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import extension
from ..backends.contract import Gradient, Norm, Owed
from .layout import pixels_last, weight_5d
from .ranks import merge_moments, sum_over_ranks


class Image(NamedTuple):
    """Channels ``begin`` to ``end`` of an operand ``(N, C, *spatial)``, or of image ``number`` of one with several."""

    operand: str
    begin: int
    end: int
    number: int = 0


class Vector(NamedTuple):
    """``length`` entries of a contiguous tensor, from its entry ``offset`` on; ``number`` in a list.

    Two rows of a matrix where ``row`` is given, the entries from one to the other.
    """

    operand: str
    number: int
    offset: int
    length: int
    row: int = 0


class Weight(NamedTuple):
    """A convolution's weight of these kernel sizes, or where its gradient goes."""

    operand: str
    number: int
    kernel: tuple[int, ...]


class Call(NamedTuple):
    """A function of the backends' contract, or one of :data:`BETWEEN`, its arguments, and whether it pools what it reads."""

    function: str
    arguments: tuple[Any, ...]
    pools: bool = False


Operands = Mapping[str, Sequence[Tensor]]
"""The tensors of a program by the names of its operands."""


@dataclass
class Program:
    """The calls in order. Recording is calling: ``program.place(x, out, mean, var)``.

    Images are ``(N, C, *spatial)``, or several, ``(images, N, D, H, W, C)``; what else it names is vectors and weights.
    """

    operands: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    _codes: dict[tuple[int, ...], Tensor | None] = field(default_factory=dict)

    def __getattr__(self, function: str) -> Callable[..., None]:
        if function.startswith("_"):
            raise AttributeError(function)
        return lambda *arguments, pools=False: self.calls.append(Call(function, arguments, pools))

    @functools.cached_property
    def kinds(self) -> frozenset[tuple[str, tuple[int, ...], bool]]:
        """What there is of calls: their functions, with the kernel sizes of a convolution, and whether it pools."""
        sizes = [next((a.kernel for a in call.arguments if isinstance(a, Weight)), ()) for call in self.calls]
        return frozenset((call.function, w, call.pools) for call, w in zip(self.calls, sizes, strict=True))

    def code(self, lengths: tuple[int, ...]) -> Tensor | None:
        """The calls as numbers for a compiled backend, operands numbered through lists of these ``lengths``.

        None where some call is none of a backend's.
        """
        if lengths not in self._codes:
            self._codes[lengths] = _encode(self, lengths)
        return self._codes[lengths]


class Bound(NamedTuple):
    """Lists of tensors, of these ``lengths``, as a ``backend`` keeps them, without a Python object for each."""

    holder: Tensor
    lengths: tuple[int, ...]
    backend: ModuleType

    @classmethod
    def by(cls, backend: ModuleType, lists: Sequence[list[Tensor]], constant: bool = False) -> "Bound | None":
        """None where the backend keeps none; of ``constant`` ones it keeps what it makes of their values, too."""
        if not hasattr(backend, "bind") or not any(lists):
            return None
        holder = backend.bind([*itertools.chain(*lists)], constant)
        return None if holder is None else cls(holder, tuple(map(len, lists)), backend)

    def like(self) -> "Bound":
        """Uninitialised, each laid out like its tensor."""
        return self._replace(holder=self.backend.bind_like(self.holder))

    def lists(self) -> list[list[Tensor]]:
        tensors = iter(self.backend.bound_tensors(self.holder))
        return [list(itertools.islice(tensors, length)) for length in self.lengths]


def execute(
    program: Program,
    operands: Operands,
    backend: ModuleType,
    context: "Context",
    bound: Sequence[Bound] = (),
) -> None:
    """Runs ``program`` on tensors: whole where the backend can and no profiler wants to see the calls, else one by one.

    The program's last operands are those that are ``bound``.
    """
    lengths = [length for one in bound for length in one.lengths]
    given = len(program.operands) - len(lengths)
    lists = [operands[name] for name in program.operands[:given]]
    if context.group is None and hasattr(backend, "run_program") and not torch.autograd._profiler_enabled():
        x, code = lists[0][0], program.code((*map(len, lists), *lengths))
        sizes = (context.fewest or context.pixels, context.pixels)
        if code is not None and backend.runs_program(x.device, x.dtype, sizes, program.kinds):
            held = [[one.holder for one in bound]] if bound else []
            backend.run_program(code, [*itertools.chain(*lists)], *held)
            return
    looked_up = [tensors for one in bound for tensors in one.lists()]
    operands = {**operands, **dict(zip(program.operands[given:], looked_up, strict=True))}
    weights = [weight_5d(weight) for weight in operands["weight"]]
    if weights and hasattr(backend, "pack_weights"):
        weights = backend.pack_weights(weights, lists[0][0])
    operands = {**operands, "weight": weights}
    for function, arguments, _ in program.calls:
        run = BETWEEN.get(function)
        tensors = [_resolve(argument, operands) for argument in arguments]
        if run is None:
            getattr(backend, function)(*tensors)
        else:
            run(context, *tensors)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """For primitives, which choose their arithmetic themselves."""
    enabled = torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


class Context(NamedTuple):
    """What calls between the primitives need beside their operands.

    Attributes:
        group: name of the process group over whose ranks statistics are taken, or None.
        pixels: how many values of a channel this rank has; where that differs, in the largest image.
        fewest: in the smallest image, where that differs.
    """

    group: str | None
    pixels: int
    fewest: int | None = None


def _merge(context: Context, mean: Tensor, var: Tensor, pixels: Tensor) -> None:
    assert context.group is not None
    merge_moments(mean, var, context.pixels, pixels, context.group)


def _sum(context: Context, pair: Tensor) -> None:
    assert context.group is not None
    whole = pair.contiguous()
    sum_over_ranks(whole, context.group)
    if whole is not pair:
        pair.copy_(whole)


def _drop(context: Context, image: Tensor, keep: Tensor, scale: float) -> None:
    image *= keep.to(image.dtype) * scale


BETWEEN: dict[str, Callable[..., None]] = {"merge_moments": _merge, "sum_over_ranks": _sum, "drop": _drop}
"""What a schedule asks for that is no primitive: messages between ranks, and dropout's product with its mask."""


def _resolve(argument: Any, operands: Operands) -> Any:
    if isinstance(argument, Image):
        whole = operands[argument.operand][0]
        pixels = whole[argument.number] if whole.dim() == 6 else pixels_last(whole)
        return pixels[..., argument.begin : argument.end]
    if isinstance(argument, Vector):
        whole = operands[argument.operand][argument.number]
        if argument.row:
            return whole.as_strided((2, argument.length), (argument.row, 1), whole.storage_offset() + argument.offset)
        return whole if whole.dim() == 1 else whole.view(-1)[argument.offset : argument.offset + argument.length]
    if isinstance(argument, Weight):
        weight = operands[argument.operand][argument.number]
        return weight_5d(weight) if argument.operand == "dweight" else weight
    if isinstance(argument, Norm | Gradient | Owed):
        return type(argument)(*[_resolve(part, operands) for part in argument])
    return argument


def _encode(program: Program, lengths: Sequence[int]) -> Tensor | None:
    """Per call: its function's number, then its arguments as :func:`_numbers` has them."""
    first, slots = 0, {}
    for name, length in zip(program.operands, lengths, strict=True):
        slots[name] = first
        first += length
    numbers: list[int] = []
    for function, arguments, _ in program.calls:
        if function not in extension.FUNCTIONS:
            return None
        numbers.append(extension.FUNCTIONS.index(function))
        for name, argument in zip(_KINDS[function], arguments, strict=True):
            numbers += _numbers(name, argument, slots)
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


_KINDS: dict[str, tuple[Any, ...]] = {
    "place": (Image, Image, Vector, Vector),
    "place_backward": (Gradient, Image),
    "norm_relu_conv": (Image, Norm, Weight, Image, Vector, Vector, Vector, float),
    "norm_relu_conv_backward": (Gradient, Image, Norm, Weight, Image, bool, Weight, Owed, Vector),
    "norm_relu_pool": (Image, Norm, Image),
    "norm_relu_pool_backward": (Image, Image, Norm, Image, Owed),
    "norm_relu_mean": (Image, Norm, Image),
    "strided_conv": (Image, Weight, Image, *[int] * 6),
}
"""Of the arguments of a function."""

_PARTS: dict[Any, tuple[Any, ...]] = {
    Norm: (Vector, Vector, Vector, Vector, float, float),
    Gradient: (Image, Image, Vector, Vector, float),
    Owed: (Vector, Vector, Vector, Vector),
}
_NOTHING: dict[Any, tuple[Any, ...]] = {Norm: extension.NO_NORM, Owed: extension.NO_OWED}


def _numbers(kind: Any, argument: Any, slots: Mapping[str, int]) -> Iterable[int]:
    """An argument as numbers, the first the number of its operand; -1 where it is None."""
    if kind in _PARTS:
        parts = _NOTHING[kind] if argument is None else argument
        return [n for part, a in zip(_PARTS[kind], parts, strict=True) for n in _numbers(part, a, slots)]
    if kind in (bool, int):
        return [int(argument)]
    if kind is float:
        return struct.unpack("<q", struct.pack("<d", argument))
    if argument is None:
        return [-1, 0, 0, 0][: 1 if kind is Weight else 4]
    if kind is Image:
        return [slots[argument.operand], argument.number, argument.begin, argument.end - argument.begin]
    slot = slots[argument.operand] + argument.number
    return [slot] if kind is Weight else [slot, argument.offset, argument.length, argument.row]
