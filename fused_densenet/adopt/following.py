"""A model's ``forward`` as a graph of modules and functions, by torch.fx, and the paths in it along which one feature map goes."""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten

from ..backends import use_backend
from ..fallback.anatomy import CONVS, HOOKS, interceptions, is_batch_norm
from ..fallback.reasons import quiet
from ..nn.gate import Gate
from .trial import undisturbed

_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(65,), (224,)],
    2: [(72, 65), (224, 224)],
    3: [(36, 33, 40), (64, 64, 64)],
}
"""Of images on which a graph is compared with what it was made of."""


class NotFollowed(Exception):
    """Why a module's ``forward`` is no graph."""


class _Tracer(torch.fx.Tracer):
    """Looks into modules as far as it can; what has hooks, and torch's own modules, are nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Gate) or is_batch_norm(m) or interceptions([("", m)]):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            known = set(self.graph.nodes)
            try:
                return forward(*args, **kwargs)
            except Exception:  # it is somebody else's code: whatever it raises, it is called as it is
                added = [node for node in self.graph.nodes if node not in known]
                for node in reversed(added):
                    self.graph.erase_node(node)
        return self.create_proxy("call_module", name, args, kwargs)


def follow(module: nn.Module) -> GraphModule:
    """The graph of ``module``, whose modules it shares, and which was seen to compute the same.

    It is a copy that is looked at and called: whatever its code keeps, and whoever its hooks tell, hears nothing of that.

    Raises:
        NotFollowed: there is none.
    """
    if reasons := interceptions([("it", module)]):
        raise NotFollowed(reasons[0])
    parameters = inspect.signature(module.forward).parameters.values()
    if [p.kind for p in parameters] != [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        raise NotFollowed("its forward takes something else than one tensor")
    own = copy.deepcopy(module)
    try:
        graph = _Tracer().trace(own)
    except Exception as error:
        raise NotFollowed(f"its forward cannot be followed: {type(error).__name__}: {_first_line(error)}") from error
    _flatten_views(graph)
    for part in own.modules():
        for name in HOOKS:
            part.__dict__[name].clear()
    if difference := _differs(own, GraphModule(own, graph)):
        raise NotFollowed(difference)
    for node in graph.nodes:  # tensors that the code made of numbers are the copy's attributes
        if node.op == "get_attr" and hasattr(own, node.target) and not hasattr(module, node.target):
            setattr(module, node.target, getattr(own, node.target))
    return GraphModule(module, graph).eval()


def _flatten_views(graph: Graph) -> None:
    """``x.view(x.size(0), -1)`` and the like as what they are of any image: ``torch.flatten(x, 1)``."""
    for node in list(graph.nodes):
        views = node.target in ("view", "reshape", torch.reshape) and not node.kwargs
        sizes = tree_flatten(node.args[1:])[0] if views else []
        if len(sizes) == 2 and _is_batch_size(sizes[0]) and sizes[1] == -1:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(torch.flatten, (node.args[0], 1)))
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.target not in ("size", getattr, operator.getitem))


def _is_batch_size(size: Any) -> bool:
    if not isinstance(size, Node):
        return False
    if size.target is operator.getitem and size.args[1] == 0:
        size = size.args[0]
        return isinstance(size, Node) and (
            size.target == "size" or (size.target is getattr and size.args[1] == "shape")
        )
    return size.target == "size" and size.args[1:] == (0,)


def _differs(module: nn.Module, graph: GraphModule) -> str:
    """What keeps a graph from standing for ``module``, seen on an image; empty if nothing.

    What Python code does may depend on more than a graph tells, ``isinstance`` for one.
    """
    called = [graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    conv: Any = next((m for outer in called for m in outer.modules() if isinstance(m, CONVS)), None)
    if conv is None:
        return "it has no convolution"
    error = ""
    for size in _SIZES[conv.weight.dim() - 2]:
        with undisturbed(), quiet(), use_backend("eager"), torch.no_grad():
            x = torch.randn(2, conv.weight.shape[1] * conv.groups, *size).to(conv.weight)
            try:
                same = _same(module(x), graph(x))
            except Exception as raised:
                error = f"its forward could not be tried: {type(raised).__name__}: {_first_line(raised)}"
                continue
            return "" if same else "its forward does something else than can be followed"
    return error


def _same(expected: Any, found: Any) -> bool:
    (theirs, as_theirs), (ours, as_ours) = tree_flatten(expected), tree_flatten(found)
    if as_theirs != as_ours:
        return False
    for a, b in zip(theirs, ours, strict=True):
        tensors = isinstance(a, Tensor), isinstance(b, Tensor)
        if tensors == (True, True):
            largest = float(a.abs().max()) if a.numel() else 0.0
            if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=1e-3 * largest, equal_nan=True):
                return False
        elif tensors != (False, False) or a != b:
            return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class Called(NamedTuple):
    """A node and the module that computes what it does: its own, or one of torch's that stands for a function."""

    node: Node
    module: nn.Module


def paths(graph: GraphModule) -> Iterator[list[Called]]:
    """Nodes that follow one another, each reading nothing but the one before it, which nobody else reads."""
    seen = set[Node]()
    for node in graph.graph.nodes:
        path = list[Called]()
        while node not in seen and (module := _module_of(graph, node)) is not None:
            seen.add(node)
            path.append(Called(node, module))
            if len(node.users) != 1:
                break
            (node,) = node.users
        if path:
            yield path


def _module_of(graph: GraphModule, node: Node) -> nn.Module | None:
    """What computes a node that reads one other."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        alone = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node)
        return graph.get_submodule(str(node.target)) if alone else None
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    make = _STAND_INS.get(node.target)
    try:
        return None if make is None else make(*node.args[1:], **node.kwargs)
    except TypeError:  # called by names that it has not
        return None


def _relu(inplace: bool = False) -> nn.Module:
    return nn.ReLU()


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


class Mean(nn.Module):
    """Over dimensions of a tensor."""

    def __init__(self, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
        super().__init__()
        self.dims = tuple(dim) if isinstance(dim, Sequence) else (dim,)
        self.keepdim, self.plain = keepdim, dtype is None

    def over(self, dims: Sequence[int], of: int) -> bool:
        """Whether these are its dimensions, of a tensor that has so many."""
        found = [dim % of if isinstance(dim, int) else None for dim in self.dims]
        return self.plain and sorted(found, key=str) == sorted(dims)


_STAND_INS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), Mean),
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    F.dropout: lambda p=0.5, training=True, inplace=False: nn.Dropout(p).train(training),
}
