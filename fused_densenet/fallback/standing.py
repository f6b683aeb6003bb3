"""What a module's structure says, worked out once and kept for as long as nothing that it depends on has changed.

Between two calls a user may hook, patch, replace or prune anything inside a module, and nothing tells of it. So every call
looks: at lists of objects and of plain values, compared as wholes, which costs a tenth of working the structure out again.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .anatomy import CONVS, HOOKS, NORMS, methods_of, own_class

Plan = TypeVar("Plan")

_NORM = operator.itemgetter("training", "eps", "momentum", "track_running_stats")
_CONV = operator.itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_SHAPE, _DEVICE = operator.attrgetter("shape"), operator.attrgetter("device")


class Standing(Generic[Plan]):
    """A plan, and everything that it depends on: a module's class and children, and all that is inside them.

    Attributes:
        plan: what was worked out; not the module itself, whose life must not depend on it.
        device: where all parameters are; None where they are on several or there are none.
    """

    def __init__(self, plan: Plan, module: nn.Module, inside: Iterable[nn.Module]) -> None:
        self.plan = plan
        self._modules = list(dict.fromkeys(inside))
        self._kinds = list(dict.fromkeys([own_class(module), *map(type, self._modules)]))
        attributes = [module.__dict__ for module in self._modules]
        self._attributes = attributes
        self._norms = [module.__dict__ for module in self._modules if type(module) in NORMS]
        self._convs = [module.__dict__ for module in self._modules if type(module) in CONVS]
        plain = (*NORMS, *CONVS, nn.ReLU)
        self._others = [module.__dict__ for module in self._modules if type(module) not in plain]
        self._parents = [module.__dict__["_modules"], *[held["_modules"] for held in attributes if held["_modules"]]]
        self._empty = [held[name] for held in attributes for name in HOOKS]
        self._empty += [held["_modules"] for held in attributes if not held["_modules"]]
        self._parameters = [held["_parameters"] for held in attributes if held["_parameters"]]
        self._buffers = [held["_buffers"] for held in attributes if held["_buffers"]]
        self._held = [list(held.values()) for held in (*self._others, *self._parents)]  # what lives keeps its id
        self._hooked = any(self._empty)  # nothing tells of the end of that
        self._seen = self._look()
        devices = self._seen[-1]
        self.device: torch.device | None = next(iter(devices)) if len(devices) == 1 else None

    def holds(self) -> bool:
        """Whether all is as it was, but for the values of tensors."""
        return not self._hooked and not any(self._empty) and self._look() == self._seen

    def _look(self) -> list[Any]:
        parameters = [t for held in self._parameters for t in held.values() if t is not None]
        return [
            list(map(type, self._modules)),
            list(map(len, self._attributes)),
            list(map(_NORM, self._norms)),
            list(map(_CONV, self._convs)),
            [list(map(id, held.values())) for held in self._others],
            [list(map(id, held.values())) for held in self._parents],
            [list(held) for held in self._parents],
            [methods_of(kind) for kind in self._kinds],
            [t is None for held in self._buffers for t in held.values()],
            list(map(_SHAPE, parameters)),
            set(map(_DEVICE, parameters)),
        ]


_standing: WeakKeyDictionary[nn.Module, tuple[type, Standing[Any]]] = WeakKeyDictionary()


def standing_of(
    module: nn.Module, work_out: Callable[[], tuple[Plan, Iterable[nn.Module]]]
) -> tuple[Plan, torch.device | None]:
    """What was worked out of ``module`` and still holds, or what ``work_out`` says now: a plan, and what it looked at.

    And where all parameters are; None where they are on several devices, or something records, which looks for itself.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return work_out()[0], None
    kind, known = _standing.get(module, (None, None))
    if known is None or kind is not type(module) or not known.holds():
        plan, inside = work_out()
        known = Standing(plan, module, inside)
        _standing[module] = type(module), known
    return known.plan, known.device
