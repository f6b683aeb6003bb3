"""Parts of a network that follow one another as one program, and what runs it where nothing is differentiated.

A part that comes before a block writes into the block's buffer, so that nothing is placed there. The buffers alternate
between two places in memory, so that two of them, the largest ones at most, are there at a time; a block's scratch stands
where the buffer before it was, and the next one will be.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.contract import Norm
from .block import Parameters
from .layout import channels_last, empty, empty_channels_last, strides_of
from .operator import is_plain, shown
from .program import Bound, Context, Image, Program, Vector, Weight, execute, without_autocast
from .schedule import PARAMETERS, Before, Names, Structure, fill


class NormReluPool(NamedTuple):
    """``act(bn(x))`` of so many channels, or where it ``pools`` of ReLU the maxima over windows of 3, stride 2, padding 1.

    Or, where it ``means``, of each image the mean over all pixels.
    """

    channels: int
    eps: float
    pools: bool
    batch_stats: bool = False
    slope: float = 0.0
    means: bool = False


class Reduction(NamedTuple):
    """A transition: a 1x1 convolution of ``act(bn(x))``, averaged over windows of 2 where it ``pools``."""

    weight: tuple[int, ...]
    biased: bool
    eps: float
    slope: float
    pools: bool
    batch_stats: bool = False


class Convolution(NamedTuple):
    """One of stride 1 and "same" padding of an image as it is, perhaps with an activation behind it.

    Of an image of one pixel it is a linear layer.
    """

    weight: tuple[int, ...]
    biased: bool
    slope: float = 1.0

    @property
    def batch_stats(self) -> bool:
        return False


class StridedConvolution(NamedTuple):
    """A network's first one, of zero padding: ``weight`` ``(K, C, *kernel)``, channels-last in memory, and no bias."""

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def batch_stats(self) -> bool:
        return False

    def sizes(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """Of its result; 0 where an image is smaller than the kernel."""
        each = zip(spatial, self.weight[2:], self.stride, self.padding, strict=True)
        return tuple([max(0, (size + 2 * padding - kernel) // stride + 1) for size, kernel, stride, padding in each])


Moments = tuple[Vector, Vector]
Part = Structure | NormReluPool | Reduction | Convolution | StridedConvolution
"""Of a network; a block is its structure."""


class Parts(tuple[Part, ...]):
    """Hashed once: all that is worked out of them is looked up by them, several times in a step."""

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(self))


def channels(part: Part) -> tuple[int, int]:
    """How many a part reads, and how many it makes."""
    if isinstance(part, Structure):
        return part.inputs, part.outputs
    return (part.channels, part.channels) if isinstance(part, NormReluPool) else (part.weight[1], part.weight[0])


def pixel_stride(part: Part) -> int:
    """Entries from one pixel of a part's own image to the next, as in the result of such a module alone."""
    outputs = channels(part)[1]
    return -(-outputs // 8) * 8 if isinstance(part, Structure) else outputs


@functools.lru_cache(maxsize=256)
def sizes(parts: Parts, spatial: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """The sizes of each part's result, of an image of sizes ``spatial``; None where one of them is too small."""
    result = []
    for part in parts:
        if isinstance(part, NormReluPool) and part.pools:
            spatial = tuple([(size + 1) // 2 for size in spatial])
        elif isinstance(part, NormReluPool) and part.means:
            spatial = (1,) * len(spatial)
        elif isinstance(part, Reduction) and part.pools:
            spatial = tuple([size // 2 for size in spatial])
        elif isinstance(part, StridedConvolution):
            spatial = part.sizes(spatial)
        result.append(spatial)
    return result if all(map(all, result)) else None


class Network:
    """Parts that follow one another, each reading as many channels as the one before it makes."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.program = record(self.parts)
        self._layout_of = functools.lru_cache(maxsize=64)(functools.partial(_layout, self.parts))

    def __call__(
        self,
        x: Tensor,
        parameters: Parameters,
        backend: str,
        bound: Bound | None = None,
        spent: bool = False,
        flat: bool = False,
    ) -> Tensor | None:
        """The result of ``x`` ``(N, C, *spatial)``, channels-last; None where an image is too small for a part.

        Parameters are contiguous, running statistics float32 (float64 for float64); ``bound`` are the same. Nobody reads
        an ``x`` again that is ``spent``. A result of one pixel may be ``flat``, ``(N, C)``.
        """
        layout = self._layout_of(x.shape)
        if layout is None:
            return None
        source, kernels = channels_last(x), BACKENDS[backend]
        spent = spent or source is not x
        if (
            bound is not None
            and hasattr(kernels, "run_network")
            and is_plain(x)
            and not torch.autograd._profiler_enabled()
        ):
            code = self.program.code((1,) * (len(layout.views) + 2) + bound.lengths)
            out: Tensor = kernels.run_network(code, source, layout.numbers, spent, flat, bound.holder)
            return out
        images = layout.images(source, spent)
        operands = dict(zip(self.program.operands, [[source], *[[i] for i in images], *parameters], strict=True))
        with shown("network"), without_autocast(x.device):
            execute(self.program, operands, kernels, layout.context, [] if bound is None else [bound])
        return images[-1]


class Layout(NamedTuple):
    """Where the images of a program are, for one size of its input.

    Attributes:
        views: of each but the result its shape, strides, and at the beginning of which of two places it is.
        entries: of the two places. Nothing is written to the first as long as the input is read.
        result: shape, and entries from one pixel to the next.
        context: of the program.
        numbers: ``entries``; which place is lent to the calls for work, from which entry and which call on; sizes and strides of
            the result; of each view its place, its sizes and its strides.
    """

    views: list[tuple[tuple[int, ...], list[int], int]]
    entries: tuple[int, int]
    result: tuple[tuple[int, ...], int]
    context: Context
    numbers: list[int]

    def images(self, x: Tensor, spent: bool) -> list[Tensor]:
        """Uninitialised: scratches, then owned images; where the input ``x`` is ``spent``, in its memory too."""
        first, second = self.entries
        fits = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset() >= first
        memory = [x if spent and fits else empty((first,), (1,), x), empty((second,), (1,), x)]
        views = [memory[place].as_strided(shape, strides) for shape, strides, place in self.views]
        return [*views, empty_channels_last(*self.result, x)]


@functools.lru_cache(maxsize=256)
def record(parts: Parts) -> Program:
    """The program: ``buffer{i}`` is the image that part ``i`` owns, ``bottleneck{i}`` a block's; statistics of :func:`statistics`."""
    images = [f"bottleneck{i}" for i in scratches(parts)] + [f"buffer{i}" for i in owned(parts)]
    program = Program(("x", *images, *[name for name, _ in statistics(parts)], *PARAMETERS, "running"))
    before = places(parts)
    names = [Names(part, str(i), before[i]) if isinstance(part, Structure) else None for i, part in enumerate(parts)]
    source: Image = Image("x", 0, channels(parts[0])[0])
    read: Moments | None = None  # of the source, where they are taken
    for i, part in enumerate(parts):
        if isinstance(part, Structure):
            own = names[i]
            assert own is not None
            inputs, moments, wanted = own.image("buffer", 0, part.inputs), own.moments(0, part.inputs), wants(part)
            if source != inputs:
                program.place(source, inputs, *(moments if wanted else (None, None)))
            elif wanted and read != moments:
                program.place(inputs, None, *moments)
            fill(program, own)
            source, read = Image(f"buffer{i}", 0, part.outputs), own.moments(0, part.outputs) if wanted else None
            continue
        if part.batch_stats and read is None:
            read = _moments(i, part)
            program.place(source, None, *read)
        into: Moments | None = None
        out, following = Image(f"buffer{i}", 0, channels(part)[1]), [*names, None][i + 1]
        if following is not None:
            width = following.structure.inputs
            out, into = following.image("buffer", 0, width), following.moments(0, width)
        elif i + 1 < len(parts):
            into = _moments(i + 1, parts[i + 1])
        if i + 1 == len(parts) or not wants(parts[i + 1]) or isinstance(part, NormReluPool | StridedConvolution):
            into = None
        _convolve_or_pool(program, part, source, out, before[i], read, into)
        source, read = out, into
    return program


def _convolve_or_pool(
    program: Program,
    part: "NormReluPool | Reduction | Convolution | StridedConvolution",
    source: Image,
    out: Image,
    before: Before,
    read: Moments | None,
    into: Moments | None,
) -> None:
    width = channels(part)[0]
    if isinstance(part, StridedConvolution):
        missing = [0] * (5 - len(part.weight))
        steps = [*[1 for _ in missing], *part.stride, *missing, *part.padding]
        program.strided_conv(source, Weight("weight", before.weight, part.weight[2:]), out, *steps)
        return
    if isinstance(part, Convolution):
        weight, bias = _kernel(part, before)
        program.norm_relu_conv(source, None, weight, out, *(into or (None, None)), bias, part.slope)
        return
    running = (Vector("running", before.running + i, 0, width) for i in range(2))
    mean, var = read if part.batch_stats and read is not None else running
    gamma, beta = (Vector(name, before.norm, 0, width) for name in ("gamma", "beta"))
    norm = Norm(mean, var, gamma, beta, part.eps, part.slope)  # type: ignore[arg-type]
    if isinstance(part, NormReluPool):
        (program.norm_relu_mean if part.means else program.norm_relu_pool)(source, norm, out)
        return
    weight, bias = _kernel(part, before)
    program.norm_relu_conv(source, norm, weight, out, *(into or (None, None)), bias, 1.0, pools=part.pools)


def _kernel(part: "Reduction | Convolution", before: Before) -> tuple[Weight, Vector | None]:
    bias = Vector("bias", before.bias, 0, part.weight[0]) if part.biased else None
    return Weight("weight", before.weight, part.weight[2:]), bias


def _moments(i: int, part: Part) -> Moments:
    width = channels(part)[0]
    mean, var = (Vector(f"moments{i}", 0, row * width, width) for row in range(2))
    return mean, var


def wants(part: Part) -> bool:
    """Whether a part reads statistics of the batch."""
    return any(part.batch_stats) if isinstance(part, Structure) else part.batch_stats


@functools.lru_cache(maxsize=256)
def statistics(parts: Parts) -> list[tuple[str, tuple[int, ...]]]:
    """Of the batch, with their shapes: those of blocks; ``moments{i}`` of what part ``i`` reads and no block wrote."""
    result: list[tuple[str, tuple[int, ...]]] = []
    for i, part in enumerate(parts):
        if isinstance(part, Structure):
            if wants(part):
                result.append((f"stats{i}", (2, part.outputs)))
                result += [(f"bottleneck_stats{i}", (2, part.layers, part.width))] if part.width else []
        elif part.batch_stats and not (i and isinstance(parts[i - 1], Structure) and wants(parts[i - 1])):
            result.append((f"moments{i}", (2, channels(part)[0])))
    return result


@functools.lru_cache(maxsize=256)
def places(parts: Parts) -> list[Before]:
    """How many parameters of each kind stand before those of each part, and at the end."""
    found = [Before()]
    for part in parts:
        if isinstance(part, Structure):
            counts = len(part.weights), sum(part.biased), len(part.eps), 2 * part.batch_stats.count(False)
        else:
            convolves = isinstance(part, Reduction | Convolution | StridedConvolution)
            normalises = isinstance(part, Reduction | NormReluPool)
            biased = isinstance(part, Reduction | Convolution) and part.biased
            counts = int(convolves), int(biased), int(normalises), 0 if part.batch_stats or not normalises else 2
        found.append(Before(*[a + b for a, b in zip(found[-1], counts, strict=True)]))
    return found


@functools.lru_cache(maxsize=256)
def owned(parts: Parts) -> list[int]:
    """The parts that have an image of their own: not what is written into the buffer of the block that follows."""
    follows = [isinstance(part, Structure) for part in parts[1:]] + [False]
    return [i for i, part in enumerate(parts) if isinstance(part, Structure) or not follows[i]]


@functools.lru_cache(maxsize=256)
def scratches(parts: Parts) -> list[int]:
    """The blocks that have bottlenecks, kept or not."""
    return [i for i, part in enumerate(parts) if isinstance(part, Structure) and part.width]


def _layout(parts: Parts, shape: Sequence[int]) -> Layout | None:
    """The owned images stand in two places in turn, a block's scratch in the other; None where an image is too small."""
    batch, _, *image = shape
    spatial = sizes(parts, tuple(image))
    if spatial is None:
        return None
    places = {i: 1 - number % 2 for number, i in enumerate(owned(parts))}
    wanted: list[tuple[int, tuple[int, ...], int]] = []  # place, shape, entries of a pixel
    for i in scratches(parts):
        width = parts[i].width  # type: ignore[union-attr]
        wanted.append((1 - places[i], (batch, width, *spatial[i]), width))
    for i, place in places.items():
        wanted.append((place, (batch, channels(parts[i])[1], *spatial[i]), pixel_stride(parts[i])))
    inside, result = wanted[:-1], wanted[-1][1:]
    rooms = [(place, batch * math.prod(sizes_of_one) * stride) for place, (_, _, *sizes_of_one), stride in inside]
    entries = _largest(rooms, 0), _largest(rooms, 1)
    views = [(shape, strides_of(shape, stride), place) for place, shape, stride in inside]
    context = Context(None, batch * math.prod(image), batch * math.prod(spatial[-1]))
    # What is lent when it has been read is the largest image, but for what stands there later.
    lent, lender, begin = Image("x", 0, channels(parts[0])[0]), 0, entries[0]
    if isinstance(parts[0], StridedConvolution) and 0 in list(places)[:-1]:
        lent, lender = Image("buffer0", 0, channels(parts[0])[1]), places[0]
        del rooms[len(scratches(parts))]
        begin = _largest(rooms, lender)
    calls = 1 + max(i for i, call in enumerate(record(parts).calls) if lent in call.arguments)
    numbers = [*entries, lender, begin, calls, *result[0], *strides_of(*result)]
    for sizes_of_view, strides, place in views:
        numbers += [place, *sizes_of_view, *strides]
    return Layout(views, entries, result, context, numbers)


def _largest(rooms: Sequence[tuple[int, int]], place: int) -> int:
    return max((room for of, room in rooms if of == place), default=0)
