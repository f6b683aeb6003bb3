"""Bad arguments and inputs: the message names what, what was expected and what came; nothing was changed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_densenet import FusedDenseBlock, use_backend
from fused_densenet.backends import BACKENDS

ARGUMENTS = {"num_layers": 2, "num_input_features": 8, "bn_size": 2, "growth_rate": 4}


@pytest.mark.parametrize(
    ("argument", "value", "error", "expected"),
    [
        ("growth_rate", 0, ValueError, "at least 1"),
        ("growth_rate", -3, ValueError, "at least 1"),
        ("growth_rate", 4.0, TypeError, "int"),
        ("num_layers", 0, ValueError, "at least 1"),
        ("num_layers", "2", TypeError, "int"),
        ("num_layers", True, TypeError, "int"),
        ("num_input_features", 0, ValueError, "at least 1"),
        ("bn_size", 0, ValueError, "at least 1"),
        ("bn_size", 1.5, TypeError, "int"),
        ("drop_rate", 1.5, ValueError, "between 0 and 1"),
        ("drop_rate", -0.1, ValueError, "between 0 and 1"),
        ("drop_rate", float("nan"), ValueError, "between 0 and 1"),
        ("spatial_dims", 4, ValueError, "1, 2 or 3"),
        ("spatial_dims", 0, ValueError, "1, 2 or 3"),
    ],
)
def test_bad_argument(argument: str, value: Any, error: type[Exception], expected: str) -> None:
    with pytest.raises(error) as raised:
        FusedDenseBlock(**{**ARGUMENTS, argument: value})
    message = str(raised.value)
    assert argument in message and expected in message
    assert (type(value).__name__ if error is TypeError else str(value)) in message


@pytest.mark.parametrize(
    ("x", "expected", "got"),
    [
        (torch.zeros(2, 7, 5, 5), "8 channels", "7"),
        (torch.zeros(2, 9, 5, 5), "8 channels", "9"),
        (torch.zeros(8, 5, 5), "4 dimensions", "(8, 5, 5)"),
        (torch.zeros(2, 8, 5, 5, 5), "4 dimensions", "(2, 8, 5, 5, 5)"),
        (torch.zeros(2, 8, 5, 5, dtype=torch.int64), "floating", "torch.int64"),
        (torch.zeros(2, 8, 5, 5, dtype=torch.uint8), "floating", "torch.uint8"),
        (torch.zeros(2, 8, 5, 5, dtype=torch.complex64), "floating", "torch.complex64"),
        (torch.zeros(2, 8, 5, 5, dtype=torch.float64), "torch.float32", "torch.float64"),
        (torch.zeros(2, 8, 5, 5, dtype=torch.bfloat16), "torch.float32", "torch.bfloat16"),
        (torch.zeros(2, 8, 5, 5, device="meta"), "cpu", "meta"),
        (torch.zeros(2, 8, 0, 5), "sizes of at least 1", "(2, 8, 0, 5)"),
        (torch.zeros(1, 8, 1, 1), "more than one value per channel", "(1, 8, 1, 1)"),
        ([torch.zeros(2, 8, 5, 5)], "Tensor", "list"),
        (None, "Tensor", "NoneType"),
    ],
    ids=str,
)
def test_bad_input(x: Any, expected: str, got: str) -> None:
    block = FusedDenseBlock(**ARGUMENTS)
    state = copy.deepcopy(block.state_dict())
    with pytest.raises((ValueError, TypeError)) as raised:
        block(x)
    message = str(raised.value)
    assert "init_features" in message and expected in message and got in message
    assert_state(block, state)


@pytest.mark.parametrize("name", ["denselayer2.conv1.weight", "denselayer1.norm2.bias"])
def test_parameter_on_another_device(name: str) -> None:
    block = FusedDenseBlock(**ARGUMENTS)
    owner, _, attribute = name.rpartition(".")
    module = block.get_submodule(owner)
    setattr(module, attribute, torch.nn.Parameter(getattr(module, attribute).to("meta")))
    with pytest.raises(ValueError, match=r"init_features.*expected.*meta.*got cpu"):
        block(torch.zeros(2, 8, 5, 5))
    assert int(block["denselayer1"].norm1.num_batches_tracked) == 0


@pytest.mark.parametrize("name", ["denselayer2.norm1.running_mean", "denselayer1.norm2.running_var"])
def test_buffer_on_another_device(name: str) -> None:
    block = FusedDenseBlock(**ARGUMENTS)
    owner, _, attribute = name.rpartition(".")
    module = block.get_submodule(owner)
    setattr(module, attribute, getattr(module, attribute).to("meta"))
    state = {key: value.clone() for key, value in block.state_dict().items() if key != name}
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        block(torch.randn(2, 8, 5, 5))
    assert all(torch.equal(block.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions_of_every_kind(dims: int) -> None:
    block = FusedDenseBlock(**ARGUMENTS, spatial_dims=dims)
    with pytest.raises(ValueError, match=rf"init_features: expected {dims + 2} dimensions"):
        block(torch.zeros(2, 8, *[4] * (4 - dims)) if dims != 2 else torch.zeros(2, 8, 4))


def test_one_value_per_channel_is_fine_in_eval_mode() -> None:
    block = FusedDenseBlock(**ARGUMENTS).eval()
    assert block(torch.randn(1, 8, 1, 1)).shape == (1, 16, 1, 1)


@pytest.mark.parametrize(
    ("primitive", "call"), [("place", 1), ("norm_relu_conv", 1), ("norm_relu_conv", 2), ("norm_relu_conv", 4)]
)
def test_exception_in_the_middle_of_forward(
    backend: str, primitive: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(BACKENDS[backend], "run_program", raising=False)
    block = FusedDenseBlock(**ARGUMENTS)
    state = copy.deepcopy(block.state_dict())
    whole = getattr(BACKENDS[backend], primitive)
    calls = []

    def out_of_memory(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("planted")
        whole(*args)

    monkeypatch.setattr(BACKENDS[backend], primitive, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        block(torch.randn(2, 8, 5, 5))
    assert_state(block, state)
    monkeypatch.undo()
    block(torch.randn(2, 8, 5, 5)).sum().backward()
    assert int(block["denselayer2"].norm2.num_batches_tracked) == 1


def test_exception_in_the_middle_of_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedDenseBlock(**ARGUMENTS)
    out = block(torch.randn(2, 8, 5, 5))
    state = copy.deepcopy(block.state_dict())

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.delattr(BACKENDS[backend], "run_program", raising=False)
    monkeypatch.setattr(BACKENDS[backend], "norm_relu_conv_backward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        out.sum().backward()
    assert_state(block, state)
    assert all(p.grad is None for p in block.parameters())


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend: expected .*cpu.*got 'fast'"), use_backend("fast"):
        pass
    monkeypatch.setenv("FUSED_DENSENET_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        FusedDenseBlock(**ARGUMENTS)(torch.randn(2, 8, 5, 5))


def good() -> dict[str, Any]:
    """Arguments of the C++ backward primitive; its names are those of its schema."""
    vectors = {name: torch.ones(6) for name in ("mean", "var", "gamma", "beta", "dgamma", "dbeta")}
    gradient = {"value_mean": torch.ones(4), "value_correction": torch.ones(2, 4)}
    return {
        "stored": torch.ones(2, 1, 3, 5, 4),
        "value": torch.ones(2, 1, 3, 5, 4),
        **gradient,
        "x": torch.ones(2, 1, 3, 5, 6),
        **vectors,
        "eps": 1e-5,
        "slope": 0.0,
        "value_slope": 1.0,
        "correction": torch.ones(2, 6),
        "pixels": None,
        "weight": torch.ones(4, 6, 1, 3, 3),
        "dx": torch.ones(2, 1, 3, 5, 6),
        "accumulate": False,
        "dweight": torch.ones(4, 6, 1, 3, 3),
    }


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", torch.ones(2, 3, 5, 6), ValueError),
        ("x", torch.ones(2, 1, 3, 5, 6, dtype=torch.int32), TypeError),
        ("x", torch.ones(2, 6, 1, 3, 5).permute(0, 2, 3, 4, 1), ValueError),
        ("x", torch.ones(2, 1, 3, 7, 6)[:, :, :, :5], ValueError),
        ("stored", torch.ones(2, 1, 3, 5, 3), ValueError),
        ("stored", torch.ones(2, 1, 5, 3, 4), ValueError),
        ("value", torch.ones(2, 1, 3, 5, 4, dtype=torch.bfloat16), TypeError),
        ("weight", torch.ones(4, 5, 1, 3, 3), ValueError),
        ("weight", torch.ones(4, 6, 1, 2, 3), ValueError),
        ("weight", torch.ones(4, 6, 1, 3, 3, dtype=torch.bfloat16), TypeError),
        ("weight", torch.ones(4, 6, 3, 3), ValueError),
        ("dweight", torch.ones(4, 6, 1, 1, 3), ValueError),
        ("dx", torch.ones(2, 1, 3, 5, 5), ValueError),
        ("dx", torch.ones(2, 1, 3, 5, 12)[..., ::2], ValueError),
        ("mean", torch.ones(5), ValueError),
        ("var", torch.ones(6, dtype=torch.float64), TypeError),
        ("gamma", torch.ones(6, dtype=torch.bfloat16), TypeError),
        ("beta", torch.ones(12)[::2], ValueError),
        ("value_correction", torch.ones(2, 6), ValueError),
        ("value_correction", torch.ones(4), ValueError),
        ("value_mean", None, ValueError),
        ("dbeta", torch.ones(6, 1), ValueError),
        ("dgamma", torch.ones(6, dtype=torch.float64), TypeError),
        ("correction", torch.ones(3, 6), ValueError),
        ("pixels", torch.ones(2), ValueError),
        ("x", torch.ones(1, 1, 3, 5, 6).expand(2, 1, 3, 5, 6), ValueError),
    ],
)
def test_bad_argument_of_the_backward_primitive(name: str, value: Tensor, error: type[Exception]) -> None:
    operator = torch.ops.fused_densenet.norm_relu_conv_backward
    operator(**good())
    with pytest.raises(error, match=r"expected .*got"):
        operator(**{**good(), name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("out", torch.ones(2, 1, 3, 5, 3), ValueError),
        ("out", torch.ones(2, 1, 3, 5, 4, dtype=torch.float64), TypeError),
        ("out_mean", torch.ones(3), ValueError),
        ("out_var", torch.ones(4, dtype=torch.float64), TypeError),
        ("out_var", None, ValueError),
    ],
)
def test_bad_argument_of_the_forward_primitive(name: str, value: Tensor | None, error: type[Exception]) -> None:
    arguments = {
        k: v for k, v in good().items() if k in ("x", "mean", "var", "gamma", "beta", "eps", "slope", "weight")
    }
    arguments.update(out=torch.ones(2, 1, 3, 5, 4), out_mean=torch.ones(4), out_var=torch.ones(4))
    operator = torch.ops.fused_densenet.norm_relu_conv
    operator(**arguments)
    with pytest.raises(error, match=name):
        operator(**{**arguments, name: value})


def assert_state(block: FusedDenseBlock, state: dict[str, Tensor]) -> None:
    for name, value in block.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([64, 64, 0, 64], "layout: expected five numbers, and sizes and strides of images"),
        ([64, 64, 2, 64, 1, *[1] * 8], "layout: expected five numbers, and sizes and strides of images"),
        ([64, 64, 0, 64, 1, *[1] * 8, 0, 1, 4], "layout: expected five numbers, and sizes and strides of images"),
        ([64, 64, 0, 64, 1, *[1] * 8, 2, 1, 4, 4, 4, 64, 1, 16, 4], "layout: expected images inside of a place"),
        ([64, 64, 0, 64, 1, *[1] * 8, 1, 1, 4, 4, 5, 80, 1, 20, 4], "layout: expected images inside of a place"),
    ],
)
def test_bad_layout_of_a_network(layout: list[int], message: str) -> None:
    code, bound = torch.tensor([], dtype=torch.int64), BACKENDS["cpu"].bind([torch.ones(1)])
    x = torch.randn(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message):
        BACKENDS["cpu"].run_network(code, x, layout, False, False, bound)
