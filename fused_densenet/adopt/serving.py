"""``optimize_for_inference``: a snapshot of a network in which what ``fuse`` knows, and what stands around it, are programs."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..backends.contract import accumulate_dtype
from ..fallback.anatomy import CONVS, convolution_reasons, interceptions, is_batch_norm, is_everywhere, own_activation
from ..fallback.reasons import FallbackError
from ..nn.block import FusedDenseBlock
from ..nn.chain import Link
from ..nn.gate import Gate
from ..nn.passage import kind_of
from ..nn.serving import Segment, Snapshot, Stem
from ..nn.stem import MAX_POOLS, Step, is_stems_pooling, run_at
from ..nn.transition import AVG_POOL, halves
from ..ops.block import Parameters
from ..ops.network import Convolution, NormReluPool, Part, Parts, Reduction, channels
from ..ops.schedule import Structure
from .explain import KINDS, Report
from .following import Called, Mean, NotFollowed, follow, paths
from .fuse import adopted
from .recognition import Finding
from .swapping import around_layers

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype | None = None, strict: bool = False, cuda_graphs: bool = False
) -> Snapshot:
    """A snapshot of ``model`` for serving: from the image to the logits one program, with weights that are folded and packed once.

    Taken are the networks that :func:`fused_densenet.fuse` takes. Batch normalisations are folded, in float64, into the
    convolutions that they follow (the stem's, each bottleneck's), the last BN-ReLU and the mean over all pixels are one
    pass, a classifier of one linear layer is part of the program. A first convolution of a stride runs as torch's own
    before it. What no program has is left to the model's own modules and functions, which :func:`fused_densenet.explain`
    of the snapshot lists with the reasons: whatever has hooks, other heads, a ``forward`` that is no sequence of calls.

    ``model`` is not changed, nor is the snapshot by what happens to it. Images of any batch and size may come, in the
    snapshot's dtype; several threads may call at once; results do not depend on either. A snapshot can be copied,
    pickled and moved to another device. It has no gradients, no training mode, takes no other weights and no other
    dtype: each is a RuntimeError.

    Args:
        model: the network, in training or evaluation mode; what runs is evaluation.
        dtype: of weights, images and results: float32, bfloat16, float16 or float64; None for that of the weights.
        strict: raise where a dense block is left out, or there is none.
        cuda_graphs: on a GPU, capture a CUDA graph for each shape of an image, and replay it; eight are kept. ``model``
            must be called with one tensor, and do nothing but launch kernels.

    Returns:
        What is called as ``model`` is.

    Raises:
        TypeError: a bad argument.
        FallbackError: with ``strict``, as :func:`fused_densenet.fuse` does.

    Warns:
        FallbackWarning: what looks like a dense block and cannot be fused, as :func:`fused_densenet.fuse` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, Snapshot):
        raise TypeError("model: expected the model that a snapshot is made of, got a Snapshot")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))} or None, got {dtype}")
    for name, value in {"strict": strict, "cuda_graphs": cuda_graphs}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    own = copy.deepcopy(model).eval().requires_grad_(False)
    findings = adopted(own, strict=strict)
    order = {name: i for i, (name, _) in enumerate(own.named_modules())}
    if dtype is None:
        dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
    freezing = _Freezing(dtype, [f for f in findings if f.reasons])
    with torch.no_grad():
        inside = freezing.network(own)
    left = [report for report in freezing.reports if report.kind == "dense block" and not report.fused]
    if strict and left:
        raise FallbackError("not every dense block is part of a program: " + "\n".join(map(str, left)))
    for module in inside.modules():
        if not isinstance(module, Segment):
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    reports = sorted(freezing.reports, key=lambda report: order.get(report.name, len(order)))
    return Snapshot(inside, dtype, reports, cuda_graphs)


class _Freezing:
    """Replaces what it can by segments of ``dtype``, and reports on all."""

    def __init__(self, dtype: torch.dtype, left: Sequence[Finding]) -> None:
        self.dtype = dtype
        self.reports = [Report(f.name, KINDS[f.fused_class], False, reasons=f.reasons) for f in left]
        self._segments = 0

    def network(self, model: nn.Module) -> nn.Module:
        """What stands for all of it."""
        if _has_gates(model):
            return self.module(model, "")
        if not self.reports:
            self.reports.append(
                Report("", "other", False, reasons=[f"no dense block was found in {type(model).__name__}"])
            )
        return model

    def module(self, module: nn.Module, name: str) -> nn.Module:
        """What stands for ``module``, which is called ``name`` in the network."""
        if isinstance(module, Gate):
            return self._alone(module, name)
        try:
            graph = follow(module)
        except NotFollowed as reason:
            if type(module).forward is not nn.Module.forward:  # else it is only a container
                self.reports.append(Report(name, "other", False, reasons=[str(reason)]))
            self._inside(module, name)
            return module
        return self._graph(graph, name)

    def _inside(self, module: nn.Module, name: str) -> None:
        for key, child in module._modules.items():
            if child is not None and _has_gates(child):
                module._modules[key] = self.module(child, _joined(name, key))

    def _alone(self, module: Gate, name: str) -> nn.Module:
        draft = _Draft(self.dtype)
        if draft.take([(name, module)], [_step(module, None)], 0) and not interceptions([(name, module)]):
            self._report(module, name, self._segments + 1)
            return self._segment(draft)
        self._report(module, name, None)
        return module

    def _graph(self, graph: GraphModule, name: str) -> nn.Module:
        for path in list(paths(graph)):
            for draft, taken in _drafts(path, self.dtype):
                segment = self._segment(draft)
                for called in taken:
                    if isinstance(called.module, Gate):
                        self._report(called.module, _joined(name, str(called.node.target)), self._segments)
                key = f"segment{self._segments}"
                graph.add_submodule(key, segment)
                with graph.graph.inserting_after(taken[-1].node):
                    node = graph.graph.call_module(key, (taken[0].node.args[0],))
                taken[-1].node.replace_all_uses_with(node)
                for called in reversed(taken):
                    graph.graph.erase_node(called.node)
        graph.delete_all_unused_submodules()
        graph.recompile()
        for target in dict.fromkeys(node.target for node in graph.graph.nodes if node.op == "call_module"):
            owner, _, key = str(target).rpartition(".")
            module, full = graph.get_submodule(str(target)), _joined(name, str(target))
            if isinstance(module, Gate):
                self._report(module, full, None)
            elif not isinstance(module, Segment):
                if _has_gates(module):
                    graph.get_submodule(owner)._modules[key] = self.module(module, full)
                else:
                    reasons = interceptions([(key, module)]) or [f"no program has a {type(module).__name__} there"]
                    self.reports.append(Report(full, "other", False, reasons=reasons))
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method"):
                function = node.target if isinstance(node.target, str) else node.target.__name__
                reasons = [f"no program has a call of {function} there"]
                self.reports.append(Report(_joined(name, node.name), "other", False, reasons=reasons))
        return graph

    def _segment(self, draft: "_Draft") -> Segment:
        self._segments += 1
        return draft.segment()

    def _report(self, module: Gate, name: str, segment: int | None) -> None:
        """Of a module, and those that it calls around its layers."""
        before, after = around_layers(module) or ([], [])
        for key in (*before, *after):
            child = module._modules[key]
            if isinstance(child, Gate):
                self._report(child, _joined(name, key), segment)
        kind = next(word for kind, word in KINDS.items() if isinstance(module, kind))
        if segment is not None:
            self.reports.append(Report(name, kind, True, mode=f"in program {segment} of the snapshot"))
            return
        reasons = [*interceptions([(name, module)]), *module.fallback_reasons()]
        self.reports.append(
            Report(name, kind, False, reasons=reasons or ["it runs fused, by itself: no program has what it computes"])
        )


def _has_gates(module: nn.Module) -> bool:
    return any(isinstance(part, Gate) for part in module.modules())


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}".strip(".")


def _step(module: nn.Module, run: Any) -> Step:
    step = Step(module, kind_of(module), run)
    step.look_inside()
    return step


def _drafts(path: Sequence[Called], dtype: torch.dtype) -> Iterator[tuple["_Draft", Sequence[Called]]]:
    """What stands on a path that can be a segment, with what it takes the place of."""
    modules = [(called.node.name, called.module) for called in path]
    steps = [_step(module, run_at(modules, i)) for i, (_, module) in enumerate(modules)]
    begin = i = 0
    draft = _Draft(dtype)
    while i <= len(modules):
        count = draft.take(modules, steps, i) if i < len(modules) else 0
        if count:
            i += count
            continue
        if draft.has_gates:
            yield draft, path[begin:i]
        begin, i = (i, i) if draft.parts or draft.stem else (i + 1, i + 1)
        draft = _Draft(dtype)


class _Layers(Step):
    """Of a dense block whose module calls others around them."""

    def __init__(self, block: Any) -> None:
        super().__init__(block, kind_of(block), None)
        self.look_inside()

    def link(self) -> Link | None:
        return None if self.plan is None else FusedDenseBlock.link(self.module, self.plan)  # type: ignore[arg-type]


class _Draft:
    """A segment in the making: its parts so far, with their tensors as they are, in float64 where something is folded."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.parts: list[Part] = []
        self.stem: tuple[Stem, Tensor] | None = None
        self.has_gates = self.flat = False
        self._dims: int | None = None
        self._parameters = Parameters([], [], [], [], [])

    def take(self, modules: Sequence[tuple[str, nn.Module]], steps: Sequence[Step], i: int) -> int:
        """How many modules from place ``i`` on it takes as what follows; 0 where it cannot."""
        module = modules[i][1]
        if not isinstance(module, Gate) and interceptions([("", module)]):
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
        if type(module) in (nn.Identity, nn.Dropout) and not (module.training and type(module) is nn.Dropout):
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

    def _copy(self) -> "_Draft":
        draft = copy.copy(self)
        draft.parts, draft._parameters = [*self.parts], Parameters(*[[*kind] for kind in self._parameters])
        return draft

    def _take_convolution(self, modules: Sequence[tuple[str, nn.Module]], i: int) -> int:
        conv: Any = modules[i][1]
        if not self._reads(conv.in_channels, conv.weight.dim() - 2) or self.flat:
            return 0
        weight, bias = conv.weight, conv.bias
        count, slope = 1, 1.0
        norm: Any = modules[i + 1][1] if i + 1 < len(modules) else None
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
        if slope == 1 and i + count < len(modules) and type(modules[i + count][1]) in _ACTIVATIONS:
            slope = _slope(modules[i + count][1])
            count += 1
        self.stem = Stem(conv.stride, conv.padding, conv.dilation, conv.groups), weight
        self._dims = weight.dim() - 2
        pool: Any = modules[i + count][1] if i + count < len(modules) else None
        pools = slope == 0 and type(pool) is MAX_POOLS[self._dims - 1] and is_stems_pooling(pool)
        zeros = weight.new_zeros(conv.out_channels)
        norm_of_bias = _only(gammas=[zeros + 1], betas=[zeros if bias is None else bias], running=[zeros, zeros + 1])
        self._add(NormReluPool(conv.out_channels, 0.0, pools, False, slope), norm_of_bias)
        return count + pools

    def _take_activation(self, module: nn.Module) -> int:
        last = self.parts[-1]
        if type(module) not in _ACTIVATIONS or not isinstance(last, Convolution) or last.slope != 1:
            return 0
        self.parts[-1] = last._replace(slope=_slope(module))
        return 1

    def _take_head(self, modules: Sequence[tuple[str, nn.Module]], i: int) -> int:
        """A transition's pooling, a mean over all pixels, what makes ``(N, C)`` of one pixel, a linear layer."""
        module, last, dims = modules[i][1], self.parts[-1], self._dims
        following = modules[i + 1][1] if i + 1 < len(modules) else None
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

    def segment(self) -> Segment:
        """In float64 until here, each constant is rounded once."""
        dtype, wide = self.dtype, accumulate_dtype(self.dtype)
        weights, *vectors = self._parameters
        constants = Parameters([_own(w, dtype) for w in weights], *[[_own(v, wide) for v in kind] for kind in vectors])
        stem = self.stem
        if stem is not None:
            layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(stem[1].dim(), torch.contiguous_format)
            stem = stem[0], _own(stem[1], dtype).contiguous(memory_format=layout)
        return Segment(Parts(self.parts), constants, stem, self.flat)


def _is_plain_norm(part: Part | None) -> bool:
    """Whether it is a norm, perhaps with an activation, and no more."""
    return isinstance(part, NormReluPool) and not part.pools and not part.means


def _own(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype, copy=True).contiguous()


_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU)


def _slope(activation: nn.Module | None) -> float:
    """Of an activation for negative numbers, 1 where there is none."""
    if activation is None or type(activation) is nn.Identity:
        return 1.0
    return getattr(activation, "negative_slope", 0.0)


def _folds(norm: Any, width: int) -> bool:
    """Whether a norm behind a convolution of so many channels is an affine map of them, perhaps with an activation that has a slope."""
    if not is_batch_norm(norm) or interceptions([("", norm)]) or norm.running_mean is None or norm.running_var is None:
        return False
    activation = own_activation(norm)
    known = activation is None or type(activation) in (nn.Identity, *_ACTIVATIONS)
    return bool(known and 0 <= _slope(activation) <= 1 and norm.running_mean.shape[0] == width)


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
