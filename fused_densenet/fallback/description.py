"""What ``fuse`` found a module to compute: where its parts stand in it, and what must stay as it is for that to hold.

A description is plain data. It names no tensor and holds no module, so it goes with a module's copies and pickles, and
parts that were replaced by others of their kind (by ``SyncBatchNorm.convert_sync_batchnorm``, say) are found again.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from torch import nn

from .anatomy import DEPTH, SWITCHES, LayerParts, Stage, contents_of

_HALVING = (nn.AvgPool1d(2), nn.AvgPool2d(2), nn.AvgPool3d(2))


class Place(NamedTuple):
    """A module inside another one: number of its parent in :attr:`Description.places`, its name there, what it may be.

    ``tensors`` are those that it has beside what norms and convolutions have, and which of them are None.
    """

    parent: int
    name: str
    path: str
    kinds: tuple[type, ...]
    children: int
    tensors: tuple[tuple[str, bool], ...] = ()


_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))


def other_tensors(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    """The parameters and buffers of a module that norms and convolutions have not, and whether they are None."""
    held = (*module._parameters.items(), *module._buffers.items())
    return tuple((name, t is None) for name, t in held if name not in _TENSORS)


def is_plain(value: Any) -> bool:
    """Whether it is a number, a string or the like, whose copies are equal to it."""
    return isinstance(value, bool | int | float | str | Enum | None)


class Contents(NamedTuple):
    """What a dict, a sequence or an object says, in plain values: a configuration, which may change in place."""

    items: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, value: Any, depth: int = DEPTH) -> "Contents":
        said = (contents_of(value) if depth else None) or {}
        inner = ((k, v if is_plain(v) else cls.of(v, depth - 1)) for k, v in said.items())
        return cls(tuple((k, v) for k, v in inner if v != cls(())))


def _is_still(before: Any, now: Any) -> bool:
    """Whether a plain attribute is as it was; a tensor or an array may compare equal to a number."""
    if isinstance(before, Contents):
        now = now if isinstance(now, Contents) else Contents.of(now)
        same = len(now.items) == len(before.items)
        return same and all(
            a[0] == b[0] and _is_still(a[1], b[1]) for a, b in zip(before.items, now.items, strict=True)
        )
    return type(now) is type(before) and bool(now == before or before != before)


class StagePlaces(NamedTuple):
    """A norm-relu-conv: the numbers of its modules, and the slope of its activation for negative numbers.

    ``activation`` is None where a function is called.
    """

    norm: int
    activation: int | None
    conv: int
    slope: float = 0.0


class DropoutPlace(NamedTuple):
    """A dropout: the module, or the rate that a function is given; the module whose mode it follows; of whole channels?"""

    module: int | None
    rate: float
    follows: int
    channels: bool


@dataclass(frozen=True)
class Description:
    """A dense block or a transition as a list of its modules, the module itself first.

    Attributes:
        places: every module inside, parents before their children.
        settings: by number, the plain attributes of modules that are not torch's own; they must stay.
        switches: paths of the modules that can be set to compute bottlenecks again in backward.
    """

    places: tuple[Place, ...]
    settings: tuple[tuple[int, dict[str, Any]], ...]
    switches: tuple[str, ...]

    def find(self, root: nn.Module) -> tuple[list[Any], list[str]]:
        """The modules, by number, and what is not as it was; they are not to be used where there is such a change."""
        found: list[Any] = []
        for place in self.places:
            module = found[place.parent]._modules.get(place.name) if found else root
            if module is None:
                return found, [f"{place.path} is missing"]
            if place.kinds and type(module) not in place.kinds:
                return found, [f"{place.path} is a {type(module).__name__}"]
            if (place.kinds or not found) and len(module._modules) != place.children:
                return found, [f"{place.path or 'it'} has other modules inside than when fuse was called"]
            if (place.kinds or not found) and other_tensors(module) != place.tensors:
                return found, [f"{place.path or 'it'} has other parameters or buffers than when fuse was called"]
            found.append(module)
        children: dict[int, list[str]] = {}
        for place in self.places[1:]:
            children.setdefault(place.parent, []).append(place.name)
        for number, names in children.items():
            if names != [name for name in found[number]._modules if name in names]:
                where = self.places[number].path or "it"
                return found, [f"{where} has its modules in another order than when fuse was called"]
        return found, [
            f"{self.places[number].path or 'it'} has another {name} than when fuse was called"
            for number, before in self.settings
            for name, value in before.items()
            if not _is_still(value, getattr(found[number], name, None))
        ]

    def is_memory_efficient(self, root: nn.Module) -> bool:
        """Whether any of the modules that can be is set to compute bottlenecks again in backward."""
        for path in self.switches:
            module: Any = root
            for name in path.split(".") if path else ():
                module = None if module is None else module._modules.get(name)
            if module is not None and any(module.__dict__.get(name, False) for name in SWITCHES):
                return True
        return False

    def dropout_places(self) -> list[DropoutPlace]:
        """All dropouts that it has."""
        return []

    def named(self, found: Sequence[Any]) -> dict[str, Any]:
        """What :meth:`find` found, by path, without the module itself."""
        return {place.path: module for place, module in zip(self.places[1:], found[1:], strict=True) if place.kinds}

    def stage(self, places: StagePlaces, found: Sequence[Any]) -> Stage:
        """A norm-relu-conv of what :meth:`find` found."""
        norm, conv = self.places[places.norm].path, self.places[places.conv].path
        activation = f"{norm}'s activation" if places.activation is None else self.places[places.activation].path
        return Stage(
            found[places.norm], [_activation(places.slope)], found[places.conv], (norm, activation, conv), seen=True
        )


_RELU = nn.ReLU()


@functools.cache
def _leaky(slope: float) -> nn.Module:
    return nn.LeakyReLU(slope)


def _activation(slope: float) -> nn.Module:
    return _leaky(slope) if slope else _RELU


@dataclass(frozen=True)
class BlockDescription(Description):
    """A dense block.

    Attributes:
        layers: for each layer its norm-relu-convs, in order.
        dropouts: for each layer the dropouts after its norm-relu-convs; None for none, or one of rate 0.
        before: names of the children that are called, one after the other, on what the block is given.
        units: names of the children that are its layers, where there are others before or after them.
        after: names of the children that are called on its result.
        prepends: whether new features stand before those that their layer read, not behind them.
        returns_new: whether the result is the new features alone.
    """

    layers: tuple[tuple[StagePlaces, ...], ...]
    dropouts: tuple[tuple[DropoutPlace | None, ...], ...]
    before: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    prepends: bool = False
    returns_new: bool = False

    def parts(self, block: nn.Module) -> list[LayerParts]:
        """The layers of ``block``, taken apart; all its modules, and all reasons against them, are the first one's."""
        found, changes = self.find(block)
        if changes:
            return [LayerParts("it", None, {}, [], 0.0, False, changes)]
        modules = self.named(found)
        parts: list[LayerParts] = []
        kinds = {place.channels for place in self.dropout_places()}
        changes = ["its dropouts drop single values and whole channels"] if len(kinds) > 1 else []
        for number, (stages, dropouts) in enumerate(zip(self.layers, self.dropouts, strict=True), 1):
            taken = [self.stage(places, found) for places in stages]
            rates, channels = _rates(dropouts, found)
            inside, rate = [0.0, *rates][-2:]
            parts.append(LayerParts(f"layer {number}", None, modules, taken, rate, channels, changes, inside))
            modules, changes = {}, []
        return parts

    @property
    def around(self) -> tuple[str, ...]:
        """The children that are no layers."""
        return (*self.before, *self.after)

    def dropout_places(self) -> list[DropoutPlace]:
        return [place for dropouts in self.dropouts for place in dropouts if place is not None]


def _rates(places: Sequence[DropoutPlace | None], found: Sequence[Any]) -> tuple[list[float], bool]:
    """Of a layer's dropouts, at the moment, and whether they drop whole channels."""
    rates = []
    for place in places:
        rate = 0.0 if place is None else place.rate if place.module is None else found[place.module].p
        rates.append(rate if place is not None and found[place.follows].training else 0.0)
    return rates, any(place is not None and place.channels for place in places)


@dataclass(frozen=True)
class TransitionDescription(Description):
    """A transition.

    Attributes:
        places_of_stage: its norm-relu-conv.
        pools: whether it pools.
        pool: number of the module that does; None where a function is called.
        dropout: between the convolution and the pooling.
    """

    places_of_stage: StagePlaces
    pools: bool
    pool: int | None
    dropout: DropoutPlace | None = None

    def parts(self, transition: nn.Module) -> tuple[dict[str, Any], Stage, nn.Module | None, list[str], float, bool]:
        """Its modules by path, its norm-relu-conv, its pooling, what has changed, its dropout's rate and whether of channels."""
        found, changes = self.find(transition)
        if changes:
            return {}, Stage(None, [], None, ("norm", "relu", "conv")), None, changes, 0.0, False
        stage, pool = self.stage(self.places_of_stage, found), None
        if self.pools:
            pool = _HALVING[stage.conv.weight.dim() - 3] if self.pool is None else found[self.pool]
        (rate,), channels = _rates([self.dropout], found)
        return self.named(found), stage, pool, [], rate, channels

    def dropout_places(self) -> list[DropoutPlace]:
        return [] if self.dropout is None else [self.dropout]


@dataclass(frozen=True)
class ResidualDescription(Description):
    """A dense block without norms.

    Attributes:
        layers: for each layer the number of its convolution, and the slope of its activation for negative numbers.
        last: number of the convolution that reads all features; None where they are the result.
        scale: what that is multiplied by.
        residual: whether the input is added.
    """

    layers: tuple[tuple[int, float], ...]
    last: int | None
    scale: float
    residual: bool

    def parts(self, block: nn.Module) -> tuple[dict[str, Any], list[str], list[float], str, float, bool, list[str]]:
        """Its modules by path, which of them are the layers' and the last convolution, and what has changed."""
        found, changes = self.find(block)
        convs, slopes = [self.places[number].path for number, _ in self.layers], [slope for _, slope in self.layers]
        last = "" if self.last is None else self.places[self.last].path
        return {} if changes else self.named(found), convs, slopes, last, self.scale, self.residual, changes
