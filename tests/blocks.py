"""Blocks whose ReLU inputs keep clear of zero, and everything that one step of a block produces."""

import copy
import math

import torch
from torch import Tensor, nn


def bimodal(*shape: int) -> Tensor:
    """``(N, C, *spatial)`` with every channel half near 1, half near -1: never near its mean."""
    pixels = shape[0] * math.prod(shape[2:])
    signs = torch.ones(shape[1], pixels)
    signs[:, : (pixels + 1) // 2] = -1
    order = torch.rand(shape[1], pixels).argsort(1)
    values = signs.gather(1, order) * (0.8 + 0.4 * torch.rand(shape[1], pixels))
    return values.reshape(shape[1], shape[0], *shape[2:]).movedim(0, 1).contiguous()


@torch.no_grad()
def keep_clear_of_zero(block: nn.Module, x: Tensor) -> None:
    """Sets ``block``'s norms so that no ReLU sees a value within 0.05 of zero for the :func:`bimodal` input ``x``.

    Such a value's sign would depend on rounding. Channels of ``x`` keep both signs. A channel that the block computes
    is normalised to at most ``sqrt(pixels - 1)`` (Samuelson's inequality), so a weight below the inverse of that, and
    a bias around 1 or -1, keep it on one side. Running statistics become those of the batch: the same in eval mode.
    """
    pixels = x.numel() // x.shape[1]
    for layer in block.children():
        for name, norm in layer.named_children():
            if not name.startswith("norm") or not norm.affine:
                continue
            width = norm.num_features
            norm.weight.copy_(_signs(width) * (0.45 + 0.45 * torch.rand(width)) / math.sqrt(pixels))
            norm.bias.copy_(_signs(width) * (1 + 0.2 * torch.rand(width)))
            if name == "norm1":
                norm.weight[: x.shape[1]] = 0.5 + torch.rand(x.shape[1])
                norm.bias[: x.shape[1]] = 0.2 * torch.rand(x.shape[1]) - 0.1
    trained = copy.deepcopy(block).train().double()
    for module in trained.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    layers = list(trained.children())
    features = x.double()
    for layer in layers:
        new = layer.conv1(layer.norm1(features).relu())
        if hasattr(layer, "conv2"):
            new = layer.conv2(layer.norm2(new).relu())
        features = torch.cat([features, new], dim=1)
    for name, buffer in block.named_buffers():
        if not name.endswith("num_batches_tracked"):
            buffer.copy_(trained.get_buffer(name))


def step(block: nn.Module, x: Tensor, *, steps: int = 1, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, every gradient that is wanted and every buffer after ``steps`` forward and backward passes."""
    for _ in range(steps):
        block.zero_grad()
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            out = block(x)
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        out.backward(dout.to(out))
    assert x.grad is not None
    result = {"output": out.detach(), "input's gradient": x.grad}
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            result[f"{name}'s gradient"] = parameter.grad
    result.update({name: buffer.clone() for name, buffer in block.named_buffers()})
    return result


def _signs(count: int) -> Tensor:
    return torch.randint(0, 2, (count,)) * 2.0 - 1
