"""Parts of a network that follow one another as one program, where nothing is differentiated and all norms are frozen.

A part that comes before a block writes into the block's buffer, so that nothing is placed there; the buffers alternate
between two places in memory, so that two of them, the largest ones at most, are there at a time.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.contract import Norm
from .functional import Parameters
from .layout import channels_last, empty_channels_last, strides_of
from .program import Context, Image, Program, Vector, Weight, execute, without_autocast
from .schedule import PARAMETERS, Before, Names, Structure, fill


class NormReluPool(NamedTuple):
    """``relu(bn(x))`` of so many channels, or where ``pools`` its maxima over windows of 3, stride 2, padding 1."""

    channels: int
    eps: float
    pools: bool


class Reduction(NamedTuple):
    """A transition: a 1x1 convolution of ``act(bn(x))``, averaged over windows of 2 where it ``pools``."""

    weight: tuple[int, ...]
    biased: bool
    eps: float
    slope: float
    pools: bool


Part = Structure | NormReluPool | Reduction
"""Of a network; a block is its structure, with every norm frozen."""


def channels(part: Part) -> tuple[int, int]:
    """How many a part reads, and how many it makes."""
    if isinstance(part, Structure):
        return part.inputs, part.outputs
    return (part.channels, part.channels) if isinstance(part, NormReluPool) else (part.weight[1], part.weight[0])


def sizes(parts: Sequence[Part], spatial: tuple[int, ...]) -> list[tuple[int, ...]] | None:
    """The sizes of each part's result, of an image of sizes ``spatial``; None where one of them is too small."""
    result = []
    for part in parts:
        if isinstance(part, NormReluPool) and part.pools:
            spatial = tuple([(size + 1) // 2 for size in spatial])
        elif isinstance(part, Reduction) and part.pools:
            spatial = tuple([size // 2 for size in spatial])
        result.append(spatial)
    return result if all(map(all, result)) else None


class Network:
    """Parts that follow one another, each reading as many channels as the one before it makes."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.program = record(self.parts)
        self._layout_of = functools.lru_cache(maxsize=64)(functools.partial(_layout, self.parts))

    def __call__(self, x: Tensor, parameters: Parameters, backend: str) -> Tensor | None:
        """The result of ``x`` ``(N, C, *spatial)``, channels-last; None where an image is too small for a part.

        Parameters are contiguous, running statistics float32 (float64 for float64).
        """
        layout = self._layout_of(x.shape)
        if layout is None:
            return None
        images = layout.images(x)
        operands = dict(
            zip(self.program.operands, [[channels_last(x)], *[[i] for i in images], *parameters], strict=True)
        )
        with without_autocast(x.device):
            execute(self.program, operands, BACKENDS[backend], layout.context)
        return images[-1]


class Layout(NamedTuple):
    """Where the images of a program are, for one size of its input.

    Attributes:
        views: shape, strides and place in common memory of each but the result.
        entries: of the common memory.
        result: shape, and entries from one pixel to the next.
        context: of the program.
    """

    views: list[tuple[tuple[int, ...], list[int], int]]
    entries: int
    result: tuple[tuple[int, ...], int]
    context: Context

    def images(self, like: Tensor) -> list[Tensor]:
        """Uninitialised: scratches, then owned images."""
        memory = torch.empty(self.entries, dtype=like.dtype, device=like.device)
        return [*[memory.as_strided(*view) for view in self.views], empty_channels_last(*self.result, like)]


@functools.lru_cache(maxsize=256)
def record(parts: tuple[Part, ...]) -> Program:
    """The program: ``buffer{i}`` is the image that part ``i`` owns, ``bottleneck{i}`` a block's scratch."""
    program = Program(("x", *_scratches(parts), *_owned(parts), *PARAMETERS, "running"))
    before, names = Before(), []
    for i, part in enumerate(parts):
        names.append(Names(part, str(i), before) if isinstance(part, Structure) else None)
        before = _after(part, before)
    source, before = Image("x", 0, channels(parts[0])[0]), Before()
    for i, part in enumerate(parts):
        own, following = names[i], [*names, None][i + 1]
        if own is not None:
            inputs = own.image("buffer", 0, own.structure.inputs)
            if source != inputs:
                program.place(source, inputs, None, None)
            fill(program, own)
            source = Image(f"buffer{i}", 0, own.structure.outputs)
        else:
            out = Image(f"buffer{i}", 0, channels(part)[1])
            if following is not None:
                out = following.image("buffer", 0, following.structure.inputs)
            _convolve_or_pool(program, part, source, out, before)
            source = out
        before = _after(part, before)
    return program


def _convolve_or_pool(program: Program, part: Part, source: Image, out: Image, before: Before) -> None:
    assert not isinstance(part, Structure)
    width = channels(part)[0]
    mean, var = (Vector("running", before.running + i, 0, width) for i in range(2))
    gamma, beta = (Vector(name, before.norm, 0, width) for name in ("gamma", "beta"))
    slope = part.slope if isinstance(part, Reduction) else 0.0
    norm = Norm(mean, var, gamma, beta, part.eps, slope)  # type: ignore[arg-type]
    if isinstance(part, NormReluPool):
        program.norm_relu_pool(source, norm, out)
        return
    weight = Weight("weight", before.weight, part.weight[2:])
    bias = Vector("bias", before.bias, 0, part.weight[0]) if part.biased else None
    program.norm_relu_conv(source, norm, weight, out, None, None, bias, 1.0, pools=part.pools)


def _after(part: Part, before: Before) -> Before:
    if isinstance(part, Structure):
        counts = len(part.weights), sum(part.biased), len(part.eps), 2 * len(part.eps)
    else:
        convolves = isinstance(part, Reduction)
        counts = int(convolves), int(isinstance(part, Reduction) and part.biased), 1, 2
    return Before(*[a + b for a, b in zip(before, counts, strict=True)])


def _owned(parts: Sequence[Part]) -> list[str]:
    """Images that are there for a part alone: not what is written into the buffer of the block that follows."""
    follows = [isinstance(part, Structure) for part in parts[1:]] + [False]
    return [f"buffer{i}" for i, part in enumerate(parts) if isinstance(part, Structure) or not follows[i]]


def _scratches(parts: Sequence[Part]) -> list[str]:
    return [f"bottleneck{i}" for i, part in enumerate(parts) if isinstance(part, Structure) and part.width]


def _layout(parts: Sequence[Part], shape: Sequence[int]) -> Layout | None:
    """All scratches stand in one place, and the owned images in two in turn; None where an image is too small."""
    batch, _, *image = shape
    spatial = sizes(parts, tuple(image))
    if spatial is None:
        return None
    wanted: list[tuple[int, tuple[int, ...], int]] = []  # place, shape, entries of a pixel
    for name in _scratches(parts):
        i = int(name.removeprefix("bottleneck"))
        width = parts[i].width  # type: ignore[union-attr]
        wanted.append((0, (batch, width, *spatial[i]), width))
    for number, name in enumerate(_owned(parts)):
        i = int(name.removeprefix("buffer"))
        outputs = channels(parts[i])[1]
        stride = -(-outputs // 8) * 8 if isinstance(parts[i], Structure) else outputs  # as a block alone has it
        wanted.append((1 + number % 2, (batch, outputs, *spatial[i]), stride))
    entries = [shape[0] * math.prod(shape[2:]) * stride for _, shape, stride in wanted]
    places = [
        max([-(-n // 64) * 64 for (p, *_), n in zip(wanted[:-1], entries, strict=False) if p == place], default=0)
        for place in range(3)
    ]
    views = [(shape, strides_of(shape, stride), sum(places[:place])) for place, shape, stride in wanted[:-1]]
    context = Context(None, batch * math.prod(image), batch * math.prod(spatial[-1]))
    return Layout(views, sum(places), wanted[-1][1:], context)
