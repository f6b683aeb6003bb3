"""Tools that look at single operators are warned of where that can be known, and see them all after ``unfuse``."""

import warnings
from typing import Any

import peers
import pytest
import torch
from small_networks import SIZE, network
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_densenet import FallbackWarning, fuse, unfuse
from fused_densenet.fallback import recording


class Counter(TorchDispatchMode):
    """Counts convolutions, as ptflops' aten mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += "convolution" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _warned_again() -> None:
    recording._warn_of_one_operator.cache_clear()


def _convolutions(model: nn.Module, x: Tensor) -> int:
    with Counter() as counter:
        model(x)
    return counter.convolutions


def test_counter_of_operators() -> None:
    block = fuse(peers.DenseBlock(*SIZE)).eval()
    x = torch.randn(2, 8, 4, 4)
    with pytest.warns(UserWarning, match=r"Counter sees a fused module as one operator: .*unfuse\(model\)"):
        assert _convolutions(block, x) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _convolutions(block, x)  # is said once
        assert _convolutions(unfuse(block), x) == 6


def test_torchs_own_counter_needs_no_warning() -> None:
    block = peers.DenseBlock(*SIZE).eval()
    x = torch.randn(2, 8, 4, 4)
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (block, fuse(block)):
            with FlopCounterMode(display=False) as counter:
                module(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def _prepared(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 3, 64, 64)
    return prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning", "ignore:Please use quant_min")
def test_fx_quantization() -> None:
    model = fuse(network()).float().eval()
    with pytest.warns(UserWarning, match="FX quantization sees a fused module as one operator"):
        _prepared(model)
    assert "features_denseblock1_denselayer1_conv2" in str(_prepared(unfuse(model)).graph)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning", "ignore:Please use quant_min")
def test_eager_quantization() -> None:
    """Its observers are hooks on the modules inside: the block runs operator by operator, and says so."""
    block = fuse(peers.DenseBlock(*SIZE)).eval()
    block.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(block)
    with pytest.warns(FallbackWarning, match="has hooks"):
        prepared(torch.randn(2, 8, 4, 4))
    assert prepared.denselayer1.conv2.activation_post_process.min_val.isfinite().all()
