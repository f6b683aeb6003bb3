"""The same cases with real launches, and what only a GPU can show: graph capture, autotuning, offsets beyond 2**31."""

import pathlib
from collections.abc import Callable

import cases
import pytest
import torch
from cases import CASES, LINE, ONE, Case

from fused_densenet import FusedDenseBlock, use_backend
from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Norm
from fused_densenet.backends.triton import plans, tiles_on_disk, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ARITHMETIC = {
    "bfloat16": (torch.bfloat16, "ieee", torch.bfloat16),
    "float16": (torch.float16, "ieee", torch.float16),
    "tf32": (torch.float32, "tf32", torch.float16),
    "ieee": (torch.float32, "ieee", torch.float32),
}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_relu_conv(case: Case, arithmetic: str) -> None:
    dtype, switch, rounding = ARITHMETIC[arithmetic]
    with cases.float32_products(switch):
        cases.run_case(case, dtype, device="cuda", rounding=rounding)


@pytest.fixture
def step() -> Callable[[], list[torch.Tensor]]:
    """A training step of a block: fills and returns the output and every gradient."""
    torch.manual_seed(0)
    block = FusedDenseBlock(3, 32, 4, 32).cuda().bfloat16()
    x = torch.randn(4, 32, 14, 14, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(4, 128, 14, 14, device="cuda", dtype=torch.bfloat16)

    def run() -> list[torch.Tensor]:
        with use_backend("triton"):
            out = block(x)
            return [out, *torch.autograd.grad(out, [x, *block.parameters()], dout)]

    return run


def test_the_same_bits_every_run(step: Callable[[], list[torch.Tensor]]) -> None:
    for first, second in zip(step(), step(), strict=True):
        assert torch.equal(first, second)


def test_captured_in_a_graph(step: Callable[[], list[torch.Tensor]]) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for first, second in zip(expected, captured, strict=True):
        assert torch.equal(first, second)


def test_autotuned(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases.run_case(Case(LINE, 96, 128, ONE), torch.bfloat16, device="cuda")
    assert {shape.kernel for shape, _ in tuning._chosen} == {"norm_relu_conv", "backward_pointwise"}
    plans.forget()
    [file] = (tmp_path / "fused_densenet").iterdir()
    assert {shape.partition("kernel='")[2].partition("'")[0] for shape in tiles_on_disk.read(file)} == {
        "norm_relu_conv",
        "backward_pointwise",
    }


def test_offsets_beyond_32_bits() -> None:
    pixels, stride = 2**16, 2**15 + 64
    buffer = torch.empty(1, 1, 1, pixels, stride, device="cuda", dtype=torch.bfloat16)
    x, out = buffer[..., :32], buffer[..., 32:64]
    x.normal_()
    norm = Norm(*(torch.full((32,), value, device="cuda") for value in (0.0, 1.0, 0.0)))
    weight = torch.randn(32, 32, 1, 1, 1, device="cuda")
    mean, var = torch.empty(2, 32, device="cuda")
    backend.norm_relu_conv(x, norm, weight, out, mean, var)
    expected = x[0, 0, 0, -64:].float().relu() @ weight.bfloat16().float().flatten(1).T
    assert torch.allclose(out[0, 0, 0, -64:].float(), expected, rtol=1e-2, atol=1e-2)
