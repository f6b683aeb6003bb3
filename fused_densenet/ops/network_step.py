"""Parts of a network that follow one another as one differentiable function, all norms in training.

Forward is one program. Backward goes from part to part. Each leaves what the image that it read is owed: a gradient, and
what the batch statistics still owe (:mod:`~.schedule`), paid where it is loaded. So nothing is copied between two parts,
and what was kept for a part is let go of as soon as it has run.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.contract import Gradient, Norm, Owed, accumulate_dtype
from . import schedule
from .block import Arguments as BlockArguments
from .block import backward_operands, block
from .layout import channels_last, empty_channels_last, empty_images, empty_like, pixels_last
from .network import (
    NormReluPool,
    Parts,
    Reduction,
    channels,
    owned,
    pixel_stride,
    places,
    record,
    scratches,
    sizes,
    statistics,
)
from .operator import Differentiable, Outputs, norm_act
from .program import Bound, Context, Image, Program, Vector, Weight, execute, without_autocast
from .schedule import Structure
from .statistics import BatchMoments
from .stem import Arguments as StemArguments
from .stem import stem
from .transition import Arguments as TransitionArguments
from .transition import transition

_INPUT = -1
"""As the number of the part that owns the network's input."""


class Arguments(NamedTuple):
    """``parts`` have all their norms in training; the lists have the parameters of all, in the order of execution.

    ``bound`` are the same parameters.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    parts: Parts
    backend: str
    bound: Bound | None = None
    group: None = None


class Debt(NamedTuple):
    """What an image is owed: its gradient, laid out like it, and ``(2, C)`` what the batch statistics add to that."""

    gradient: Tensor
    correction: Tensor | None


class NetworkStep(Differentiable):
    name = "network"
    arguments = Arguments
    keeps_input = True
    releases = True

    def __call__(self, a: Arguments) -> tuple[Tensor, list[tuple[BatchMoments, Tensor]]]:
        """The result, and for each part the batch moments that its norms read, with an image of as many pixels."""
        outputs = self._run(a)
        made = _Made(a, outputs.kept, outputs.constants)
        moments = []
        for i, part in enumerate(a.parts):
            read = BatchMoments(made.read(i), None, None)
            if isinstance(part, Structure):
                inside = made.statistics.get(f"bottleneck_stats{i}")
                read = BatchMoments(made.statistics[f"stats{i}"], inside, None, None, part.prepends)
            moments.append((read, made.source(i)))
        return outputs.out, moments

    def forward(self, a: Arguments) -> Outputs:
        x, spatial = channels_last(a.x), sizes(a.parts, tuple(a.x.shape[2:]))
        assert spatial is not None
        bottlenecks = []
        for i in scratches(a.parts):
            part = a.parts[i]
            assert isinstance(part, Structure)
            shape = x.shape[0], part.width, *spatial[i]
            kept = part.keep_bottleneck
            bottlenecks.append(
                empty_images(part.layers, shape, x) if kept else empty_channels_last(shape, part.width, x)
            )
        images = []
        for i in owned(a.parts):
            shape = x.shape[0], channels(a.parts[i])[1], *spatial[i]
            images.append(empty_channels_last(shape, pixel_stride(a.parts[i]), x))
        dtype = accumulate_dtype(x.dtype)
        taken = [torch.empty(shape, dtype=dtype, device=x.device) for _, shape in statistics(a.parts)]
        program = record(a.parts)
        tensors = [[x], *[[t] for t in (*bottlenecks, *images, *taken)], a.weights, a.biases, a.gammas, a.betas, []]
        context = Context(None, x.numel() // x.shape[1], x.shape[0] * math.prod(spatial[-1]))
        with without_autocast(x.device):
            execute(program, dict(zip(program.operands, tensors, strict=True)), BACKENDS[a.backend], context, a.bound)
        read_again = images[: len(_kept(a.parts))]
        return Outputs(images[-1], [*read_again, *[t for t in bottlenecks if t.dim() == 6]], taken)

    def backward(
        self, dout: Tensor, a: Arguments, kept: list[Tensor], constants: list[Tensor], needed: list[bool]
    ) -> list[Tensor]:
        made, before = _Made(a, kept, constants), places(a.parts)
        kept.clear()  # the caller's list: an image is let go of when nothing here holds it
        debts: dict[int, Debt] = {}
        found = []
        with without_autocast(dout.device):
            for i in reversed(range(len(a.parts))):
                run = _block_backward if isinstance(a.parts[i], Structure) else _other_backward
                part = _of(a, before[i], before[i + 1], needed)
                found.append(run(i, a, made, part, debts, dout))
                made.forget(i)
                for number in [number for number in debts if number > i]:
                    del debts[number]
            dx, correction = debts[_INPUT]
            if correction is not None:
                pixels = pixels_last(dx)
                owing = Gradient(pixels, pixels_last(made.image(_INPUT)), made.read(0)[0], correction)
                BACKENDS[a.backend].place_backward(owing, pixels)
        lists = [[t for part in reversed(found) for t in part[kind]] for kind in range(4)]
        return [dx, *[t for tensors in lists for t in tensors]]

    def by_operators(self, a: Arguments) -> Tensor:
        x, before = a.x, places(a.parts)
        for part, begin, end in zip(a.parts, before, before[1:], strict=False):
            p = _of(a, begin, end, [])
            if isinstance(part, Structure):
                parameters: Any = p.weights, p.biases, p.gammas, p.betas, [], None, None
                form: Any = (list(of) for of in (part.biased, part.slopes, part.eps, part.batch_stats))
                rest: Any = part.per_layer, [1.0, 1.0], part.prepends, False, "", None
                x = block.by_operators(BlockArguments(x, *parameters, *form, *rest))
            elif isinstance(part, Reduction):
                constants: Any = part.eps, part.slope, True, part.pools, "", None
                lists_of_one = p.weights, p.biases, p.gammas, p.betas
                x = transition.by_operators(TransitionArguments(x, *lists_of_one, [], None, *constants))
            elif part.pools:
                x = stem.by_operators(StemArguments(x, p.gammas, p.betas, [], None, part.eps, True, True, "", None))
            else:
                x = norm_act(x, (None, None), p.gammas[0], p.betas[0], part.eps, True, part.slope)
        return x


network_step = NetworkStep()


@functools.lru_cache(maxsize=256)
def _kept(parts: Parts) -> list[int]:
    """The parts whose images backward reads: all that are :func:`owned` but a result that no block reads again."""
    return owned(parts) if isinstance(parts[-1], Structure) else owned(parts)[:-1]


class _Parameters(NamedTuple):
    """A part's, and which of the weights need a gradient."""

    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    needed: list[bool]

    def gradients(self) -> tuple[list[Tensor], ...]:
        """Uninitialised: by weights (empty where not needed), gammas, betas and biases."""
        weights = self.weights
        if not all(self.needed):
            weights = [w if n else w.new_empty(0) for w, n in zip(weights, self.needed, strict=True)]
        made = iter(empty_like([*weights, *self.gammas, *self.betas, *self.biases]))
        kinds = self.weights, self.gammas, self.betas, self.biases
        return tuple([list(itertools.islice(made, len(kind))) for kind in kinds])


def _of(a: Arguments, begin: schedule.Before, end: schedule.Before, needed: Sequence[bool]) -> _Parameters:
    weights, norms = slice(begin.weight, end.weight), slice(begin.norm, end.norm)
    biases = a.biases[begin.bias : end.bias]
    return _Parameters(a.weights[weights], biases, a.gammas[norms], a.betas[norms], list(needed[weights]))


class _Arrangement(NamedTuple):
    """Where parts find what they read.

    Attributes:
        images: the owner of each part's source: a part's number, or that of the input; behind them that of the result.
        moments: the name of the statistics that each part reads, of a block those of its whole buffer; None without.
        keeping: the blocks that keep bottlenecks.
    """

    images: tuple[int, ...]
    moments: tuple[str | None, ...]
    keeping: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _arrangement(parts: Parts) -> _Arrangement:
    blocks = [isinstance(part, Structure) for part in parts] + [False]
    images = [_INPUT] + [i if blocks[i] and not blocks[i - 1] else i - 1 for i in range(1, len(parts) + 1)]
    names = {name for name, _ in statistics(parts)}
    moments = [
        next((name for name in (f"stats{i}", f"moments{i}", f"stats{i - 1}") if name in names), None)
        for i in range(len(parts))
    ]
    keeping = [i for i in scratches(parts) if parts[i].keep_bottleneck]  # type: ignore[union-attr]
    return _Arrangement(tuple(images), tuple(moments), tuple(keeping))


class _Made:
    """What forward made: the images that parts own and kept bottlenecks, by the number of their part, and statistics."""

    def __init__(self, a: Arguments, kept: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
        self.parts, self._at = a.parts, _arrangement(a.parts)
        numbers = _kept(a.parts)
        self._images = {_INPUT: channels_last(a.x)} | dict(zip(numbers, kept, strict=False))
        self.bottlenecks = dict(zip(self._at.keeping, kept[len(numbers) :], strict=True))
        self.statistics = dict(zip([name for name, _ in statistics(a.parts)], taken, strict=True))

    def image(self, owner: int) -> Tensor:
        """``(N, C, *spatial)``, all channels."""
        return self._images[owner]

    def forget(self, i: int) -> None:
        """What only parts from ``i`` on read."""
        self.bottlenecks.pop(i, None)
        for owner in [owner for owner in self._images if owner > i]:
            del self._images[owner]

    def read(self, i: int) -> Tensor:
        """``(2, C)``, moments of what part ``i`` reads; of a block's whole buffer."""
        name = self._at.moments[i]
        assert name is not None
        return self.statistics[name]

    def reads(self, i: int) -> int:
        """The owner of the image that part ``i`` reads, or of which it is the result, ``i`` counted from 0."""
        return self._at.images[i]

    def source(self, i: int) -> Tensor:
        """What part ``i`` reads; of a block that owns that, its whole buffer."""
        return self.image(self.reads(i))


def _block_backward(
    i: int, a: Arguments, made: _Made, p: _Parameters, debts: dict[int, Debt], dout: Tensor
) -> tuple[list[Tensor], ...]:
    s, buffer = a.parts[i], made.image(i)
    assert isinstance(s, Structure)
    reads, gradients = made.reads(i), p.gradients()
    gradient, correction = debts[i] if i in debts else (_like(buffer), None)
    if correction is None:
        correction = torch.zeros_like(made.statistics[f"stats{i}"])
    followed, preceded = i in debts, reads == i
    dx = [] if preceded else [_like(made.image(reads))]
    constants = [made.statistics[name] for name in (f"stats{i}", f"bottleneck_stats{i}") if name in made.statistics]
    kept = [made.bottlenecks[i]] if i in made.bottlenecks else []
    operands = {
        "dout": [gradient if followed else dout],
        **backward_operands(s, buffer, kept, constants, gradient, [correction], gradients, p.needed),
        "weight": p.weights,
        "bias": p.biases,
        "gamma": p.gammas,
        "beta": p.betas,
        "dx": dx,
    }
    program = schedule.backward(s, tuple(p.needed), followed, preceded)
    context = Context(None, buffer.numel() // buffer.shape[1])
    execute(program, {name: operands.get(name, []) for name in program.operands}, BACKENDS[a.backend], context)
    debts[reads] = Debt(gradient, correction) if preceded else Debt(dx[0], None)
    return gradients


def _other_backward(
    i: int, a: Arguments, made: _Made, p: _Parameters, debts: dict[int, Debt], dout: Tensor
) -> tuple[list[Tensor], ...]:
    part, gradients, source, moments = a.parts[i], p.gradients(), made.source(i), made.read(i)
    assert not isinstance(part, Structure)
    begin, end = 0, channels(part)[1]
    value, after, owed = [], [], []
    if i + 1 == len(a.parts):
        stored = channels_last(dout)
    else:
        owner, following = made.reads(i + 1), a.parts[i + 1]
        stored, correction = debts[owner]
        if isinstance(following, Structure) and owner == i + 1:
            begin, end = following.span(begin, end)
        if correction is not None:
            value, after, owed = [made.image(owner)], [made.read(i + 1)], [correction]
    dx, correction = _like(source), torch.empty_like(moments)
    program = _backward_of(part, begin, end, stored.shape[1], bool(owed), all(p.needed))
    dweights, dgammas, dbetas, dbiases = gradients
    kept = [[stored], value, after, owed, [source], [moments], [dx], [correction]]
    lists = [*kept, p.weights, p.gammas, p.betas, dweights if all(p.needed) else [], dgammas, dbetas, dbiases]
    sizes = (source.numel() // source.shape[1], stored.numel() // stored.shape[1])
    context = Context(None, sizes[0], sizes[1])
    execute(program, dict(zip(program.operands, lists, strict=True)), BACKENDS[a.backend], context)
    debts[made.reads(i)] = Debt(dx, correction)
    return gradients


@functools.lru_cache(maxsize=1024)
def _backward_of(part: NormReluPool | Reduction, begin: int, end: int, total: int, owes: bool, needed: bool) -> Program:
    """The gradients of a part that is no block, whose result's gradient is channels ``begin`` to ``end`` of ``total`` in ``stored``.

    Where it ``owes``, ``value`` and its moments ``after`` are laid out like that, and so is ``owed``.
    """
    given = "stored", "value", "after", "owed", "x", "moments", "dx", "correction", "weight", "gamma", "beta"
    program = Program((*given, "dweight", "dgamma", "dbeta", "dbias"))
    width = channels(part)[0]

    def vector(operand: str, row: int = 0) -> Vector:
        return Vector(operand, 0, 0, width, row)

    stored, x, dx = Image("stored", begin, end), Image("x", 0, width), Image("dx", 0, width)
    grad: Any = Gradient(stored)  # type: ignore[arg-type]
    if owes:
        mean, correction = Vector("after", 0, begin, end - begin), Vector("owed", 0, begin, end - begin, total)
        grad = Gradient(stored, Image("value", begin, end), mean, correction)  # type: ignore[arg-type]
    mean, var = (Vector("moments", 0, row * width, width) for row in range(2))
    norm: Any = Norm(mean, var, vector("gamma"), vector("beta"), part.eps, part.slope)  # type: ignore[arg-type]
    debts: Any = Owed(vector("dgamma"), vector("dbeta"), vector("correction", width))  # type: ignore[arg-type]
    if isinstance(part, NormReluPool):
        if owes:  # it is loaded as it stands
            program.place_backward(grad, stored)
        program.norm_relu_pool_backward(stored, x, norm, dx, debts)
        return program
    kernel = part.weight[2:]
    dweight = Weight("dweight", 0, kernel) if needed else None
    dbias = Vector("dbias", 0, 0, part.weight[0]) if part.biased else None
    program.norm_relu_conv_backward(grad, x, norm, Weight("weight", 0, kernel), dx, False, dweight, debts, dbias)
    return program


def _like(image: Tensor) -> Tensor:
    return torch.empty_strided(image.shape, image.stride(), dtype=image.dtype, device=image.device)
