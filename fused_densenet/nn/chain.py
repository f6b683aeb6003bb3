"""Neighbours in a sequence that run as one: a program in inference, a differentiable function in training."""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import BACKENDS, choose
from ..backends.contract import accumulate_dtype
from ..fallback.reasons import autocasts, meets
from ..ops.block import Parameters
from ..ops.network import Network, Part, Parts, channels, sizes
from ..ops.network_parameters import Held
from ..ops.network_step import Arguments, network_step
from ..ops.operator import is_plain, records
from ..ops.program import Bound
from ..ops.ranks import are_there_ranks
from .passage import Passage
from .running import RunningStatistics


class Link(NamedTuple):
    """A module of a chain.

    Attributes:
        part: what it computes.
        dims: spatial dimensions of what it reads, where it reads but one number of them.
        parameters: looks up its tensors.
        running: the running statistics that it updates; None where its norms take no statistics of the batch.
        convolution: with its pooling, where its result is not laid out as what it reads.
    """

    part: Part
    dims: int | None
    parameters: Callable[[], Parameters]
    running: RunningStatistics | None
    convolution: tuple[nn.Module, nn.Module | None] | None = None


class Chain:
    """Links that follow one another, each reading as many channels as the one before it makes.

    ``end`` is the place in the sequence that comes after them.
    """

    def __init__(self, links: Sequence[Link], end: int) -> None:
        self.links, self.end = links, end
        self.parts = Parts(link.part for link in links)
        self._in_training = links[0].running is not None
        self._network = None if self._in_training else Network(self.parts)
        running = [link.running for link in links if link.running is not None]
        self._running = RunningStatistics(*[norms for one in running for norms in one.groups])
        self._looked: _Looked | None = None
        hold = functools.partial(Held.by, parts=self.parts) if self._in_training else Bound.by
        self._hold: Callable[[ModuleType, Parameters], Any] = hold
        self._kept: tuple[object, str, Any] | None = None

    def run(self, x: Tensor, tensors: object | None, passage: Passage) -> Tensor | None:
        """The result of all, of parameters that are others only where ``tensors`` is; None where they cannot run at once."""
        if records() != self._in_training or tensors is None or not is_plain(x) or not x.numel():
            return None
        looked = self._looked
        if looked is None or looked.tensors is not tensors or looked.dtype is not x.dtype:
            looked = self._looked = _Looked.at([link.parameters() for link in self.links], tensors, x.dtype)
        if not looked.of_one_dtype or not meets(x, looked.parameters.weights[0]):
            return None
        if x.dtype == torch.float32 and autocasts(x):  # of which a transition makes images of another dtype
            return None
        try:
            out = self._step(x, looked) if self._in_training else self._infer(x, looked)
        except (TypeError, ValueError):  # changed in place: the modules say what is wrong, or do without a program
            return None
        if out is not None:
            passage.statistics = None
            for link in self.links:
                if link.convolution is not None:
                    passage.convolved(*link.convolution)
        return out

    def _infer(self, x: Tensor, looked: "_Looked") -> Tensor | None:
        assert self._network is not None
        backend = choose(x.device, x.dtype)
        if looked.as_they_are:
            return self._network(x, looked.parameters, backend, self._held(looked, backend))
        return self._network(x, _converted(looked.parameters, x.dtype), backend)

    def _step(self, x: Tensor, looked: "_Looked") -> Tensor | None:
        """Where the first part is to be differentiated: one that is not keeps nothing for a backward pass, and has none.

        Not where there are other processes, to which a module's gradients go while those before it are computed.
        """
        if are_there_ranks():
            return None
        if not looked.as_they_are or not (x.requires_grad or any(t.requires_grad for t in looked.first)):
            return None
        spatial = sizes(self.parts, tuple(x.shape[2:]))
        read = None if spatial is None else [tuple(x.shape[2:]), *spatial[:-1]]
        if read is None or x.shape[0] * min(map(math.prod, read)) < 2:  # whose variance would be that of one value
            return None
        weights, biases, gammas, betas, _ = looked.parameters
        backend = choose(x.device, x.dtype)
        held = self._held(looked, backend)
        out, moments = network_step(Arguments(x, weights, biases, gammas, betas, self.parts, backend, held))
        self._running.update(moments, looked.tensors)
        return out

    def _held(self, looked: "_Looked", backend: str) -> Any:
        """The parameters as the backend keeps them from call to call; None where it does not."""
        kept = self._kept
        if kept is None or kept[0] is not looked.tensors or kept[1] != backend or kept[2] is None:
            kept = self._kept = looked.tensors, backend, self._hold(BACKENDS[backend], looked.parameters)
        return kept[2]


def chains(links: Sequence[tuple[int, Link | None]]) -> dict[int, Chain]:
    """The longest chains of two links or more by the place where they begin, of links by theirs; the last one is None."""
    found: dict[int, Chain] = {}
    begin, members = 0, list[Link]()
    for place, link in links:
        if link is None or not members or not _follows(link, members):
            if len(members) > 1:
                found[begin] = Chain(members, place)
            begin, members = place, []
        if link is not None:
            members.append(link)
    return found


def _follows(link: Link, members: Sequence[Link]) -> bool:
    before, dims = members[-1], {member.dims for member in (*members, link)} - {None}
    alike = len(dims) < 2 and (link.running is None) == (before.running is None)
    return alike and channels(before.part)[1] == channels(link.part)[0]


class _Looked(NamedTuple):
    """What was found at some tensors for data of a dtype: whether programs can read them as they are.

    ``first`` are the parameters of the first link.
    """

    parameters: Parameters
    first: list[Tensor]
    tensors: object
    dtype: torch.dtype
    of_one_dtype: bool
    as_they_are: bool

    @classmethod
    def at(cls, of_links: Sequence[Parameters], tensors: object, dtype: torch.dtype) -> "_Looked":
        parameters = Parameters(*[[t for tensors in kind for t in tensors] for kind in zip(*of_links, strict=True)])
        first = [t for kind in of_links[0][:4] for t in kind]
        weights, *_ = parameters
        converted = _converted(parameters, dtype)
        same = all(
            a is b
            for before, after in zip(parameters, converted, strict=True)
            for a, b in zip(before, after, strict=True)
        )
        return cls(parameters, first, tensors, dtype, len({t.dtype for t in weights}) == 1, same)


def _converted(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """As programs on data of ``dtype`` read them: running statistics in the dtype of sums, vectors contiguous."""
    weights, *vectors, running = parameters
    biases, gammas, betas = ([t.contiguous() for t in vector] for vector in vectors)
    wide = accumulate_dtype(dtype)
    return Parameters(weights, biases, gammas, betas, [t.to(wide).contiguous() for t in running])
