"""Tensors of other kinds: subclasses, as data loaders give them, in and out as through the unfused network; negated ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from networks import images, torchvisions
from tolerances import assert_largest, assert_same
from torch import Tensor, nn

from fused_densenet import FusedDenseBlock, FusedTransition, fuse, strict


class Tagged(Tensor):
    """Hands its attributes on, as fastai's TensorImage does: those of the first argument that has any."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        first = args[0] if args else None
        sources = [a for a in (first if isinstance(first, list | tuple) else args) if hasattr(a, "__dict__")]
        if isinstance(result, Tagged) and sources:
            result.__dict__.update(copy.copy(sources[0].__dict__))
        return result


class Disabled(Tensor):
    """As torch's Parameter: an argument of its class gives plain results."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def metatensor(x: Tensor) -> Tensor:
    return MetaTensor(x, meta={"filename_or_obj": "a.nii"})


def tagged(x: Tensor) -> Tensor:
    result: Any = x.as_subclass(Tagged)
    result.tag = "a"
    return result


def image(x: Tensor) -> Tensor:
    return pytest.importorskip("torchvision.tv_tensors").Image(x)


KINDS: list[Callable[[Tensor], Tensor]] = [metatensor, tagged, image, lambda x: x.as_subclass(Disabled), nn.Parameter]


def described(x: Tensor) -> tuple[Any, ...]:
    """What is known of a tensor but its values."""
    return type(x), getattr(x, "tag", None), getattr(x, "meta", {}).get("filename_or_obj"), x.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", ["network", "features", "block", "transition"])
def test_same_class_in_and_out(part: str, training: bool, kind: Callable[[Tensor], Tensor]) -> None:
    theirs = torchvisions().train(training)
    ours = fuse(copy.deepcopy(theirs))
    names = {
        "network": "",
        "features": "features",
        "block": "features.denseblock1",
        "transition": "features.transition1",
    }
    x = images(2) if part in ("network", "features") else torch.randn(2, 16 if part == "block" else 32, 8, 8).double()
    found = []
    for network in (ours, theirs):
        leaf = kind(x.clone()).requires_grad_()
        with strict():
            out = network.get_submodule(names[part])(leaf)
        out.sigmoid().sum().backward()
        values = [t.detach().as_subclass(Tensor) for t in (out, leaf.grad)]
        found.append((described(out), type(leaf.grad), values))
    assert found[0][:2] == found[1][:2]
    for actual, expected in zip(found[0][2], found[1][2], strict=True):
        assert_largest(actual, expected, "float64 whole block", part)


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "where", ["features.conv0", "features.relu0", "features.denseblock1", "features.denseblock2.denselayer1.norm2"]
)
def test_hooks_see_it(where: str, kind: Callable[[Tensor], Tensor]) -> None:
    theirs = torchvisions()
    ours, x = fuse(copy.deepcopy(theirs)), images(2)
    found: list[list[Any]] = []
    for network in (ours, theirs):
        seen: list[Any] = []
        module = network.get_submodule(where)
        module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(described(inputs[0])))
        module.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(described(out)))
        network(kind(x))
        found.append(seen)
    if where.endswith("norm2"):  # torchvision's layers call their parts with a list: what it is made of comes out
        assert [description[0] for description in found[0]] == [description[0] for description in found[1]]
    else:
        assert found[0] == found[1]


def test_own_modules() -> None:
    x = tagged(torch.randn(2, 4, 6, 6))
    for module in (FusedDenseBlock(2, 4, 2, 4), FusedTransition(4, 3)):
        assert described(module(x))[:2] == (Tagged, "a")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [FusedDenseBlock, FusedTransition])
def test_numbers_that_are_to_be_negated(kind: type[nn.Module], training: bool) -> None:
    """The imaginary part of a conjugate: memory that holds the numbers' negatives."""
    module: nn.Module = FusedDenseBlock(2, 8, 2, 4) if kind is FusedDenseBlock else FusedTransition(8, 4)
    module.double().train(training)

    def negated(x: Tensor) -> Tensor:
        result = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert result.is_neg()
        return result

    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    gradient = torch.randn(module(x).shape, dtype=torch.float64)
    results = []
    for made in (torch.clone, negated):
        leaf = x.clone().requires_grad_()
        out = module(made(leaf))
        out.backward(made(gradient))
        assert leaf.grad is not None
        results.append({"output": out.detach(), "gradient": leaf.grad})
    assert_same(*results, "float64 whole block")
