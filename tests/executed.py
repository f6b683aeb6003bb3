"""Kernels that are executed outside torch's dispatcher, as a backend for CPU tensors.

:class:`Executed` has the functions of :mod:`fused_densenet.backends.contract`. Each call works on copies between guard
bytes: results start as NaN, and every byte that is not part of a result must be what it was before.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import problems
import torch
from arena import Arena
from torch import Tensor

from fused_densenet.backends import extension
from fused_densenet.backends.contract import Gradient, Norm, Owed


class Executed(ABC):
    @abstractmethod
    def workspace(self, name: str, problem: ctypes.Structure, dtype: torch.dtype) -> int:
        """The bytes of scratch memory that a primitive takes for data of a dtype."""

    @abstractmethod
    def execute(self, name: str, problem: ctypes.Structure, dtype: torch.dtype, arena: Arena) -> None: ...

    def place(self, x: Tensor, out: Tensor | None, mean: Tensor | None, var: Tensor | None) -> None:
        self.run("place", lambda at: problems.place(at, x, out, mean, var), x, [x], _present(out, mean, var))

    def place_backward(self, grad: Gradient, out: Tensor) -> None:
        in_place = out.data_ptr() == grad.stored.data_ptr()
        kept = [out] if in_place else []
        inputs = _present(*grad)
        self.run("place_backward", lambda at: problems.place_backward(at, grad, out), out, inputs, [out], kept)

    def norm_relu_pool(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        self.run("norm_relu_pool", lambda at: problems.norm_relu_pool(at, x, norm, out), x, [x, *norm[:4]], [out])

    def norm_relu_pool_backward(self, grad: Tensor, x: Tensor, norm: Norm, dx: Tensor, owed: Owed) -> None:
        self.run(
            "norm_relu_pool_backward",
            lambda at: problems.norm_relu_pool_backward(at, grad, x, norm, dx, owed),
            x,
            [grad, x, *norm[:4], *_present(owed.pixels)],
            _present(dx, owed.dweight, owed.dbias, owed.correction),
        )

    def norm_relu_conv(
        self,
        x: Tensor,
        norm: Norm | None,
        weight: Tensor,
        out: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        bias: Tensor | None = None,
        negative_slope: float = 1.0,
    ) -> None:
        self.run(
            "forward",
            lambda at: problems.forward(at, x, norm, weight, out, mean, var, bias, negative_slope),
            x,
            _present(x, *(norm or ()), weight, bias),
            _present(out, mean, var),
        )

    def strided_conv(self, x: Tensor, weight: Tensor, out: Tensor, *steps: int) -> None:
        self.run("strided_conv", lambda at: problems.strided_conv(at, x, weight, out, *steps), x, [x, weight], [out])

    def norm_relu_conv_backward(
        self,
        grad: Gradient,
        x: Tensor,
        norm: Norm | None,
        weight: Tensor,
        dx: Tensor,
        accumulate: bool,
        dweight: Tensor | None,
        owed: Owed | None,
        dbias: Tensor | None = None,
    ) -> None:
        arguments = (grad, x, norm, weight, dx, accumulate, dweight, owed, dbias)
        dgamma, dbeta, correction, pixels = owed or extension.NO_OWED
        self.run(
            "backward",
            lambda at: problems.backward(at, *arguments),
            x,
            _present(*grad, pixels, x, *(norm or ()), weight),
            _present(dx, dweight, dgamma, dbeta, correction, dbias),
            kept=_present(dx, correction) if accumulate else [],
        )

    def run(
        self,
        name: str,
        problem: Callable[[Arena], Any],
        data: Tensor,
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
        kept: Sequence[Tensor] = (),
    ) -> None:
        """``problem`` is what the kernels get of the tensors in an arena; results are NaN before, but those ``kept``."""
        if not data[..., 0].numel():
            return
        inputs, results = [t.detach() for t in inputs], [t.detach() for t in results]
        workspace = self.workspace(name, problem(Arena([*inputs, *results], 0)), data.dtype)
        arena = Arena([*inputs, *results], workspace)
        for tensor in results:
            if not any(tensor.data_ptr() == other.data_ptr() for other in kept):
                arena.view(tensor).fill_(float("nan"))
        before = arena.bytes.clone()
        self.execute(name, problem(arena), data.dtype, arena)
        with torch.no_grad():
            arena.finish(before, results, name)


def _present(*values: Tensor | float | None) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
