"""``optimize_for_inference``: results, bits, memory, what it refuses, what it leaves alone and says so."""

import concurrent.futures
import contextlib
import copy
import functools
import io
import itertools
import pathlib
import pickle
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import packages
import peers
import pytest
import rebuilt_networks
import residual_networks
import torch
import torch.nn.functional as F
from networks import torchvisions
from report import sections
from tolerances import assert_error_ratio, assert_largest, tolerance
from torch import Tensor, nn

import fused_densenet
from fused_densenet import (
    DenseNet,
    FallbackError,
    FusedDenseBlock,
    FusedTransition,
    explain,
    fuse,
    optimize_for_inference,
    use_backend,
)
from fused_densenet.adopt import drafts
from fused_densenet.backends import BACKENDS
from fused_densenet.nn import serving
from fused_densenet.nn.serving import Segment
from fused_densenet.ops import network

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from allocator import call_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = {1: (67,), 2: (41, 38), 3: (33, 34, 35)}


def randomised(model: nn.Module) -> Any:
    """In evaluation, with norms that do something."""
    for module in model.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def small(dims: int = 2, **options: Any) -> Any:
    """In float64."""
    torch.manual_seed(0)
    arguments: Any = {"bn_size": 2, "num_classes": 5, "spatial_dims": dims} | options
    return randomised(DenseNet(4, (2, 2), 8, **arguments)).double()


def segments(model: nn.Module) -> list[Segment]:
    return [module for module in model.modules() if isinstance(module, Segment)]


def leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


@torch.no_grad()
def assert_served(model: nn.Module, x: Tensor) -> Any:
    """A snapshot of ``model``, which is in float64 and gives the same."""
    served = optimize_for_inference(model)
    ours, theirs = leaves(served(x)), leaves(model(x))
    for mine, expected in zip(ours, theirs, strict=True):
        assert_largest(mine, expected, "float64 whole block", "output")
    return served


IN_ONE = {
    "torchvision": 1,
    "timm": 1,
    "monai": 1,
    "monai 3d": 1,
    "torchxrayvision": 1,
    "segmentation_models_pytorch": 4,
}
"""Packages, and how many programs their networks are."""


@pytest.mark.parametrize("name", packages.PACKAGES)
def test_packages(name: str) -> None:
    x = packages.images(name)
    served = assert_served(randomised(packages.build(name)), x[:1] if x.dim() == 5 else x)
    assert len(segments(served)) == IN_ONE[name]
    report = explain(served, x[:1])
    assert len(report.blocks) == 4
    assert all(block.fused and block.backend == "cpu" for block in report.blocks)
    assert all(t.fused or t.reasons == ["its owner calls its parts one by one"] for t in report.transitions)


@pytest.mark.parametrize("name", [*rebuilt_networks.NETWORKS, *residual_networks.NETWORKS])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_rebuilt_networks(name: str) -> None:
    known = name in rebuilt_networks.NETWORKS
    model = rebuilt_networks.built(name) if known else residual_networks.NETWORKS[name][0]().double()
    served = assert_served(randomised(model), torch.randn(3, 3, 12, 14, dtype=torch.float64))
    report = explain(served)
    assert all(block.fused or block.reasons for block in report.blocks)
    if known and not name.startswith("Tiramisu"):  # whose last blocks return what is new alone
        assert len(segments(served)) == 1 and not report.others
        assert all(part.fused for part in (*report.blocks, *report.transitions))
    else:
        assert report.others


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
@torch.no_grad()
def test_dtypes_and_dimensions(dims: int, dtype: torch.dtype, batch: int) -> None:
    """As exact as the model itself in that dtype, operator by operator; no Python between image and logits but one convolution."""
    model = small(dims, num_classes=64)
    x = torch.randn(batch, 3, *SIZES[dims]).to(dtype)
    served = optimize_for_inference(model, dtype=dtype)
    assert [len(s.parts) for s in segments(served)] == [6]
    assert not explain(served).others
    ours, exact = served(x), model(x.double())
    assert ours.dtype == dtype
    with use_backend("eager"):
        theirs = copy.deepcopy(model).to(dtype)(x)
    if dtype.itemsize > 2:
        assert_largest(ours, exact, f"{str(dtype).removeprefix('torch.')} whole block", "output")
    if dtype.itemsize == 2 or (dtype == torch.float32 and batch == 8):  # a few float32 entries' errors are luck
        assert_error_ratio(ours, theirs, exact, dtype, "output", exact)


@pytest.mark.parametrize(
    "options",
    [
        {"bn_size": None},
        {"small_inputs": True},
        {"small_inputs": True, "bn_size": None, "in_channels": 1},
        {"drop_rate": 0.2},
        {"compression": 1.0, "memory_efficient": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_architectures(options: dict[str, Any], backend: str) -> None:
    model = small(**options)
    x = torch.randn(2, options.get("in_channels", 3), 33, 34, dtype=torch.float64)
    with use_backend(backend):
        served = assert_served(model, x)
    assert not explain(served).others


class Heads(nn.Module):
    """A block behind a stem with everything that a program can have there, and one of several heads."""

    def __init__(self, head: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, 2, bias=True), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block, self.norm = FusedDenseBlock(2, 8, 2, 4, bias=True, negative_slope=0.2), nn.BatchNorm2d(16)
        self.pool, self.fc, self.out = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 6), nn.Linear(6, 5)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.second(self.act(self.bn(self.conv(x)))))
        return self.head(self, torch.relu(self.norm(x)))


HEADS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "mean": (lambda m, x: m.fc(x.mean((-1, -2))), 0),
    "mean of flat": (lambda m, x: m.fc(x.flatten(2).mean(-1)), 0),
    "kept": (lambda m, x: m.fc(torch.flatten(F.dropout(m.pool(x), training=False), 1)), 0),
    "layers": (lambda m, x: m.out(F.relu(m.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)))), 0),
    "pool alone": (lambda m, x: m.pool(x), 0),
    "mean alone": (lambda m, x: x.mean((2, 3)), 0),
    "view": (lambda m, x: m.fc(m.pool(x).view(x.size(0), -1)), 0),
    "view of shape": (lambda m, x: m.fc(m.pool(x).reshape((x.shape[0], -1))), 0),
    "view of more": (lambda m, x: m.pool(x).view(x.size(0) * 2, -1), 4),
    "maxima": (lambda m, x: m.fc(x.amax((2, 3))), 2),
    "mean of rows": (lambda m, x: x.mean(2), 1),
    "mean of all": (lambda m, x: x.mean((1, 2, 3)), 1),
    "channels": (lambda m, x: x.flatten(1, 2).mean(2), 2),
    "half the image": (lambda m, x: F.adaptive_avg_pool2d(x, 2), 1),
    "square": (lambda m, x: m.fc(m.pool(x).flatten(1).square()), 2),
    "twice": (lambda m, x: m.pool(x) + x, 2),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    """What a program has no place for is left as it is, and named."""
    head, left = HEADS[name]
    model = randomised(Heads(head)).double()
    served = assert_served(model, torch.randn(2, 3, 17, 21, dtype=torch.float64))
    assert len(segments(served)) == 1
    assert len(explain(served).others) == left


def test_the_model_stays_as_it_is_and_so_does_the_snapshot() -> None:
    model, x = torchvisions().train(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    served = optimize_for_inference(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    expected = served(x)
    assert_largest(expected, model.eval()(x), "float64 whole block", "output")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(served(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_the_same_in_every_call_and_thread(dtype: torch.dtype) -> None:
    """Threads that begin together pack the weights of two sizes, one of which Winograd's filtering is used for."""
    served = optimize_for_inference(small(), dtype=dtype)
    images = [torch.randn(n, 3, *size).to(dtype) for n, size in [(1, (33, 40)), (4, (64, 64)), (2, (96, 80))]]
    expected = [copy.deepcopy(served)(x) for x in images]
    start = threading.Barrier(4)

    def work(seed: int) -> list[bool]:
        start.wait()
        order = [(seed + i) % len(images) for i in range(6)]
        return [torch.equal(served(images[i]), expected[i]) for i in order]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(itertools.chain(*pool.map(work, range(4))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_weights_packed_once_are_those_packed_at_each_call(dtype: torch.dtype) -> None:
    """In either layout, whichever came first."""
    (segment,) = segments(optimize_for_inference(DenseNet(16, (2, 2), 32, num_classes=5), dtype=dtype))
    for batch, size in [(1, 33), (8, 64), (1, 64), (8, 33)]:
        x = torch.randn(batch, 3, size, size).to(dtype)
        assert segment.stem is not None
        ours = segment(x)
        image = F.conv2d(x, segment.stem_weight, None, *segment.stem)  # type: ignore[arg-type]
        packed_again = network.Network(network.Parts(segment.parts))(image, segment.constants(), "cpu")
        assert packed_again is not None
        assert torch.equal(ours, packed_again.flatten(1))


def test_where_a_backend_has_no_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, torch computes the end of the network."""
    monkeypatch.delattr(BACKENDS["cpu"], "norm_relu_mean")
    for name in ("mean", "layers", "pool alone"):
        assert_served(randomised(Heads(HEADS[name][0])).double(), torch.randn(2, 3, 17, 21, dtype=torch.float64))


def test_any_size() -> None:
    model = small()
    served = optimize_for_inference(model)
    for batch, height, width in [(1, 16, 16), (3, 17, 50), (1, 224, 20), (0, 32, 32), (2, 16, 16)]:
        x = torch.randn(batch, 3, height, width, dtype=torch.float64)
        for image in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            assert_largest(served(image), model(image), "float64 whole block", "output")
    with pytest.raises(ValueError, match="expected larger images, got shape"):
        served(torch.randn(1, 3, 4, 4, dtype=torch.float64))


def test_memory_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two largest buffers, which are the stem's and the first block's."""
    monkeypatch.setattr(torch.autograd, "_profiler_enabled", lambda: False)  # for which single calls would be run
    torch.use_deterministic_algorithms(False)  # fills what it allocates
    served, x = optimize_for_inference(peers.densenet121()), torch.randn(1, 3, 224, 224)
    theirs = peers.densenet121().eval()
    with torch.no_grad():
        x = x.contiguous(memory_format=torch.channels_last)
        ours, torchvisions = call_memory(lambda: served(x)) / 2**20, call_memory(lambda: theirs(x)) / 2**20
    two_largest = 2 * 64 * 112 * 112 * 4 / 2**20
    sections["memory of an inference, float32, batch 1, 224x224"].append(
        f"DenseNet-121: {ours:.2f} MiB beside the weights; its two largest buffers {two_largest:.2f}; torchvision {torchvisions:.2f}"
    )
    assert ours <= two_largest + tolerance("vectors MiB")


def test_it_has_no_gradients() -> None:
    served, x = optimize_for_inference(torchvisions()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert not served(x).requires_grad
    assert not any(p.requires_grad for p in served.parameters())
    wanting = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="requires no gradient"):
        served(wanting)
    with torch.no_grad():
        assert torch.equal(served(wanting), served(x))
    with torch.inference_mode():
        assert torch.equal(served(x), served(x))


def test_what_a_snapshot_refuses() -> None:
    served = optimize_for_inference(torchvisions(), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="has no training mode"):
        served.train()
    assert served.eval() is served and not served.training
    with pytest.raises(RuntimeError, match="weights are constants"):
        served.requires_grad_()
    with pytest.raises(RuntimeError, match="keeps the weights that it was made with"):
        served.load_state_dict(served.state_dict())
    for convert in (lambda: served.float(), lambda: served.half(), lambda: served.to("cpu", torch.float64)):
        with pytest.raises(RuntimeError, match=r"were rounded to torch\.bfloat16"):
            convert()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(TypeError, match=r"expected torch\.bfloat16, the snapshot's, got torch\.float32"):
        served(x)
    with pytest.raises(ValueError, match="3 channels"):
        served(x[:, :2].bfloat16())
    with pytest.raises(ValueError, match="dimensions"):
        served(x[0].bfloat16())
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script"):
        torch.jit.script(served)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a snapshot"):
        torch.jit.trace(served, x.bfloat16(), check_trace=False)


def test_a_module_around_it_loads_no_other_weights() -> None:
    around, others = (nn.Sequential(optimize_for_inference(randomised(torchvisions()))) for _ in range(2))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = around(x)
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="keeps the weights that it was made with"):
            around.load_state_dict(others.state_dict(), assign=assign)
    with pytest.raises(RuntimeError, match="keeps the weights that it was made with"):
        around.load_state_dict({}, strict=False)
    around.load_state_dict(copy.deepcopy(around.state_dict()))
    assert torch.equal(around(x), expected)


def test_it_has_no_forward_mode_derivative() -> None:
    served, x = optimize_for_inference(torchvisions()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected a tensor without a tangent"):
        torch.func.jvp(served, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(served(x), served(x))
        with pytest.raises(RuntimeError, match="expected a tensor without a tangent"):
            served(torch.autograd.forward_ad.make_dual(x, x))


def test_hooks_on_all_modules_are_not_passed_over() -> None:
    served, x = optimize_for_inference(torchvisions()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="hooks on all modules are registered"):
            served(x)
    finally:
        handle.remove()
    served(x)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Flatten, nn.AdaptiveAvgPool2d])
def test_a_class_whose_forward_was_replaced_is_called(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = kind.forward
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)
    model = randomised(nn.Sequential(torchvisions().features, nn.ReLU(), *head)).double()
    monkeypatch.setattr(kind, "forward", lambda module, x: forward(module, x) * 2)
    assert_served(model, torch.randn(2, 3, 17, 21, dtype=torch.float64))


def test_bad_arguments() -> None:
    model = torchvisions()
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        optimize_for_inference(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a Snapshot"):
        optimize_for_inference(optimize_for_inference(model))
    with pytest.raises(TypeError, match=r"expected one of torch\.float32"):
        optimize_for_inference(model, dtype=torch.int8)
    with pytest.raises(TypeError, match="cuda_graphs: expected True or False, got int"):
        optimize_for_inference(model, cuda_graphs=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies(dtype: torch.dtype) -> None:
    served, x = optimize_for_inference(torchvisions(), dtype=dtype), torch.randn(2, 3, 33, 32).to(dtype)
    expected = served(x)
    assert served._device is not None and pickle.loads(pickle.dumps(served))._device is None
    file = io.BytesIO()
    torch.save(served, file)
    file.seek(0)
    copies = [copy.deepcopy(served), pickle.loads(pickle.dumps(served)), torch.load(file, weights_only=False)]
    copies += [copy.deepcopy(served).to("cpu").to(dtype).to("cpu", dtype)]
    for one in copies:
        assert torch.equal(one(x), expected)
        assert str(explain(one)) == str(explain(served))
    elsewhere = copy.deepcopy(served).to("meta")
    assert {t.device.type for t in elsewhere.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match="expected a tensor on meta"):
        elsewhere(x)


def test_autocast_and_compile_change_nothing() -> None:
    served, x = optimize_for_inference(torchvisions(), dtype=torch.float32), torch.randn(2, 3, 32, 32)
    expected = served(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(served(x), expected)
    assert torch.equal(torch.compile(served, backend="eager")(x), expected)


def test_a_subclass_of_tensor_comes_back() -> None:
    class Image(Tensor):
        pass

    served, x = optimize_for_inference(torchvisions()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    out = served(x.as_subclass(Image))
    assert type(out) is Image and torch.equal(out.as_subclass(Tensor), served(x))


def test_hooks_are_called() -> None:
    """Of a module that is no part of a program, of one that would be, of a sequence and of one inside a block."""
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    model: Any = torchvisions()
    names = ["features.norm5", "features.transition1", "features", "features.denseblock2.denselayer1.conv1"]
    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    served, x = optimize_for_inference(model), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert not seen
    with pytest.warns(fused_densenet.FallbackWarning, match="has hooks"):
        found = served(x)
    assert sorted(seen) == sorted(names)
    assert_largest(found, model.eval()(x), "float64 whole block", "output")
    report = explain(served)
    assert [block.fused for block in report.blocks] == [True, False]
    assert report.blocks[1].reasons == ["denselayer1.conv1 has hooks"]
    assert any("features" in r.name and "has hooks" in r.reasons[0] for r in report.others)
    with pytest.raises(FallbackError, match="has hooks"):
        optimize_for_inference(model, strict=True)


@pytest.mark.parametrize(
    "name", ["features.conv0", "features.norm0", "features.relu0", "features.pool0", "features.norm5"]
)
def test_a_hook_around_the_blocks_is_called(name: str) -> None:
    """Of each module that would be taken with the one before it."""
    model: Any = randomised(torchvisions())
    model.get_submodule(name).register_forward_hook(lambda module, inputs, out: out * 2)
    served = assert_served(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    (report,) = [r for r in explain(served).others if r.name == name]
    assert "has hooks" in report.reasons[0]


def odd_slopes(model: Any) -> None:
    model.act.negative_slope = 1.5


def other_strides(model: Any) -> None:
    model.second[0] = nn.Conv2d(8, 8, 3, 2, padding=1, groups=2)


def reflected(model: Any) -> None:
    model.conv = nn.Conv2d(3, 8, 3, 2, padding=1, padding_mode="reflect")


def frozen_without_statistics(model: Any) -> None:
    model.bn = nn.BatchNorm2d(8, track_running_stats=False)


def without_affine(model: Any) -> None:
    model.bn, model.second[1] = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)


def identities(model: Any) -> None:
    model.bn, model.act, model.second[2] = nn.Identity(), nn.Dropout2d(0.5), nn.Identity()


def other_eps(model: Any) -> None:
    model.norm.eps = 0.5


def pointwise(model: Any) -> None:
    model.second = nn.Sequential(
        nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2), nn.Conv2d(8, 8, (1, 3), padding="same")
    )


def other_windows(model: Any) -> None:
    model.second = nn.Sequential(
        nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2, padding=1), nn.MaxPool2d(3, 2, 1)
    )


CHANGES = [
    *(odd_slopes, other_strides, reflected, frozen_without_statistics, without_affine, identities, other_eps),
    *(pointwise, other_windows),
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_stems(change: Callable[[Any], None]) -> None:
    model = Heads(HEADS["mean"][0])
    change(model)
    served = assert_served(randomised(model).double(), torch.randn(2, 3, 21, 25, dtype=torch.float64))
    assert any(isinstance(part, network.Structure) for segment in segments(served) for part in segment.parts)


class Branching(nn.Module):
    """Whose ``forward`` looks like one sequence of calls to a tracer that feeds it no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.features: Any = torchvisions().features

    def forward(self, x: Any) -> Tensor:
        return self.features(x if isinstance(x, Tensor) else -x)


class BySize(Branching):
    def forward(self, x: Any) -> Tensor:
        return self.features(x.flip(2) if x.shape[2] > 40 else x)


class WithMask(Branching):
    def forward(self, x: Any, mask: Any = None) -> Tensor:
        return self.features(x if mask is None else x * mask)


class Counting(Branching):
    calls = 0

    def forward(self, x: Any) -> Tensor:
        self.calls += 1
        return self.features(x) * self.calls


@pytest.mark.parametrize("kind", [Branching, BySize, WithMask, Counting])
def test_a_forward_that_cannot_be_followed_stays(kind: type[nn.Module]) -> None:
    """Its sequence of features is one program all the same."""
    model: Any = randomised(kind()).double()
    served, x = optimize_for_inference(model), torch.randn(1, 3, 48, 32, dtype=torch.float64)
    calls = ((x,), (x[:, :, :33],), *([(x, x)] if kind is WithMask else []))
    for i, inputs in enumerate(calls):
        if kind is Counting:
            served.inside.calls = model.calls = i
        assert_largest(served(*inputs), model(*inputs), "float64 whole block", "output")
    assert [len(s.parts) for s in segments(served)] == [5]
    assert explain(served).others[0].name == ""
    assert len(explain(served).others) == 1


class Looking(nn.Module):
    """Whose code cannot be followed, and looks into its sequence of features."""

    def __init__(self, look: str) -> None:
        super().__init__()
        self.features: Any = torchvisions().features
        self.look = look

    def forward(self, x: Any, unused: Any = None) -> Any:
        assert x.shape[1] == 3
        return LOOKS[self.look](self.features, x)


def taps(features: Any, x: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, layer in features.named_children():
        x = layer(x)
        found[name] = x.mean((2, 3))
    return found


LOOKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "named_children": taps,
    "iteration": lambda features, x: functools.reduce(lambda y, layer: layer(y), features, x),
    "indexing": lambda features, x: [features[: len(features) - 1](x), features[-1].weight],
    "attributes": lambda features, x: features.denseblock1(features.pool0(features.norm0(features.conv0(x)))),
    "class": lambda features, x: features(x) if isinstance(features, nn.Sequential) else -x,
    "call and attribute": lambda features, x: (features(x), features.conv0(x)),
}


@pytest.mark.parametrize("name", LOOKS)
def test_code_that_looks_into_a_module_finds_its_children(name: str) -> None:
    model, x = randomised(Looking(name)).double(), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = assert_served(model, x)
    assert [len(s.parts) for s in segments(served)] == [5]
    with torch.no_grad():
        expected = leaves(served(x))
        for one in (copy.deepcopy(served), pickle.loads(pickle.dumps(served)), served.to("cpu", torch.float64)):
            assert all(map(torch.equal, map(torch.as_tensor, leaves(one(x))), map(torch.as_tensor, expected)))


def changed_behind_a_program(model: Any, x: Tensor) -> Any:
    x = x * 1.0
    out = model.block(model.second(model.act(model.bn(model.conv(x)))))
    return model.norm(out), x.sub_(x.mean())


def changed_before_its_end(model: Any, x: Tensor) -> Any:
    h = model.conv(x)
    normed = model.bn(h)
    other = F.relu(h, inplace=True)
    return model.norm(model.block(model.act(normed))), other


def added_to(model: Any, x: Tensor) -> Any:
    h = model.conv(x)
    normed = model.bn(h)
    h.add_(1)
    return model.norm(model.block(model.act(normed))), h


class Changing(Heads):
    def forward(self, x: Tensor) -> Any:
        return self.head(self, x)


@pytest.mark.parametrize("head", [changed_behind_a_program, changed_before_its_end, added_to])
def test_a_program_reads_its_input_before_it_is_changed(head: Callable[[Any, Tensor], Any]) -> None:
    served = assert_served(randomised(Changing(head)).double(), torch.randn(2, 3, 17, 21, dtype=torch.float64))
    assert len(segments(served)) == 1


class Masked(Branching):
    """Whose result is another at each call, beside very large numbers."""

    calls, fill = 0, 0.0

    def forward(self, x: Any) -> Tensor:
        self.calls += 1
        return torch.cat([self.features(x).mean((2, 3)) * self.calls, torch.full((2, 1), self.fill).to(x)], 1)


@pytest.mark.parametrize("fill", [-1e4, -1e9, float("-inf")])
def test_large_numbers_hide_no_difference(fill: float) -> None:
    model: Any = randomised(Masked()).double()
    model.fill, model.calls = fill, 5
    served, x = optimize_for_inference(model), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    found, expected = served(x)[:, :-1], model(x)[:, :-1]
    assert_largest(found, expected, "float64 whole block", "output")


class Crops(Branching):
    """Several of each image."""

    def forward(self, x: Any) -> Tensor:
        images = self.features(x.reshape(-1, 3, x.size(-2), x.size(-1)))
        return F.adaptive_avg_pool2d(images, 1).view(x.size(0), -1)


def test_crops_of_an_image_stay_together() -> None:
    model, x = randomised(Crops()).double(), torch.randn(2, 4, 3, 33, 34, dtype=torch.float64)
    served = assert_served(model, x)
    assert_served(model, x[:, 0])
    assert served(x).shape == (2, 4 * 32)


def test_an_image_that_is_normalised_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), torchvisions())
    x = torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = optimize_for_inference(randomised(model))
    assert len(segments(served)) == 1
    with torch.no_grad():
        assert_largest(served(x.clone()), model(x.clone()), "float64 whole block", "output")


def test_a_program_that_is_seen_to_be_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = drafts._with_norm
    monkeypatch.setattr(drafts, "_with_norm", lambda w, *rest: (fold(w, *rest)[0] * 1.001, fold(w, *rest)[1]))
    model, x = torchvisions(), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = assert_served(randomised(model), x)
    assert any("its program computes something else than it" in r.reasons for r in explain(served).others)
    with pytest.raises(FallbackError, match="its program computes something else than it"):
        optimize_for_inference(model, strict=True)


class Scaled(Branching):
    """By a parameter of its own, and by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x: Any) -> Tensor:
        return self.features((x - torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64).view(1, 3, 1, 1)) * self.scale)


def test_tensors_of_the_code() -> None:
    model, x = randomised(Scaled()).double(), torch.randn(2, 3, 33, 34, dtype=torch.float64)
    served = assert_served(model, x)
    assert {r.name for r in explain(served).others} == {"sub", "mul"}
    assert torch.equal(pickle.loads(pickle.dumps(served))(x), served(x))


def test_batch_statistics_are_left_to_the_modules() -> None:
    """A norm without running statistics takes those of the batch in evaluation, too."""
    model: Any = torchvisions()
    norm = model.features.transition1.norm
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    served = assert_served(model.eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64))
    (transition,) = explain(served).transitions
    assert not any(
        isinstance(m, Segment) and any(type(p).__name__ == "Reduction" for p in m.parts) for m in served.modules()
    )
    assert transition.reasons


def test_a_network_without_dense_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    served, x = optimize_for_inference(model), torch.randn(1, 3, 8, 8)
    assert torch.equal(served(x), model(x))
    assert explain(served).others[0].reasons == ["no dense block was found in Sequential"]
    with pytest.raises(FallbackError, match="no dense block was found"):
        optimize_for_inference(model, strict=True)


def test_a_fused_network() -> None:
    """With or without ``memory_efficient``; a snapshot is that of the network before it was fused."""
    model, x = randomised(torchvisions()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = optimize_for_inference(model)(x)
    for memory_efficient in (False, True):
        served = assert_served(fuse(copy.deepcopy(model), memory_efficient=memory_efficient), x)
        assert torch.equal(served(x), expected)
        assert len(segments(served)) == 1 and not explain(served).others


def test_blocks_and_transitions_by_themselves() -> None:
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    for model in (FusedDenseBlock(2, 8, 2, 4), FusedTransition(8, 3), FusedDenseBlock(2, 8, None, 4, bias=True)):
        served = assert_served(randomised(model).double(), x)
        assert len(segments(served)) == 1


class _FakeGraphs:
    """Of torch.cuda what capturing uses: a "graph" calls its function again, on the memory that it was captured with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures, self.replays = 0, 0
        self._capturing: Any = None
        fakes = {
            "CUDAGraph": lambda: types.SimpleNamespace(replay=self._replay),
            "graph": lambda graph, **_: _nothing(),
            "Stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda: types.SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None),
            "stream": lambda _: _nothing(),
            "device": lambda _: _nothing(),
            "Event": lambda: types.SimpleNamespace(record=lambda *_: None, synchronize=lambda: None),
        }
        monkeypatch.setattr(serving.torch, "cuda", types.SimpleNamespace(**fakes))

    def _replay(self) -> None:
        self.replays += 1


@functools.cache
def _nothing() -> Any:
    return contextlib.nullcontext()


def test_cuda_graphs_by_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each layout and shape, the oldest let go of; an image goes to the graph's memory and the result out of it."""
    fake = _FakeGraphs(monkeypatch)
    calls: list[Tensor] = []
    graphs = serving._Graphs(lambda x: calls.append(x) or {"double": 2 * x})
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    one = graphs(first)
    assert len(calls) == 2 and calls[0] is calls[1] and calls[0] is not first
    two = graphs(second)
    assert len(calls) == 2 and fake.replays == 2
    assert torch.equal(calls[0], second)
    assert torch.equal(one["double"], 2 * first) and one["double"] is not two["double"]
    for size in range(1, 2 + serving._GRAPHS):
        graphs(torch.randn(size, 5))
    assert len(graphs._captured) == serving._GRAPHS
    graphs(first)
    assert len(calls) == 2 * (serving._GRAPHS + 3)
