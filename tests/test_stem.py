"""FusedFeatures against the same modules in a plain Sequential."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import bimodal, step
from tolerances import assert_no_worse, assert_same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_densenet import FallbackError, FallbackWarning, FusedDenseBlock, strict
from fused_densenet.backends import eager
from fused_densenet.backends.contract import Norm, Owed
from fused_densenet.nn.stem import FusedFeatures
from fused_densenet.ops.statistics import statistics_of
from fused_densenet.ops.stem import Arguments

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def pair(spatial_dims: int, channels: int, pool: bool = True) -> tuple[FusedFeatures, nn.Sequential]:
    """Ours and a plain one, of a norm, a ReLU and perhaps a pooling."""
    modules = OrderedDict[str, nn.Module](norm0=NORM[spatial_dims](channels), relu0=nn.ReLU(inplace=True))
    if pool:
        modules["pool0"] = POOL[spatial_dims](kernel_size=3, stride=2, padding=1)
    norm = modules["norm0"]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.weight[::3] *= -1
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return FusedFeatures(modules), nn.Sequential(copy.deepcopy(modules))


SIZES = [(2, 6, 9), (1, 3, 2), (3, 70, 8, 5), (1, 6, 2, 2), (2, 100, 1, 7), (2, 5, 3, 4, 5)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_step_equals_that_of_the_modules(sizes: tuple[int, ...], pool: bool, training: bool) -> None:
    ours, theirs = (m.double().train(training) for m in pair(len(sizes) - 2, sizes[1], pool))
    x = torch.randn(sizes, dtype=torch.float64)
    assert_same(step(ours, x, steps=2), step(theirs, x, steps=2), "float64 whole block")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_no_larger(dtype: torch.dtype) -> None:
    ours, theirs = pair(2, 64)
    x = bimodal(4, 64, 15, 18).to(dtype)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    found, expected = step(ours, x), step(theirs, x)
    assert found["output"].dtype == expected["output"].dtype == dtype
    if dtype == torch.float32:  # a rounding or two: their ratio is luck
        assert_same(found, expected, "float32 whole block")
    else:
        assert_no_worse(found, expected, exact)


@pytest.mark.usefixtures("backend")
def test_the_first_of_equal_maxima_takes_the_gradient() -> None:
    ours, theirs = pair(2, 3)
    x = torch.randint(0, 3, (2, 3, 8, 8)).double()
    assert_same(step(ours.double(), x), step(theirs.double(), x), "float64 whole block")


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    ours, x, results = pair(2, 70)[0], torch.randn(3, 70, 17, 14), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(step(copy.deepcopy(ours), x))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.usefixtures("backend")
def test_nan_reaches_its_windows() -> None:
    ours, theirs = (m.eval() for m in pair(2, 3))
    x = torch.randn(1, 3, 8, 8)
    x[0, 1, 3, 4] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(2, 2, 5), (1, 2, 4, 3)], ids=str)
def test_gradients_of_first_and_second_order(sizes: tuple[int, ...], training: bool) -> None:
    ours = pair(len(sizes) - 2, 2)[0].double().train(training)
    ours.norm0.track_running_stats = False
    names = ["norm0.weight", "norm0.bias"]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    inputs = [torch.randn(sizes, dtype=torch.float64), *(ours.get_parameter(name).detach() for name in names)]
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [True, False])
def test_autocast_changes_nothing(pool: bool, dtype: torch.dtype) -> None:
    """As BN, ReLU and pooling it keeps the dtype of its input; the derivatives, too, of either order."""
    ours, x = pair(2, 6, pool)[0], torch.randn(2, 6, 7, 6).to(dtype)

    def derivatives(autocast: bool) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), *ours.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = ours(inputs[0])
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [out, *first, *second]

    for with_autocast, without in zip(derivatives(True), derivatives(False), strict=True):
        assert with_autocast.dtype == without.dtype
        assert torch.equal(with_autocast, without)


def test_whole_stem_keeps_its_input_alone() -> None:
    """conv0's image and its result: not ReLU's result, not the places of the maxima."""
    modules = OrderedDict(
        conv0=nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), **dict(pair(2, 16)[1].named_children())
    )
    theirs = nn.Sequential(copy.deepcopy(OrderedDict(modules.items())))
    theirs = nn.Sequential(OrderedDict(zip(modules, theirs.children(), strict=True)))
    ours = FusedFeatures(modules)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ours(x)
    sizes = [size for place, size in kept.items() if place not in own]
    assert sum(sizes) == 4 * (x.numel() + 2 * 16 * 16 * 16)
    torch.testing.assert_close(out, theirs(x))
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float32 whole block")


def test_compile_and_operators() -> None:
    ours = pair(2, 4)[0].double()
    eager, x = copy.deepcopy(ours), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    torch._dynamo.reset()
    found = step(torch.compile(ours, fullgraph=True, backend="aot_eager"), x)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_same(found, step(eager, x), "float64 whole block")
    x.requires_grad_()
    gamma, beta = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    moments, pixels, _ = statistics_of(x, "eager", None)
    arguments = Arguments(x, [gamma], [beta], list(moments), pixels, 1e-5, True, True, "eager", None)
    operators = torch.ops.fused_densenet
    torch.library.opcheck(operators.stem.default, arguments)
    dout = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(operators.stem_backward.default, (dout, [], [], [], *arguments))


def test_what_is_no_stem_is_called_as_it_is() -> None:
    """Other windows, norms without ReLU, a pooling elsewhere: as in a plain Sequential."""
    modules = [nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    theirs = nn.Sequential(*modules).double()
    ours = FusedFeatures(*copy.deepcopy(modules)).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_same(step(ours, x), step(theirs, x), "float64 whole block")
    assert isinstance(ours[2:4], FusedFeatures)


@pytest.mark.parametrize("pooled", [True, False])
def test_one_value_per_channel(pooled: bool) -> None:
    """It has no variance: an error in training, before anything is counted."""
    stem = FusedFeatures(nn.BatchNorm2d(4), nn.ReLU(), *([nn.MaxPool2d(3, 2, 1)] if pooled else []))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stem(torch.randn(1, 4, 1, 1))
    assert not stem[0].running_mean.any()
    assert stem.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)


POOLS = {
    "dilated": {"dilation": 2},
    "dilated in one dimension": {"dilation": (1, 2)},
    "rounded up": {"ceil_mode": True},
    "stride 1": {"stride": 1},
    "stride of one dimension": {"stride": (2, 1)},
    "not padded": {"padding": 0},
    "larger window": {"kernel_size": 5, "padding": 2},
    "tuples": {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)},
}


@pytest.mark.parametrize("settings", POOLS.values(), ids=POOLS)
def test_pooling_of_other_settings(settings: dict[str, Any]) -> None:
    """Even sizes, where rounding up is seen, and windows of which the first and last reach over the edge."""
    pool = nn.MaxPool2d(**{"kernel_size": 3, "stride": 2, "padding": 1} | settings)
    theirs = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), pool).double()
    ours = FusedFeatures(*copy.deepcopy(theirs).children())
    for sizes in ((2, 4, 8, 10), (2, 4, 9, 7)):
        x = torch.randn(sizes, dtype=torch.float64)
        assert_same(step(ours, x), step(theirs, x), "float64 whole block")


def test_places_of_the_maxima_are_given() -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1, return_indices=True)).double()
    ours = FusedFeatures(*copy.deepcopy(theirs).children())
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for actual, expected in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_hooks_are_called_and_said() -> None:
    ours, theirs = (m.double() for m in pair(2, 4))
    seen = []
    ours.relu0.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="FusedFeatures runs operator by operator, not fused: relu0 has hooks"):
        torch.testing.assert_close(ours(x), theirs(x))
    assert seen
    with strict(), pytest.raises(FallbackError, match="relu0 has hooks"):
        ours(x)


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"ceil_mode": True}, {"stride": 1}, {"padding": 0}, {"kernel_size": 2}]
)
def test_pooling_of_other_settings_is_no_part_of_a_run(options: dict[str, int]) -> None:
    """It is called as it is, behind the norm and the ReLU that run fused."""
    pool = nn.MaxPool2d(**({"kernel_size": 3, "stride": 2, "padding": 1} | options))
    theirs = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), pool).double()
    ours = FusedFeatures(*theirs)
    assert [run.pool for run in ours.runs()] == [False]
    x = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("value", [None, "image", [torch.ones(2, 3, 4, 4)]], ids=["None", "str", "list"])
def test_what_is_no_tensor_goes_to_the_first_module(value: Any) -> None:
    """Which may be for such a thing."""
    norm, relu = nn.BatchNorm2d(3), nn.ReLU()

    class First(nn.Module):
        def forward(self, given: Any) -> Tensor:
            assert given is value
            return torch.ones(2, 3, 4, 4)

    assert FusedFeatures(First(), norm, relu)(value).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("relu", [True, False])
def test_an_eps_of_zero_is_torchs_error(relu: bool) -> None:
    modules = [nn.BatchNorm2d(3), nn.ReLU()] if relu else [FusedDenseBlock(1, 3, 1, 2), nn.BatchNorm2d(5)]
    features = FusedFeatures(*modules)
    features(torch.randn(2, 3, 4, 4))
    modules[0 if relu else 1].eps = 0.0
    with pytest.raises(ValueError, match="eps"):
        features(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_only_the_maxima_of_volumes_are_pooled_as_volumes(spatial_dims: int) -> None:
    """In torch's own operators: on a GPU the backward pass of ``max_pool3d`` adds in any order, that of ``max_pool2d`` in one."""
    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            called.append(function.overloadpacket.__name__)
            return function(*arguments, **options or {})

    sizes = (*(1, 1, 1)[spatial_dims:], *(6, 7, 5)[:spatial_dims])
    x, dx = torch.randn(2, 2, *sizes, 5, dtype=torch.float64)
    grad = torch.ones(2, *[(size + 1) // 2 for size in sizes], 5, dtype=torch.float64)
    norm = Norm(*torch.rand(4, 5, dtype=torch.float64), 1e-5)
    with Calls():
        eager.norm_relu_pool_backward(grad, x, norm, dx, Owed(*torch.empty(2, 5, dtype=torch.float64)))
    backward = {name for name in called if name.endswith("with_indices_backward")}
    assert backward == {f"max_pool{3 if spatial_dims == 3 else 2}d_with_indices_backward"}
