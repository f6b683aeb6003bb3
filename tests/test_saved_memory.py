"""Bytes that the four dense blocks of DenseNet-121 keep for backward, float32, 224 by 224, per image."""

from collections.abc import Callable

import peers
import pytest
import torch
from tolerances import tolerance
from torch import Tensor, nn

from fused_densenet import FusedDenseBlock

BLOCKS = [(6, 64, 56), (12, 128, 28), (24, 256, 14), (16, 512, 7)]  # layers, input channels, pixels along a side
MEBI = 2**20


def saved_mebibytes(make_block: Callable[[int, int], nn.Module], images: int = 1) -> float:
    """Unique storages, whole, that autograd holds between forward and backward, but for the parameters."""
    total = 0
    for layers, channels, side in BLOCKS:
        block = make_block(layers, channels)
        own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
        held: dict[int, int] = {}

        def pack(t: Tensor, own: set[int] = own, held: dict[int, int] = held) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        x = torch.randn(images, channels, side, side, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(x)
        total += sum(held.values())
        del out
    return total / MEBI / images


def test_the_count_finds_torchvisions_published_bytes() -> None:
    for memory_efficient, published in ((False, 102.5), (True, 38.0)):
        counted = saved_mebibytes(lambda n, c, m=memory_efficient: peers.DenseBlock(n, c, 4, 32, 0.0, m))  # type: ignore[misc]
        assert counted == pytest.approx(published, rel=tolerance("torchvision's saved MiB"))


@pytest.mark.parametrize("images", [1, 2])
def test_kept_bottleneck(images: int) -> None:
    counted = saved_mebibytes(lambda n, c: FusedDenseBlock(n, c, 4, 32), images)
    assert 20 < counted <= tolerance("saved MiB")


@pytest.mark.parametrize("images", [1, 2])
def test_recomputed_bottleneck(images: int) -> None:
    counted = saved_mebibytes(lambda n, c: FusedDenseBlock(n, c, 4, 32, memory_efficient=True), images)
    assert 5 < counted <= tolerance("saved MiB, memory_efficient")


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
@pytest.mark.parametrize(("memory_efficient", "torchvisions"), [(False, 102.5), (True, 38.0)])
def test_operator_by_operator(memory_efficient: bool, torchvisions: float) -> None:
    def hooked(layers: int, channels: int) -> FusedDenseBlock:
        block = FusedDenseBlock(layers, channels, 4, 32, memory_efficient=memory_efficient)
        block.denselayer1.conv2.register_forward_hook(lambda *_: None)
        return block

    assert saved_mebibytes(hooked) == pytest.approx(torchvisions, rel=tolerance("torchvision's saved MiB"))


def test_nothing_is_kept_without_gradients() -> None:
    with torch.no_grad():
        assert saved_mebibytes(lambda n, c: FusedDenseBlock(n, c, 4, 32)) == 0
