"""Batched gradients, torch.func and saved-tensor hooks on a fused network, beside the same network unfused in float64."""

import copy
from typing import Any

import peers
import pytest
import torch
from tolerances import tolerance
from torch import Tensor, nn

from fused_densenet import FallbackWarning, fuse

pytestmark = pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")


def pair(training: bool = False) -> tuple[nn.Module, nn.Module]:
    """A small network with everything that is fused, and a copy of it that is fused."""
    theirs = peers.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5).double()
    with torch.no_grad():
        for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.3, 0.3)
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    for module in theirs.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which torch.func refuses
    theirs.train(training)
    return theirs, fuse(copy.deepcopy(theirs))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_batched_gradients(training: bool) -> None:
    x, results = images(), []
    vectors = torch.randn(3, 2, 5, dtype=torch.float64)
    for model in pair(training):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        sources = [leaf, *model.parameters()]
        results.append(torch.autograd.grad(out, sources, vectors, is_grads_batched=True))
    same(*results)


def test_vectorised_jacobian_and_hessian() -> None:
    x, results = images(1), []
    for model in pair():
        jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True)
        part = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        part[..., 7:9, 7:9] = 1

        def of_a_patch(patch: Tensor, model: nn.Module = model, part: Tensor = part) -> Tensor:
            return model(x + part * nn.functional.interpolate(patch, 32)).square().sum()

        patch = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(of_a_patch, patch, vectorize=True)
        results.append((jacobian, hessian))
    same(*results)


def test_gradients_of_each_image() -> None:
    x, targets, results = images(3), torch.tensor([0, 3, 1]), []
    for model in pair():
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss(
            parameters: Any, image: Tensor, target: Tensor, model: nn.Module = model, buffers: Any = buffers
        ) -> Any:
            out = torch.func.functional_call(model, (parameters, buffers), (image[None],))
            return nn.functional.cross_entropy(out, target[None])

        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, targets))
    same(*results)


def test_ensemble() -> None:
    x, results = images(), []
    theirs, ours = zip(*(pair() for _ in range(3)), strict=True)
    for models in (theirs, ours):
        parameters, buffers = torch.func.stack_module_state(list(models))
        base = models[0]

        def call(p: Any, b: Any, base: nn.Module = base) -> Tensor:
            out: Tensor = torch.func.functional_call(base, (p, b), (x,))
            return out

        with torch.no_grad():
            results.append(torch.func.vmap(call)(parameters, buffers))
    same(*results)


def test_what_cannot_run_fused_is_said() -> None:
    _, ours = pair()
    with pytest.warns(FallbackWarning, match=r"a torch\.func transform"):
        torch.func.jvp(ours, (images(1),), (images(1),))


@pytest.mark.parametrize("training", [True, False])
def test_saved_tensors_packed_in_float16(training: bool) -> None:
    """What is packed are activations and parameters: no count that float16 cannot hold, and no statistics."""
    theirs, ours = pair(training)
    x, gradients, packed = torch.randn(4, 3, 256, 256), [], []
    exact = copy.deepcopy(theirs).double()
    exact(x.double()).square().sum().backward()

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.half() if t.dtype == torch.float32 else t

    for model in (theirs.float(), ours.float()):
        packed.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float() if t.dtype == torch.float16 else t):
            model(x).square().sum().backward()
        gradients.append([p.grad.double() for p in model.parameters()])
    assert all(t.numel() != 1 and (t.dim() not in (2, 3) or t.shape[0] > 2) for t in packed), "a count, or statistics"
    whole = sum(e.grad.square().sum() for e in exact.parameters()).sqrt()
    for found in gradients:
        errors = sum((g - e.grad).square().sum() for g, e in zip(found, exact.parameters(), strict=True)).sqrt()
        assert errors / whole < tolerance("packed in float16")
