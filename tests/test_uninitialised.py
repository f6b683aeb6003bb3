"""The tests see a value that is read before it is written: what they fill memory with, and two planted bugs."""

from types import ModuleType
from typing import Any

import pytest
import torch

from fused_densenet import FusedDenseBlock
from fused_densenet.backends import BACKENDS
from fused_densenet.ops.block import Arguments, block


def test_empty_is_nan() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(5, dtype=dtype).isnan().all()
        assert torch.empty_strided((2, 3), (8, 1), dtype=dtype).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=dtype)).isnan().all()


def test_buffers_of_a_block_start_as_nan() -> None:
    weight, vector = torch.ones(3, 4, 3, 3), torch.ones(4)
    parameters = ([weight], [], [vector], [vector], [], None, None, [False], [0.0], [1e-5], [True], 1, [1.0, 1.0])
    outputs = block.allocate(Arguments(torch.ones(2, 4, 5, 5), *parameters, False, True, "eager", None))
    assert outputs.out.isnan().all() and outputs.constants[0].isnan().all()


def test_unwritten_channel_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = BACKENDS[backend]
    whole = module.norm_relu_conv

    def without_last_channel(x: Any, norm: Any, weight: Any, out: Any, mean: Any, var: Any, *_: Any) -> None:
        whole(x, norm, weight[:-1], out[..., :-1], mean[:-1], var[:-1])

    monkeypatch.delattr(module, "run_program", raising=False)
    assert _output(module).isfinite().all()
    monkeypatch.setattr(module, "norm_relu_conv", without_last_channel)
    assert _output(module).isnan().any()


def test_unwritten_sum_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = BACKENDS[backend]
    whole = module.norm_relu_conv_backward

    def without_a_sum(*args: Any) -> None:
        *others, owed, dbias = args
        whole(*others, owed._replace(correction=torch.empty_like(owed.correction)), dbias)

    monkeypatch.delattr(module, "run_program", raising=False)
    assert _input_gradient().isfinite().all()
    monkeypatch.setattr(module, "norm_relu_conv_backward", without_a_sum)
    assert _input_gradient().isnan().any()


def _output(module: ModuleType) -> torch.Tensor:
    torch.manual_seed(0)
    return FusedDenseBlock(2, 5, 2, 3)(torch.randn(2, 5, 4, 4)).detach()


def _input_gradient() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    FusedDenseBlock(2, 5, 2, 3)(x).square().sum().backward()
    assert x.grad is not None
    return x.grad
