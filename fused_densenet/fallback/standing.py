"""What a module's structure says, worked out once and kept for as long as nothing that it depends on has changed.

Between two calls a user may hook, patch, replace or prune anything inside a module, and nothing tells of it. So every call
looks, at every attribute of the module and of all inside; in C++ (``csrc/watch.cpp``) where that was compiled.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch
from torch import nn

from ..backends import cpu, extension
from .anatomy import CONVS, HOOKS, MODULES_OWN, SWITCHES, attribute_names, dicts_within, foreign_tensors, own_class

Plan = TypeVar("Plan")


class Standing(Generic[Plan]):
    """A plan, and everything that it depends on: a module's class and attributes, and all that is inside it.

    The values of tensors are none of that, nor which tensors they are.

    Attributes:
        plan: what was worked out; not the module itself, whose life must not depend on it.
        one_device: whether all parameters and buffers are on one device, but for what was moved in place since.
        tensors: another object whenever one of the parameters and buffers is another; None where one was computed from
            others: it is for this call, and what it was computed from must not be kept.
    """

    def __init__(self, plan: Plan, module: nn.Module, inside: Iterable[nn.Module]) -> None:
        self.plan = plan
        modules = list(dict.fromkeys(inside))
        attributes = [inner.__dict__ for inner in modules]
        owners = [module.__dict__, *attributes]
        held = [*owners, module.__dict__["_modules"]]
        held += [of_one[name] for of_one in attributes for name in ("_modules", *HOOKS)]
        theirs = [value for of_one in owners for name, value in of_one.items() if name not in MODULES_OWN]
        held += [said for value in theirs for said in dicts_within(value)]
        tensors = [of_one[name] for of_one in attributes for name in ("_parameters", "_buffers") if of_one[name]]
        kinds = dict.fromkeys(map(own_class, (module, *modules)))
        looked_at = ((kind, (*attribute_names(kind), *SWITCHES, "__call__")) for kind in kinds)
        methods = [(kind, name) for kind, names in looked_at for name in names if hasattr(kind, name)]
        self._is_as_it_was = _watch(held, tensors, modules, methods)
        self._tensors, self._owners = tensors, modules
        kernels = [
            of_one["_parameters"] for of_one, inner in zip(attributes, modules, strict=True) if type(inner) in CONVS
        ]
        self._kernels = [of_one for of_one in kernels if of_one.get("weight") is not None]
        self._shapes = [_shape_of(of_one) for of_one in self._kernels]
        self._look_at_tensors()
        self._planned = self._foreign

    def holds(self) -> bool:
        """Whether all is as it was."""
        if not self._is_as_it_was():
            return False
        if not self._has_the_same_tensors():
            self._look_at_tensors()
        return self._foreign == self._planned and self._has_the_same_shapes()

    def _look_at_tensors(self) -> None:
        found = [t for of_one in self._tensors for t in of_one.values() if t is not None]
        self._foreign = [key for module in self._owners for key, _ in foreign_tensors(module)]
        self.one_device = len({t.device for t in found}) < 2
        computed = any(t.grad_fn is not None for t in found)
        self.tensors = None if computed else _watch(self._tensors, [], [], [])
        self._has_the_same_tensors = (lambda: False) if self.tensors is None else self.tensors
        self._has_the_same_shapes = _watch_shapes(self._kernels, self._shapes, keeps=not computed)


def _shape_of(kernel: dict[str, Any]) -> torch.Size:
    shape: torch.Size = kernel["weight"].shape
    return shape


def _watch_shapes(kernels: Sequence[dict[str, Any]], shapes: Sequence[torch.Size], keeps: bool) -> Callable[[], bool]:
    """What tells whether the weights of convolutions have these shapes; where it ``keeps`` them, the tensors that they are now."""

    def look() -> bool:
        return all(_shape_of(kernel) == shape for kernel, shape in zip(kernels, shapes, strict=True))

    weights = [kernel["weight"] for kernel in kernels]
    plain = all(type(weight) in (torch.Tensor, nn.Parameter) and weight.device.type == "cpu" for weight in weights)
    if not keeps or not weights or not plain or extension.cpu is None or not look():
        return look
    bound = cpu.bind(weights)
    return look if bound is None else _Shapes(bound).hold


def _watch(
    held: list[dict[str, Any]],
    tensors: list[dict[str, Any]],
    objects: list[Any],
    methods: list[tuple[type, str]],
) -> Callable[[], bool]:
    """What tells whether these are as they are now.

    The keys and values of the dicts ``held``; the keys of the dicts ``tensors``, and which of them are None; the classes of
    ``objects``; attributes of classes.
    """
    if extension.cpu is not None:
        return _Watch(held, tensors, objects, methods).holds

    def look() -> list[Any]:
        return [
            [[*map(id, of_one), *map(id, of_one.values())] for of_one in held],
            [[(key, value is None) for key, value in of_one.items()] for of_one in tensors],
            [*map(type, objects)],
            [getattr(kind, name, None) for kind, name in methods],
        ]

    seen = look(), [[*of_one.values()] for of_one in held]  # what lives keeps its id
    return lambda: look() == seen[0]


class _Functions:
    """Of the compiled library; they look at Python's objects."""

    def __init__(self, library: ctypes.CDLL) -> None:
        python = ctypes.PyDLL(library._name)
        self.begin, self.holds, self.end, self.bound_holds = (
            getattr(python, f"fused_densenet_{name}") for name in ("watch", "watch_holds", "watch_end", "bound_holds")
        )
        self.begin.restype, self.begin.argtypes = ctypes.c_void_p, [*[ctypes.py_object] * 6, ctypes.c_size_t]
        self.end.restype, self.end.argtypes = None, [ctypes.c_void_p]
        for look in (self.holds, self.bound_holds):
            look.restype, look.argtypes = ctypes.c_bool, [ctypes.c_void_p]


_compiled: Any = None if extension.cpu is None else _Functions(extension.cpu)


def _versions_at() -> int:
    """Behind how many bytes of a dict CPython keeps its version (PEP 509, until Python 3.12); 0 where it keeps none."""
    tracing = hasattr(sys, "getobjects")  # such builds have longer objects
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 13) or sys.maxsize < 2**32 or tracing:
        return 0
    place, watched, versions = 24, dict[str, int](), set[int]()
    for change in (lambda: None, lambda: watched.update(a=1), lambda: watched.update(a=2), watched.clear):
        change()
        versions.add(ctypes.c_uint64.from_address(id(watched) + place).value)
    return place if len(versions) == 4 else 0


_VERSIONS_AT = _versions_at()


class _Watch:
    """The same in C++."""

    def __init__(self, *watched: list[Any]) -> None:
        held, tensors, objects, methods = watched
        owners, names = ([pair[i] for pair in methods] for i in range(2))
        self._watch = _compiled.begin(held, tensors, objects, owners, names, None, _VERSIONS_AT)
        self._end = _compiled.end

    def __del__(self) -> None:
        self._end(self._watch)  # of a library that outlives this module

    def holds(self) -> bool:
        looks: bool = _compiled.holds(self._watch)
        return looks


class _Shapes:
    """Those of bound tensors, in C++."""

    def __init__(self, bound: torch.Tensor) -> None:
        self._bound, self._at = bound, bound.data_ptr()

    def hold(self) -> bool:
        looks: bool = _compiled.bound_holds(self._at)
        return looks


_standing: WeakKeyDictionary[nn.Module, tuple[type, Standing[Any]]] = WeakKeyDictionary()
_keeping: WeakSet[nn.Module] = WeakSet()


class Remembered(nn.Module):
    """A module of which nothing is remembered while its tensors are exchanged.

    ``torch.utils.swap_tensors``, which ``to`` and ``load_state_dict`` use where torch was asked for it, takes only what nobody
    else holds, and a plan may hold tensors.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        _standing.pop(self, None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _standing.pop(self, None)
        super()._load_from_state_dict(*args, **kwargs)


class Known(NamedTuple):
    """What is known of a module: its plan; and its tensors, an object that is another one when one of them is.

    ``tensors`` is None where they are not known to be on one device.
    """

    plan: Any
    tensors: object | None


def known_of(module: nn.Module, work_out: Callable[[], tuple[Any, Iterable[nn.Module]]]) -> Known:
    """What was worked out of ``module`` and still holds, or what ``work_out`` says now: a plan, and what it looked at."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return Known(work_out()[0], None)
    kind, known = _standing.get(module, (None, None))
    if known is None or kind is not type(module) or not known.holds():
        called = nn.Module.__call__
        plan, inside = work_out()
        known = Standing(plan, module, inside)
        if nn.Module.__call__ is not called:  # torch.fx has begun or ended in another thread: it is for this call
            return Known(plan, None)
        _standing[module] = type(module), known
        if module not in _keeping:
            _keeping.add(module)
            finalize(module, cpu.empty_cache).atexit = False  # what its steps kept goes with the module
    return Known(known.plan, known.tensors if known.one_device else None)
