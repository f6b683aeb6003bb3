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
from .layout import channels_last, empty, empty_channels_last, empty_images, pixels_last
from .network import (
    Convolution,
    NormReluPool,
    Parts,
    Reduction,
    StridedConvolution,
    channels,
    owned,
    pixel_stride,
    record,
    scratches,
    sizes,
    statistics,
)
from .network_parameters import GivenPart, Held, HeldPart, lists_by_part
from .operator import Differentiable, Outputs, is_batched, is_plain, norm_act, records, shown
from .program import Context, Image, Program, Vector, Weight, execute, without_autocast
from .schedule import PARAMETERS, Structure
from .statistics import BatchMoments
from .stem import Arguments as StemArguments
from .stem import stem
from .transition import Arguments as TransitionArguments
from .transition import transition

_INPUT = -1
"""As the number of the part that owns the network's input."""


class Arguments(NamedTuple):
    """``parts`` have all their norms in training; the lists have the parameters of all, in the order of execution.

    ``held`` are the same parameters, ``stand_in`` one of those by which it is differentiated instead.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    parts: Parts
    backend: str
    held: Held | None = None
    stand_in: Tensor | None = None
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

    def _run(self, a: Arguments) -> Outputs:
        if a.held is not None and records() and (stand_ins := a.held.stand_ins()):
            return _held_step.applied(a._replace(stand_in=stand_ins[0]), [a.x, *stand_ins])
        return super()._run(a)

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
            operands = dict(zip(program.operands, tensors, strict=True))
            execute(program, operands, BACKENDS[a.backend], context, [] if a.held is None else [a.held.all])
        read_again = images[: len(_kept(a.parts))]
        return Outputs(images[-1], [*read_again, *[t for t in bottlenecks if t.dim() == 6]], taken)

    def backward(
        self, dout: Tensor, a: Arguments, kept: list[Tensor], constants: list[Tensor], needed: list[bool]
    ) -> list[Tensor]:
        dx, found = self._by_part(dout, a, kept, constants, self._parameters(a, needed))
        return [dx, *itertools.chain(*[of_part[kind] for kind in range(4) for of_part in found])]

    def _parameters(self, a: Arguments, needed: Sequence[bool]) -> list[GivenPart]:
        of_weights = iter(needed)
        lists = lists_by_part((a.weights, a.biases, a.gammas, a.betas), a.parts)
        return [GivenPart(*one, list(itertools.islice(of_weights, len(one[0])))) for one in lists]

    def _by_part(
        self,
        dout: Tensor,
        a: Arguments,
        kept: list[Tensor],
        constants: list[Tensor],
        parameters: Sequence[GivenPart | HeldPart],
    ) -> tuple[Tensor, list[Any]]:
        """The gradient by ``x``, and what :meth:`GivenPart.backward` or :meth:`HeldPart.backward` leaves of each part."""
        made = _Made(a, kept, constants)
        kept.clear()  # the caller's list: an image is let go of when nothing here holds it
        debts: dict[int, Debt] = {}
        found: list[Any] = []
        with without_autocast(dout.device):
            for i in reversed(range(len(a.parts))):
                run = _block_backward if isinstance(a.parts[i], Structure) else _other_backward
                found.append(run(i, a, made, parameters[i], debts, dout))
                made.forget(i)
                for number in [number for number in debts if number > i]:
                    del debts[number]
            dx, correction = debts[_INPUT]
            if correction is not None:
                pixels = pixels_last(dx)
                owing = Gradient(pixels, pixels_last(made.image(_INPUT)), made.read(0)[0], correction)
                BACKENDS[a.backend].place_backward(owing, pixels)
        return dx, found[::-1]

    def by_operators(self, a: Arguments) -> Tensor:
        x = a.x
        for part, p in zip(a.parts, self._parameters(a, []), strict=True):
            if isinstance(part, Structure):
                parameters: Any = p.weights, p.biases, p.gammas, p.betas, [], None, None
                form: Any = (list(of) for of in (part.biased, part.slopes, part.eps, part.batch_stats))
                rest: Any = part.per_layer, [1.0, 1.0], part.prepends, False, "", None
                x = block.by_operators(BlockArguments(x, *parameters, *form, *rest))
            elif isinstance(part, Reduction):
                constants: Any = part.eps, part.slope, True, part.pools, "", None
                lists_of_one = p.weights, p.biases, p.gammas, p.betas
                x = transition.by_operators(TransitionArguments(x, *lists_of_one, [], None, *constants))
            elif isinstance(part, Convolution | StridedConvolution):
                raise NotImplementedError("a convolution alone has no training step")
            elif part.pools:
                x = stem.by_operators(StemArguments(x, p.gammas, p.betas, [], None, part.eps, True, True, "", None))
            else:
                x = norm_act(x, (None, None), p.gammas[0], p.betas[0], part.eps, True, part.slope)
        return x


class _HeldStep(NetworkStep):
    """The same, differentiated by stand-ins for the parameters of its parts."""

    constants = ("weights", "biases", "gammas", "betas", "stand_in")

    def gradients(
        self, dout: Tensor, a: Arguments, kept: list[Tensor], constants: list[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        assert a.held is not None and a.stand_in is not None
        BACKENDS[a.backend].check_unchanged(a.stand_in)
        if torch.is_grad_enabled() or not is_plain(dout) or is_batched(dout):
            dx, *rest = self._batched(dout, a)
            gradients = iter(rest)
            weights, gammas, betas, biases = (
                list(itertools.islice(gradients, len(kind))) for kind in (a.weights, a.gammas, a.betas, a.biases)
            )
            lists = lists_by_part((weights, biases, gammas, betas), a.parts)
            return [dx, *[torch.ops.fused_densenet.bind.default([*itertools.chain(*one)]) for one in lists]]
        parameters = [HeldPart(bound) for bound in a.held.by_part]
        with shown(f"{self.name}_backward"):
            dx, found = self._by_part(dout, a, kept, constants, parameters)
        return [dx, *found]


network_step, _held_step = NetworkStep(), _HeldStep()


@functools.lru_cache(maxsize=256)
def _kept(parts: Parts) -> list[int]:
    """The parts whose images backward reads: all that are :func:`owned` but a result that no block reads again."""
    return owned(parts) if isinstance(parts[-1], Structure) else owned(parts)[:-1]


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
    i: int, a: Arguments, made: _Made, parameters: GivenPart | HeldPart, debts: dict[int, Debt], dout: Tensor
) -> Any:
    s, buffer, reads = a.parts[i], made.image(i), made.reads(i)
    assert isinstance(s, Structure)
    gradient, correction = debts[i] if i in debts else (_like(buffer), None)
    if correction is None:
        correction = torch.zeros_like(made.statistics[f"stats{i}"])
    followed, preceded = i in debts, reads == i
    dx = [] if preceded else [_like(made.image(reads))]
    constants = [made.statistics[name] for name in (f"stats{i}", f"bottleneck_stats{i}") if name in made.statistics]
    kept = [made.bottlenecks[i]] if i in made.bottlenecks else []
    operands = {
        "dout": [gradient if followed else dout],
        **backward_operands(s, buffer, kept, constants, gradient, [correction]),
        "dx": dx,
    }
    program = schedule.backward(s, tuple(parameters.needed), followed, preceded)
    operands = {name: operands.get(name, []) for name in program.operands}
    context = Context(None, buffer.numel() // buffer.shape[1])
    gradients = parameters.backward(program, operands, BACKENDS[a.backend], context)
    debts[reads] = Debt(gradient, correction) if preceded else Debt(dx[0], None)
    return gradients


def _other_backward(
    i: int, a: Arguments, made: _Made, parameters: GivenPart | HeldPart, debts: dict[int, Debt], dout: Tensor
) -> Any:
    part, source, moments = a.parts[i], made.source(i), made.read(i)
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
    program = _backward_of(part, begin, end, stored.shape[1], bool(owed), all(parameters.needed))
    given = [[stored], value, after, owed, [source], [moments], [dx], [correction]]
    context = Context(None, source.numel() // source.shape[1], stored.numel() // stored.shape[1])
    operands = dict(zip(program.operands, given, strict=False))
    gradients = parameters.backward(program, operands, BACKENDS[a.backend], context)
    debts[made.reads(i)] = Debt(dx, correction)
    return gradients


@functools.lru_cache(maxsize=1024)
def _backward_of(part: NormReluPool | Reduction, begin: int, end: int, total: int, owes: bool, needed: bool) -> Program:
    """The gradients of a part that is no block, whose result's gradient is channels ``begin`` to ``end`` of ``total`` in ``stored``.

    Where it ``owes``, ``value`` and its moments ``after`` are laid out like that, and so is ``owed``.
    """
    given = "stored", "value", "after", "owed", "x", "moments", "dx", "correction"
    program = Program((*given, *PARAMETERS, *[f"d{name}" for name in PARAMETERS]))
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
    return empty(image.shape, image.stride(), image)
