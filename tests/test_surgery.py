"""Layers that are cut, widened or inflated after ``fuse``: widths and dimensions are what the layers have."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import step
from networks import assert_same_step, torchvisions
from torch import Tensor, nn

from fused_densenet import FusedDenseBlock, FusedFeatures, fuse, reference, strict


def kept(channels: int) -> Tensor:
    """Two of three."""
    return torch.arange(channels)[torch.arange(channels) % 3 != 1]


def cut(module: Any, dim: int, indices: Tensor, *, attributes: bool) -> None:
    """Takes channels out of a norm (``dim`` 0) or a convolution, as pruning tools do; some leave its attributes."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is None or (name == "bias" and dim):
            continue
        shorter = tensor.detach().index_select(dim, indices)
        setattr(module, name, nn.Parameter(shorter) if isinstance(tensor, nn.Parameter) else shorter)
    names = ["num_features"] if not isinstance(module, nn.Conv2d) else [("out_channels", "in_channels")[dim]]
    for name in names if attributes else []:
        setattr(module, name, len(indices))


def cut_the_stem(network: Any, attributes: bool) -> None:
    """Fewer channels of the first convolution, and of all that reads them."""
    features = network.features
    channels = features.conv0.out_channels
    stays = kept(channels)
    cut(features.conv0, 0, stays, attributes=attributes)
    cut(features.norm0, 0, stays, attributes=attributes)
    for layer in features.denseblock1.children():
        whole = torch.cat([stays, torch.arange(channels, layer.conv1.weight.shape[1])])
        cut(layer.norm1, 0, whole, attributes=attributes)
        cut(layer.conv1, 1, whole, attributes=attributes)
    transition = features.transition1
    whole = torch.cat([stays, torch.arange(channels, transition.conv.weight.shape[1])])
    cut(transition.norm, 0, whole, attributes=attributes)
    cut(transition.conv, 1, whole, attributes=attributes)


def cut_bottlenecks(network: Any, attributes: bool) -> None:
    for block in (network.features.denseblock1, network.features.denseblock2):
        for layer in block.children():
            stays = kept(layer.conv1.out_channels)
            cut(layer.conv1, 0, stays, attributes=attributes)
            cut(layer.norm2, 0, stays, attributes=attributes)
            cut(layer.conv2, 1, stays, attributes=attributes)


def cut_a_transition(network: Any, attributes: bool) -> None:
    features = network.features
    channels = features.transition1.conv.out_channels
    stays = kept(channels)
    cut(features.transition1.conv, 0, stays, attributes=attributes)
    for layer in features.denseblock2.children():
        whole = torch.cat([stays, torch.arange(channels, layer.conv1.weight.shape[1])])
        cut(layer.norm1, 0, whole, attributes=attributes)
        cut(layer.conv1, 1, whole, attributes=attributes)
    whole = torch.cat([stays, torch.arange(channels, features.norm5.weight.shape[0])])
    cut(features.norm5, 0, whole, attributes=attributes)
    cut(network.classifier, 1, whole, attributes=False)


@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize("operation", [cut_the_stem, cut_bottlenecks, cut_a_transition])
def test_pruned_after_fuse(operation: Callable[[Any, bool], None], attributes: bool) -> None:
    theirs = torchvisions()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        operation(network, attributes)
    with strict():
        found = step(ours, x)
    assert_same_step(found, step(theirs, x))
    blocks = [module for module in ours.modules() if isinstance(module, FusedDenseBlock)]
    assert [b.num_input_features for b in blocks] == [b.denselayer1.conv1.weight.shape[1] for b in blocks]


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_one_bottleneck_narrower_than_the_others() -> None:
    theirs = torchvisions()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        layer: Any = network.get_submodule("features.denseblock2.denselayer1")
        stays = kept(layer.conv1.out_channels)
        cut(layer.conv1, 0, stays, attributes=True)
        cut(layer.norm2, 0, stays, attributes=True)
        cut(layer.conv2, 1, stays, attributes=True)
    assert_same_step(step(ours, x), step(theirs, x))


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("bn_size", [2, None])
def test_one_layer_adds_fewer_channels(layer: int, bn_size: int | None) -> None:
    ours, theirs = FusedDenseBlock(3, 6, bn_size, 4).double(), reference.DenseBlock(3, 6, bn_size, 4).double()
    theirs.load_state_dict(ours.state_dict())
    for block in (ours, theirs):
        layers: list[Any] = list(block.children())
        cut(layers[layer - 1].conv1 if bn_size is None else layers[layer - 1].conv2, 0, kept(4), attributes=True)
        before = 6 + 4 * (layer - 1)
        for later in layers[layer:]:
            width = later.conv1.weight.shape[1]
            stays = torch.cat([torch.arange(before), before + kept(4), torch.arange(before + 4, width)])
            cut(later.norm1, 0, stays, attributes=True)
            cut(later.conv1, 1, stays, attributes=True)
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    assert_same_step(step(ours, x), step(theirs, x))


def test_own_block_of_other_layers() -> None:
    """Layers that a block gets from another one are its layers."""
    block, wide = FusedDenseBlock(2, 4, 2, 4), FusedDenseBlock(2, 10, 2, 4)
    for name, layer in wide.named_children():
        block[name] = layer
    x = torch.randn(2, 10, 5, 5)
    torch.testing.assert_close(block(x), wide(x))
    assert (block.num_input_features, block.spatial_dims) == (10, 2)
    with pytest.raises(ValueError, match="init_features: expected 10 channels, got 4"):
        block(x[:, :4])


def inflated(module: nn.Module) -> nn.Module:
    """The module of volumes for one of images, a convolution's weight the same in every slice, as I3D's is."""
    if isinstance(module, nn.Conv2d):
        settings = [(size[0], *size) for size in (module.kernel_size, module.stride, module.padding)]
        conv = nn.Conv3d(module.in_channels, module.out_channels, *settings, bias=False)
        depth = conv.kernel_size[0]
        conv.weight = nn.Parameter(module.weight.detach().unsqueeze(2).repeat(1, 1, depth, 1, 1) / depth)
        return conv
    if isinstance(module, nn.BatchNorm2d):
        norm = nn.BatchNorm3d(module.num_features).double()
        norm.load_state_dict(module.state_dict())
        return norm
    if isinstance(module, nn.MaxPool2d):
        return nn.MaxPool3d(module.kernel_size, module.stride, module.padding)
    return nn.AvgPool3d(2, 2) if isinstance(module, nn.AvgPool2d) else module


def test_inflated_to_volumes_after_fuse() -> None:
    theirs = torchvisions()
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 32, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        for part in list(network.features.modules()):
            for name, child in part.named_children():
                part._modules[name] = inflated(child)
    assert isinstance(ours.features, FusedFeatures)
    with strict():
        found = step(ours.features, x)
    assert_same_step(found, step(theirs.features, x))


def test_network_of_references_pruned_is_the_same() -> None:
    ours, theirs = FusedDenseBlock(2, 6, 2, 4).double(), reference.DenseBlock(2, 6, 2, 4).double()
    theirs.load_state_dict(ours.state_dict())
    for block in (ours, theirs):
        for layer in block.children():
            stays = torch.arange(2, layer.norm1.num_features)
            cut(layer.norm1, 0, stays, attributes=False)
            cut(layer.conv1, 1, stays, attributes=False)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_same_step(step(ours, x), step(theirs, x))
