"""A module of an unknown class on small inputs: what it was read to be, and whether the fused one gives the same."""

import contextlib
import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..fallback.anatomy import HOOKS, SWITCHES
from ..fallback.reasons import strict
from ..nn.block import NORM
from .interpretation import Reading
from .swapping import Described, is_swapped, swap, swap_back
from .trace import Trace, trace

_SIZES = {1: ((5,), (12,)), 2: ((5, 3), (9, 10)), 3: ((2, 3, 5), (3, 3, 9))}
"""Odd ones and, in the last dimension at least, more than eight: what a module does to a few pixels is no proof."""
_BATCHES = (3, 2)
_MIXED = "training of some modules"
_MODES = (("training", "eval", _MIXED), ("training", "eval"))
_ALONE = threading.RLock()


def observe(module: nn.Module, channels: int, spatial_dims: int) -> tuple[nn.Module, list[Trace]]:
    """A copy of ``module``, and what it does in training and in eval mode.

    Raises:
        Exception: whatever copying or calling it raises.
    """
    with undisturbed():
        own, size = _copy(module, spatial_dims), _SIZES[spatial_dims][1]
        traces = []
        for training in (True, False):
            x = torch.randn(2, channels, *size, dtype=torch.float64, device="cpu", requires_grad=True)
            traces.append(trace(own.train(training), x * 1))
        return own, traces


def read(reader: Callable[[nn.Module, Trace], Reading], module: nn.Module, traces: Sequence[Trace]) -> Reading:
    """What ``reader`` makes of the ``traces`` of a module, if it is the same of each."""
    readings = [reader(module, trace) for trace in traces]
    descriptions = [reading.description for reading in readings]
    if descriptions[1:] == descriptions[:-1]:
        return readings[0]
    reasons = [reason for reading in readings for reason in reading.reasons]
    return Reading(reasons=reasons or ["it does something else in eval mode than in training"])


def differs(
    own: nn.Module, channels: int, spatial_dims: int, fused_class: type[nn.Module], described: Described
) -> str:
    """What the fused one does otherwise than ``own``, in float64; empty if nothing.

    Compared are results, gradients by input and parameters, and buffers, in training, in eval mode and with modes mixed.

    Raises:
        Exception: whatever calling one of them raises.
    """
    with undisturbed(), use_backend("eager"), strict():
        fused = copy.deepcopy(own)
        swap(fused, fused_class, described)
        for batch, size, modes in zip(_BATCHES, _SIZES[spatial_dims], _MODES, strict=True):
            x = torch.randn(batch, channels, *size, dtype=torch.float64, device="cpu")
            for mode in modes:
                for module in (own, fused):
                    _set_mode(module, mode, described)
                expected, actual = _step(own, x), _step(fused, x)
                for what, value in expected.items():
                    if not _same(value, actual[what]):
                        return f"{what} in {mode}"
                with torch.no_grad():
                    if not _same(*(_seeded(module, x.detach()) for module in (own, fused))):
                        return f"its result in {mode} without gradients"
    return ""


def _set_mode(module: nn.Module, mode: str, described: Described) -> None:
    module.train(mode == "training")
    if mode == _MIXED:
        choices = random.Random(0)
        for part in module.modules():
            part.training = choices.random() < 0.5
        for place in described.dropout_places():
            module.get_submodule(described.places[place.follows].path).training = True


def _seeded(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    random.seed(0)
    out: Tensor = module(x * 1)
    return out


def _step(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    x = x.requires_grad_()
    given = x * 1
    torch.manual_seed(0)
    random.seed(0)
    out = module(given)
    named = dict(module.named_parameters())
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=out.dtype, device=out.device)
    gradients = torch.autograd.grad(out, [x, *named.values()], dout, allow_unused=True)
    names = ["its input", *named]
    return {
        "its result": out.detach(),
        "what it leaves of its input": given.detach(),
        **{f"the gradient by {name}": gradient for name, gradient in zip(names, gradients, strict=True)},
        **{f"the buffer {name}": buffer.clone() for name, buffer in module.named_buffers()},
    }


def _same(expected: Tensor | None, actual: Tensor | None) -> bool:
    if expected is None or actual is None:
        return expected is actual
    return expected.shape == actual.shape and torch.allclose(actual, expected, rtol=1e-7, atol=1e-9)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves random numbers alone, and whatever gradients and autocast are set to; one thread at a time, whose they are."""
    numpy: Any = sys.modules.get("numpy")
    with _ALONE:
        states = random.getstate(), numpy and numpy.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
                torch.manual_seed(0)
                yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


def _copy(module: nn.Module, spatial_dims: int) -> nn.Module:
    """On the CPU in float64, with norms that do something, of this process alone, without hooks; nothing inside is fused."""
    own = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
    for part in own.modules():
        if is_swapped(part):
            swap_back(part)
        for name in HOOKS:
            part.__dict__[name].clear()
        for name in SWITCHES:
            if name in part.__dict__:
                setattr(part, name, False)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
        if type(part) is nn.SyncBatchNorm:  # which the CPU refuses
            part.__class__ = NORM[spatial_dims]  # type: ignore[assignment]
    return own
