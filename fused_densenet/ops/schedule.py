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

The loops run on names, once for each :class:`Structure`: what they record is a :class:`~.program.Program`.
"""

import functools
from dataclasses import dataclass

from ..backends.contract import Gradient, Norm, Owed
from .program import Image, Program, Vector, Weight

PARAMETERS = ("weight", "gamma", "beta")
"""Operands with a tensor for each norm-relu-conv, in the order of execution; ``running`` has two for each frozen norm."""


@dataclass(frozen=True)
class Structure:
    """All that a block's programs depend on.

    Attributes:
        weights: shapes of the convolutions' weights, in the order of execution.
        eps: of each norm.
        batch_stats: whether each norm takes its statistics from the batch.
        per_layer: norm-relu-convs of a layer: 2 with a bottleneck, 1 without.
        keep_bottleneck: the bottlenecks' outputs are kept for backward, not computed again.
        over_ranks: batch statistics are taken over the ranks of a group.
        keep_scale: what dropout multiplies kept values by; None without dropout.
    """

    weights: tuple[tuple[int, ...], ...]
    eps: tuple[float, ...]
    batch_stats: tuple[bool, ...]
    per_layer: int
    keep_bottleneck: bool
    over_ranks: bool = False
    keep_scale: float | None = None

    @property
    def layers(self) -> int:
        return len(self.weights) // self.per_layer

    @property
    def inputs(self) -> int:
        return self.weights[0][1]

    @property
    def growth_rate(self) -> int:
        return self.weights[self.per_layer - 1][0]

    @property
    def width(self) -> int:
        """Channels of a bottleneck; 0 without one."""
        return self.weights[0][0] if self.per_layer == 2 else 0

    @property
    def outputs(self) -> int:
        return self.inputs + self.layers * self.growth_rate


class _Names:
    """The operands of a block as its loops name them."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._running = iter(range(2 * structure.batch_stats.count(False)))
        self._norms = [self._constants(i) for i in range(len(structure.weights))]

    def moments(self, begin: int, end: int) -> tuple[Vector, Vector]:
        """Mean and variance of channels of the buffer."""
        total = self.structure.outputs
        mean, var = (Vector("stats", 0, row * total + begin, end - begin) for row in range(2))
        return mean, var

    def bottleneck(self, layer: int) -> tuple[Image, tuple[Vector, Vector]]:
        """A layer's bottleneck and its moments."""
        s = self.structure
        y = Image("bottleneck", 0, s.width, layer if s.keep_bottleneck else 0)
        mean, var = (Vector("bottleneck_stats", 0, (row * s.layers + layer) * s.width, s.width) for row in range(2))
        return y, (mean, var)

    def weight(self, i: int) -> Weight:
        return Weight("weight", i, self.structure.weights[i][2:])

    def norm(self, i: int, moments: tuple[Vector, Vector]) -> Norm:
        mean, var = self._norms[i] or moments
        gamma, beta = (Vector(name, i, 0, self.structure.weights[i][1]) for name in ("gamma", "beta"))
        return Norm(mean, var, gamma, beta, self.structure.eps[i])  # type: ignore[arg-type]

    def owed(self, i: int, correction: Vector) -> Owed:
        dgamma, dbeta = (Vector(name, i, 0, self.structure.weights[i][1]) for name in ("dgamma", "dbeta"))
        pixels = Vector("pixels", 0, 0, 1) if self.structure.over_ranks else None
        if not self.structure.batch_stats[i]:
            return Owed(dgamma, dbeta)  # type: ignore[arg-type]
        return Owed(dgamma, dbeta, correction, pixels)  # type: ignore[arg-type]

    def _constants(self, i: int) -> tuple[Vector, Vector] | None:
        if self.structure.batch_stats[i]:
            return None
        mean, var = (Vector("running", next(self._running), 0, self.structure.weights[i][1]) for _ in range(2))
        return mean, var


@functools.lru_cache(maxsize=1024)
def forward(structure: Structure) -> Program:
    """Fills ``buffer`` from ``x``, its moments ``stats`` ``(2, outputs)`` and ``bottleneck_stats`` ``(2, layers, width)``.

    ``bottleneck`` are the bottlenecks' outputs, one image for each layer where they are kept, else one for all.
    Moments that no norm reads are not taken.
    """
    s, names = structure, _Names(structure)
    wanted = any(s.batch_stats)
    program = Program(
        ("x", "buffer", "bottleneck", "stats", "bottleneck_stats", "pixels", "keep", *PARAMETERS, "running")
    )

    def taken(moments: tuple[Vector, Vector]) -> tuple[Vector | None, Vector | None]:
        return moments if wanted else (None, None)

    def merge(moments: tuple[Vector, Vector]) -> None:
        if s.over_ranks and wanted:
            program.merge_moments(*moments, Vector("pixels", 0, 0, 1))

    width = s.inputs
    moments = names.moments(0, width)
    program.place(Image("x", 0, width), Image("buffer", 0, width), *taken(moments))
    merge(moments)
    for layer in range(s.layers):
        i = layer * s.per_layer
        source, moments = Image("buffer", 0, width), names.moments(0, width)
        if s.per_layer == 2:
            y, y_moments = names.bottleneck(layer)
            program.norm_relu_conv(source, names.norm(i, moments), names.weight(i), y, *taken(y_moments), None, 1.0)
            merge(y_moments)
            source, moments, i = y, y_moments, i + 1
        end = width + s.growth_rate
        new, new_moments = Image("buffer", width, end), names.moments(width, end)
        convolve = (source, names.norm(i, moments), names.weight(i), new)
        if s.keep_scale is None:
            program.norm_relu_conv(*convolve, *taken(new_moments), None, 1.0)
        else:
            program.norm_relu_conv(*convolve, None, None, None, 1.0)
            program.drop(new, _mask(s, layer), s.keep_scale)
            if wanted:
                program.place(new, None, *new_moments)
        merge(new_moments)
        width = end
    return program


@functools.lru_cache(maxsize=1024)
def backward(structure: Structure, weight_needed: tuple[bool, ...]) -> Program:
    """The gradients ``dx``, ``dgamma``, ``dbeta`` and, of the weights where they are needed, ``dweight``, given ``dout``.

    The other operands are those of :func:`forward`, and scratch: ``gradient`` is laid out like ``buffer``, ``dbottleneck``
    ``(N, width, *spatial)``, ``correction`` ``(2, outputs)`` of zeros, ``own_correction`` ``(2, width)``, ``dropped``
    ``(N, growth_rate, *spatial)``; ``bottleneck`` is scratch where it was not kept. ``dweight`` has tensors for the
    needed weights only.
    """
    s, names = structure, _Names(structure)
    program = Program(
        (
            *("dout", "buffer", "bottleneck", "stats", "bottleneck_stats", "pixels", "keep", *PARAMETERS, "running"),
            *("gradient", "dbottleneck", "correction", "own_correction", "dropped", "dx", "dweight", "dgamma", "dbeta"),
        )
    )
    positions = iter(range(sum(weight_needed)))
    dweights = [
        Weight("dweight", next(positions), shape[2:]) if needed else None
        for needed, shape in zip(weight_needed, s.weights, strict=True)
    ]

    def load(begin: int, end: int, last: bool) -> Gradient:
        stored = Image("gradient", begin, end)
        if last or not any(s.batch_stats):  # nobody read them, or nothing is owed
            return Gradient(stored)  # type: ignore[arg-type]
        correction = Vector("correction", 0, begin, end - begin, s.outputs)
        if s.over_ranks:
            program.sum_over_ranks(correction)
        mean, _ = names.moments(begin, end)
        return Gradient(stored, Image("buffer", begin, end), mean, correction)  # type: ignore[arg-type]

    program.place(Image("dout", 0, s.outputs), Image("gradient", 0, s.outputs), None, None)
    end = s.outputs
    for layer in reversed(range(s.layers)):
        i, width = layer * s.per_layer, end - s.growth_rate
        grad = load(width, end, layer == s.layers - 1)
        if s.keep_scale is not None:
            dropped = Image("dropped", 0, s.growth_rate)
            program.place_backward(grad, dropped)
            program.drop(dropped, _mask(s, layer), s.keep_scale)
            grad = Gradient(dropped)  # type: ignore[arg-type]
        source, norm = Image("buffer", 0, width), names.norm(i, names.moments(0, width))
        if s.per_layer == 2:
            y, y_moments = names.bottleneck(layer)
            if not s.keep_bottleneck:
                program.norm_relu_conv(source, norm, names.weight(i), y, None, None, None, 1.0)
            dy, own = Image("dbottleneck", 0, s.width), Vector("own_correction", 0, 0, s.width, s.width)
            program.norm_relu_conv_backward(
                grad,
                y,
                names.norm(i + 1, y_moments),
                names.weight(i + 1),
                dy,
                False,
                dweights[i + 1],
                names.owed(i + 1, own),
                None,
            )
            grad = Gradient(dy)  # type: ignore[arg-type]
            if s.batch_stats[i + 1]:
                if s.over_ranks:
                    program.sum_over_ranks(own)
                grad = Gradient(dy, y, y_moments[0], own)  # type: ignore[arg-type]
        correction = Vector("correction", 0, 0, width, s.outputs)
        program.norm_relu_conv_backward(
            grad,
            source,
            norm,
            names.weight(i),
            Image("gradient", 0, width),
            True,
            dweights[i],
            names.owed(i, correction),
            None,
        )
        end = width
    program.place_backward(load(0, end, False), Image("dx", 0, end))
    return program


def _mask(structure: Structure, layer: int) -> Image:
    return Image("keep", layer * structure.growth_rate, (layer + 1) * structure.growth_rate)
