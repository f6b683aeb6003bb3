"""Neighbours in a sequence that run as one program where nothing is differentiated and no norm takes batch statistics."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends import choose
from ..backends.contract import accumulate_dtype
from ..fallback.reasons import autocasts, context_reasons
from ..ops.functional import Parameters
from ..ops.network import Network, Part, channels
from .passage import Passage


class Link(NamedTuple):
    """A module of a chain.

    Attributes:
        part: what it computes.
        dims: spatial dimensions of what it reads, where it reads but one number of them.
        parameters: looks up its tensors.
        convolution: with its pooling, where its result is not laid out as what it reads.
    """

    part: Part
    dims: int | None
    parameters: Callable[[], Parameters]
    convolution: tuple[nn.Module, nn.Module | None] | None = None


class Chain:
    """Links that follow one another, each reading as many channels as the one before it makes.

    ``end`` is the place in the sequence that comes after them.
    """

    def __init__(self, links: Sequence[Link], end: int) -> None:
        self.links, self.end = links, end
        self._network = Network([link.part for link in links])
        self._inputs = channels(links[0].part)[0]
        self._dims = {link.dims for link in links} - {None}
        self._looked: _Looked | None = None

    def run(self, x: Tensor, tensors: object | None, passage: Passage) -> Tensor | None:
        """The result of all, of parameters that are others only where ``tensors`` is; None where they cannot run at once."""
        if torch.is_grad_enabled() or tensors is None or type(x) is not Tensor or torch.autograd._profiler_enabled():
            return None
        if x.shape[1] != self._inputs or not self._dims <= {x.dim() - 2} or not x.numel():
            return None
        looked = self._looked
        if looked is None or looked.tensors is not tensors or looked.dtype is not x.dtype:
            parameters = _together([link.parameters() for link in self.links])
            looked = self._looked = _Looked.at(parameters, tensors, x.dtype)
        if not looked.of_one_dtype or not _meets(x, looked.parameters.weights[0]):
            return None
        parameters = looked.parameters if looked.as_they_are else _converted(looked.parameters, x.dtype)
        try:
            out = self._network(x, parameters, choose(x.device, x.dtype))
        except (TypeError, ValueError):  # changed in place: the modules say what is wrong, or do without a program
            return None
        if out is not None:
            passage.statistics = None
            for link in self.links:
                if link.convolution is not None:
                    passage.convolved(*link.convolution)
        return out


def chains(links: Sequence[tuple[int, Link | None]]) -> dict[int, Chain]:
    """The longest chains of two links or more by the place where they begin, of links by theirs; the last one is None."""
    found: dict[int, Chain] = {}
    begin, members = 0, list[Link]()
    for place, link in links:
        if link is None or not members or channels(members[-1].part)[1] != channels(link.part)[0]:
            if len(members) > 1:
                found[begin] = Chain(members, place)
            begin, members = place, []
        if link is not None:
            members.append(link)
    return found


def _meets(x: Tensor, weight: Tensor) -> bool:
    """Whether there is nothing to be said against ``x`` for convolutions with weights like this one."""
    if weight.device != x.device:
        return False
    if not autocasts(x):
        return weight.dtype == x.dtype
    autocast = torch.get_autocast_dtype(x.device.type)
    return x.dtype == autocast and weight.dtype in (autocast, torch.float32) and not context_reasons(x)


class _Looked(NamedTuple):
    """What was found at some tensors for data of a dtype: whether programs can read them as they are."""

    parameters: Parameters
    tensors: object
    dtype: torch.dtype
    of_one_dtype: bool
    as_they_are: bool

    @classmethod
    def at(cls, parameters: Parameters, tensors: object, dtype: torch.dtype) -> "_Looked":
        weights, *_ = parameters
        converted = _converted(parameters, dtype)
        same = all(
            a is b
            for before, after in zip(parameters, converted, strict=True)
            for a, b in zip(before, after, strict=True)
        )
        return cls(parameters, tensors, dtype, len({t.dtype for t in weights}) == 1, same)


def _together(parameters: Sequence[Parameters]) -> Parameters:
    return Parameters(*[[t for tensors in kind for t in tensors] for kind in zip(*parameters, strict=True)])


def _converted(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """As programs on data of ``dtype`` read them: running statistics in the dtype of sums, vectors contiguous."""
    weights, *vectors, running = parameters
    biases, gammas, betas = ([t.contiguous() for t in vector] for vector in vectors)
    wide = accumulate_dtype(dtype)
    return Parameters(weights, biases, gammas, betas, [t.to(wide) for t in running])
