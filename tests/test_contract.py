"""What every backend is asked for, whatever its kernels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import float32_products

from fused_densenet.backends.contract import uses_tf32


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, True),
        ("cuda", torch.bfloat16, False),
        ("xpu", torch.float32, False),
    ],
)
def test_tf32_is_for_float32_on_nvidias_gpus(device: str, dtype: torch.dtype, expected: bool) -> None:
    """torch's switch is on in a build without CUDA, too; its convolutions on an Intel GPU are IEEE."""
    x: Any = SimpleNamespace(dtype=dtype, device=torch.device(device))
    with float32_products("tf32"):
        assert uses_tf32(x) == expected
    with float32_products("ieee"):
        assert not uses_tf32(x)


def test_tf32_is_not_for_amds_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    x: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    with float32_products("tf32"):
        assert not uses_tf32(x)
