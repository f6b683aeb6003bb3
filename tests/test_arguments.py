"""Arguments of constructors and of the functions that take a model: what is no such argument is named, what is one runs."""

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from blocks import step
from hypothesis import given
from hypothesis import strategies as st
from networks import assert_same_step
from torch import nn

import fused_densenet
from fused_densenet import (
    CSPDenseBlock,
    CSPDenseNet,
    DenseNet,
    FusedDenseBlock,
    FusedDenseLayer,
    FusedResidualDenseBlock,
    FusedTransition,
    reference,
)

WORKING: dict[type, dict[str, Any]] = {
    FusedDenseLayer: {"num_input_features": 6, "growth_rate": 4, "bn_size": 2, "drop_rate": 0.0},
    FusedDenseBlock: {"num_layers": 2, "num_input_features": 6, "bn_size": 2, "growth_rate": 4},
    CSPDenseBlock: {"num_layers": 2, "num_input_features": 6, "bn_size": 2, "growth_rate": 4},
    FusedTransition: {"num_input_features": 6, "num_output_features": 3},
    FusedResidualDenseBlock: {"num_features": 6, "growth_rate": 4, "num_layers": 2},
    DenseNet: {"growth_rate": 4, "block_config": (1, 2), "num_init_features": 6, "num_classes": 3},
    CSPDenseNet: {"growth_rate": 4, "block_config": (1, 2), "num_init_features": 6, "num_classes": 3},
}
NO_COUNTS = [(0, ValueError), (-2, ValueError), (True, TypeError), (4.0, TypeError), ("4", TypeError)]
NO_WIDTHS = [*NO_COUNTS, (None, TypeError)]
NO_RATES = [(-0.1, ValueError), (1.5, ValueError), (float("nan"), ValueError), ("0.5", TypeError), (True, TypeError)]
NO_SHARES = [*NO_RATES, (None, TypeError)]
NO_DIMENSIONS = [(0, ValueError), (4, ValueError), (2.0, TypeError), ("2", TypeError), (None, TypeError)]
NO_FLAGS = [("no", TypeError), (1, TypeError), (None, TypeError)]
LAYERS = {
    "num_input_features": NO_WIDTHS,
    "growth_rate": NO_WIDTHS,
    "bn_size": NO_COUNTS,
    "drop_rate": [*NO_RATES, (None, TypeError)],
    "memory_efficient": NO_FLAGS,
    "spatial_dims": NO_DIMENSIONS,
}
BLOCKS = LAYERS | {"num_layers": NO_WIDTHS}
FORMS = {"bias": NO_FLAGS, "negative_slope": NO_SHARES, "bottleneck_drop_rate": NO_SHARES}
NETWORKS = {
    **{name: LAYERS[name] for name in ("growth_rate", "bn_size", "drop_rate", "memory_efficient", "spatial_dims")},
    **dict.fromkeys(("num_init_features", "num_classes", "in_channels"), NO_WIDTHS),
    "block_config": [
        *[((1, value), error) for value, error in NO_COUNTS],
        *[((), ValueError), (3, TypeError), ("12", TypeError), (None, TypeError)],
    ],
    "small_inputs": NO_FLAGS,
    "compression": [*NO_SHARES, (0, ValueError), (0.01, ValueError)],
}
CSP = {"split_ratio": [*NO_SHARES, (1, ValueError)], "fusion": [("middle", ValueError), (None, ValueError)]}
UNFIT: dict[type, dict[str, list[tuple[Any, type[Exception]]]]] = {
    FusedDenseLayer: LAYERS | FORMS,
    FusedDenseBlock: BLOCKS | FORMS | {"return_new": NO_FLAGS},
    CSPDenseBlock: BLOCKS | CSP | {"num_output_features": NO_COUNTS, "pool": NO_FLAGS},
    FusedTransition: {
        **dict.fromkeys(("num_input_features", "num_output_features"), NO_WIDTHS),
        "spatial_dims": NO_DIMENSIONS,
        "pool": NO_FLAGS,
    },
    FusedResidualDenseBlock: {
        **dict.fromkeys(("num_features", "growth_rate", "num_layers"), NO_WIDTHS),
        "negative_slope": NO_SHARES,
        "scale": [("1", TypeError), (None, TypeError)],
        "spatial_dims": NO_DIMENSIONS,
    },
    DenseNet: NETWORKS,
    CSPDenseNet: NETWORKS | CSP,
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, unfit in UNFIT.items() for name in unfit],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_no_such_argument(kind: type, name: str) -> None:
    """Its name, what was expected of it and what came."""
    for value, error in UNFIT[kind][name]:
        with pytest.raises(error, match=rf"^{name}[^ ]*: expected .*, got ") as raised:
            kind(**WORKING[kind] | {name: value})
        came = type(value).__name__ if error is TypeError and not isinstance(value, tuple) else value
        assert isinstance(value, tuple) or re.search(rf"got '?{re.escape(str(came))}\b", str(raised.value)), (
            raised.value
        )


@pytest.mark.parametrize("kind", WORKING, ids=lambda kind: kind.__name__)
def test_numbers_of_numpy(kind: type) -> None:
    numbers = {name: np.int64(value) if isinstance(value, int) else value for name, value in WORKING[kind].items()} | {
        "spatial_dims": np.uint8(1)
    }
    if "block_config" in numbers:
        numbers["block_config"] = np.array(numbers["block_config"])
    if "drop_rate" in UNFIT[kind]:
        numbers["drop_rate"] = np.float32(0.25)
    module = kind(**numbers)
    expected = kind(**WORKING[kind] | {"spatial_dims": 1} | ({"drop_rate": 0.25} if "drop_rate" in UNFIT[kind] else {}))
    assert repr(module) == repr(expected)
    for found, wanted in zip(module.modules(), expected.modules(), strict=True):
        assert {type(value) for value in vars(found).values()} == {type(value) for value in vars(wanted).values()}
    channels = 3 if "block_config" in numbers else 6
    assert module.eval()(torch.randn(2, channels, 40)).isfinite().all()


@pytest.mark.parametrize("value", [None, "densenet121", torch.nn.Linear, torch.zeros(2)], ids=str)
@pytest.mark.parametrize("name", ["fuse", "unfuse", "optimize_for_inference", "explain"])
def test_no_model(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"expected a torch.nn.Module, got {type(value).__name__}$"):
        getattr(fused_densenet, name)(value)


@pytest.mark.parametrize("name", ["fuse", "optimize_for_inference"])
def test_a_flag_of_a_function(name: str) -> None:
    with pytest.raises(TypeError, match="strict: expected True or False, got str"):
        getattr(fused_densenet, name)(FusedDenseBlock(**WORKING[FusedDenseBlock]), strict="no")


COUNT, RATE, FLAG = st.integers(1, 9), st.sampled_from([0, 0.0, 0.5, 1, 0.25]), st.booleans()
LAYER = {
    "bn_size": st.sampled_from([None, 1, 2]),
    "growth_rate": COUNT,
    "drop_rate": RATE,
    "memory_efficient": FLAG,
    "spatial_dims": st.integers(1, 3),
}
NETWORK = LAYER | {
    "block_config": st.lists(st.integers(1, 2), min_size=1, max_size=2),
    "num_init_features": COUNT,
    "num_classes": COUNT,
    "in_channels": COUNT,
    "small_inputs": FLAG,
    "compression": st.floats(0.1, 1),
}
STAGE = {"split_ratio": st.floats(0, 0.99), "fusion": st.sampled_from(["first", "last", "both"])}
BLOCK = LAYER | {"num_layers": st.integers(1, 3), "num_input_features": COUNT}
FIT: dict[type, tuple[type[nn.Module], dict[str, st.SearchStrategy[Any]]]] = {
    FusedDenseBlock: (
        reference.DenseBlock,
        BLOCK
        | {
            "bias": FLAG,
            "negative_slope": st.sampled_from([0, 0.25, np.float32(0.5)]),  # of 1, means are nothing but rounding
            "return_new": FLAG,
            "bottleneck_drop_rate": st.sampled_from([0, 0, 0.5]),
        },
    ),
    CSPDenseBlock: (reference.CSPDenseBlock, BLOCK | STAGE | {"num_output_features": st.integers(1, 20), "pool": FLAG}),
    DenseNet: (reference.DenseNet, NETWORK),
    CSPDenseNet: (reference.CSPDenseNet, NETWORK | STAGE),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("kind", FIT, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_whatever_it_is_given(kind: type, data: st.DataObject) -> None:
    """An error that names an argument, the unfit one if there is one, or a module that computes what the reference does."""
    plain, fit = FIT[kind]
    arguments = data.draw(st.fixed_dictionaries(fit))
    unfit = data.draw(st.one_of(st.none(), st.none(), st.sampled_from(list(UNFIT[kind]))))
    if unfit is not None:
        arguments[unfit] = data.draw(st.sampled_from(UNFIT[kind][unfit]))[0]
    torch.manual_seed(0)
    try:
        ours = kind(**arguments)
    except (ValueError, TypeError) as error:
        named = re.match(r"(\w+)[^ ]*: expected ", str(error))
        assert named and named[1] in inspect.signature(kind).parameters
        assert unfit is None or named[1] in (unfit, "compression"), "that may leave too few channels besides"
        return
    assert unfit is None
    theirs = plain(**{name: value for name, value in arguments.items() if name != "memory_efficient"})
    theirs.load_state_dict(ours.state_dict())
    channels = arguments.get("num_input_features") or arguments["in_channels"]
    sizes = [16, 8, 8] if "block_config" in arguments else [6, 4, 2]
    x = torch.randn(3, channels, *sizes[: arguments["spatial_dims"]], dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        results.append(step(module.double(), x))
    assert_same_step(*results)
