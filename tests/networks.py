"""What two networks produce in one step, compared where batch norms make some gradients cancel to nothing."""

from collections.abc import Mapping

import torch
from tolerances import assert_same, tolerance
from torch import Tensor


def assert_same_step(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Results of ``blocks.step`` in float64; a gradient's error is measured by the largest gradient of all.

    The loss does not depend on the scale of what a batch norm reads, so the gradient of a norm just before it is a sum
    of large terms that is zero but for rounding.
    """
    assert actual.keys() == expected.keys()
    gradients = [name for name in expected if name.endswith("gradient")]
    limit = tolerance("float64 whole block") * max(expected[name].abs().max().item() for name in gradients)
    for name in gradients:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    rest = expected.keys() - set(gradients)
    assert_same({n: actual[n] for n in rest}, {n: expected[n] for n in rest}, "float64 whole block")
