"""The gate of a fused module: how it is recorded, whether it may run fused, what it runs instead."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ..arguments import check_image
from ..fallback.reasons import announce, context_reasons, dtype_reasons, transform_reasons
from ..fallback.recording import exports_operators, one_call, refuse_script
from ..fallback.standing import Known, Remembered, known_of
from ..ops.subclasses import on_plain
from .chain import Link
from .passage import Passage


class Plan(Protocol):
    """What a module's structure says, worked out by :meth:`Gate.work_out`."""

    @property
    def reasons(self) -> list[str]:
        """Why it cannot run fused, whatever the input."""

    def fits(self, x: Tensor) -> bool:
        """Whether there is nothing to be said against ``x`` in a quiet surrounding; False where it takes a longer look."""


class Gate(Remembered):
    """A module that runs as one operator where it can, and operator by operator, with the reason said, where it cannot."""

    gate_name: ClassVar[str]
    input_name: ClassVar[str]
    """What messages call it, and what it is called with."""

    def pass_on(self, x: Tensor, passage: Passage, known: Known | None = None) -> Tensor:
        """``forward(x)``, told what is known of ``x`` and perhaps of the module, and telling of the result."""
        if isinstance(x, torch.fx.Proxy):
            return one_call(self, x)
        calm = passage.is_calm()
        if not calm:
            if exports_operators():
                return self._operator_by_operator(x)
            if torch.jit.is_tracing():  # to which sizes are tensors
                return self._fall_back(transform_reasons(), x, passage)
        plan, tensors = known = known or known_of(self, self.work_out)
        if not (calm and tensors is not None and type(x) in (Tensor, nn.Parameter) and plan.fits(x)):
            self._check(x, plan)
            if reasons := self._reasons_for(x, plan):
                return self._fall_back(reasons, x, passage)
            if not self._check_parameters(x, plan):
                passage.statistics = None
                return self._operator_by_operator(x)
        if type(x) is Tensor:
            return self._fused(x, known, passage)
        return on_plain(x, lambda plain: self._fused(plain, known, passage))

    def plan(self) -> Any:
        """What it looks like at the moment."""
        return known_of(self, self.work_out).plan

    def fallback_reasons(self, x: Tensor | None = None) -> list[str]:
        """Why it cannot run fused on ``x``, or on any input if None; empty if it can."""
        plan = self.plan()
        reasons: list[str] = plan.reasons
        return reasons if x is None else self._reasons_for(x, plan)

    def _fall_back(self, reasons: list[str], x: Tensor, passage: Passage) -> Tensor:
        announce(reasons, self.gate_name, self)
        return passage.through_operators(self._operator_by_operator, x)

    @abstractmethod
    def work_out(self) -> tuple[Plan, Iterable[nn.Module]]:
        """Its plan, and the modules that it depends on."""

    def _check(self, x: Any, plan: Any) -> None:
        """Raises for what is no input of it, whatever it runs; of a plan that has a ``weight`` unless ``structure`` is amiss."""
        if not plan.structure:
            check_image(x, self.input_name, plan.weight.shape[1], plan.weight.dim() - 2)

    def _reasons_for(self, x: Tensor, plan: Any) -> list[str]:
        """Why it cannot run fused on ``x``."""
        return context_reasons(x) + (plan.reasons or dtype_reasons(x, plan.weight.dtype))

    def link(self, plan: Any) -> Link | None:
        """What it is in a network that runs as one program, where it can be part of one."""
        return None

    @abstractmethod
    def _check_parameters(self, x: Tensor, plan: Any) -> bool:
        """Raises where ``x`` does not fit the parameters; False where there is nothing to run fused."""

    @abstractmethod
    def _fused(self, x: Tensor, known: Known, passage: Passage) -> Tensor: ...

    @abstractmethod
    def _operator_by_operator(self, x: Tensor) -> Tensor: ...

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script()
