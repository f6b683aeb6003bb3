"""Differentiable operators, each of one description: for eager autograd a ``torch.autograd.Function``, for what records or
counts operators (torch.compile, export, dispatch modes, tensor subclasses) an operator of ``torch.library``.

Both run the same forward and the same backward. Second orders, and gradients that are batched by ``torch.vmap``, are
autograd through the operator written in torch's own.
"""

import contextlib
import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    bool: "bool",
    list[bool]: "bool[]",
    int: "int",
    float: "float",
    float | None: "float?",
    list[float]: "float[]",
    str: "str",
    str | None: "str?",
}


class Outputs(NamedTuple):
    """What an operator's forward leaves.

    Attributes:
        out: the result.
        kept: what else backward needs that is as large as an image.
        constants: what it needs beside, of a size that no image has; nothing that saved-tensor hooks pack.
    """

    out: Tensor
    kept: list[Tensor]
    constants: list[Tensor]


class Differentiable(ABC):
    """A function of ``arguments``, a NamedTuple class with ``x``, lists ``gammas``, ``betas`` and perhaps ``weights`` and ``biases``, and ``group``.

    ``x`` and the tensors of the lists are what it is differentiated by.
    """

    name: ClassVar[str]
    arguments: ClassVar[Any]
    keeps_input: ClassVar[bool]
    """Whether backward reads ``x``; else it reads the result, which contains it."""
    constants: ClassVar[tuple[str, ...]] = ()
    """Arguments with statistics that are given: of a size that no image has, nothing that saved-tensor hooks pack."""
    releases = False
    """Whether its backward lets go, on the way, of what was kept."""

    def __init__(self) -> None:
        kinds = list(self.arguments.__annotations__.values())
        self._places = [i for i, kind in enumerate(kinds) if kind in (Tensor, Tensor | None, list[Tensor])]
        self._lists = [i for i, kind in enumerate(kinds) if kind == list[Tensor]]

    @abstractmethod
    def forward(self, a: Any) -> Outputs:
        """Runs it."""

    @abstractmethod
    def backward(
        self, dout: Tensor, a: Any, kept: list[Tensor], constants: list[Tensor], needed: list[bool]
    ) -> list[Tensor]:
        """The gradients by ``x``, each weight (empty where it is not ``needed``), each gamma, beta and bias.

        ``a.x`` is the operator's result unless ``keeps_input``.
        """

    @abstractmethod
    def by_operators(self, a: Any) -> Tensor:
        """The result by torch's own operators."""

    def input_of(self, a: Any) -> Tensor:
        """The operator's input, given arguments as :meth:`backward` gets them."""
        x: Tensor = a.x
        return x

    def _run(self, a: Any) -> Outputs:
        return self.applied(a, _differentiable(a))

    def applied(self, a: Any, tensors: Sequence[Tensor]) -> Outputs:
        """:meth:`forward`, differentiable by ``tensors``."""
        with shown(self.name):
            if not (records() and any(map(_REQUIRES_GRAD, tensors))):
                return self.forward(a)
            left: list[Outputs] = []
            apply = _Function.apply if torch._C._are_functorch_transforms_active() else _apply
            out = apply(self, a, left, *tensors)
            return left[0]._replace(out=out)

    def gradients(
        self, dout: Tensor, a: Any, kept: list[Tensor], constants: list[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """:meth:`backward`, or what of it can be differentiated or is batched where that is asked for."""
        if torch.is_grad_enabled() or not is_plain(dout) or is_batched(dout):
            return self._batched(dout, a)
        return self._shown_backward(dout, a, kept, constants, self._by_weights(a, needed))

    def _shown_backward(self, *arguments: Any) -> list[Tensor]:
        with shown(f"{self.name}_backward"):
            return self.backward(*arguments)

    def _by_weights(self, a: Any, needed: Sequence[bool]) -> list[bool]:
        return list(map(bool, needed[1 : 1 + len(getattr(a, "weights", ()))]))

    def _batched(self, dout: Tensor, a: Any) -> list[Tensor]:
        refuse_synchronised(a.group)
        with torch.autocast(dout.device.type, enabled=False):
            sources = _aliases(self._sources(a), torch.is_grad_enabled())
            return _gradients(self._function(a), dout, sources, torch.is_grad_enabled())

    def pack(self, ctx: Any, a: Any, others: list[Tensor], in_context: Sequence[str] = ()) -> None:
        """Saves the tensors of ``a``, but for those ``in_context``, and ``others``."""
        ctx.places = [i for i in self._places if a._fields[i] not in in_context]
        held = [a[i] if i in self._lists else [] if a[i] is None else [a[i]] for i in ctx.places]
        ctx.lengths = [len(tensors) for tensors in held]
        ctx.save_for_backward(*itertools.chain(*held, others))
        ctx.rest = [None if i in ctx.places else value for i, value in enumerate(a)]
        ctx.group = a.group

    def unpack(self, ctx: Any) -> tuple[Any, list[Tensor]]:
        """What :meth:`pack` saved."""
        tensors = iter(ctx.saved_tensors)  # read once: hooks unpack at every reading
        values = list(ctx.rest)
        for i, length in zip(ctx.places, ctx.lengths, strict=True):
            here = list(itertools.islice(tensors, length))
            values[i] = here if i in self._lists else here[0] if here else None
        return self.arguments(*values), list(tensors)

    def _sources(self, a: Any) -> list[Tensor]:
        return [self.input_of(a), *_differentiable(a)[1:]]

    def _function(self, a: Any) -> Callable[..., Tensor]:
        def function(x: Tensor, *parameters: Tensor) -> Tensor:
            return self.by_operators(_with(a, x.contiguous(), parameters))  # vmap knows no other layout

        return function


class Operator(Differentiable):
    """One that is an operator of ``torch.library`` as well."""

    def __init__(self) -> None:
        super().__init__()
        kinds = self.arguments.__annotations__
        schema = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in kinds.items())
        self._forward: Any = torch.library.custom_op(
            f"fused_densenet::{self.name}",
            lambda *values: _flat(self.forward(self.arguments(*values))),
            mutates_args=(),
            schema=f"({schema}) -> (Tensor, Tensor[], Tensor[])",
        )
        self._forward.register_fake(lambda *values: _flat(self.allocate(self.arguments(*values))))
        self._backward: Any = torch.library.custom_op(
            f"fused_densenet::{self.name}_backward",
            lambda dout, kept, constants, needed, *values: self.backward(
                dout, self.arguments(*values), kept, constants, needed
            ),
            mutates_args=(),
            schema=f"(Tensor dout, Tensor[] kept, Tensor[] constants, bool[] needed, {schema}) -> Tensor[]",
        )
        self._backward.register_fake(
            lambda dout, kept, constants, needed, *values: self.allocate_backward(dout, self.arguments(*values), needed)
        )
        self._forward.register_autograd(self._first, setup_context=self._keep)
        self._backward.register_autograd(self._second, setup_context=self._keep_for_second)

    @abstractmethod
    def allocate(self, a: Any) -> Outputs:
        """Uninitialised outputs of :meth:`forward`."""

    @abstractmethod
    def allocate_backward(self, dout: Tensor, a: Any, needed: list[bool]) -> list[Tensor]:
        """Uninitialised results of :meth:`backward`."""

    def as_result(self, a: Any, by_input: Tensor) -> Tensor:
        """A gradient by the input as one by ``a.x``: zero where that is the result and no input."""
        return by_input

    def __call__(self, a: Any) -> Outputs:
        if not is_plain(a.x):
            return Outputs(*self._forward(*self._without_empty_lists(a)))
        return self._run(a)

    def _without_empty_lists(self, a: Any) -> Any:
        """A compiler's: AOTInductor's packages give None for a list without tensors, so there is one that nothing reads."""
        if not torch.compiler.is_compiling():
            return a
        empty = [a._fields[i] for i in self._lists if not a[i]]
        return a._replace(**{name: [a.x.new_empty(0)] for name in empty})

    def gradients(
        self, dout: Tensor, a: Any, kept: list[Tensor], constants: list[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """:meth:`backward`, or what of it can be differentiated or is batched where that is asked for."""
        by_weights = self._by_weights(a, needed)
        if not torch.compiler.is_compiling() and is_batched(dout):
            return self._batched(dout, a)
        if torch.is_grad_enabled() or not is_plain(dout):
            return self._backward(dout, kept, constants, by_weights, *a)
        return self._shown_backward(dout, a, kept, constants, by_weights)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        a = self.arguments(*inputs)
        out, kept, constants = output
        ctx.mark_non_differentiable(*kept, *constants)
        ctx.set_materialize_grads(False)
        ctx.counts = len(kept), len(constants)
        ctx.zeros_like = out.shape
        self.pack(ctx, a._replace(x=a.x if self.keeps_input else out), [*kept, *constants])

    def _first(self, ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        a, others = self.unpack(ctx)
        if dout is None:
            if a.group is None:
                return self._by_argument(a, [None] * len(_differentiable(a)))
            dout = a.x.new_zeros(ctx.zeros_like)
        kept, constants = others[: ctx.counts[0]], others[ctx.counts[0] :]
        by_name = dict(zip(a._fields, ctx.needs_input_grad, strict=True))
        needed = [bool(by_name["x"])]
        for name in _lists(a):
            needed += map(bool, by_name[name] or [False] * len(getattr(a, name)))
        gradients = self.gradients(dout, a, kept, constants, needed)
        return self._by_argument(a, [g if n else None for g, n in zip(gradients, needed, strict=True)])

    def _by_argument(self, a: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Gradients of the differentiable tensors in the places of the arguments."""
        empty: list[Any] = [[None] * len(value) if i in self._lists else None for i, value in enumerate(a)]
        places = [
            [] if isinstance(value, list) and not value else nothing for value, nothing in zip(a, empty, strict=True)
        ]  # of any kind
        rest = iter(gradients)
        places[a._fields.index("x")] = next(rest)
        for name in _lists(a):
            places[a._fields.index(name)] = [next(rest) for _ in getattr(a, name)]
        return tuple(places)

    def _keep_for_second(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dout, kept, constants, needed, *values = inputs
        ctx.set_materialize_grads(False)
        ctx.nothing = [None] * len(kept), [None] * len(constants), None if needed else []  # as torch.library wants it
        self.pack(ctx, self.arguments(*values), [dout])

    def _second(self, ctx: Any, second: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Of the gradients' gradients, those by ``dout`` and by the arguments.

        What the gradients depend on reaches them through the input and the parameters alone.
        """
        a, (dout,) = self.unpack(ctx)
        refuse_synchronised(a.group)
        with torch.enable_grad(), torch.autocast(dout.device.type, enabled=False):
            dout, *sources = _aliases([dout, *self._sources(a)], True)
            first = _gradients(self._function(a), dout, sources, True)
        used = [(g, s) for g, s in zip(first, second, strict=True) if s is not None and s.numel()]
        by_dout, by_x, *rest = torch.autograd.grad(
            [g for g, _ in used],
            [dout, *sources],
            [s for _, s in used],
            allow_unused=True,
            create_graph=torch.is_grad_enabled(),
        )
        gradients = self._by_argument(a, [None if by_x is None else self.as_result(a, by_x), *rest])
        return (by_dout, *ctx.nothing, *gradients)


class _Function(torch.autograd.Function):
    """An operator for eager autograd; ``left`` takes its outputs, of which only the first is differentiable."""

    @staticmethod
    def forward(ctx: Any, operator: Differentiable, a: Any, left: list[Outputs], *tensors: Tensor) -> Tensor:
        outputs = operator.forward(a)
        left.append(outputs)
        ctx.operator, ctx.constants, ctx.shape = operator, outputs.constants, outputs.out.shape
        ctx.set_materialize_grads(False)
        kept = a._replace(x=a.x if operator.keeps_input else outputs.out)
        operator.pack(ctx, kept, outputs.kept, operator.constants)
        return outputs.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3:]
        if dout is None and ctx.group is None:
            return (None, None, None, *[None] * len(needed))
        a, kept = ctx.operator.unpack(ctx)
        if ctx.operator.releases:
            ctx.maybe_clear_saved_tensors()
        if dout is None:  # as torch's SyncBatchNorm sends back for an empty batch; other ranks wait for this one's sums
            dout = a.x.new_zeros(ctx.shape)
        gradients = ctx.operator.gradients(dout, a, kept, ctx.constants, needed)
        if not all(needed):
            gradients = [g if wanted else None for g, wanted in zip(gradients, needed, strict=True)]
        return (None, None, None, *gradients)


_apply: Any = super(torch.autograd.Function, _Function).apply
"""``_Function.apply`` without a look, in Python, at whether each tensor is what a transform left behind."""


def _flat(outputs: Outputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return outputs.out, outputs.kept, outputs.constants


def shown(name: str) -> contextlib.AbstractContextManager[Any]:
    """In which a profiler shows what is called ``name``."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"fused_densenet::{name}")
    return contextlib.nullcontext()


def records() -> bool:
    """Whether autograd records what is computed; it does not in inference mode, even with gradients enabled inside."""
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()  # of which a compiler knows nothing


def is_plain(x: Tensor) -> bool:
    """Whether nothing looks at single operators: no compiler, no mode of ``torch.utils``, no subclass of Tensor.

    And there is data: tensors without any have the operators' shapes.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for many, by ``torch.vmap`` or by ``torch.autograd.grad(is_grads_batched=True)``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_DIFFERENTIABLE = ("weights", "gammas", "betas", "biases")
"""Beside ``x``, in the order of gradients."""


def _differentiable(a: Any) -> list[Tensor]:
    return [a.x, *itertools.chain(*[getattr(a, name) for name in _lists(a)])]


def _lists(a: Any) -> list[str]:
    return [name for name in _DIFFERENTIABLE if name in a._fields]


def _with(a: Any, x: Tensor, parameters: Sequence[Tensor]) -> Any:
    rest = iter(parameters)
    return a._replace(x=x, **{name: [next(rest) for _ in getattr(a, name)] for name in _lists(a)})


def _aliases(tensors: Sequence[Tensor], connected: bool) -> list[Tensor]:
    """Aliases that need a gradient, none of them another's ancestor, ``connected`` to what they are aliases of or not."""
    return [t.view_as(t) if connected and t.requires_grad else t.detach().requires_grad_() for t in tensors]


def _gradients(
    function: Callable[..., Tensor], dout: Tensor, sources: Sequence[Tensor], create_graph: bool
) -> list[Tensor]:
    with torch.enable_grad():
        out = function(*sources)
        return list(torch.autograd.grad(out, sources, dout, create_graph=create_graph, materialize_grads=True))


def act(x: Tensor, slope: float) -> Tensor:
    """``x`` where it is positive, else ``slope * x``."""
    return F.leaky_relu(x, slope) if slope else F.relu(x)


def norm_act(
    x: Tensor,
    moments: Sequence[Tensor | None],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    batch_stats: bool,
    slope: float = 0.0,
) -> Tensor:
    """``act(bn(x))``, by the batch's statistics or by ``moments``, a mean and a variance; differentiable to any order.

    torch's batch_norm is not, by the batch's statistics.
    """
    if not batch_stats:
        running_mean, running_var = moments
        return act(F.batch_norm(x, running_mean, running_var, gamma, beta, False, eps=eps), slope)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0, keepdim=True)
    scale, shift = (t.view(-1, *[1] * (x.dim() - 2)) for t in (gamma, beta))
    return act((wide - mean) * ((var + eps).rsqrt() * scale) + shift, slope).to(x.dtype)


def refuse_synchronised(group: str | None) -> None:
    """No second order through statistics of several processes.

    Raises:
        RuntimeError: ``group`` is one.
    """
    if group is not None:
        raise RuntimeError(
            "a gradient of a gradient through SyncBatchNorm was asked for; neither a fused module nor torch's "
            "SyncBatchNorm has one: train this part with BatchNorm, or without create_graph=True"
        )
