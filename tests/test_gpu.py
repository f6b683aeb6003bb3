"""Real launches of both backends for GPUs, and what only a GPU can show: graphs, streams, devices, 64-bit offsets."""

from collections.abc import Callable

import cases
import maxima
import pytest
import torch
from blocks import bimodal, keep_clear_of_zero, step
from cases import CASES, NARROW_WEIGHTS, POOLED, Case
from primitives import (
    backward_magnitude,
    check_moments,
    clear_of_zero,
    draw_norm,
    exact_backward,
    load,
    load_magnitude,
    loaded_gradient,
    vector,
)
from tolerances import assert_entries, assert_no_worse, assert_same
from torch import Tensor

from fused_densenet import FusedDenseBlock, FusedTransition, reference, use_backend
from fused_densenet.backends import BACKENDS
from fused_densenet.backends.contract import Gradient, Norm, Owed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

ARITHMETIC = {
    "bfloat16": (torch.bfloat16, "ieee", torch.bfloat16),
    "float16": (torch.float16, "ieee", torch.float16),
    "tf32": (torch.float32, "tf32", torch.float16),
    "ieee": (torch.float32, "ieee", torch.float32),
}
NAMES = ["triton"] if torch.version.hip else ["cuda", "triton"]

both = pytest.mark.parametrize("name", NAMES)
Step = Callable[[], list[Tensor]]


@both
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("case", [*CASES, *POOLED, *NARROW_WEIGHTS], ids=str)
def test_norm_relu_conv(case: Case, arithmetic: str, name: str) -> None:
    dtype, switch, rounding = ARITHMETIC[arithmetic]
    with cases.float32_products(switch):
        cases.run_case(case, dtype, device="cuda", rounding=rounding, backend=BACKENDS[name])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_first", [False, True])
def test_place(channels_first: bool, dtype: torch.dtype, name: str) -> None:
    shape = (3, 1, 29, 31, 70)
    x = torch.randn(shape).to(dtype)
    grad = loaded_gradient(shape[:-1], shape[-1], dtype)
    loaded = torch.empty_like(x)
    if channels_first:
        x, loaded = (t.movedim(4, 1).contiguous().movedim(1, 4) for t in (x, loaded))
    out, mean, var = torch.empty(shape, dtype=dtype, device="cuda"), *torch.empty(2, shape[-1], device="cuda")
    BACKENDS[name].place(x.cuda(), out, mean, var)
    assert torch.equal(out.cpu(), x)
    guarded = [vector(shape[-1], dtype) for _ in range(2)]
    for guard, value in zip(guarded, (mean, var), strict=True):
        guard.data.copy_(value)
    check_moments(x, *guarded)
    on_gpu = torch.empty_strided(loaded.shape, loaded.stride(), dtype=dtype, device="cuda")
    moved = grad._replace(**{key: t.cuda() for key, t in grad._asdict().items() if isinstance(t, Tensor)})
    BACKENDS[name].place_backward(moved, on_gpu)
    assert_entries(on_gpu.cpu(), load(grad), load_magnitude(grad), dtype, "loaded")


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", maxima.CASES, ids=str)
def test_a_stem(case: maxima.Case, dtype: torch.dtype, name: str) -> None:
    maxima.run(case, dtype, BACKENDS[name], device="cuda")


@both
@pytest.mark.parametrize("batch_stats", [False, True])
def test_what_narrow_parameters_are_owed(batch_stats: bool, name: str) -> None:
    """Weight and bias in the data's 16 bits, statistics of more pixels than are here, and a plain gradient."""
    norm = draw_norm(70, torch.bfloat16, torch.bfloat16)
    x, stored = torch.randn(2, 1, 9, 7, 70).bfloat16(), torch.randn(2, 1, 9, 7, 33).bfloat16()
    x, weight, grad = clear_of_zero(x, norm), torch.randn(33, 70, 1, 1, 1) / 8, Gradient(stored)
    count = torch.tensor([1260.0], device="cuda") if batch_stats else None  # of ten ranks
    correction = torch.empty(2, 70, device="cuda") if batch_stats else None
    owed = Owed(*torch.empty(2, 70, dtype=torch.bfloat16, device="cuda"), correction, count)
    on_gpu, dx = Norm(*(v.cuda() for v in norm[:4]), norm.eps, norm.negative_slope), torch.empty_like(x, device="cuda")
    BACKENDS[name].norm_relu_conv_backward(
        Gradient(stored.cuda()), x.cuda(), on_gpu, weight.cuda(), dx, False, None, owed
    )
    exact, size = exact_backward(grad, x, norm, weight), backward_magnitude(grad, x, norm, weight)
    found = {"dx": dx, "dgamma": owed.dweight, "dbeta": owed.dbias}
    for what, t in found.items():
        assert_entries(t.cpu(), getattr(exact, what), getattr(size, what), torch.bfloat16, what)
    if correction is not None:
        for row, what in zip(correction.cpu(), ("constant", "slope"), strict=True):
            assert_entries(row, getattr(exact, what) / 10, getattr(size, what) / 10, torch.bfloat16, what)


@both
@pytest.mark.parametrize("size", [(3, 32, 4, 32), (2, 24, 4, 12), (2, 20, None, 7)], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_block_against_the_reference(size: tuple[int, int, int | None, int], dims: int, name: str) -> None:
    x = bimodal(2, size[1], *(5, 7, 6)[:dims])
    theirs = reference.DenseBlock(*size, spatial_dims=dims)
    keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(*size, spatial_dims=dims)
    ours.load_state_dict(theirs.state_dict())
    with cases.float32_products("ieee"), use_backend(name):
        actual = step(ours.cuda(), x.cuda())
    exact = step(theirs.double(), x.double())
    assert_same({key: value.cpu() for key, value in actual.items()}, exact, "float32 whole block")


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_block_under_autocast(dtype: torch.dtype, name: str) -> None:
    size = (3, 32, 4, 32)
    x = bimodal(4, size[1], 9, 11)
    theirs = reference.DenseBlock(*size)
    keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(*size)
    ours.load_state_dict(theirs.state_dict())
    x = x.cuda().to(dtype)
    with use_backend(name):
        mine = step(ours.cuda(), x, autocast=dtype)
    eager = step(theirs.cuda(), x, autocast=dtype)
    assert_no_worse(mine, eager, step(theirs.double(), x.double()))


@pytest.fixture(params=NAMES)
def training_step(request: pytest.FixtureRequest) -> Step:
    return make_step(request.param, "cuda")


def make_step(name: str, device: str) -> Step:
    """A training step of a block: the output and every gradient."""
    torch.manual_seed(0)
    block = FusedDenseBlock(3, 32, 4, 32).to(device).bfloat16()
    x = torch.randn(4, 32, 14, 14).bfloat16().to(device).requires_grad_()
    dout = torch.randn(4, 128, 14, 14).bfloat16().to(device)

    def run() -> list[Tensor]:
        with use_backend(name):
            out = block(x)
            return [out, *torch.autograd.grad(out, [x, *block.parameters()], dout)]

    return run


def test_the_same_bits_every_run(training_step: Step) -> None:
    for first, second in zip(training_step(), training_step(), strict=True):
        assert torch.equal(first, second)


def test_captured_in_a_graph(training_step: Step) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = training_step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step()
    graph.replay()
    torch.cuda.synchronize()
    for first, second in zip(expected, captured, strict=True):
        assert torch.equal(first, second)


@both
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it imports its compiler
def test_compiled_by_inductor(name: str) -> None:
    """The block and the transition behind it in one graph, training."""
    network = torch.nn.Sequential(FusedDenseBlock(2, 32, 4, 32), FusedTransition(96, 48)).cuda()
    x = torch.randn(2, 32, 14, 14, device="cuda").requires_grad_()
    results = []
    for run in (network, torch.compile(network, fullgraph=True)):
        with use_backend(name):
            out = run(x)
        results.append([out, *torch.autograd.grad(out, [x, *network.parameters()], torch.ones_like(out))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@both
def test_on_a_side_stream(name: str) -> None:
    """The input is still being made on that stream when the launch is asked for."""
    x, out = torch.randn(2, 1, 9, 9, 64, device="cuda"), torch.empty(2, 1, 9, 9, 64, device="cuda")
    BACKENDS[name].place(x, out, None, None)
    torch.cuda.synchronize()
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        BACKENDS[name].place(late, out.zero_(), None, None)
    assert not stream.query(), "the launch waited for the device"
    stream.synchronize()
    assert torch.equal(out, x)


@both
def test_on_a_device_that_is_not_current(name: str) -> None:
    """The last GPU, while the first is current; where there is one, the same."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    for first, second in zip(make_step(name, last)(), make_step(name, "cuda:0")(), strict=True):
        assert first.device == torch.device(last)
        assert torch.equal(first.cpu(), second.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(bool(torch.version.hip), reason="CUDA")
def test_tensors_of_two_devices_are_refused() -> None:
    x = torch.ones(1, 1, 2, 2, 4, device="cuda")
    with pytest.raises(ValueError, match="out_mean: expected a tensor on cuda:0, got one on cpu"):
        BACKENDS["cuda"].place(x, torch.empty_like(x), torch.empty(4), torch.empty(4, device="cuda"))


@both
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 1, 3)], ids=str)
def test_offsets_beyond_32_bits(kernel: tuple[int, int, int], name: str) -> None:
    """The last of 2**16 pixels, 2**15 elements apart: forward and backward against the same pixels alone."""
    pixels, stride, few = 2**16, 2**15 + 64, 64
    backend = BACKENDS[name]
    buffer = torch.empty(1, 1, 1, pixels, stride, device="cuda", dtype=torch.bfloat16)
    x, out, dx, placed = (buffer[..., first : first + 32] for first in (0, 32, 64, 96))
    x.normal_()
    norm = Norm(*(torch.full((32,), value, device="cuda") for value in (0.0, 1.0, 1.0, 0.0)), 0.0)
    weight = torch.randn(32, 32, *kernel, device="cuda")
    vectors = torch.empty(2, 32, device="cuda")
    mean, correction = torch.zeros(32, device="cuda"), torch.zeros(2, 32, device="cuda")

    def run(x: Tensor, out: Tensor, dx: Tensor, placed: Tensor) -> list[Tensor]:
        backend.norm_relu_conv(x, norm, weight, out, vectors[0], vectors[1])
        grad = Gradient(x, out, mean, correction)
        backend.norm_relu_conv_backward(grad, x, norm, weight, dx, False, None, Owed(vectors[0], vectors[1]))
        backend.place(x, placed, vectors[0], vectors[1])
        return [t[..., 1 - few :, :].float() for t in (out, dx, placed)]

    alone = x[..., -few:, :].contiguous()
    expected = run(alone, *(torch.empty_like(alone) for _ in range(3)))
    for ours, theirs in zip(run(x, out, dx, placed), expected, strict=True):
        torch.testing.assert_close(ours[..., 1:, :], theirs[..., 1:, :], rtol=1e-2, atol=1e-2)
