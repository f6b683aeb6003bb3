"""torch.compile, torch.export, AOTInductor, ONNX, torch.fx and TorchScript on a fused torchvision DenseNet."""

import copy
import pathlib
from collections.abc import Iterator
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from networks import images, torchvisions
from tolerances import assert_largest, assert_same
from torch import Tensor, nn

from fused_densenet import FallbackWarning, FusedDenseBlock, fuse, strict, unfuse

BATCHES = (4, 5, 7)


def train(network: Any, parameters: Any, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(parameters, 0.01)
    for x in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(x), torch.arange(len(x)) % 5).backward()
        optimizer.step()


def trained(network: nn.Module) -> nn.Module:
    """Running statistics of a few batches, so that evaluation depends on them."""
    with torch.no_grad():
        for _ in range(3):
            network(images(4))
    return network.eval()


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """g++ without optimisation, which takes longer than everything else."""
    with torch._inductor.config.patch("aot_inductor.debug_compile", True):
        yield


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_inductor() -> None:
    """Whole network, one graph for every batch size in training, one in evaluation; parameters after three steps."""
    theirs = torchvisions()
    ours = fuse(copy.deepcopy(theirs))
    batches = [images(count) for count in BATCHES]
    train(theirs, theirs.parameters(), batches)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    with strict():
        train(compiled, ours.parameters(), batches[:1])
        with torch.compiler.set_stance("fail_on_recompile"):
            train(compiled, ours.parameters(), batches[1:])
    assert_same(ours.state_dict(), theirs.state_dict(), "float64 whole block")
    theirs.eval(), ours.eval()
    with torch.no_grad(), strict():
        assert_largest(compiled(batches[0]), theirs(batches[0]), "float64 whole block", "evaluation")
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_largest(compiled(batches[1]), theirs(batches[1]), "float64 whole block", "evaluation")


def exported(network: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(network, (images(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool, tmp_path: pathlib.Path) -> None:
    network = trained(fuse(torchvisions())).train(training)
    with strict():
        program = exported(network)
    called = [node.target for node in program.graph.nodes if "dense_block" in str(node.target)]
    assert called == [torch.ops.fused_densenet.dense_block.default] * 2
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    x = images(3)
    assert_largest(loaded(x), network(x), "float64 whole block", "output")
    assert_same(dict(loaded.named_buffers()), dict(network.named_buffers()), "float64 whole block")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strictly", [True, False])
def test_export_of_any_size(strictly: bool, training: bool) -> None:
    """Batch, height and width, traced with and without dynamo."""
    theirs = trained(torchvisions()).train(training)
    ours = fuse(copy.deepcopy(theirs))
    size = {0: torch.export.Dim("batch", min=2), **{d: torch.export.Dim(f"size{d}", min=32, max=512) for d in (2, 3)}}
    program = torch.export.export(ours, (images(4),), dynamic_shapes=(size,), strict=strictly)
    loaded, x = program.module(), torch.randn(3, 3, 48, 96, dtype=torch.float64)
    assert_largest(loaded(x), theirs(x), "float64 whole block", "output")
    if training:
        assert_same(dict(loaded.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ahead_of_time(tmp_path: pathlib.Path) -> None:
    network = trained(fuse(torchvisions()))
    package = torch._inductor.aoti_compile_and_package(exported(network), package_path=str(tmp_path / "network.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for count in (4, 6):
        x = images(count)
        assert_largest(run(x), network(x), "float64 whole block", "output")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo: bool, tmp_path: pathlib.Path) -> None:
    """Both exporters write standard operators, which onnxruntime runs on other batch sizes."""
    network = trained(fuse(torchvisions())).float()
    path, x = str(tmp_path / "network.onnx"), images(2).float()
    shapes: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    if not dynamo:
        shapes = {"dynamic_axes": {"image": {0: "batch"}}}
    with strict():
        torch.onnx.export(network, (x,), path, dynamo=dynamo, input_names=["image"], **shapes)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path)
    x = images(3).float()
    (found,) = session.run(None, {"image": x.numpy()})
    assert_largest(torch.from_numpy(found), network(x), "float32 whole block", "output")


def test_symbolic_trace() -> None:
    """A fused block is one call, a stem one for each of its modules; unfused, the operators are recorded."""
    network = trained(fuse(torchvisions()))
    graph = torch.fx.symbolic_trace(network)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert [name for name in called if "denseblock" in name] == ["features.denseblock1", "features.denseblock2"]
    assert isinstance(graph.get_submodule("features.denseblock1"), FusedDenseBlock)
    x = images(2)
    assert_largest(graph(x), network(x), "float64 whole block", "output")
    for module in (network.features.denseblock1, network.features.transition1, FusedDenseBlock(2, 8, 2, 4)):
        with pytest.raises(RuntimeError, match=r"torch\.fx records a fused module as one call"):
            torch.fx.symbolic_trace(module)
    called = [node.target for node in torch.fx.symbolic_trace(unfuse(network)).graph.nodes]
    assert "features.denseblock1.denselayer1.conv1" in called


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript() -> None:
    network = trained(fuse(torchvisions()))
    x = images(2)
    expected = network(x)
    for module in (network, FusedDenseBlock(2, 8, 2, 4)):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script cannot compile a fused module: script fused_densenet\.unf"
        ):
            torch.jit.script(module)
    with pytest.warns(FallbackWarning, match=r"torch\.jit\.trace is recording"):
        traced = torch.jit.trace(network, x)
    assert_largest(traced(x), expected, "float64 whole block", "output")
    scripted = torch.jit.script(unfuse(copy.deepcopy(network)))
    assert_largest(scripted(x), expected, "float64 whole block", "output")


def test_torchvisions_feature_extractor() -> None:
    """Nodes between the fused modules; for those inside it says what to do."""
    create = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    theirs, x = trained(torchvisions()), images(2)
    ours = fuse(copy.deepcopy(theirs))
    names = ["features.conv0", "features.pool0", "features.denseblock1", "features.norm5"]
    with pytest.warns(UserWarning, match=r"as one call: .* takes fused_densenet\.unfuse\(model\)"):
        found = create(ours, names)(x)
    assert_same(found, create(theirs, names)(x), "float64 whole block")
    inside = ["features.transition1.conv", "features.denseblock2.denselayer1.norm2"]
    with (
        pytest.warns(UserWarning, match="as one call"),
        pytest.raises(ValueError, match="not present"),
    ):
        create(ours, inside)
    unfuse(ours).eval()  # the error left it training
    assert_same(create(ours, inside)(x), create(theirs, inside)(x), "float64 whole block")
