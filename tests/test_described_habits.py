"""What blocks of unknown classes do besides computing, and what users set anew on them after ``fuse``."""

import copy
import functools
import types
from typing import Any

import pytest
import releases
import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_densenet import CSPDenseNet, FallbackWarning, FusedDenseBlock, explain, fuse, reference

pytestmark = pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")


class Residual(nn.Module):
    """A residual dense block whose settings are the attribute ``cfg``."""

    def __init__(self, cfg: Any = None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 + i * 4, 4, 3, padding=1) for i in range(3))
        self.last = nn.Conv2d(20, 8, 1)
        self.cfg = cfg

    def activation(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(x, 0.2)

    def features(self, x: Tensor) -> Tensor:
        found = [x]
        for conv in self.convs:
            found.append(self.activation(conv(torch.cat(found, 1))))
        return torch.cat(found, 1)

    def scale(self) -> float:
        return 0.2

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x)) * self.scale() + x


class Listed(Residual):
    def scale(self) -> float:
        return self.cfg[0]


class Nested(Residual):
    def scale(self) -> float:
        return self.cfg.model.scale


class NestedDict(Residual):
    def scale(self) -> float:
        return self.cfg["model"]["scale"]


class NestedTuple(Residual):
    def scale(self) -> float:
        return self.cfg[0][0]


class Partial(Residual):
    def activation(self, x: Tensor) -> Tensor:
        return self.cfg(x)


class InFloat32(Residual):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x += self.last(self.features(x)) * 0.2
        return x


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    return module, fuse(copy.deepcopy(module))


def is_fused(module: nn.Module) -> bool:
    blocks = explain(module).blocks
    return bool(blocks) and blocks[0].fused


def namespace(scale: float) -> types.SimpleNamespace:
    return types.SimpleNamespace(model=types.SimpleNamespace(scale=scale))


def leaky(slope: float) -> Any:
    return functools.partial(functional.leaky_relu, negative_slope=slope)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (Listed, [0.2], [1.0]),
        (Nested, namespace(0.2), namespace(1.0)),
        (NestedDict, {"model": {"scale": 0.2}}, {"model": {"scale": 1.0}}),
        (NestedTuple, ((0.2,),), ((1.0,),)),
        (Partial, leaky(0.2), leaky(0.9)),
    ],
)
def test_settings_that_are_replaced(kind: Any, before: Any, after: Any) -> None:
    theirs, ours = pair(kind(before))
    x = torch.randn(1, 8, 8, 8)
    assert is_fused(ours)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.cfg = ours.cfg = after
    torch.testing.assert_close(ours(x), theirs(x))
    assert not is_fused(ours)


def test_a_nested_setting_that_changes_in_place() -> None:
    theirs, ours = pair(NestedDict({"model": {"scale": 0.2}}))
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.cfg["model"]["scale"] = ours.cfg["model"]["scale"] = 1.0
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_method_of_the_block_itself_that_is_replaced() -> None:
    theirs, ours = pair(Residual())
    x = torch.randn(1, 8, 8, 8)
    ours(x)
    for module in (theirs, ours):
        module.features = types.MethodType(lambda self, x: 2 * Residual.features(self, x), module)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not is_fused(ours)


def test_autocast_that_is_switched_off_inside() -> None:
    theirs, ours = pair(InFloat32())
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = theirs(x), ours(x)
    assert torch.equal(found, expected)
    assert not is_fused(ours)


def test_an_input_that_is_changed_in_place() -> None:
    theirs, ours = pair(InPlace())
    x = torch.randn(1, 8, 8, 8)
    y = x.clone()
    with torch.no_grad():
        theirs(x), ours(y)
    torch.testing.assert_close(y, x)


def test_a_dropout_that_no_forward_calls() -> None:
    block = FusedDenseBlock(2, 8, 2, 4).double()
    for layer in block.children():
        layer.dropout = nn.Dropout(0.5)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match=r"denselayer1\.dropout is no part of a dense layer"):
        found = block(x)
    expected = reference.DenseBlock(num_layers=2, num_input_features=8, bn_size=2, growth_rate=4).double()
    expected.load_state_dict(block.state_dict())
    torch.testing.assert_close(found, expected(x))


@pytest.mark.parametrize("fusion", ["first", "last", "both"])
def test_a_csp_network_is_followed_and_exported_for_any_size(fusion: Any) -> None:
    model = CSPDenseNet(6, (2, 2), 8, 2, num_classes=5, fusion=fusion).eval()
    x, other = torch.randn(2, 3, 40, 36), torch.randn(3, 3, 53 if releases.OLD else 57, 49)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(other), model(other))
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    torch.testing.assert_close(exported(other), model(other))


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DENSENET_BACKEND", "")
    FusedDenseBlock(1, 8, 2, 4)(torch.randn(2, 8, 6, 6))
