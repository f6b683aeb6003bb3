"""Segments in the making: what of a path of modules a program has, its constants folded in float64 and rounded once."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import accumulate_dtype
from ..fallback.anatomy import (
    CHANNEL_DROPOUTS,
    CONVS,
    convolution_reasons,
    is_batch_norm,
    is_everywhere,
    own_activation,
    remember_methods,
    replacements,
    widths_of,
)
from ..nn.block import FusedDenseBlock
from ..nn.chain import Link
from ..nn.gate import Gate
from ..nn.passage import channels_last, kind_of, layout_of
from ..nn.serving import Segment, Stem
from ..nn.stem import MAX_POOLS, Step, is_stems_pooling, run_at
from ..nn.transition import AVG_POOL, halves
from ..ops.block import Parameters
from ..ops.network import Convolution, NormReluPool, Part, Parts, Reduction, channels
from ..ops.schedule import Structure
from .following import TRACING, Called, Mean
from .swapping import around_layers

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)
_DROPOUTS = (nn.Dropout, *CHANNEL_DROPOUTS)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
for _kind in (nn.Linear, nn.Flatten, *_ADAPTIVE):
    remember_methods(_kind)


def _step(module: nn.Module, run: Any) -> Step:
    step = Step(module, kind_of(module), run)
    step.look_inside()
    return step


def drafts(path: Sequence[Called]) -> list[tuple["Draft", Sequence[Called]]]:
    """What stands on a path that can be a segment, with what it takes the place of."""
    with TRACING:
        return [*_drafts(path)]


def _drafts(path: Sequence[Called]) -> Iterator[tuple["Draft", Sequence[Called]]]:
    modules = [(called.node.name, called.module) for called in path]
    steps = [_step(module, run_at(modules, i)) for i, (_, module) in enumerate(modules)]
    begin = i = 0
    draft = Draft()
    while i <= len(modules):
        count = draft.take(modules, steps, i) if i < len(modules) else 0
        if count:
            i += count
            continue
        if draft.has_gates:
            yield draft, path[begin:i]
        begin, i = (i, i) if draft.parts or draft.stem else (i + 1, i + 1)
        draft = Draft()


def alone(module: Gate) -> "Draft | None":
    """A module by itself as a segment."""
    draft = Draft()
    with TRACING:
        taken = draft.take([("", module)], [_step(module, None)], 0)
    return draft if taken and draft.has_gates else None


class _Layers(Step):
    """Of a dense block whose module calls others around them."""

    def __init__(self, block: Any) -> None:
        super().__init__(block, kind_of(block), None)
        self.look_inside()

    def link(self) -> Link | None:
        return None if self.plan is None else FusedDenseBlock.link(self.module, self.plan)  # type: ignore[arg-type]


class Draft:
    """A segment in the making: its parts so far, with their tensors as they are, in float64 where something is folded."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.stem: tuple[Stem, Tensor] | None = None
        self.has_gates = self.flat = False
        self.layout: torch.memory_format | None = None
        self._dims: int | None = None
        self._parameters = Parameters([], [], [], [], [])

    def take(self, modules: Sequence[tuple[str, nn.Module]], steps: Sequence[Step], i: int) -> int:
        """How many modules from place ``i`` on it takes as what follows; 0 where it cannot."""
        count = self._take(modules, steps, i)
        for _, module in modules[i : i + count]:
            self._look_at_layout(module)
        return count

    def _look_at_layout(self, module: nn.Module) -> None:
        """As :meth:`~..nn.passage.Passage.convolved`, of any input; a dense block keeps that of its own, which it copies."""
        if isinstance(module, CONVS):
            of_weight = layout_of(module.weight)
            self.layout = self.layout if of_weight is torch.contiguous_format else of_weight
        elif isinstance(module, nn.AvgPool3d):
            self.layout = torch.contiguous_format
        elif not isinstance(module, FusedDenseBlock):
            for child in module.children():
                self._look_at_layout(child)

    def _take(self, modules: Sequence[tuple[str, nn.Module]], steps: Sequence[Step], i: int) -> int:
        module = modules[i][1]
        if not isinstance(module, Gate) and _at(modules, i) is None:
            return 0
        if type(module) in CONVS:
            return self._take_convolution(modules, i)
        link = steps[i].link()
        if link is None and (around := around_layers(module)) is not None:
            return self._take_around(module, *around)
        if link is not None:
            run = steps[i].run
            fits = self._reads(channels(link.part)[0], link.dims) and link.running is None and not self.flat
            if fits:
                self._add(*_folded(link.part, link.parameters()))
                self.has_gates |= isinstance(module, Gate)
            return 0 if not fits else 1 if run is None else len(run.modules)
        if not self.parts:
            return 0
        if type(module) is nn.Identity or (type(module) in _DROPOUTS and not module.training):
            return 1
        return self._take_activation(module) or self._take_head(modules, i)

    def _take_around(self, block: Any, before: Sequence[str], after: Sequence[str]) -> int:
        """A dense block with what its module calls before and behind its layers: all of it, or nothing."""
        names = [*before, "", *after]
        modules = [(name, block._modules[name] if name else block) for name in names]
        steps = [
            _step(module, run_at(modules, i)) if name else _Layers(block) for i, (name, module) in enumerate(modules)
        ]
        whole, i = self._copy(), 0
        while i < len(modules):
            count = whole.take(modules, steps, i)
            if not count:
                return 0
            i += count
        self.__dict__.update(whole.__dict__)
        return 1

    def _copy(self) -> "Draft":
        draft = copy.copy(self)
        draft.parts, draft._parameters = [*self.parts], Parameters(*[[*kind] for kind in self._parameters])
        return draft

    def _take_convolution(self, modules: Sequence[tuple[str, nn.Module]], i: int) -> int:
        conv: Any = modules[i][1]
        if not self._reads(conv.in_channels, conv.weight.dim() - 2) or self.flat:
            return 0
        weight, bias = conv.weight, conv.bias
        count, slope = 1, 1.0
        norm: Any = _at(modules, i + 1)
        if norm is not None and _folds(norm, conv.out_channels):
            constants = norm.weight, norm.bias, norm.running_mean, norm.running_var
            weight, bias = _with_norm(weight, bias, constants, norm.eps)
            count, slope = 2, _slope(own_activation(norm))
        if not convolution_reasons(conv, ""):
            last: Any = self.parts[-1] if self.parts else None
            part: Part = Convolution(tuple(weight.shape), bias is not None, slope)
            if _is_plain_norm(last) and slope == 1 and not any(size > 1 for size in conv.kernel_size):
                part = Reduction(tuple(weight.shape), bias is not None, last.eps, last.slope, False)
                self.parts.pop()
            self._add(part, _only(weights=[weight], biases=[bias]))
            return count
        if self.parts or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return 0
        if slope == 1 and _is_activation(following := _at(modules, i + count)):
            slope = _slope(following)
            count += 1
        self.stem = Stem(conv.stride, conv.padding, conv.dilation, conv.groups), weight
        self._dims = weight.dim() - 2
        pool: Any = _at(modules, i + count)
        pools = slope == 0 and type(pool) is MAX_POOLS[self._dims - 1] and is_stems_pooling(pool)
        zeros = weight.new_zeros(conv.out_channels)
        norm_of_bias = _only(gammas=[zeros + 1], betas=[zeros if bias is None else bias], running=[zeros, zeros + 1])
        self._add(NormReluPool(conv.out_channels, 0.0, pools, False, slope), norm_of_bias)
        return count + pools

    def _take_activation(self, module: nn.Module) -> int:
        last = self.parts[-1]
        if not _is_activation(module) or not isinstance(last, Convolution) or last.slope != 1:
            return 0
        self.parts[-1] = last._replace(slope=_slope(module))
        return 1

    def _take_head(self, modules: Sequence[tuple[str, nn.Module]], i: int) -> int:
        """A transition's pooling, a mean over all pixels, what makes ``(N, C)`` of one pixel, a linear layer."""
        module, last, dims = modules[i][1], self.parts[-1], self._dims
        following = _at(modules, i + 1)
        at_one_pixel = any(isinstance(part, NormReluPool) and part.means for part in self.parts)
        if isinstance(last, Reduction) and not last.pools and halves(module) and type(module) is AVG_POOL[dims or 0]:
            self.parts[-1] = last._replace(pools=True)
            return 1
        if isinstance(last, NormReluPool) and _is_plain_norm(last) and dims is not None:
            count = 0
            if type(module) in _ADAPTIVE:
                count = int(_ADAPTIVE.index(type(module)) + 1 == dims and is_everywhere(module.output_size, 1))
            elif isinstance(module, Mean):
                count = int(module.over(range(2, 2 + dims), 2 + dims))
                self.flat = bool(count) and not module.keepdim
            elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (2, -1):
                count = 2 * int(isinstance(following, Mean) and following.over([2], 3) and not following.keepdim)
                self.flat = bool(count)
            if count:
                self.parts[-1] = last._replace(means=True)
            return count
        if at_one_pixel and type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            self.flat = True
            return 1
        if self.flat and type(module) is nn.Linear and module.in_features == channels(last)[1]:
            weight = module.weight.reshape(*module.weight.shape, *[1] * (dims or 0))
            part = Convolution(tuple(weight.shape), module.bias is not None)
            self._add(part, _only(weights=[weight], biases=[module.bias]))
            return 1
        return 0

    def _reads(self, width: int, dims: int | None) -> bool:
        alike = dims is None or self._dims is None or dims == self._dims
        return alike and (not self.parts or channels(self.parts[-1])[1] == width)

    def _add(self, part: Part, parameters: Parameters) -> None:
        self.parts.append(part)
        for kind, tensors in zip(self._parameters, parameters, strict=True):
            kind += tensors
        if parameters.weights:
            self._dims = parameters.weights[0].dim() - 2

    def segment(self, dtype: torch.dtype) -> Segment:
        """In float64 until here, each constant is rounded once."""
        wide = accumulate_dtype(dtype)
        weights, *vectors = self._parameters
        constants = Parameters([_own(w, dtype) for w in weights], *[[_own(v, wide) for v in kind] for kind in vectors])
        stem = self.stem
        if stem is not None:
            stem = stem[0], channels_last(_own(stem[1], dtype))
        return Segment(Parts(self.parts), constants, stem, self.flat, self.layout)


def _is_plain_norm(part: Part | None) -> bool:
    """Whether it is a norm, perhaps with an activation, and no more."""
    return isinstance(part, NormReluPool) and not part.pools and not part.means


def _own(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype, copy=True).contiguous()


def _at(modules: Sequence[tuple[str, nn.Module]], i: int) -> Any:
    """The module there, if nothing follows or replaces what it does."""
    return None if i >= len(modules) or replacements(modules[i : i + 1]) else modules[i][1]


def _is_activation(module: nn.Module | None) -> bool:
    return type(module) in _ACTIVATIONS and 0 <= _slope(module) <= 1


def _slope(activation: nn.Module | None) -> float:
    """Of an activation for negative numbers, 1 where there is none."""
    if activation is None or type(activation) is nn.Identity:
        return 1.0
    return getattr(activation, "negative_slope", 0.0)


def _folds(norm: Any, width: int) -> bool:
    """Whether a norm behind a convolution of so many channels is an affine map of them, perhaps with an activation that has a slope."""
    if not is_batch_norm(norm) or norm.running_mean is None or norm.running_var is None:
        return False
    activation = own_activation(norm)
    known = activation is None or type(activation) is nn.Identity or _is_activation(activation)
    drop = norm._modules.get("drop")
    return known and (drop is None or type(drop) is nn.Identity) and widths_of(norm) == {width}


def _only(
    *,
    weights: Sequence[Tensor] = (),
    biases: Sequence[Tensor | None] = (),
    gammas: Sequence[Tensor] = (),
    betas: Sequence[Tensor] = (),
    running: Sequence[Tensor] = (),
) -> Parameters:
    return Parameters(list(weights), [b for b in biases if b is not None], list(gammas), list(betas), list(running))


def _with_norm(
    weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the norm that follows it, in float64."""
    gamma, beta, mean, var = (None if t is None else t.double() for t in norm)
    assert mean is not None and var is not None
    scale = (var + eps).rsqrt() if gamma is None else gamma * (var + eps).rsqrt()
    shifted = -mean * scale if bias is None else (bias.double() - mean) * scale
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return folded, shifted if beta is None else shifted + beta


def _folded(part: Part, parameters: Parameters) -> tuple[Part, Parameters]:
    """A dense block with bottlenecks whose second norms are folded into the convolutions before them; all else as it is."""
    if not isinstance(part, Structure) or part.per_layer != 2 or not part.eps:
        return part, parameters
    weights, biases = list(parameters.weights), iter(parameters.biases)
    bias_of = [next(biases) if biased else None for biased in part.biased]
    gammas, betas, running = parameters.gammas, parameters.betas, parameters.running
    for i in range(1, len(weights), 2):
        norm = gammas[i], betas[i], running[2 * i], running[2 * i + 1]
        weights[i - 1], bias_of[i - 1] = _with_norm(weights[i - 1], bias_of[i - 1], norm, part.eps[i])
    first = [t for i in range(0, len(gammas), 2) for t in running[2 * i : 2 * i + 2]]
    structure = dataclasses.replace(
        part,
        biased=tuple(b is not None for b in bias_of),
        eps=part.eps[::2],
        batch_stats=part.batch_stats[::2],
        folded=True,
    )
    return structure, _only(weights=weights, biases=bias_of, gammas=gammas[::2], betas=betas[::2], running=first)
