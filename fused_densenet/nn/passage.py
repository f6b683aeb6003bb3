"""What goes from one module to the next beside the feature maps, where a network owns both: their layout and statistics.

Fused modules write channels-last, whatever they read. A network that calls them one after the other knows the layout that
the feature maps would have without them, and gives it to every module that may ask for it and to what comes after. It also
knows that nothing has touched a block's result when the next module reads it: the statistics that the block took still hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..fallback.anatomy import CONVS, has_hooks, interceptions
from ..fallback.reasons import is_calm
from ..fallback.standing import Known
from ..ops.statistics import BatchStatistics

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_ANY_LAYOUT = (
    *CONVS,
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)
"""Modules whose result holds the same values, in the layout of their input, whatever that is."""
_CALL = nn.Module.__call__
_FORWARDS: list[Callable[..., Any]] = []
Kind = Literal["bare", "convolution", "any layout", "other"]
Forward = TypeVar("Forward", bound=Callable[..., Any])


def passes_on(forward: Forward) -> Forward:
    """Marks a ``forward(self, x)`` that is ``alone(self, x)`` and does nothing else."""
    _FORWARDS.append(forward)
    return forward


def alone(module: Any, x: Any) -> Tensor:
    """``module.pass_on(x)`` where no network hands anything over: channels-last, whatever the layout of ``x``.

    A backward hook sees a view of the result, and for one image torch's ``view_as`` gives a channels-last tensor strides
    from which the CPU's batch normalisation takes wrong gradients: such a module keeps the layout of ``x``.
    """
    hooked = bool(module._backward_hooks or module._backward_pre_hooks) and isinstance(x, Tensor)
    passage = Passage(layout_of(x) if hooked else None)
    return passage.arranged(module.pass_on(x, passage))


@dataclass
class Passage:
    """Of the feature maps between two modules.

    Attributes:
        layout: what they would have if no module ran fused; None where that does not matter.
        statistics: their batch statistics, where the module that wrote them has taken them.
        undisturbed: whether nothing has run so far that may have changed anything.
    """

    layout: torch.memory_format | None = None
    statistics: BatchStatistics | None = None
    undisturbed: bool = True
    _calm: bool | None = None

    def is_calm(self) -> bool:
        """:func:`~..fallback.reasons.is_calm`, asked again only after a module that may have changed it."""
        if self._calm is None:
            self._calm = is_calm()
        return self._calm

    def through(self, module: nn.Module, x: Tensor, kind: Kind | None = None, known: Known | None = None) -> Tensor:
        """``module(x)``, of :func:`kind_of`: told what is known of ``x`` where nobody else follows or replaces what it does."""
        kind = kind or kind_of(module)
        if kind == "bare" and self.is_calm():
            whole: Any = module.pass_on
            result: Tensor = whole(x, self) if known is None else whole(x, self, known)
            return result
        self.statistics = None
        if self.layout is None:
            self._disturb()
            return module(x)
        # What a compiler asks of a norm's channels-last strides limits the sizes that its graph is for.
        if kind in ("bare", "other") or (kind == "any layout" and torch.compiler.is_compiling()):
            return self.through_operators(module, x)
        out = module(x)
        self.convolved(module)
        self._look_at(out)
        return out

    def through_operators(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``: to it and behind it, the layout is that without fused modules (:func:`alone` says why)."""
        self._disturb()
        out = function(self.arranged(x))
        self._look_at(out)
        return self.arranged(out)

    def _disturb(self) -> None:
        self.statistics = self._calm = None
        self.undisturbed = False

    def convolved(self, convolution: nn.Module, pool: nn.Module | None = None) -> None:
        """Notes that modules have run: channels-last weights make their result so, and ``AvgPool3d`` contiguous."""
        weight = convolution._parameters.get("weight")
        if self.layout is torch.contiguous_format and weight is not None:
            self.layout = layout_of(weight)
        if self.layout is not None and isinstance(pool, nn.AvgPool3d):
            self.layout = torch.contiguous_format

    def _look_at(self, out: Any) -> None:
        """Notes what a module has returned. Channels-last feature maps of contiguous ones are fused modules' inside it."""
        if self.layout is not None and self.layout is not torch.contiguous_format:
            self.layout = layout_of(out) if isinstance(out, Tensor) else None

    def arranged(self, x: Tensor) -> Tensor:
        """``x`` in :attr:`layout`."""
        if self.layout is None or not isinstance(x, Tensor) or x.is_contiguous(memory_format=self.layout):
            return x  # itself: some subclasses' ``contiguous`` returns another class
        return x.contiguous(memory_format=self.layout)


def kind_of(module: Any) -> Kind:
    """What calling a module means: the same as calling its ``pass_on``, or one of torch's operators alone, or anything."""
    if (
        any(type(module).forward is forward for forward in _FORWARDS)
        and "forward" not in module.__dict__
        and type(module).__call__ is _CALL
        and module._compiled_call_impl is None
        and not has_hooks(module)
    ):
        return "bare"
    if type(module) not in _ANY_LAYOUT or interceptions([("", module)]):
        return "other"
    return "convolution" if type(module) in CONVS else "any layout"


def channels_last(x: Tensor) -> Tensor:
    """``x`` ``(N, C, *spatial)``, copied where it is of two or three spatial dimensions and in another layout."""
    layout = _CHANNELS_LAST.get(x.dim())
    return x if layout is None else x.contiguous(memory_format=layout)


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that torch's operators give to what they compute from ``x``: channels-last if its strides look like that."""
    layout = _CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    sizes = x.shape
    if layout is torch.contiguous_format:
        return layout
    if x.is_contiguous() and sizes[1] > 1 and x.numel() > sizes[0] * sizes[1]:  # else it may be laid out both ways
        return torch.contiguous_format
    strides = x.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[dim] * sizes[dim]
    return layout
