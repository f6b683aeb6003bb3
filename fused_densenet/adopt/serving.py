"""``optimize_for_inference``: a snapshot of a network in which what ``fuse`` knows, and what stands around it, are programs."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..arguments import check_flags, check_module
from ..fallback.anatomy import interceptions
from ..fallback.reasons import FallbackError
from ..nn.gate import Gate
from ..nn.serving import Arrangement, Segment, Snapshot
from .drafts import Draft, alone, drafts
from .explain import KINDS, Report
from .following import Called, NotFollowed, follow, images, paths, tried, without_hooks
from .fuse import adopted
from .recognition import Finding
from .swapping import around_layers

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIFFERS = "its program computes something else than it"


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype | None = None, strict: bool = False, cuda_graphs: bool = False
) -> Snapshot:
    """A snapshot of ``model`` for serving: from the image to the logits one program, with weights that are folded and packed once.

    Taken are the networks that :func:`fused_densenet.fuse` takes. Batch normalisations are folded, in float64, into the
    convolutions that they follow (the stem's, each bottleneck's), the last BN-ReLU and the mean over all pixels are one
    pass, a classifier of one linear layer is part of the program. A first convolution of a stride is part of it on the CPU,
    and runs as torch's own before it elsewhere. What no program has is left to the model's own modules and functions, which :func:`fused_densenet.explain`
    of the snapshot lists with the reasons: whatever has hooks, other heads, a ``forward`` that is no sequence of calls.

    ``model`` is not changed, nor is the snapshot by what happens to it; other threads may call theirs while it is made.
    Images of any batch and size may come, in the snapshot's dtype; several threads may call at once, and get the bits that
    one would get. Feature maps that it returns have the layout that those of ``model`` have, or, where they come from blocks
    without norms or of new features alone, channels-last. A ``forward`` that looks at what it was given is followed as it is
    for a tensor. A snapshot can be copied, pickled and moved to another device. It has no gradients, no training mode, takes
    no other weights and no other dtype: each is a RuntimeError.

    Args:
        model: the network, in training or evaluation mode; what runs is evaluation.
        dtype: of weights, images and results: float32, bfloat16, float16 or float64; None for that of the weights.
        strict: raise where a dense block is left out, or there is none.
        cuda_graphs: on a GPU, capture a CUDA graph for each shape of an image, and replay it; eight are kept. ``model``
            must be called with one tensor, and do nothing but launch kernels.

    Returns:
        What is called as ``model`` is.

    Raises:
        TypeError: a bad argument, or a model that Python cannot copy.
        FallbackError: with ``strict``, as :func:`fused_densenet.fuse` does.

    Warns:
        FallbackWarning: what looks like a dense block and cannot be fused, as :func:`fused_densenet.fuse` does.
    """
    check_module("model", model)
    if isinstance(model, Snapshot):
        raise TypeError("model: expected the model that a snapshot is made of, got a Snapshot")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))} or None, got {dtype}")
    check_flags(strict=strict, cuda_graphs=cuda_graphs)
    converts = dtype is not None
    own = _copied(model).eval().requires_grad_(False)
    findings = adopted(own, strict=strict)
    order = {name: i for i, (name, _) in enumerate(own.named_modules())}
    if dtype is None:
        dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
    freezing = _Freezing(dtype, [f for f in findings if f.reasons])
    with torch.no_grad():
        inside = freezing.network(own)
    left = [report for report in freezing.reports if report.kind == "dense block" and not report.fused]
    if strict and (left or freezing.differing):
        lines = map(str, (*left, *freezing.differing))
        raise FallbackError("not every dense block is part of a program: " + "\n".join(lines))
    for part in (inside, *freezing.programs) if converts else ():
        _convert(part, dtype)
    reports = sorted(freezing.reports, key=lambda report: order.get(report.name, len(order)))
    return Snapshot(inside, dtype, reports, cuda_graphs, freezing.programs)


def _copied(model: nn.Module) -> nn.Module:
    """A copy, of tensors that were computed by their values alone: what is behind them torch does not copy.

    Raises:
        TypeError: there is something in it that Python does not copy.
    """
    held: list[Any] = []
    with contextlib.suppress(RecursionError):  # of what holds itself
        held = pytree.tree_leaves([[*part.__dict__.values()] for part in model.modules()])
    computed = [t for t in held if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"model: expected a module that can be copied, as a snapshot must be; copy.deepcopy says: {error}"
        ) from error


class _Freezing:
    """Replaces what it can by segments of ``dtype``, and reports on all.

    A module that is called by code which is not known stays, with all of its children, and only its ``forward`` is one of
    ``programs``: the code may ask it for anything.
    """

    def __init__(self, dtype: torch.dtype, left: Sequence[Finding]) -> None:
        self.dtype = dtype
        self.reports = [Report(f.name, KINDS[f.fused_class], False, reasons=f.reasons) for f in left]
        self.programs: list[nn.Module] = []
        self.differing: list[Report] = []
        self._segments = 0
        self._seen = set[nn.Module]()

    def network(self, model: nn.Module) -> nn.Module:
        """What stands for all of it."""
        if _has_gates(model):
            return self._program(model, "") or model
        if not self.reports:
            self.reports.append(
                Report("", "other", False, reasons=[f"no dense block was found in {type(model).__name__}"])
            )
        return model

    def _program(self, module: nn.Module, name: str) -> nn.Module | None:
        """What computes what ``module`` does, which is called ``name`` in the network; None where it stays as it is, but for what is inside."""
        if isinstance(module, Gate):
            return self._alone(module, name)
        try:
            return self._graph(module, name)
        except NotFollowed as reason:
            if type(module).forward is not nn.Module.forward:  # else it is only a container
                self.reports.append(Report(name, "other", False, reasons=[str(reason)]))
        for key, child in module._modules.items():
            if child is not None and _has_gates(child):
                self._called_by_code(child, _joined(name, key))
        return None

    def _called_by_code(self, module: nn.Module, name: str) -> None:
        if module in self._seen:
            return
        self._seen.add(module)
        if (program := self._program(module, name)) is not None:
            self.programs.append(program)
            module.__dict__["forward"] = program

    def _alone(self, module: Gate, name: str) -> nn.Module | None:
        draft = alone(module)
        if draft is not None and self._differs(module, draft.segment, images(module), name):
            draft = None
        self._report(module, name, None if draft is None else self._segments + 1)
        return None if draft is None else self._segment(draft)

    def _graph(self, module: nn.Module, name: str) -> GraphModule:
        graph = follow(module)
        found, trials = dict[str, tuple[Draft, Sequence[Called]]](), images(graph)
        for path in list(paths(graph)):
            for draft, taken in drafts(path):
                key = f"segment{self._segments + len(found) + 1}"
                found[key] = draft, taken
                graph.add_submodule(key, nn.Identity())
                with graph.graph.inserting_before(taken[0].node):  # what comes later may change its input in place
                    node = graph.graph.call_module(key, (taken[0].node.args[0],))
                taken[-1].node.replace_all_uses_with(node)
                for called in reversed(taken):
                    graph.graph.erase_node(called.node)
        arranged = _arrange_for_others(graph, {key: draft for key, (draft, _) in found.items()})
        graph.delete_all_unused_submodules()
        graph.recompile()

        def built(dtype: torch.dtype, graph: GraphModule = graph) -> GraphModule:
            for key, (draft, _) in found.items():
                graph._modules[key] = segment = draft.segment(dtype)
                segment.arranges = key not in arranged
            return graph

        if self._differs(module, lambda dtype: built(dtype, copy.deepcopy(graph)), trials, name):
            raise NotFollowed(_DIFFERS)
        for _, taken in found.values():
            self._segments += 1
            for called in taken:
                if isinstance(called.module, Gate):
                    self._report(called.module, _joined(name, str(called.node.target)), self._segments)
        built(self.dtype)
        for target in dict.fromkeys(node.target for node in graph.graph.nodes if node.op == "call_module"):
            inner, full = graph.get_submodule(str(target)), _joined(name, str(target))
            if isinstance(inner, Gate):
                self._report(inner, full, None)
            elif not isinstance(inner, Segment | Arrangement):
                if _has_gates(inner):
                    self._called_by_code(inner, full)
                else:
                    key = str(target).rpartition(".")[2]
                    reasons = interceptions([(key, inner)]) or [f"no program has a {type(inner).__name__} there"]
                    self.reports.append(Report(full, "other", False, reasons=reasons))
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method"):
                function = node.target if isinstance(node.target, str) else node.target.__name__
                reasons = [f"no program has a call of {function} there"]
                self.reports.append(Report(_joined(name, node.name), "other", False, reasons=reasons))
        return graph

    def _differs(
        self, module: nn.Module, build: Callable[[torch.dtype], nn.Module], trials: Iterator[Tensor], name: str
    ) -> bool:
        """Whether what is built for ``module`` was seen to compute something else.

        Both are copies in float64, where a difference is none of rounding; where code of the module cannot be called with
        that, in the dtype that it has, or float32.
        """
        for x in trials:
            for dtype in (torch.float64, x.dtype if x.dtype.itemsize > 2 else torch.float32):
                own, other = copy.deepcopy(module), build(dtype)
                for whole in (own, other):
                    without_hooks(whole)
                    _convert(whole, dtype)
                    _convert_attributes(whole, dtype)
                same, _ = tried(own, other, [x.to(dtype)])
                if same is False:
                    self.differing.append(Report(name, "other", False, reasons=[_DIFFERS]))
                if same is not None:
                    return not same
        return False

    def _segment(self, draft: Draft) -> Segment:
        self._segments += 1
        return draft.segment(self.dtype)

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


def _arrange_for_others(graph: GraphModule, segments: Mapping[str, Draft]) -> set[str]:
    """Between segments feature maps stay as they were written; whoever else reads one of those gets the model's layout.

    Returns:
        The segments whose results are not arranged, or behind them.
    """
    handled = set()

    def is_segment(node: Any) -> bool:
        return node.op == "call_module" and node.target in segments

    for key, draft in segments.items():
        (node,) = graph.graph.find_nodes(op="call_module", target=key)
        others = [user for user in node.users if not is_segment(user)]
        if not is_segment(node.args[0]) and len(others) == len(node.users):
            continue  # it does that itself
        handled.add(key)
        if not others:
            continue
        layout, source = draft.layout, node.args[0]
        while is_segment(source):
            layout, source = layout or segments[source.target].layout, source.args[0]
        graph.add_submodule(f"{key}_arranged", Arrangement(layout))
        with graph.graph.inserting_after(node):
            arranged = graph.graph.call_module(f"{key}_arranged", (node, source))
        for user in others:
            user.replace_input_with(node, arranged)
    return handled


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """To ``dtype``, but for segments, which have one."""
    for part in module.modules():
        if not isinstance(part, Segment):
            part._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)


def _convert_attributes(module: nn.Module, dtype: torch.dtype) -> None:
    """Tensors that are no buffers, as a hook keeps the weights that it computes: the hooks are gone."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not isinstance(part, Segment):
                part.__dict__[name] = value.to(dtype)


def _has_gates(module: nn.Module) -> bool:
    return any(isinstance(part, Gate) for part in module.modules())


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}".strip(".")
