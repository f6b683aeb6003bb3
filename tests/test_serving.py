"""``optimize_for_inference``: results, bits, memory, what it refuses."""

import concurrent.futures
import copy
import io
import itertools
import pathlib
import pickle
import sys
import threading
from typing import Any

import packages
import peers
import pytest
import rebuilt_networks
import residual_networks
import torch
from networks import torchvisions
from report import sections
from snapshots import HEADS, Heads, assert_served, randomised, segments, small
from tolerances import assert_error_ratio, assert_largest, tolerance
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fused_densenet import (
    DenseNet,
    explain,
    optimize_for_inference,
    use_backend,
)
from fused_densenet.backends import BACKENDS

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from allocator import call_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = {1: (67,), 2: (41, 38), 3: (33, 34, 35)}


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
        ours = segment(x)
        plan = segment._plans["cpu"]
        packed_again = plan.network(x, plan.parameters, "cpu")
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


def test_memory_is_kept_for_the_next_call() -> None:
    """Not where torch fills what it allocates, as in all other tests; of the largest image so far, and none of its numbers are seen."""
    torch.use_deterministic_algorithms(False)
    served = optimize_for_inference(small(), dtype=torch.float32)
    images = [torch.randn(n, 3, size, size) for n, size in [(2, 64), (1, 32), (3, 96)]]
    expected = [copy.deepcopy(served)(x) for x in images]
    for x, y in zip([*images, *reversed(images)], [*expected, *reversed(expected)], strict=True):
        assert torch.equal(served(x), y)
    buffer = 64 * 48 * 48 * 3 * 4
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "_profiler_enabled", lambda: False)
        assert call_memory(lambda: served(images[2])) < buffer / 2


def test_hooks_on_what_is_inside_are_called() -> None:
    served, seen, x = optimize_for_inference(small()), [], torch.randn(1, 3, 32, 32, dtype=torch.float64)
    served(x)
    (segment,) = segments(served)
    handles = [module.register_forward_hook(lambda *_: seen.append(1)) for module in (segment, served.inside)]
    served(x)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    served(x)
    assert len(seen) == 2


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


class Counting(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **kwargs or {})


def test_function_modes_are_not_passed_over() -> None:
    served, x = optimize_for_inference(torchvisions()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"a TorchFunctionMode is active \(Counting\)"), Counting():
        served(x)
    with torch.device("cpu"):
        served(x)


def test_what_cannot_be_exported_says_so() -> None:
    """A program would stand in the file as an address of this process."""
    served, x = optimize_for_inference(torchvisions()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"torch[.]export cannot record a snapshot"):
        torch.export.export(served, (x,))


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
    assert served._autocasts is not None and pickle.loads(pickle.dumps(served))._autocasts is None
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
