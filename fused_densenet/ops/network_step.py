"""Parts of a network that follow one another as one differentiable function, all norms in training.

Forward is one program. Backward goes from part to part. Each leaves what the image that it read is owed: a gradient, and
what the batch statistics still owe (:mod:`~.schedule`), paid where it is loaded. So nothing is copied between two parts,
and what was kept for a part is let go of as soon as it has run.
"""

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
from .layout import channels_last, empty_channels_last, empty_images, empty_like, pixels_last, weight_5d
from .network import (
    NormReluPool,
    Part,
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
from .operator import Differentiable, Outputs
from .program import Bound, Context, execute, without_autocast
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
    parts: tuple[Part, ...]
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
        return Outputs(images[-1], [*images, *[t for t in bottlenecks if t.dim() == 6]], taken)

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
            else:
                x = stem.by_operators(
                    StemArguments(x, p.gammas, p.betas, [], None, part.eps, True, part.pools, "", None)
                )
        return x


network_step = NetworkStep()


class _Parameters(NamedTuple):
    """A part's, and which of the weights need a gradient."""

    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    needed: list[bool]

    def gradients(self) -> tuple[list[Tensor], ...]:
        """Uninitialised: by weights (empty where not needed), gammas, betas and biases."""
        weights = self.weights if all(self.needed) else [w for w, n in zip(self.weights, self.needed, strict=True) if n]
        made = iter(empty_like([*weights, *self.gammas, *self.betas, *self.biases]))
        dweights = [next(made) if n else w.new_empty(0) for w, n in zip(self.weights, self.needed, strict=True)]
        kinds = self.gammas, self.betas, self.biases
        return dweights, *[list(itertools.islice(made, len(kind))) for kind in kinds]


def _of(a: Arguments, begin: schedule.Before, end: schedule.Before, needed: Sequence[bool]) -> _Parameters:
    weights, norms = slice(begin.weight, end.weight), slice(begin.norm, end.norm)
    biases = a.biases[begin.bias : end.bias]
    return _Parameters(a.weights[weights], biases, a.gammas[norms], a.betas[norms], list(needed[weights]))


class _Made:
    """What forward made: the images that parts own and kept bottlenecks, by the number of their part, and statistics."""

    def __init__(self, a: Arguments, kept: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
        self.parts = a.parts
        numbers = owned(a.parts)
        self._images = {_INPUT: channels_last(a.x)} | dict(zip(numbers, kept, strict=False))
        keeping = [i for i in scratches(a.parts) if a.parts[i].keep_bottleneck]  # type: ignore[union-attr]
        self.bottlenecks = dict(zip(keeping, kept[len(numbers) :], strict=True))
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
        for name in (f"stats{i}", f"moments{i}", f"stats{i - 1}"):
            if name in self.statistics:
                return self.statistics[name]
        raise KeyError(i)

    def reads(self, i: int) -> int:
        """The owner of the image that part ``i`` reads, or of which it is the result, ``i`` counted from 0."""
        if i == 0:
            return _INPUT
        before = self.parts[i - 1]
        return i if isinstance(self.parts[i], Structure) and not isinstance(before, Structure) else i - 1

    def source(self, i: int) -> Tensor:
        """What part ``i`` reads; of a block that owns that, its whole buffer."""
        return self.image(self.reads(i))

    def owing(self, i: int, debts: dict[int, Debt]) -> Gradient:
        """The gradient of the result of part ``i``, which is no block and not the last."""
        owner = self.reads(i + 1)
        gradient, correction = debts[owner]
        value, moments, following = self.image(owner), self.read(i + 1), self.parts[i + 1]
        begin, end = 0, value.shape[1]
        if owner == i + 1:
            assert isinstance(following, Structure)
            begin, end = following.span(0, following.inputs)
        stored, value = (pixels_last(t)[..., begin:end] for t in (gradient, value))
        if correction is None:
            return Gradient(stored)
        return Gradient(stored, value, moments[0, begin:end], correction[:, begin:end])


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
    part, kernels, gradients = a.parts[i], BACKENDS[a.backend], p.gradients()
    assert not isinstance(part, Structure)
    last = i + 1 == len(a.parts)
    grad = Gradient(pixels_last(channels_last(dout))) if last else made.owing(i, debts)
    source, moments = made.source(i), made.read(i)
    dx, correction = _like(source), torch.empty_like(moments)
    slope = part.slope if isinstance(part, Reduction) else 0.0
    norm = Norm(moments[0], moments[1], p.gammas[0], p.betas[0], part.eps, slope)
    dweights, (dgamma,), (dbeta,), dbiases = gradients
    owed = Owed(dgamma, dbeta, correction)
    if isinstance(part, NormReluPool):
        if grad.correction is not None:  # it is loaded as it stands
            kernels.place_backward(grad, grad.stored)
        kernels.norm_relu_pool_backward(grad.stored, pixels_last(source), norm, pixels_last(dx), owed)
    else:
        dweight = weight_5d(dweights[0]) if p.needed[0] else None
        images = pixels_last(source), norm, weight_5d(p.weights[0]), pixels_last(dx), False
        kernels.norm_relu_conv_backward(grad, *images, dweight, owed, dbiases[0] if dbiases else None)
    debts[made.reads(i)] = Debt(dx, correction)
    return gradients


def _like(image: Tensor) -> Tensor:
    return torch.empty_strided(image.shape, image.stride(), dtype=image.dtype, device=image.device)
