"""The dense block as one functional operator: its schedule's programs on tensors, and the block in torch's operators.

It allocates its buffer, writes every layer into it and returns it; nothing that it is given is modified, so autograd,
``torch.compile`` and ``torch.export`` see an ordinary function.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import BACKENDS, choose
from ..backends.contract import accumulate_dtype
from . import schedule
from .layout import channels_last, empty_channels_last, empty_images
from .operator import Operator, Outputs, act, norm_act, records
from .program import Context, execute, without_autocast
from .schedule import Structure
from .statistics import BatchMoments


class Arguments(NamedTuple):
    """Of the operator; lists have an entry for each norm-relu-conv in the order of execution.

    Attributes:
        x: ``(N, C_0, *spatial)``.
        weights, gammas, betas: of the convolutions and of the norms; layers without a bottleneck may have no norms.
        biases: of the convolutions that are ``biased``, in order.
        running: (mean, variance) of the norms whose ``batch_stats`` is False, in order.
        keep: dropout's mask for the new feature maps of all layers, boolean ``(N, their sum, *spatial)``.
        keep_inside: the same for all bottlenecks.
        biased: whether a convolution has a bias.
        slopes: of the activations for negative numbers: before a convolution, behind it where there are no norms.
        eps: of the norms.
        batch_stats: whether a norm takes its statistics from the batch.
        per_layer: 2 for layers with a bottleneck, 1 for plain ones.
        keep_scales: what dropout multiplies kept values by, where there is one: in a bottleneck, and at a layer's end.
        prepends: new features stand before those that their layer read.
        keep_bottleneck: keep the bottlenecks for backward; otherwise they are computed again.
        backend: name of the backend.
        group: name of the process group whose ranks share their batch statistics.
    """

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    running: list[Tensor]
    keep: Tensor | None
    keep_inside: Tensor | None
    biased: list[bool]
    slopes: list[float]
    eps: list[float]
    batch_stats: list[bool]
    per_layer: int
    keep_scales: list[float]
    prepends: bool
    keep_bottleneck: bool
    backend: str
    group: str | None

    def structure(self) -> Structure:
        inside, behind = self.keep_scales
        drops = [] if self.keep_inside is None else [(0, inside)]
        drops += [] if self.keep is None else [(self.per_layer - 1, behind)]
        return Structure(
            tuple([weight.shape for weight in self.weights]),
            tuple(self.biased),
            tuple(self.slopes),
            tuple(self.eps),
            tuple(self.batch_stats),
            self.per_layer,
            self.keep_bottleneck,
            self.group is not None,
            tuple(drops),
            self.prepends,
        )


class Block(Operator):
    """``outputs.kept``: every layer's bottleneck ``(layers, N, D, H, W, width)``, where they are kept.

    ``outputs.constants``, where any norm takes batch statistics: ``(2, C)``, mean and biased variance of each channel of the buffer; ``(2, layers, width)``, those
    of the bottlenecks; and where there is a group ``(1,)``, how many values of a channel they are of.
    """

    name = "dense_block"
    arguments = Arguments
    keeps_input = False
    constants = ("running",)

    def forward(self, a: Arguments) -> Outputs:
        structure = a.structure()
        outputs = _allocate(a.x, structure)
        buffer, kept, constants = outputs
        operands = {
            "x": [a.x.resolve_neg()],
            "buffer": [buffer],
            "bottleneck": kept or _scratch(buffer, structure.width),
            **_constants(constants),
            **_parameters(a),
        }
        _run(schedule.forward(structure), operands, a)
        return outputs

    def allocate(self, a: Arguments) -> Outputs:
        return _allocate(a.x, a.structure())

    def backward(
        self, dout: Tensor, a: Arguments, kept: list[Tensor], constants: list[Tensor], needed: list[bool]
    ) -> list[Tensor]:
        structure, buffer = a.structure(), channels_last(a.x)
        gradients = self.allocate_backward(dout, a, needed)
        rest = iter(gradients[1:])
        dweights, dgammas, dbetas, dbiases = (
            list(itertools.islice(rest, len(tensors))) for tensors in (a.weights, a.gammas, a.betas, a.biases)
        )
        gradient = empty_channels_last(buffer.shape, -(-buffer.shape[1] // 8) * 8, buffer)
        correction = [torch.zeros_like(c) for c in constants[:1]]
        found = dweights, dgammas, dbetas, dbiases
        operands = {
            "dout": [dout.resolve_neg()],
            **_parameters(a),
            **backward_operands(structure, buffer, kept, constants, gradient, correction),
            **gradient_operands(found, needed),
            "dropped": _scratch(buffer, 0 if a.keep is None else max(structure.growths)),
            "dropped_bottleneck": _scratch(buffer, 0 if a.keep_inside is None else structure.width),
            "dx": [gradients[0]],
        }
        _run(schedule.backward(structure, tuple(needed)), operands, a)
        return gradients

    def allocate_backward(self, dout: Tensor, a: Arguments, needed: list[bool]) -> list[Tensor]:
        channels = a.weights[0].shape[1]
        return [
            empty_channels_last((a.x.shape[0], channels, *a.x.shape[2:]), channels, a.x),
            *[
                torch.empty_like(w) if wanted else dout.new_empty(0)
                for w, wanted in zip(a.weights, needed, strict=True)
            ],
            *[torch.empty_like(t) for t in (*a.gammas, *a.betas, *a.biases)],
        ]

    def input_of(self, a: Arguments) -> Tensor:
        channels, total = a.weights[0].shape[1], a.x.shape[1]
        return a.x.narrow(1, total - channels if a.prepends else 0, channels)

    def as_result(self, a: Arguments, by_input: Tensor) -> Tensor:
        rest = a.x.shape[1] - by_input.shape[1]
        return F.pad(by_input, [*[0, 0] * (a.x.dim() - 2), *((rest, 0) if a.prepends else (0, rest))])

    def by_operators(self, a: Arguments) -> Tensor:
        x, running, biases = a.x, iter(a.running), iter(a.biases)
        masks = [a.keep_inside, a.keep][-a.per_layer :]
        kept = [
            iter([] if m is None else m.split([w.shape[0] for w in a.weights[i :: a.per_layer]], 1))
            for i, m in enumerate(masks)
        ]
        for first in range(0, len(a.weights), a.per_layer):
            new = x
            for i in range(first, first + a.per_layer):
                if a.eps:
                    moments = (None, None) if a.batch_stats[i] else (next(running), next(running))
                    new = norm_act(new, moments, a.gammas[i], a.betas[i], a.eps[i], a.batch_stats[i], a.slopes[i])
                bias = next(biases).to(new.dtype) if a.biased[i] else None
                weight = a.weights[i].to(new.dtype)
                convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
                new = convolve(new, weight, bias, padding=[size // 2 for size in weight.shape[2:]])
                if not a.eps:
                    new = act(new, a.slopes[i])
                if masks[i - first] is not None:
                    new = new * next(kept[i - first]) * a.keep_scales[i - first - a.per_layer]
            x = torch.cat([new, x] if a.prepends else [x, new], dim=1)
        return x


block = Block()


class Parameters(NamedTuple):
    """Of norm-relu-convs in the order of execution; ``biases`` of the convolutions that have one, ``running`` (mean,
    variance) of the norms that use them."""

    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    running: list[Tensor]


class Form(NamedTuple):
    """What a block is beside its tensors; the lists have an entry for each convolution.

    Attributes:
        biased, slopes, eps, batch_stats, per_layer: as :class:`Arguments` has them.
        drop_rate, drop_inside, drop_channels, prepends: as :func:`~.functional.dense_block` has them.
    """

    biased: list[bool]
    slopes: list[float]
    eps: list[float]
    batch_stats: list[bool]
    per_layer: int
    drop_rate: float = 0.0
    drop_inside: float = 0.0
    drop_channels: bool = False
    prepends: bool = False


def run_block(
    x: Tensor,
    parameters: Parameters,
    form: Form,
    memory_efficient: bool,
    group: str | None,
    drop_layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, BatchMoments | None]:
    """:func:`~.functional.dense_block` of parameters and a form: picks the backend and the mode, draws dropout's masks.

    Dropout draws in the order of memory: ``drop_layout`` is that of the feature maps that it would see.
    """
    weights, biases, gammas, betas, running = parameters
    per_layer, rates = form.per_layer, (form.drop_inside, form.drop_rate)
    inside, keep = None, None
    if any(rates):
        masks = _draw_masks(x, weights, rates[-per_layer:], form.drop_channels, drop_layout)
        inside, keep = [None, *masks][-2:]
    tensors = (x, *weights, *gammas, *betas, *biases)
    differentiable = records() and any(t.requires_grad for t in tensors)
    dtype = accumulate_dtype(x.dtype)
    if differentiable:
        running = [t.clone() for t in running]  # a later training step may update them before this one's backward
    outputs = block(
        Arguments(
            x,
            weights,
            [t if t.is_contiguous() else t.contiguous() for t in biases],
            [t if t.is_contiguous() else t.contiguous() for t in gammas],
            [t if t.is_contiguous() else t.contiguous() for t in betas],
            [t if t.dtype == dtype else t.to(dtype) for t in running],
            keep,
            inside,
            form.biased,
            form.slopes,
            form.eps,
            form.batch_stats,
            per_layer,
            [1 / (1 - rate) if rate < 1 else 0.0 for rate in rates],
            form.prepends,
            per_layer == 2 and differentiable and not memory_efficient,
            choose(x.device, x.dtype) if x.numel() else "eager",
            group,
        )
    )
    if not any(form.batch_stats):
        return outputs.out, None
    stats, bottleneck_stats, *pixels = outputs.constants
    moments = bottleneck_stats if per_layer == 2 else None
    return outputs.out, BatchMoments(stats, moments, pixels[0] if pixels else None, group, form.prepends)


def _draw_masks(
    x: Tensor, weights: Sequence[Tensor], rates: Sequence[float], drop_channels: bool, layout: torch.memory_format
) -> list[Tensor | None]:
    """For each place in a layer the masks of all layers side by side, or None where the rate is 0; drawn layer by layer."""
    draw = torch.feature_dropout if drop_channels else F.dropout
    masks: list[list[Tensor]] = [[] for _ in rates]
    for i, weight in enumerate(weights):
        place = i % len(rates)
        if rates[place] > 0:
            sizes = (x.shape[0], weight.shape[0], *x.shape[2:])
            ones = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout).fill_(1)
            masks[place].append(draw(ones, rates[place], True) != 0)
    return [torch.cat(drawn, dim=1) if drawn else None for drawn in masks]


def backward_operands(
    s: Structure,
    buffer: Tensor,
    kept: list[Tensor],
    constants: list[Tensor],
    gradient: Tensor,
    correction: list[Tensor],
) -> dict[str, Sequence[Tensor]]:
    """Of a program of :func:`schedule.backward`, but parameters and their gradients, dropouts, ``dout`` and ``dx``.

    ``kept`` and ``constants`` as forward leaves them.
    """
    return {
        "buffer": [buffer],
        "bottleneck": kept or _scratch(buffer, s.width),
        **_constants(constants),
        "gradient": [gradient],
        "dbottleneck": _scratch(buffer, s.width),
        "correction": correction,
        "own_correction": [torch.empty_like(c[:, 0]) for c in constants[1:2]],
    }


def gradient_operands(found: Sequence[list[Tensor]], needed: Sequence[bool]) -> dict[str, Sequence[Tensor]]:
    """Where the gradients by weights, those that are ``needed``, gammas, betas and biases go."""
    dweights, dgammas, dbetas, dbiases = found
    needed_ones = list(itertools.compress(dweights, needed))
    return {"dweight": needed_ones, "dgamma": dgammas, "dbeta": dbetas, "dbias": dbiases}


def _constants(constants: list[Tensor]) -> dict[str, Sequence[Tensor]]:
    return {"stats": constants[:1], "bottleneck_stats": constants[1:2], "pixels": constants[2:]}


def _parameters(a: Arguments) -> dict[str, Sequence[Tensor]]:
    masks = {"keep": a.keep, "keep_inside": a.keep_inside}
    return {
        "weight": a.weights,
        "bias": a.biases,
        "gamma": a.gammas,
        "beta": a.betas,
        "running": a.running,
        **{name: [] if mask is None else [mask] for name, mask in masks.items()},
    }


def _run(program: Any, operands: dict[str, Sequence[Tensor]], a: Arguments) -> None:
    with without_autocast(a.x.device):
        execute(program, operands, BACKENDS[a.backend], Context(a.group, a.x.numel() // a.x.shape[1]))


def _allocate(x: Tensor, s: Structure) -> Outputs:
    padded = -(-s.outputs // 8) * 8  # 16-byte aligned pixels in every dtype
    dtype, device = accumulate_dtype(x.dtype), x.device
    shape = x.shape[0], s.width, *x.shape[2:]
    kept = [empty_images(s.layers, shape, x)] if s.keep_bottleneck and s.width else []
    shapes = [(2, s.outputs), (2, s.layers, s.width), *([(1,)] if s.over_ranks else [])] if any(s.batch_stats) else []
    constants = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    return Outputs(empty_channels_last((x.shape[0], s.outputs, *x.shape[2:]), padded, x), kept, constants)


def _scratch(buffer: Tensor, channels: int) -> list[Tensor]:
    """An image of as many channels; none where there are none."""
    return [empty_channels_last((buffer.shape[0], channels, *buffer.shape[2:]), channels, buffer)] if channels else []


def _flops(x_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]]) -> list[int]:
    pixels = x_shape[0] * math.prod(x_shape[2:])
    return [2 * pixels * math.prod(shape) for shape in weight_shapes]


_PER_LAYER = Arguments._fields.index("per_layer") - Arguments._fields.index("weights") - 1


@register_flop_formula(torch.ops.fused_densenet.dense_block)
def _dense_block_flops(x_shape: Any, weight_shapes: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-add of the convolutions, as torch counts them."""
    return sum(_flops(x_shape, weight_shapes))


@register_flop_formula(torch.ops.fused_densenet.dense_block_backward)
def _dense_block_backward_flops(
    dout_shape: Any, kept: Any, constants: Any, needed: Any, x_shape: Any, weight_shapes: Any, *rest: Any, **_: Any
) -> int:
    """Data gradient, the weight gradients that are needed, and the recomputed bottleneck where it was not kept."""
    flops, per_layer = _flops(x_shape, weight_shapes), rest[_PER_LAYER]
    recomputed = sum(flops[0::2]) if per_layer == 2 and not kept else 0
    return sum(flops) + sum(f for f, wanted in zip(flops, needed, strict=True) if wanted) + recomputed
