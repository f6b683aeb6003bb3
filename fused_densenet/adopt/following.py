"""A model's ``forward`` as a graph of modules and functions, by torch.fx, and the paths in it along which one feature map goes."""

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten

from ..backends import use_backend
from ..fallback.anatomy import CHANNEL_DROPOUTS, CONVS, HOOKS, interceptions, is_batch_norm
from ..fallback.reasons import quiet
from ..nn.gate import Gate
from .trace import plain_settings, random_states
from .trial import undisturbed

_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(65,), (224,)],
    2: [(72, 65), (224, 224)],
    3: [(36, 33, 40), (64, 64, 64)],
}
"""Of images on which a graph is compared with what it was made of."""


_TRACES = 3
"""Other threads may draw random numbers meanwhile; a forward that does, does so each time."""


class NotFollowed(Exception):
    """Why a module's ``forward`` is no graph."""


TRACING = threading.Lock()
"""While torch.fx traces, ``nn.Module.__call__`` is its own, for all threads of the process: one traces at a time, and who asks
whether somebody else has replaced it waits."""


class _Tracer(torch.fx.Tracer):
    """Looks into modules as far as it can; what has hooks, and torch's own modules, are nodes. Other threads call what they call."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Gate) or is_batch_norm(m) or interceptions([("", m)]):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
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
    own, graph = _traced(module)
    _flatten_views(graph, own)
    without_hooks(own)
    found = GraphModule(own, graph)
    if difference := _differs(own, found):
        raise NotFollowed(difference)
    for node in graph.nodes:  # tensors that the code made of numbers are the copy's attributes
        if node.op == "get_attr" and hasattr(own, node.target) and not hasattr(module, node.target):
            setattr(module, node.target, getattr(own, node.target))
    return GraphModule(module, graph).eval()


def _traced(module: nn.Module) -> tuple[nn.Module, Graph]:
    """A copy, and its graph as it is without gradients."""
    for _ in range(_TRACES):
        own = copy.deepcopy(module)
        settings = [plain_settings(part) for part in own.modules()]
        with undisturbed(), torch.no_grad():
            before = [*random_states(), torch.get_rng_state().tolist()]
            try:
                with TRACING:
                    graph = _Tracer().trace(own)
            except Exception as error:
                raise NotFollowed(
                    f"its forward cannot be followed: {type(error).__name__}: {_first_line(error)}"
                ) from error
            drawn = before != [*random_states(), torch.get_rng_state().tolist()]
        if settings != [plain_settings(part) for part in own.modules()]:
            raise NotFollowed("its forward sets attributes of its own")
        if not drawn:
            return own, graph
    raise NotFollowed("its forward draws random numbers")


def without_hooks(module: nn.Module) -> None:
    """Takes them away, from all parts of a copy."""
    for part in module.modules():
        for name in HOOKS:
            part.__dict__[name].clear()


def _flatten_views(graph: Graph, modules: nn.Module) -> None:
    """``x.view(x.size(0), -1)`` and the like as what they are of any image: ``torch.flatten(x, 1)``."""
    for node in list(graph.nodes):
        views = node.target in ("view", "reshape", torch.reshape) and not node.kwargs
        sizes = tree_flatten(node.args[1:])[0] if views else []
        if len(sizes) == 2 and sizes[1] == -1 and _is_batch_size(sizes[0], node.args[0], modules):
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(torch.flatten, (node.args[0], 1)))
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.target not in ("size", getattr, operator.getitem))


def _is_batch_size(size: Any, of: Any, modules: nn.Module) -> bool:
    """Whether it is the first size of ``of``, or of a tensor that is as many images as that."""
    if not isinstance(size, Node):
        return False
    if size.target is operator.getitem and size.args[1] == 0:
        size = size.args[0]
        known = isinstance(size, Node) and (
            size.target == "size" or (size.target is getattr and size.args[1] == "shape")
        )
    else:
        known = size.target == "size" and size.args[1:] == (0,)
    while known and isinstance(of, Node) and of is not size.args[0]:
        called = modules.get_submodule(str(of.target)) if of.op == "call_module" else None
        keeps = of.target in _OF_EACH_IMAGE if called is None else isinstance(called, _PARTS_OF_EACH_IMAGE)
        if not keeps and not (called is not None and is_batch_norm(called)):
            return False
        of = of.args[0] if of.args else None
    return known and isinstance(of, Node)


def _differs(module: nn.Module, graph: GraphModule) -> str:
    """What keeps a graph from standing for ``module``, seen on an image; empty if nothing.

    What Python code does may depend on more than a graph tells, ``isinstance`` for one.
    """
    if convolution_of(graph) is None:
        return "it has no convolution"
    with use_backend("eager"):
        same, error = tried(module, graph, images(graph))
    if same is None:
        return f"its forward could not be tried: {error}"
    return "" if same else "its forward does something else than can be followed"


def convolution_of(module: nn.Module) -> Any:
    """The first one, of a graph the first that it calls; None where there is none."""
    called: list[nn.Module] = [module]
    if isinstance(module, GraphModule):
        called = [module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module"]
    return next((m for outer in called for m in outer.modules() if isinstance(m, CONVS)), None)


def images(module: nn.Module) -> Iterator[Tensor]:
    """Such as the first convolution of ``module`` reads, random, in its dtype."""
    conv = convolution_of(module)
    return iter(()) if conv is None else _images(conv)


def _images(conv: Any) -> Iterator[Tensor]:
    for size in _SIZES[conv.weight.dim() - 2]:
        with undisturbed():
            x = torch.randn(2, conv.weight.shape[1] * conv.groups, *size, device="cpu").to(conv.weight)
        yield x


def tried(module: nn.Module, other: nn.Module, images: Iterable[Tensor]) -> tuple[bool | None, str]:
    """Whether ``other`` gives what ``module`` does of the first image that that can be called with; None and the error if of none.

    All tensors must be close, and all else equal.
    """
    error = ""
    for x in images:
        with undisturbed(), quiet(), torch.no_grad():
            try:
                with use_backend("eager"):
                    expected = module(x.clone())
            except Exception as raised:
                error = f"{type(raised).__name__}: {_first_line(raised)}"
                continue
            run = other.forward if isinstance(other, GraphModule) else other  # a call would print what it raises
            try:
                return _same(expected, run(x.clone())), ""
            except Exception:
                return False, ""
    return None, error


def _same(expected: Any, found: Any) -> bool:
    (theirs, as_theirs), (ours, as_ours) = tree_flatten(expected), tree_flatten(found)
    if as_theirs != as_ours:
        return False
    for a, b in zip(theirs, ours, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not _are_close(a, b):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _are_close(a: Tensor, b: Tensor) -> bool:
    """Each entry, up to rounding, beside itself or a usual one: a few very large ones hide no others."""
    finite = a.isfinite()
    if not (a.is_floating_point() or a.is_complex()) or not _equal(a[~finite], b[~finite]):
        return _equal(a, b)
    expected, error = a[finite].abs(), (a[finite] - b[finite]).abs()
    usual = expected[expected > 0].median() if bool((expected > 0).any()) else 0
    return bool((error <= {2: 0.05, 4: 1e-3}.get(a.dtype.itemsize, 1e-6) * (expected + usual)).all())


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


_OF_EACH_IMAGE = (
    *(F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.leaky_relu, F.dropout),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
)
_PARTS_OF_EACH_IMAGE = (
    *(Gate, *CONVS, *CHANNEL_DROPOUTS, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Identity),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)
"""What gives as many images as it reads."""
_STAND_INS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.mean, "mean"), Mean),
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    F.dropout: lambda p=0.5, training=True, inplace=False: nn.Dropout(p).train(training),
}
