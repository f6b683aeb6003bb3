"""What the operators' derivatives have in common; second orders are autograd through them written operator by operator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def register_derivatives(operator: Any, backward: Any, after_relu: Callable[..., Tensor]) -> None:
    """Makes an operator that begins with BN and ReLU differentiable, to any order.

    Args:
        operator: of the tensors ``x, *weights, gamma, beta, moments, pixels`` and the constants ``eps, batch_stats, pool,
            backend, group``.
        backward: of the gradient of its result, the same, and whether each weight's gradient is needed; returns the
            gradients of ``x, *weights, gamma, beta``.
        after_relu: the operator, in torch's, of ``relu(bn(x)), *weights, pool``.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.constants = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    def keep_with_shape(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(ctx, inputs, output)
        ctx.shape = output.shape

    def first(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        nothing = [None] * len(ctx.needs_input_grad)
        *_, group = ctx.constants
        if dout is None and group is None:
            return tuple(nothing)
        tensors = ctx.saved_tensors  # read once: hooks unpack at every reading
        if dout is None:  # other ranks wait for this one's sums
            dout = tensors[0].new_zeros(ctx.shape)
        needed = ctx.needs_input_grad[: len(tensors) - 2]
        gradients = backward(dout, *tensors, *ctx.constants, *map(bool, needed[1:-2]))
        return (*(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), *nothing[len(needed) :])

    def second(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        eps, batch_stats, pool, _, group, *_ = ctx.constants
        refuse_synchronised(group)
        dout, *sources, moments, _ = ctx.saved_tensors

        def operator_by_operator(x: Tensor, *parameters: Tensor) -> Tensor:
            *weights, gamma, beta = parameters
            return after_relu(norm_relu(x, moments, gamma, beta, eps, batch_stats), *weights, pool)

        gradients = second_order(operator_by_operator, dout, sources, second)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))

    operator.register_autograd(first, setup_context=keep_with_shape)
    backward.register_autograd(second, setup_context=keep)


def norm_relu(
    x: Tensor, moments: Sequence[Tensor | None], gamma: Tensor, beta: Tensor, eps: float, batch_stats: bool
) -> Tensor:
    """``relu(bn(x))``, by the batch's statistics or by ``moments``, a mean and a variance."""
    mean, var = (None, None) if batch_stats else moments
    return F.relu(F.batch_norm(x, mean, var, gamma, beta, batch_stats, eps=eps))


def second_order(
    function: Callable[..., Tensor], dout: Tensor, sources: Sequence[Tensor], second: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients, by ``dout`` and by every source, of the gradients of ``function(*sources)`` by its sources.

    Args:
        dout: the gradient of the function's result.
        second: the gradient of each first-order gradient; None or empty where there is none.
    """
    with torch.enable_grad(), torch.autocast(dout.device.type, enabled=False):
        # Aliases, still connected for higher orders, and none of them another's ancestor.
        inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (dout, *sources)]
        first = torch.autograd.grad(function(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
    used = [(g, s) for g, s in zip(first, second, strict=True) if s is not None and s.numel()]
    return list(
        torch.autograd.grad(
            [g for g, _ in used],
            inputs,
            [s for _, s in used],
            allow_unused=True,
            create_graph=torch.is_grad_enabled(),
        )
    )


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
