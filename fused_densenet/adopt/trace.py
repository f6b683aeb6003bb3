"""What a module computes: its operators on a small input, which parameters each one reads, and what else it looks at."""

import inspect
import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..fallback.anatomy import MODULES_OWN, attribute_names, contents_of, own_class
from ..fallback.description import Contents, is_plain

HARMLESS = frozenset({"dim", "ndim", "device", "_assert"})
"""What a module may ask of a tensor: every input of a kind that the fused operators take answers the same."""

DROPOUTS = {"dropout": False, "dropout1d": True, "dropout2d": True, "dropout3d": True, "feature_dropout": True}
"""Functions that drop values out, and whether they drop whole channels."""

_SAME = frozenset({"contiguous"})
_ALIASES = {"relu_": "relu", "leaky_relu_": "leaky_relu", "concat": "cat", "concatenate": "cat", "hstack": "cat"}


@dataclass(eq=False)
class Node:
    """A tensor and the operator that made it.

    Attributes:
        op: the function's name, without the underscore of its in-place form; "input" for what the module was given.
        inputs: the tensors among its arguments that are no parameters.
        arguments: the others, by position or name.
        owner: path of the module whose parameters or buffers it reads, "" for none, None where there are several.
        caller: path of the module whose ``forward`` called it.
        channels: of the tensor.
    """

    op: str
    inputs: tuple["Node", ...] = ()
    arguments: dict[int | str, Any] = field(default_factory=dict)
    owner: str | None = ""
    caller: str = ""
    channels: int = 0


def pieces_of(node: Node) -> list[Node]:
    """What concatenations put together, in order; a node that is none is the only piece."""
    if node.op != "cat":
        return [node]
    return [piece for part in node.inputs for piece in pieces_of(part)]


@dataclass
class Call:
    """A call of a module inside with one tensor, which returned one."""

    path: str
    given: Node
    returned: Node


@dataclass
class Trace:
    """A run of a module.

    Attributes:
        nodes: every tensor that was made, in order, the input first.
        result: what it returned; None where that is no tensor that an operator of torch made.
        calls: the modules inside that were called.
        remarks: what it did besides that may decide what it does another time, and which module inside did.
    """

    nodes: list[Node]
    result: Node | None
    calls: list[Call]
    remarks: list[tuple[str, str]]


def trace(module: nn.Module, x: Tensor) -> Trace:
    """Runs ``module`` on ``x``; its modules must be copies of its own, for hooks are added to them.

    Raises:
        Exception: whatever ``module(x)`` raises.
    """
    recorder = _Recorder(module, x)
    before = list(random_states())
    attributes = [_attributes(part) for part in module.modules()]
    handles = [handle for path, part in module.named_modules() for handle in recorder.follow(path, part)]
    try:
        with recorder:
            out = module(x)
    finally:
        for handle in handles:
            handle.remove()
    remarks = list(recorder.remarks)
    if before != list(random_states()):
        remarks.append(("", "draws random numbers that are not torch's"))
    if attributes != [_attributes(part) for part in module.modules()]:
        remarks.append(("", "sets attributes of its own"))
    return Trace(recorder.nodes, recorder.node_of.get(id(out)), recorder.calls, remarks)


def rate(arguments: Mapping[int | str, Any]) -> float:
    """The rate among the arguments of a dropout function."""
    found: float = arguments.get("p", arguments.get(1, 0.5))
    return found


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, strings and the like, and no matter of its mode."""
    return {name: value for name, value in module.__dict__.items() if name not in MODULES_OWN and _is_setting(value)}


def kept_settings(module: nn.Module) -> dict[str, Any]:
    """:func:`plain_settings`, functions and what dicts and objects say, and what of these the module has from its class."""
    held = {name: value for name, value in module.__dict__.items() if name not in MODULES_OWN}
    functions = {name: value for name, value in held.items() if isinstance(value, _FUNCTIONS)}
    said = {name: Contents.of(value) for name, value in held.items() if contents_of(value) is not None}
    inherited = [
        name for name in attribute_names(own_class(module)) if name not in held and name not in module._modules
    ]
    of_class = {name: inspect.getattr_static(type(module), name, ...) for name in inherited}
    plain = {name: value for name, value in of_class.items() if _is_setting(value)}
    return plain | functions | said | plain_settings(module)


_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)


def _is_setting(value: Any) -> bool:
    return is_plain(value) or (type(value) is tuple and all(map(is_plain, value)))


class _Identity(NamedTuple):
    """An attribute that is no plain value: which one, and how much is in it."""

    value: Any
    size: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value and self.size == other.size


def _attributes(module: nn.Module) -> dict[str, Any]:
    """All attributes of a module but torch's own, to see whether they change."""
    others = {
        name: _Identity(value, len(value) if isinstance(value, list | dict | set) else 0)
        for name, value in module.__dict__.items()
        if name not in MODULES_OWN
    }
    return others | plain_settings(module)


def random_states() -> Iterator[Any]:
    """Of the generators that are not torch's."""
    yield random.getstate()
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state()
        yield [part.tobytes() if hasattr(part, "tobytes") else part for part in state]


def _autocasts() -> list[int]:
    """Which are enabled, and how many contexts stand around: one that switches off what is off is another, too."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return [depth, *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))]


class _Recorder(TorchFunctionMode):
    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.owners = {
            id(tensor): (path, name)
            for path, part in module.named_modules()
            for name, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None
        }
        self.nodes = [Node("input", channels=_channels(x))]
        self.node_of = {id(x): self.nodes[0]}
        self.alive: list[Any] = [x]  # so that no other tensor gets the id of one of these
        self.calls: list[Call] = []
        self.remarks: dict[tuple[str, str], None] = {}
        self.stack: list[str] = []
        self.given: list[Any] = []
        self._autocasts = _autocasts()

    def follow(self, path: str, module: nn.Module) -> Iterator[Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            values = (*args, *options.values())
            self.stack.append(path)
            self.given.append(self.node_of.get(id(values[0])) if len(values) == 1 else None)

        def leave(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.stack.pop()
            given, returned = self.given.pop(), self.node_of.get(id(out))
            if given is not None and returned is not None:
                self.calls.append(Call(path, given, returned))

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        out = function(*args, **options)
        if _autocasts() != self._autocasts:
            self.remarks[self._caller(), "switches autocast"] = None
        name = getattr(function, "__name__", str(function))
        if name in ("__get__", "__set__"):
            name = getattr(function.__self__, "__name__", name)
        tensors = list(_tensors((args, options)))
        owned = [self.owners[id(t)] for t in tensors if id(t) in self.owners]
        if name in HARMLESS or (owned and all(attribute == "num_batches_tracked" for _, attribute in owned)):
            return out
        if name == "size" and (*args[1:], *options.values()) == (1,):  # which is what the first parameter is for
            return out
        results = list(_tensors(out))
        if not results:
            what = {"size": "shape", "__len__": "shape"}.get(name, name).strip("_")
            self.remarks[self._caller(), f"looks at the {what} of a tensor" if tensors else f"calls {what}"] = None
            return out
        inputs = tuple(self._node(t) for t in tensors if id(t) not in self.owners)
        arguments = {key: value for key, value in (*enumerate(args), *options.items()) if not list(_tensors(value))}
        rest = _without_first(inputs[0], args[1]) if name == "__getitem__" and len(inputs) == 1 else None
        if inputs and (name in _SAME or (name in DROPOUTS and not rate(arguments))):
            nodes = [inputs[0]] * len(results)
        elif rest is not None:
            nodes = [rest]
            self.nodes += [] if rest in self.nodes else nodes
        else:
            paths = {path for path, _ in owned}
            owner = None if len(paths) > 1 else next(iter(paths), "")
            op = _ALIASES.get(name, name)
            if op == "cat" and name != "hstack" and _dimension(arguments) not in (1, 1 - results[0].dim()):
                op = "cat along another dimension than the channels'"
            nodes = [Node(op, inputs, arguments, owner, self._caller(), _channels(out)) for out in results]
            self.nodes += nodes
        for tensor, node in zip(results, nodes, strict=True):
            self.node_of[id(tensor)] = node
        self.alive += results
        return out

    def _caller(self) -> str:
        return self.stack[-1] if self.stack else ""

    def _node(self, tensor: Tensor) -> Node:
        """That of a tensor; one that comes from nowhere is an operator that torch did not call."""
        node = self.node_of.get(id(tensor))
        if node is None:
            node = self.node_of[id(tensor)] = Node("something that is no function of torch", caller=self._caller())
            self.nodes.append(node)
            self.alive.append(tensor)
        return node


def _dimension(arguments: Mapping[int | str, Any]) -> Any:
    """The dimension among the arguments of a concatenation."""
    return next((arguments[key] for key in ("dim", "axis", 1) if key in arguments), 0)


def _channels(tensor: Tensor) -> int:
    return tensor.shape[1] if tensor.dim() > 1 else 0


def _without_first(node: Node, index: Any) -> Node | None:
    """``node[index]`` where that is all channels from some on, and these are whole pieces of a concatenation."""
    if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
        return None
    channels, found = index[1], pieces_of(node)
    if not isinstance(channels, slice) or channels != slice(channels.start, None, None):
        return None
    if any(i is not ... and i != slice(None) for i in index[2:]):
        return None
    starts = list(itertools.accumulate([piece.channels for piece in found], initial=0))[:-1]
    if (channels.start or 0) not in starts:
        return None
    kept = found[starts.index(channels.start or 0) :]
    if len(kept) in (1, len(found)):
        return kept[0] if len(kept) == 1 else node
    return Node("cat", tuple(kept), channels=node.channels - channels.start)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
