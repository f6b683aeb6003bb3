"""``dense_block`` on plain tensors: what the modules compute, and an error that names whatever does not fit."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from blocks import bimodal, keep_clear_of_zero
from networks import assert_same_step
from tolerances import assert_same
from torch import Tensor, nn

from fused_densenet import NormReluConv, dense_block, reference


def of_block(block: nn.Module) -> list[NormReluConv]:
    """The norm-relu-convs of a reference block."""
    found = []
    for layer in block.children():
        for number in "12" if layer.bottleneck else "1":
            norm, conv = layer.get_submodule(f"norm{number}"), layer.get_submodule(f"conv{number}")
            tensors = conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var
            found.append(NormReluConv(*tensors, norm.eps, norm.training, conv.bias, layer.negative_slope))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bn_size", [2, None])
@pytest.mark.parametrize("spatial", [(30,), (5, 4), (3, 4, 2)], ids=str)
def test_reference(spatial: tuple[int, ...], bn_size: int | None, training: bool, backend: str) -> None:
    x = bimodal(2, 6, *spatial).double()
    block = reference.DenseBlock(3, 6, bn_size, 4, spatial_dims=len(spatial), bias=True).double()
    keep_clear_of_zero(block, x)
    convolutions = of_block(block.train(training))
    results = []
    for run in (lambda x: dense_block(x, convolutions, bottleneck=bn_size is not None)[0], block):
        block.zero_grad()
        inputs = x.clone().requires_grad_()
        out = run(inputs)
        out.square().sum().backward()
        gradients = {f"{name}'s gradient": p.grad for name, p in block.named_parameters()}
        results.append({"output": out.detach(), "input's gradient": inputs.grad, **gradients})
    assert_same_step(*results)


def test_moments_are_what_running_statistics_become() -> None:
    x, block = torch.randn(2, 6, 5, 4, dtype=torch.float64), reference.DenseBlock(2, 6, 2, 4).double()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    convolutions = of_block(block)
    before = [c.running_mean.clone() for c in convolutions]
    _, moments = dense_block(x, convolutions, bottleneck=True)
    assert all(torch.equal(c.running_mean, mean) for c, mean in zip(convolutions, before, strict=True))
    block(x)
    pixels = x.numel() // x.shape[1]
    for i, c in enumerate(convolutions):
        mean, var = moments.of(i, c.weight.shape[1])
        assert_same(
            {"mean": mean, "var": var * pixels / (pixels - 1)},
            {"mean": c.running_mean, "var": c.running_var},
            "float64 whole block",
        )


def convolution(channels: int, made: int, *kernel: int, **others: Any) -> NormReluConv:
    weight, vectors = torch.randn(made, channels, *kernel), torch.ones(4, channels)
    return NormReluConv(**{**dict(zip(FIELDS, [weight, *vectors, 1e-5, True], strict=True)), **others})


FIELDS = [field.name for field in dataclasses.fields(NormReluConv)][:7]


def good() -> list[NormReluConv]:
    return [convolution(6, 8, 1, 1), convolution(8, 4, 3, 3), convolution(10, 8, 1, 1), convolution(8, 4, 3, 3)]


@pytest.mark.parametrize(
    ("place", "changes", "error", "expected"),
    [
        (0, {"weight": torch.ones(8, 3, 1, 1)}, ValueError, "x: expected 3 channels, got 6"),
        (0, {"weight": torch.ones(8, 6, 1)}, ValueError, "x: expected 3 dimensions"),
        (0, {"weight": torch.ones(8, 6)}, ValueError, "convolutions[0].weight: expected a Tensor (K, C, *kernel)"),
        (1, {"weight": torch.ones(4, 7, 3, 3)}, ValueError, "[1].weight: expected (K, 8, *kernel) of 2 odd sizes, got shape (4, 7, 3, 3)"),
        (2, {"weight": torch.ones(8, 6, 1, 1)}, ValueError, "[2].weight: expected (K, 10, *kernel)"),
        (1, {"weight": torch.ones(4, 8, 3)}, ValueError, "[1].weight: expected (K, 8, *kernel)"),
        (1, {"weight": torch.ones(4, 8, 2, 3)}, ValueError, "[1].weight: expected (K, 8, *kernel) of 2 odd sizes"),
        (1, {"weight": torch.ones(0, 8, 3, 3)}, ValueError, "[1].weight: expected (K, 8, *kernel)"),
        (1, {"weight": torch.ones(4, 8, 3, 3).double()}, TypeError, "[1].weight: expected torch.float32, for x in torch.float32, got torch.float64"),
        (1, {"weight": None}, TypeError, "[1].weight: expected a Tensor, got NoneType"),
        (3, {"weight": torch.ones(4, 8, 3, 3, device="meta")}, ValueError, "[3].weight: expected device cpu, where x is, got meta"),
        (2, {"gamma": torch.ones(9)}, ValueError, "[2].gamma: expected shape (10,), got (9,)"),
        (2, {"gamma": None}, TypeError, "[2].gamma: expected a Tensor, got NoneType"),
        (2, {"beta": torch.ones(10, 1)}, ValueError, "[2].beta: expected shape (10,), got (10, 1)"),
        (2, {"beta": torch.ones(10, dtype=torch.bfloat16)}, TypeError, "[2].beta: expected torch.float32"),
        (3, {"bias": torch.ones(3)}, ValueError, "[3].bias: expected shape (4,), got (3,)"),
        (3, {"batch_stats": False, "running_mean": None}, TypeError, "[3].running_mean: expected a Tensor, got NoneType"),
        (3, {"batch_stats": False, "running_var": torch.ones(4)}, ValueError, "[3].running_var: expected shape (8,), got (4,)"),
        (1, {"eps": 0.0}, ValueError, "[1].eps: expected a number above 0, got 0.0"),
        (1, {"eps": "small"}, TypeError, "[1].eps: expected a float, got str"),
        (1, {"slope": 1.5}, ValueError, "[1].slope: expected a number between 0 and 1, got 1.5"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)  # fmt: skip
def test_a_convolution_that_does_not_fit(place: int, changes: dict[str, Any], error: type, expected: str) -> None:
    convolutions = good()
    convolutions[place] = dataclasses.replace(convolutions[place], **changes)
    with pytest.raises(error, match=re.escape(expected)):
        dense_block(torch.randn(2, 6, 5, 4), convolutions, bottleneck=True)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"x": torch.randn(6, 5, 4)}, ValueError, "x: expected 4 dimensions (N, C, H, W), got 3"),
        ({"x": torch.ones(2, 6, 5, 4, dtype=torch.int64)}, TypeError, "x: expected a floating dtype, got torch.int64"),
        ({"x": torch.ones(2, 6, 0, 4)}, ValueError, "x: expected sizes of at least 1, got shape (2, 6, 0, 4)"),
        ({"x": torch.ones(1, 6, 1, 1)}, ValueError, "x: expected more than one value per channel"),
        ({"x": None}, TypeError, "x: expected a Tensor, got NoneType"),
        ({"convolutions": []}, ValueError, "convolutions: expected 2 for each of the layers, got 0"),
        ({"convolutions": good()[:1]}, ValueError, "convolutions: expected 2 for each of the layers, got 1"),
        ({"convolutions": None}, TypeError, "convolutions: expected a sequence, got NoneType"),
        ({"convolutions": [None, None]}, TypeError, "convolutions[0]: expected a NormReluConv, got NoneType"),
        ({"bottleneck": None}, TypeError, "bottleneck: expected True or False, got NoneType"),
        ({"drop_rate": 1.5}, ValueError, "drop_rate: expected a probability between 0 and 1, got 1.5"),
        ({"drop_inside": "0"}, TypeError, "drop_inside: expected a float, got str"),
        ({"prepend": 1}, TypeError, "prepend: expected True or False, got int"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_an_argument_that_does_not_fit(changes: dict[str, Any], error: type, expected: str) -> None:
    arguments = {"x": torch.randn(2, 6, 5, 4), "convolutions": good(), "bottleneck": True}
    with pytest.raises(error, match=re.escape(expected)):
        dense_block(**arguments | changes)


def test_dropout_of_a_bottleneck_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="drop_inside: expected 0 where there is no bottleneck"):
        dense_block(torch.randn(2, 6, 5, 4), [convolution(6, 4, 3, 3)], bottleneck=False, drop_inside=0.5)


@pytest.mark.parametrize("name", ["weight", "gamma", "beta", "bias", "running_mean", "running_var"])
def test_strided_tensors(name: str, backend: str) -> None:
    whole = convolution(6, 6, 3, 3, bias=torch.randn(6), batch_stats=False)
    tensor: Tensor = getattr(whole, name)
    strided = torch.stack([tensor, tensor + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    x = torch.randn(2, 6, 5, 4)
    expected, _ = dense_block(x, [whole], bottleneck=False)
    found, _ = dense_block(x, [dataclasses.replace(whole, **{name: strided})], bottleneck=False)
    assert torch.equal(found, expected)
