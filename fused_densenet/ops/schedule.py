"""The dense block's algorithm: two loops, over layers forward and backward, above any backend's primitives.

Write X for the block's buffer; layer l reads its first C_l channels. In training a channel's mean and variance are the
same for every layer that reads it, so they are taken once, where the channel is written. One reader's batch
normalisation sends back to x (arXiv 1502.03167, section 3)

    dx = s (dz - sum(dz) / M - (x - mean) rstd^2 sum(dz (x - mean)) / M),    s = gamma rstd

with dz the gradient by ReLU's input and M the pixels. The first term goes into the gradient buffer at once; the other
two are the same functions of x for all readers, so only their coefficients are summed, and they are subtracted where
the channel's own producer loads its gradient. Where a norm is frozen, its statistics are constants and owe nothing.

Where statistics are taken over the ranks of a group, M counts the pixels of all, the moments of what a convolution
wrote are merged as soon as it is done, and the coefficients are summed over the ranks just before the producer loads
them: each way one small message for each convolution, whatever the number of its readers.

Where layers have no norms, a convolution reads its channels as they are and an activation stands behind it: backward
takes its derivative from the sign of what was stored. Where new features stand before those that their layer read, the
buffer is filled from its end, and what a layer reads is a channel suffix of it.

The loops run on names, once for each :class:`Structure`: what they record is a :class:`~.program.Program`.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..backends.contract import Gradient, Norm, Owed
from .program import Image, Program, Vector, Weight

PARAMETERS = ("weight", "bias", "gamma", "beta")
"""Operands with a tensor for each norm-relu-conv that has one, in the order of execution; ``running`` has two for each
frozen norm."""


@dataclass(frozen=True)
class Structure:
    """All that a block's programs depend on.

    Attributes:
        weights: shapes of the convolutions' weights, in the order of execution.
        biased: whether each convolution has a bias.
        slopes: of the activations for negative numbers, before each convolution; behind it where there are no norms.
        eps: of each norm; empty where there are no norms.
        batch_stats: whether each norm takes its statistics from the batch.
        per_layer: norm-relu-convs of a layer: 2 with a bottleneck, 1 without.
        keep_bottleneck: the bottlenecks' outputs are kept for backward, not computed again.
        over_ranks: batch statistics are taken over the ranks of a group.
        drops: places in a layer of the convolutions that a dropout follows, and what it multiplies kept values by.
        prepends: new features stand before those that their layer read.
        folded: the second norm of each layer is part of the first convolution's weight and bias, and its activation stands
            behind that; ``eps`` and ``batch_stats`` are those of the first norms.
    """

    weights: tuple[tuple[int, ...], ...]
    biased: tuple[bool, ...]
    slopes: tuple[float, ...]
    eps: tuple[float, ...]
    batch_stats: tuple[bool, ...]
    per_layer: int
    keep_bottleneck: bool
    over_ranks: bool = False
    drops: tuple[tuple[int, float], ...] = ()
    prepends: bool = False
    folded: bool = False

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # programs are looked up by structures many times in a step
        return hash(tuple([getattr(self, field.name) for field in fields(self)]))

    @functools.cached_property
    def layers(self) -> int:
        return len(self.weights) // self.per_layer

    @property
    def per_norm(self) -> int:
        """Convolutions for each norm."""
        return 2 if self.folded else 1

    @functools.cached_property
    def inputs(self) -> int:
        return self.weights[0][1]

    @functools.cached_property
    def growths(self) -> list[int]:
        """New features of each layer."""
        return [shape[0] for shape in self.weights[self.per_layer - 1 :: self.per_layer]]

    @functools.cached_property
    def widths(self) -> list[int]:
        """Channels of each layer's bottleneck; none without."""
        return [shape[0] for shape in self.weights[::2]] if self.per_layer == 2 else []

    @functools.cached_property
    def width(self) -> int:
        """Of the widest bottleneck; 0 without."""
        return max(self.widths, default=0)

    @functools.cached_property
    def outputs(self) -> int:
        return self.inputs + sum(self.growths)

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where channels, counted in the order in which they are made, stand in the buffer."""
        return (self.outputs - end, self.outputs - begin) if self.prepends else (begin, end)


class Before(NamedTuple):
    """How many parameters of each kind stand in the operands before a block's."""

    weight: int = 0
    bias: int = 0
    norm: int = 0
    running: int = 0


NOTHING = Before()


class Names:
    """The operands of a block as its loops name them; channels are counted in the order in which they are made.

    In a program of several blocks, images have the block's ``suffix``, and parameters others ``before`` them.
    """

    def __init__(self, structure: Structure, suffix: str = "", before: Before = NOTHING) -> None:
        self.structure = structure
        self._suffix, self._before = suffix, before
        self._drops = dict(structure.drops)
        self._running = iter(range(before.running, before.running + 2 * structure.batch_stats.count(False)))
        self._norms = [self._constants(i) for i in range(len(structure.eps))]

    def image(self, operand: str, begin: int, end: int) -> Image:
        """Channels of the buffer, or of what is laid out like it."""
        return Image(operand + self._suffix, *self.structure.span(begin, end))

    def moments(self, begin: int, end: int) -> tuple[Vector, Vector]:
        """Mean and variance of channels of the buffer."""
        total, first = self.structure.outputs, self.structure.span(begin, end)[0]
        name = "stats" + self._suffix
        mean, var = (Vector(name, 0, row * total + first, end - begin) for row in range(2))
        return mean, var

    def correction(self, begin: int, end: int) -> Vector:
        """What the statistics of channels of the buffer owe."""
        return Vector("correction", 0, self.structure.span(begin, end)[0], end - begin, self.structure.outputs)

    def bottleneck(self, layer: int) -> tuple[Image, tuple[Vector, Vector]]:
        """A layer's bottleneck and its moments."""
        s = self.structure
        width = s.widths[layer]
        y = Image("bottleneck" + self._suffix, 0, width, layer if s.keep_bottleneck else 0)
        name = "bottleneck_stats" + self._suffix
        mean, var = (Vector(name, 0, (row * s.layers + layer) * s.width, width) for row in range(2))
        return y, (mean, var)

    def weight(self, i: int) -> Weight:
        return Weight("weight", self._before.weight + i, self.structure.weights[i][2:])

    def mask(self, layer: int, place: int) -> tuple[Image, float] | None:
        """Of the dropout that follows a layer's convolution, and its scale; None where there is none."""
        s = self.structure
        if place not in self._drops:
            return None
        channels = [shape[0] for shape in s.weights[place :: s.per_layer]]
        first = sum(channels[:layer])
        kept = "keep" if place == s.per_layer - 1 else "keep_inside"
        return Image(kept, first, first + channels[layer]), self._drops[place]

    def norm(self, i: int, moments: tuple[Vector, Vector]) -> Norm | None:
        s = self.structure
        if not s.eps or (s.folded and i % 2):
            return None
        place = i // s.per_norm
        mean, var = self._norms[place] or moments
        gamma, beta = (Vector(name, self._before.norm + place, 0, s.weights[i][1]) for name in ("gamma", "beta"))
        return Norm(mean, var, gamma, beta, s.eps[place], s.slopes[i])  # type: ignore[arg-type]

    def bias(self, i: int, operand: str = "bias") -> Vector | None:
        s = self.structure
        return Vector(operand, self._before.bias + sum(s.biased[:i]), 0, s.weights[i][0]) if s.biased[i] else None

    def epilogue(self, i: int) -> tuple[Vector | None, float]:
        """A convolution's bias, and the slope of what follows it."""
        s = self.structure
        if s.folded and i % 2 == 0:
            return self.bias(i), s.slopes[i + 1]
        return self.bias(i), 1.0 if s.eps else s.slopes[i]

    def owed(self, i: int, correction: Vector) -> Owed | None:
        if not self.structure.eps:
            return None
        dgamma, dbeta = (Vector(name, i, 0, self.structure.weights[i][1]) for name in ("dgamma", "dbeta"))
        pixels = Vector("pixels", 0, 0, 1) if self.structure.over_ranks else None
        if not self.structure.batch_stats[i]:
            return Owed(dgamma, dbeta)  # type: ignore[arg-type]
        return Owed(dgamma, dbeta, correction, pixels)  # type: ignore[arg-type]

    def _constants(self, i: int) -> tuple[Vector, Vector] | None:
        if self.structure.batch_stats[i]:
            return None
        channels = self.structure.weights[i * self.structure.per_norm][1]
        mean, var = (Vector("running", next(self._running), 0, channels) for _ in range(2))
        return mean, var


_GIVEN = ("buffer", "bottleneck", "stats", "bottleneck_stats", "pixels", "keep", "keep_inside", *PARAMETERS, "running")


@functools.lru_cache(maxsize=1024)
def forward(structure: Structure) -> Program:
    """Fills ``buffer`` from ``x``, its moments ``stats`` ``(2, outputs)`` and ``bottleneck_stats`` ``(2, layers, width)``.

    ``bottleneck`` are the bottlenecks' outputs, one image for each layer where they are kept, else one for all. Moments
    that no norm reads are not taken. ``keep`` and ``keep_inside`` are the masks of dropouts of all layers.
    """
    program, names = Program(("x", *_GIVEN)), Names(structure)
    inputs, moments = structure.inputs, names.moments(0, structure.inputs)
    wanted = any(structure.batch_stats)
    program.place(Image("x", 0, inputs), names.image("buffer", 0, inputs), *(moments if wanted else (None, None)))
    _merge(program, structure, moments)
    fill(program, names)
    return program


def fill(program: Program, names: Names) -> None:
    """Every layer of a block whose input stands in its buffer."""
    s = names.structure
    wanted = any(s.batch_stats)

    def convolve(layer: int, place: int, source: Image, read: tuple[Vector, Vector], out: Image, wrote: Any) -> None:
        i = layer * s.per_layer + place
        mask = names.mask(layer, place)
        taken = wrote if wanted and mask is None else (None, None)
        program.norm_relu_conv(source, names.norm(i, read), names.weight(i), out, *taken, *names.epilogue(i))
        if mask is not None:
            program.drop(out, *mask)
            if wanted:
                program.place(out, None, *wrote)
        _merge(program, s, wrote)

    width = s.inputs
    for layer, growth in enumerate(s.growths):
        source, moments = names.image("buffer", 0, width), names.moments(0, width)
        if s.per_layer == 2:
            y, y_moments = names.bottleneck(layer)
            convolve(layer, 0, source, moments, y, y_moments)
            source, moments = y, y_moments
        end = width + growth
        new, new_moments = names.image("buffer", width, end), names.moments(width, end)
        convolve(layer, s.per_layer - 1, source, moments, new, new_moments)
        width = end


def _merge(program: Program, structure: Structure, moments: tuple[Vector, Vector]) -> None:
    if structure.over_ranks and any(structure.batch_stats):
        program.merge_moments(*moments, Vector("pixels", 0, 0, 1))


@functools.lru_cache(maxsize=1024)
def backward(
    structure: Structure, weight_needed: tuple[bool, ...], followed: bool = False, preceded: bool = False
) -> Program:
    """The gradients ``dx``, ``dgamma``, ``dbeta``, ``dbias`` and, of the weights where they are needed, ``dweight``, given ``dout``.

    The other operands are those of :func:`forward`, and scratch: ``gradient`` is laid out like ``buffer``, ``dbottleneck``
    ``(N, width, *spatial)``, ``correction`` ``(2, outputs)`` of zeros, ``own_correction`` ``(2, width)``, ``dropped``
    and ``dropped_bottleneck`` for a layer's gradients; ``bottleneck`` is scratch where it was not kept. ``dweight`` has
    tensors for the needed weights only.

    In a network, what comes after a block that is ``followed`` has filled ``gradient`` and ``correction``, and one that is
    ``preceded`` leaves there what its input is owed: no ``dout``, no ``dx``.
    """
    s, names = structure, Names(structure)
    program = Program(
        (
            *("dout", *[name for name in _GIVEN if name not in PARAMETERS]),
            *("gradient", "dbottleneck", "correction", "own_correction", "dropped", "dropped_bottleneck", "dx"),
            *(*PARAMETERS, *[f"d{name}" for name in PARAMETERS]),
        )
    )
    positions = iter(range(sum(weight_needed)))
    dweights = [
        Weight("dweight", next(positions), shape[2:]) if needed else None
        for needed, shape in zip(weight_needed, s.weights, strict=True)
    ]

    def load(begin: int, end: int, layer: int | None) -> Gradient:
        stored, value = names.image("gradient", begin, end), names.image("buffer", begin, end)
        if not s.eps and layer is not None and s.slopes[layer] != 1:
            return Gradient(stored, value, negative_slope=s.slopes[layer])  # type: ignore[arg-type]
        if (layer == s.layers - 1 and not followed) or not any(s.batch_stats):  # nobody read them, or nothing is owed
            return Gradient(stored)  # type: ignore[arg-type]
        correction = names.correction(begin, end)
        if s.over_ranks:
            program.sum_over_ranks(correction)
        mean, _ = names.moments(begin, end)
        return Gradient(stored, value, mean, correction)  # type: ignore[arg-type]

    def through_dropout(grad: Gradient, layer: int, place: int, scratch: str) -> Gradient:
        mask = names.mask(layer, place)
        if mask is None:
            return grad
        dropped = Image(scratch, 0, mask[0].end - mask[0].begin)
        program.place_backward(grad, dropped)
        program.drop(dropped, *mask)
        return Gradient(dropped)  # type: ignore[arg-type]

    if not followed:
        program.place(Image("dout", 0, s.outputs), Image("gradient", 0, s.outputs), None, None)
    end = s.outputs
    for layer in reversed(range(s.layers)):
        i, width = layer * s.per_layer, end - s.growths[layer]
        grad = through_dropout(load(width, end, layer), layer, s.per_layer - 1, "dropped")
        source, norm = names.image("buffer", 0, width), names.norm(i, names.moments(0, width))
        if s.per_layer == 2:
            y, y_moments = names.bottleneck(layer)
            if not s.keep_bottleneck:
                program.norm_relu_conv(source, norm, names.weight(i), y, None, None, *names.epilogue(i))
                if (mask := names.mask(layer, 0)) is not None:
                    program.drop(y, *mask)
            own = Vector("own_correction", 0, 0, s.widths[layer], s.width)
            dy = Image("dbottleneck", 0, s.widths[layer])
            program.norm_relu_conv_backward(
                grad,
                y,
                names.norm(i + 1, y_moments),
                names.weight(i + 1),
                dy,
                False,
                dweights[i + 1],
                names.owed(i + 1, own),
                names.bias(i + 1, "dbias"),
            )
            grad = Gradient(dy)  # type: ignore[arg-type]
            if s.batch_stats[i + 1]:
                if s.over_ranks:
                    program.sum_over_ranks(own)
                grad = Gradient(dy, y, y_moments[0], own)  # type: ignore[arg-type]
            grad = through_dropout(grad, layer, 0, "dropped_bottleneck")
        program.norm_relu_conv_backward(
            grad,
            source,
            norm,
            names.weight(i),
            names.image("gradient", 0, width),
            True,
            dweights[i],
            names.owed(i, names.correction(0, width)),
            names.bias(i, "dbias"),
        )
        end = width
    if not preceded:
        program.place_backward(load(0, end, None), Image("dx", 0, end))
    return program
