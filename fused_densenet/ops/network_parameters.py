"""The parameters of a network, part by part, in a training step: tensors that autograd sees, or what a backend keeps of them."""

import itertools
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block import gradient_operands
from .layout import empty_like
from .network import Parts, places
from .program import Bound, Context, Operands, Program, execute
from .schedule import PARAMETERS

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Weights, biases, gammas and betas."""


def lists_by_part(parameters: Sequence[list[Tensor]], parts: Parts) -> list[Lists]:
    """Of lists of all weights, biases, gammas and betas those of each part."""
    weights, biases, gammas, betas, *_ = parameters
    found = []
    for begin, end in itertools.pairwise(places(parts)):
        norms = slice(begin.norm, end.norm)
        kernels = weights[begin.weight : end.weight], biases[begin.bias : end.bias]
        found.append((*kernels, gammas[norms], betas[norms]))
    return found


class GivenPart(NamedTuple):
    """A part's parameters, and which of the weights need a gradient."""

    weights: list[Tensor]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    needed: list[bool]

    def backward(self, program: Program, operands: Operands, backend: ModuleType, context: Context) -> Any:
        """Runs a program; the gradients by weights (empty where not needed), gammas, betas and biases."""
        weights, biases, gammas, betas, needed = self
        if not all(needed):
            weights = [w if n else w.new_empty(0) for w, n in zip(weights, needed, strict=True)]
        kinds = weights, gammas, betas, biases
        made = iter(empty_like([*itertools.chain(*kinds)]))
        gradients = [list(itertools.islice(made, len(kind))) for kind in kinds]
        parameters = dict(zip(PARAMETERS, self[:4], strict=True))
        execute(program, {**operands, **parameters, **gradient_operands(gradients, needed)}, backend, context)
        return gradients


class HeldPart(NamedTuple):
    """A part's parameters, all of which need a gradient, as a backend keeps them."""

    bound: Bound

    @property
    def needed(self) -> list[bool]:
        return [True] * self.bound.lengths[0]

    def backward(self, program: Program, operands: Operands, backend: ModuleType, context: Context) -> Any:
        """Runs a program; the holder of the gradients."""
        gradients = self.bound.like()
        execute(program, operands, backend, context, [self.bound, gradients])
        return gradients.holder


class Held(NamedTuple):
    """Parameters as a backend keeps them: all, and those of each part; lists of weights, biases, gammas and betas."""

    all: Bound
    by_part: list[Bound]

    @classmethod
    def by(cls, backend: ModuleType, parameters: Sequence[list[Tensor]], parts: Parts) -> "Held | None":
        """None where the backend keeps none."""
        whole = Bound.by(backend, parameters)
        if whole is None:
            return None
        by_part = [Bound.by(backend, lists) for lists in lists_by_part(parameters, parts)]
        return cls(whole, [bound for bound in by_part if bound is not None])

    def stand_ins(self) -> list[Tensor]:
        """A tensor to differentiate by for each part, whose gradient is the holder of its parameters' gradients.

        None of them where autograd has to see the parameters: those that need no gradient, saved tensors that hooks pack, backward
        passes that are compiled.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None or _compiles_backward():
            return []
        stand_ins: list[Tensor] = self.all.backend.stand_ins([bound.holder for bound in self.by_part])
        return stand_ins


def _compiles_backward() -> bool:
    compiler: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiler is not None and (compiler.compiled_autograd_enabled or torch._dynamo.config.compiled_autograd)
