"""``explain``: every reason is told, the mode is the one that runs, and nothing is changed by asking."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

import fused_densenet
from fused_densenet import FallbackError, FallbackWarning, FusedDenseBlock, explain, fuse, strict, use_backend
from fused_densenet.backends import choose


def network() -> Any:
    return peers.DenseNet(4, (2, 2), 8, 2, num_classes=5)


def images(**options: Any) -> Tensor:
    return torch.randn(2, 3, 64, 64, **options)


def test_every_reason() -> None:
    model = fuse(network())
    model.features.denseblock1.denselayer2.conv1.register_forward_hook(lambda *_: None)
    model.features.denseblock1.denselayer1.relu2 = nn.SiLU()
    model.features.denseblock1.denselayer1.conv2.forward = model.features.denseblock1.denselayer1.conv2.forward
    broken, whole = explain(model, images()).blocks
    assert broken.name == "features.denseblock1" and not broken.fused and broken.backend is None
    assert sorted(broken.reasons) == [
        "denselayer1.conv2 has a forward of its own",
        "denselayer1.relu2 is a SiLU",
        "denselayer2.conv1 has hooks",
    ]
    assert whole.fused and whole.backend == "cpu" and whole.reasons == []
    assert [block.reasons for block in explain(model).blocks] == [broken.reasons, []]
    with pytest.warns(FallbackWarning, match=r"and 2 more reasons, which fused_densenet\.explain lists"):
        model(images())


@pytest.mark.filterwarnings("ignore:not every dense block:fused_densenet.FallbackWarning")
def test_before_fuse() -> None:
    model = network()
    model.features.denseblock2.denselayer1.norm1 = nn.GroupNorm(2, 8)
    first, second = explain(model, images()).blocks
    assert (first.fused, second.fused) == (False, False)
    assert first.reasons == ["fused_densenet.fuse would replace it, and was not called"]
    assert second.reasons == ["denselayer1.norm1 is a GroupNorm"]
    assert str(explain(fuse(model))).splitlines() == [
        "1 of 2 dense blocks, 1 of 1 transitions, 1 of 1 stems run fused",
        "features.denseblock1: fused",
        "features.denseblock2: operator by operator",
        "    - denselayer1.norm1 is a GroupNorm",
        "features.transition1: fused",
        "features: fused",
    ]


MODES: dict[str, tuple[Callable[[FusedDenseBlock], Any], str]] = {
    "training": (lambda b: b.train(), "for backward, with batch statistics, bottlenecks kept"),
    "memory-efficient": (
        lambda b: setattr(b, "memory_efficient", True),
        "for backward, with batch statistics, bottlenecks computed again (memory_efficient)",
    ),
    "eval": (lambda b: b.eval(), "for backward, with running statistics, bottlenecks kept"),
    "frozen": (lambda b: b.requires_grad_(False).eval(), "inference with running statistics"),
    "partly frozen": (
        lambda b: b["denselayer1"].eval(),
        "for backward, with batch statistics in some norms, running ones in others, bottlenecks kept",
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_mode(name: str, backend: str) -> None:
    block = FusedDenseBlock(2, 8, 2, 4)
    MODES[name][0](block)
    (report,) = explain(block, torch.randn(2, 8, 4, 4)).blocks
    assert (report.name, report.fused, report.backend, report.mode) == ("", True, backend, MODES[name][1])
    assert report.reasons[:1] == ([] if backend == "cpu" else ["not cpu: backend 'eager' was asked for"])
    with torch.no_grad():
        (report,) = explain(block, torch.randn(2, 8, 4, 4)).blocks
    assert report.mode is not None and report.mode.startswith("inference with")


def test_plain_layers_and_hooks_on_all_modules() -> None:
    block = FusedDenseBlock(2, 8, None, 4, spatial_dims=1)
    x = torch.randn(2, 8, 5)
    (report,) = explain(block, x).blocks
    assert report.mode == "for backward, with batch statistics"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        (report,) = explain(block, x).blocks
    finally:
        handle.remove()
    assert report.reasons == ["hooks on all modules are registered"]


def test_nothing_is_changed() -> None:
    model = fuse(peers.DenseNet(4, (2, 2), 8, 2, drop_rate=0.5))
    model.features.denseblock2.denselayer1.conv1.register_forward_hook(lambda *_: None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = images()
    random = torch.get_rng_state()
    with strict(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [block.fused for block in explain(model, x).blocks] == [True, False]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.warns(FallbackWarning, match="conv1 has hooks"):
        model(images())


def test_block_that_is_not_reached() -> None:
    model = fuse(network())
    model.forward = lambda x: model.features[:5](x)
    first, second = explain(model, images()).blocks
    assert first.fused and not second.fused
    assert second.reasons == ["this input does not reach it"]


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got str"):
        explain("network")
    block = FusedDenseBlock(2, 8, 2, 4)
    with pytest.raises(ValueError, match="expected 8 channels"):
        explain(block, torch.randn(2, 7, 4, 4))
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for and cannot run"):
        explain(block, torch.randn(2, 8, 4, 4))
    assert not block._forward_pre_hooks


def test_contexts_hold_for_their_thread() -> None:
    """What one thread asks for neither reaches another nor is undone by it, in whatever order they leave."""
    block = FusedDenseBlock(2, 8, 2, 4)
    block["denselayer1"].conv1.register_forward_hook(lambda *_: None)
    seen: dict[str, list[Any]] = {"first": [], "second": []}
    barrier = threading.Barrier(2, timeout=60)

    def look(name: str) -> None:
        seen[name].append(choose(torch.device("cpu"), torch.float32))
        try:
            block(torch.randn(2, 8, 4, 4))
            seen[name].append("ran")
        except FallbackError:
            seen[name].append("error")

    def first() -> None:
        with use_backend("eager"), strict():
            barrier.wait()
            look("first")
            barrier.wait()
        barrier.wait()
        look("first")
        barrier.wait()

    def second() -> None:
        barrier.wait()
        with use_backend("cpu"), strict(False):
            barrier.wait()
            barrier.wait()
            look("second")
            barrier.wait()
        look("second")

    threads = [threading.Thread(target=run) for run in (first, second)]
    with warnings.catch_warnings(), use_backend("eager"):
        warnings.simplefilter("ignore", FallbackWarning)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"first": ["eager", "error", "cpu", "ran"], "second": ["cpu", "ran", "cpu", "ran"]}


def test_exported() -> None:
    assert {"explain", "fuse", "unfuse"} <= set(fused_densenet.__all__)
