"""The operators of csrc/cuda_binding.cpp, called through torch.ops over the kernels that the runner executes."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import binding
import building
import pytest
import report
import torch
from blocks import bimodal, keep_clear_of_zero, step
from emulated import Emulated
from networks import pooled, sequence, torchvisions
from primitives import Shape, draw_norm, loaded_gradient, make_weight, source
from tolerances import assert_error_ratio, assert_no_worse, assert_same
from torch import Tensor

from fused_densenet import FusedDenseBlock, FusedTransition, optimize_for_inference, reference, use_backend
from fused_densenet.backends import choice, cuda
from fused_densenet.backends.choice import ShapeClass
from fused_densenet.backends.contract import Gradient, Norm, Owed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    (Shape((2, 1, 5, 7), 24, 16, (1, 1, 1)), "contiguous"),
    (Shape((1, 1, 9, 6), 16, 12, (1, 3, 3)), "channels_last"),
    (Shape((2, 1, 1, 11), 7, 5, (1, 1, 3)), "strided"),
    (Shape((1, 3, 4, 5), 8, 4, (3, 3, 3)), "contiguous"),
    (Shape((2, 3, 5, 4), 16, 8, (1, 1, 1), pool=True), "contiguous"),
]


@pytest.fixture(scope="module")
def operators() -> Any:
    return binding.load("fused_densenet_emulated", building.kernels())


@pytest.fixture
def backend(operators: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend ``cuda`` serving CPU tensors, float32 products in float32."""
    monkeypatch.setattr(cuda, "_operators", operators)
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: None)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with use_backend("cuda"):
        yield cuda
    torch.backends.cudnn.conv.fp32_precision = before


def forward(backend: Any, x: Tensor, norm: Norm, weight: Tensor, shape: Shape) -> list[Tensor]:
    out = torch.full((*shape.out_pixels, shape.out_channels), float("nan"), dtype=x.dtype)
    mean, var = torch.empty(2, shape.out_channels)
    backend.norm_relu_conv(x, norm, weight, out, mean, var)
    return [out, mean, var]


def backward(backend: Any, grad: Gradient, x: Tensor, norm: Norm, weight: Tensor, accumulate: bool) -> list[Tensor]:
    dx = torch.ones_like(x) if accumulate else torch.full_like(x, float("nan"))
    dweight = torch.full_like(weight, float("nan"))
    gradients, correction = torch.empty(2, x.shape[4], dtype=norm.weight.dtype), torch.ones(2, x.shape[4])
    owed = Owed(*gradients, correction, torch.tensor([77.0]) if accumulate else None)
    backend.norm_relu_conv_backward(grad, x, norm, weight, dx, accumulate, dweight, owed)
    return [dx, dweight, gradients, correction]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["owing", "plain"])
def test_the_operators_are_the_kernels(
    backend: Any, plain: bool, shape: Shape, layout: str, dtype: torch.dtype
) -> None:
    """The same bits as the kernels give when they are called directly, which other tests check."""
    norm = draw_norm(shape.channels, dtype, torch.float32 if layout == "contiguous" else dtype)
    x = source(torch.randn(*shape.pixels, shape.channels).to(dtype), 8, 1)
    weight = make_weight(shape, torch.float32 if layout == "contiguous" else dtype, layout)
    grad = loaded_gradient(shape.out_pixels, shape.out_channels, dtype, plain)
    direct = Emulated()
    results = []
    for each in (backend, direct):
        placed, mean, var = torch.empty_like(x), *torch.empty(2, shape.channels)
        each.place(x, placed, mean, var)
        loaded = torch.empty_like(grad.stored)
        each.place_backward(grad, loaded)
        result = [placed, mean, var, loaded, *forward(each, x, norm, weight, shape)]
        for accumulate in (False, True):
            result += backward(each, grad, x, norm, weight, accumulate)
        results.append(result)
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert torch.equal(ours, theirs), f"result {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_pixels", [(2, 1, 5, 7), (2, 1, 3, 4)], ids=["not pooled", "pooled"])
def test_a_stems_operators_are_the_kernels(backend: Any, out_pixels: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, x = draw_norm(24, dtype), source(torch.randn(2, 1, 5, 7, 24).to(dtype), 8, 1)
    grad, results = torch.randn(*out_pixels, 24).to(dtype), []
    for each in (backend, Emulated()):
        out, dx, sums = torch.empty_like(grad), torch.empty_like(x), torch.empty(4, 24)
        each.norm_relu_pool(x, norm, out)
        each.norm_relu_pool_backward(grad, x, norm, dx, Owed(sums[0], sums[1], sums[2:]))
        results.append([out, dx, sums])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_float32_follows_torchs_switch(backend: Any, precision: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = precision
    shape, _ = CASES[0]
    x, norm = torch.randn(*shape.pixels, shape.channels), draw_norm(shape.channels, torch.float32)
    weight = make_weight(shape, torch.float32, "contiguous")
    ours, *_ = forward(backend, x, norm, weight, shape)
    for tf32 in (False, True):
        theirs, *_ = forward(Emulated(tf32=tf32), x, norm, weight, shape)
        assert torch.equal(ours, theirs) == (tf32 == (precision == "tf32"))


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", [(2, 16, 2, 8), (2, 10, None, 6)], ids=str)
def test_a_block_against_the_reference(
    backend: Any, size: tuple[int, int, int | None, int], memory_efficient: bool
) -> None:
    x = bimodal(2, size[1], 4, 5)
    theirs = reference.DenseBlock(*size)
    keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(*size, memory_efficient=memory_efficient)
    ours.load_state_dict(theirs.state_dict())
    actual = step(ours, x)
    assert_same(actual, step(theirs.double(), x.double()), "float32 whole block")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_block_in_16_bits(backend: Any, dtype: torch.dtype) -> None:
    """float32 weights beside 16-bit data; errors no worse than operator by operator."""
    size = (2, 16, 2, 8)
    x = bimodal(2, size[1], 6, 7)
    theirs = reference.DenseBlock(*size)
    keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(*size)
    ours.load_state_dict(theirs.state_dict())
    mine, eager = step(ours, x.to(dtype), autocast=dtype), step(theirs, x.to(dtype), autocast=dtype)
    assert mine["output"].dtype == dtype
    assert_no_worse(mine, eager, step(theirs.double(), x.to(dtype).double()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_network_as_one(backend: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.randn(2, 8, 9, 10), sequence().train(training)
    runs: list[int] = []
    whole = backend.run_program
    monkeypatch.setattr(backend, "run_program", lambda code, operands: runs.append(1) or whole(code, operands))

    def result(model: Any, x: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(training):
            return pooled(step(model, x) if training else {"output": model(x)})

    mine = result(copy.deepcopy(model), x)
    assert len(runs) == (5 if training else 1)  # forward, and the backward pass of each part
    with use_backend("eager"):
        assert_same(mine, result(model.double(), x.double()), "float32 whole block")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_snapshot_as_one(backend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program from the stem to the last norm; behind it torch's mean and classifier."""
    x, model = torch.randn(2, 3, 33, 34), torchvisions().eval()
    served = optimize_for_inference(model, dtype=dtype)
    runs: list[int] = []
    whole = backend.run_program
    monkeypatch.setattr(backend, "run_program", lambda code, operands: runs.append(1) or whole(code, operands))
    ours = served(x.to(dtype))
    assert len(runs) == 1
    with use_backend("eager"), torch.no_grad():
        exact, theirs = model(x.double()), copy.deepcopy(model).to(dtype)(x.to(dtype))
    if dtype == torch.float32:
        assert_same({"output": ours}, {"output": exact}, "float32 whole block")
    else:
        assert_error_ratio(ours, theirs, exact, dtype, "output", exact)


@pytest.mark.parametrize("memory_efficient", [False, True], ids=["kept", "recomputed"])
def test_a_program_is_its_calls(backend: Any, memory_efficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whole, or call by call where the table leaves another backend some of it."""
    x, block = bimodal(2, 16, 4, 5), FusedDenseBlock(2, 16, 2, 8, memory_efficient=memory_efficient)
    runs: list[int] = []
    whole = backend.run_program
    monkeypatch.setattr(backend, "run_program", lambda code, operands: runs.append(1) or whole(code, operands))
    at_once = step(copy.deepcopy(block), x)
    assert len(runs) == 2  # forward, backward
    monkeypatch.setattr(backend, "runs_program", lambda device, dtype, pixels, kinds: False)
    one_by_one = step(block, x)
    assert len(runs) == 2
    for name, result in one_by_one.items():
        assert torch.equal(at_once[name], result), name


def test_another_backends_calls_are_not_in_a_program(backend: Any) -> None:
    here, kinds = (
        (torch.device("cpu"), torch.float32),
        frozenset({("place", (), False), ("norm_relu_conv", (3, 3), False)}),
    )
    assert backend.runs_program(*here, (100, 100), kinds)
    with choice.preferring({ShapeClass("norm_relu_conv", "3", "few"): ("eager",)}):
        assert not backend.runs_program(*here, (100, choice.FEW), kinds)
        assert backend.runs_program(*here, (choice.FEW, choice.FEW), kinds)
    assert not backend.runs_program(*here, (100, 100), frozenset({("norm_relu_conv", (15, 15), False)}))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (torch.tensor([9]), "expected the number of a function"),
        (torch.tensor([0, 7, 0, 0, 4]), "there is no operand 7"),
        (torch.tensor([0, 0, 0, 0, 9]), "expected 9 channels, got 4"),
        (torch.tensor([0, 0, 0]), "expected more numbers"),
        (torch.tensor([0.0]), "expected a contiguous tensor of int64"),
    ],
)
def test_a_bad_program_is_refused(operators: Any, code: Tensor, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        operators.run_program(code, [torch.ones(2, 4, 3, 3)], False, [])


@pytest.mark.parametrize("sizes", [(4, 5), (3, 4, 2)], ids=str)
def test_a_transition_against_the_reference(backend: Any, sizes: tuple[int, ...]) -> None:
    x = bimodal(2, 24, *sizes)
    theirs = reference.Transition(24, 10, spatial_dims=len(sizes))
    torch.nn.init.uniform_(theirs.norm.weight, 0.5, 1.5)
    ours = FusedTransition(24, 10, spatial_dims=len(sizes))
    ours.load_state_dict(theirs.state_dict())
    actual = step(ours, x)
    assert_same(actual, step(theirs.double(), x.double()), "float32 whole block")


CONSTANTS = {"eps": 1e-5, "slope": 0.0, "value_slope": 1.0, "accumulate": False}


def good() -> dict[str, Any]:
    """Arguments of the backward operator, which has those of the others too."""
    images = {name: torch.ones(2, 1, 3, 5, 4) for name in ("stored", "value")}
    norm = {name: torch.ones(6) for name in ("mean", "var", "gamma", "beta", "dgamma", "dbeta")}
    weights = {name: torch.ones(4, 6, 1, 3, 3) for name in ("weight", "dweight")}
    x = {name: torch.ones(2, 1, 3, 5, 6) for name in ("x", "dx")}
    owing = {"value_mean": torch.ones(4), "value_correction": torch.ones(2, 7)[:, 3:], "correction": torch.ones(2, 6)}
    return {**images, **norm, **weights, **x, **owing, "pixels": torch.ones(1), **CONSTANTS}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", torch.ones(2, 1, 3, 5, 6, dtype=torch.float64), "expected float32, bfloat16 or float16, got Double"),
        ("x", torch.ones(2, 1, 3, 5, 6, dtype=torch.int64), "expected float32, float64, bfloat16 or float16, got Long"),
        ("x", torch.ones(2, 3, 5, 6), "expected 5 dimensions"),
        ("value", torch.ones(2, 1, 3, 5, 4, dtype=torch.bfloat16), "expected dtype Float, got BFloat16"),
        ("stored", torch.ones(2, 1, 3, 5, 3), "expected 4 channels, got 3"),
        ("dx", torch.ones(2, 1, 3, 5, 12)[..., ::2], "expected channel stride 1, got 2"),
        ("weight", torch.ones(4, 6, 1, 2, 3), "expected odd kernel sizes"),
        ("dweight", torch.ones(4, 6, 1, 1, 3), "expected shape"),
        ("mean", torch.ones(5), "expected 6 entries, got shape"),
        ("var", torch.ones(6, dtype=torch.float64), "expected dtype Float, got Double"),
        ("gamma", torch.ones(6, dtype=torch.float64), "expected dtype Float, got Double"),
        ("beta", torch.ones(12)[::2], "expected stride 1, got 2"),
        ("value_mean", torch.ones(3), "expected 4 entries, got shape"),
        ("value_mean", None, "expected value, value_mean and value_correction, all of them or none"),
        ("value_correction", torch.ones(4), r"expected shape \(2, 4\), got \[4\]"),
        ("dgamma", torch.ones(6, dtype=torch.bfloat16), "expected dtype Float, got BFloat16"),
        ("dbeta", torch.ones(1, 6), "expected 6 entries, got shape"),
        ("correction", torch.ones(6, 2).T, "expected stride 1, got 2"),
        ("correction", torch.ones(6), r"expected shape \(2, 6\), got \[6\]"),
        ("pixels", torch.ones(2), "expected 1 entries"),
    ],
)
def test_a_bad_argument_is_named(operators: Any, name: str, value: Tensor | None, said: str) -> None:
    operators.norm_relu_conv_backward(**good())
    arguments = {**good(), name: value}
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(RuntimeError, match=f"{name}: .*{said}"):
        operators.norm_relu_conv_backward(**arguments)
    for key in ("dx", "dgamma", "dbeta", "correction"):
        assert torch.equal(arguments[key], before[key]), f"{key} was written"


def test_a_launch_that_fails_is_an_exception() -> None:
    absent = binding.load("fused_densenet_absent", [])
    x = torch.ones(1, 1, 2, 2, 8)
    with pytest.raises(RuntimeError, match="fused_densenet: CUDA error 801"):
        absent.place(x, torch.empty_like(x), None, None)


def test_an_empty_batch_launches_nothing() -> None:
    absent = binding.load("fused_densenet_absent", [])
    x = torch.ones(0, 1, 2, 2, 8)
    absent.place(x, torch.empty_like(x), None, None)


def test_opcheck(operators: Any) -> None:
    arguments = good()
    x, stored, out = arguments["x"], arguments["stored"], torch.empty(2, 1, 3, 5, 4)
    gradient = {key: arguments[key] for key in ("stored", "value", "value_mean", "value_correction", "value_slope")}
    norm = [arguments[key] for key in ("mean", "var", "gamma", "beta", "eps", "slope")]
    owed = [*torch.empty(2, 6), torch.ones(2, 9)[:, 3:], None]
    calls = {
        "place": ((x, torch.empty_like(x), torch.empty(6), torch.empty(6)), {}),
        "place_backward": ((), {**gradient, "out": torch.empty_like(stored)}),
        "norm_relu_conv": ((x, *norm, arguments["weight"], out, None, None), {}),
        "norm_relu_conv_backward": ((), arguments),
        "norm_relu_pool": ((x, *norm, torch.empty(2, 1, 2, 3, 6)), {}),
        "norm_relu_pool_backward": ((torch.ones(2, 1, 2, 3, 6), x, *norm, x.clone(), *owed), {}),
    }
    for name, (positional, named) in calls.items():
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(operators, name).default, positional, named, test_utils=tests)


COST = """
import ctypes, sys, torch
sys.path[:0] = {path!r}
import binding, building
from fused_densenet.backends import cuda
from fused_densenet.backends.contract import Gradient, Norm, Owed
from host_cost import microseconds
cuda._operators = binding.load("fused_densenet_emulated", building.kernels())
library = ctypes.CDLL(binding.build("fused_densenet_emulated", building.kernels(), 4))
library.cuda_host_launcher(library.cuda_host_no_launch)
cuda.unavailable = lambda device, dtype: None
pixels, c, k, growth = (32, 1, 56, 56), 256, 128, 32
new = lambda *sizes: torch.empty(*sizes, dtype=torch.bfloat16)
x, dx, y, dy, out = new(*pixels, c), new(*pixels, c), new(*pixels, k), new(*pixels, k), new(*pixels, growth)
norm_x, norm_y = Norm(*torch.ones(4, c), 1e-5), Norm(*torch.ones(4, k), 1e-5)
grad_y = Gradient(y, dy, torch.ones(k), torch.ones(2, k))
grad_out = Gradient(out, out, torch.ones(growth), torch.ones(2, growth))
w1, w3 = torch.empty(k, c, 1, 1, 1), torch.empty(growth, k, 1, 3, 3)
moments_x, moments, few_moments = [*torch.ones(2, c)], [*torch.ones(2, k)], [*torch.ones(2, growth)]
owed_x, owed_y = (Owed(*torch.ones(2, n), torch.ones(2, n)) for n in (c, k))
calls = dict(
    place=lambda: cuda.place(x, dx, *moments_x),
    place_backward=lambda: cuda.place_backward(grad_y, y),
    forward_1x1=lambda: cuda.norm_relu_conv(x, norm_x, w1, y, *moments),
    forward_3x3=lambda: cuda.norm_relu_conv(y, norm_y, w3, out, *few_moments),
    backward_3x3=lambda: cuda.norm_relu_conv_backward(grad_out, y, norm_y, w3, dy, False, w3, owed_y),
    backward_1x1=lambda: cuda.norm_relu_conv_backward(grad_y, x, norm_x, w1, dx, True, w1, owed_x),
)
with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
    for name, call in calls.items():
        print(name, microseconds(call))
"""


def test_what_a_call_costs_on_the_host() -> None:
    """Python, the operator, checks, plans, workspace and launches that do nothing, for layers of DenseNet-121."""
    script = COST.format(path=[str(building.HERE), str(building.HERE.parent)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    costs = {name: float(cost) for name, cost in map(str.split, done.stdout.splitlines())}
    report.sections["CUDA kernels: microseconds of a call on the host, its launches aside"] += [
        f"{name:24} {cost:5.1f}" for name, cost in costs.items()
    ]
    assert len(costs) == 6
    assert max(costs.values()) < 11  # a bias, slopes and the bias's gradient are among the arguments


class Recorder:
    """A backend that notes which primitives it ran, and runs them by ``to``."""

    def __init__(self, to: Any) -> None:
        self._to = to
        self.ran: list[str] = []

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        self.ran.append(name)
        return getattr(self._to, name)


def test_one_primitive_of_a_block_on_another_backend(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = bimodal(2, 16, 4, 5)
    theirs = reference.DenseBlock(2, 16, 2, 8)
    keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(2, 16, 2, 8)
    ours.load_state_dict(theirs.state_dict())
    other = Recorder(cuda._OTHERS["eager"])
    monkeypatch.setitem(cuda._OTHERS, "triton", other)
    monkeypatch.setattr(choice, "triton", other)
    with choice.preferring({ShapeClass("norm_relu_conv_backward", "3", "few"): ("triton", "cuda")}):
        actual = step(ours, x)
    assert_same(actual, step(theirs.double(), x.double()), "float32 whole block")
    assert other.ran == ["norm_relu_conv_backward"] * 2
