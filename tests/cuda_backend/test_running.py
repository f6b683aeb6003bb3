"""Running statistics of many norms in few launches, by the runner and as PTX, against torch's own updates."""

import pytest
import torch
from building import CSRC
from emulated import Emulated, Executor, Host
from ptx_launch import Ptx
from torch import Tensor


def executor(name: str) -> Executor:
    return Host() if name == "runner" else Ptx(name, (CSRC / "cuda" / "running.cu",))


@pytest.mark.parametrize("name", ["runner", "75", "80", "90a"])
def test_as_torch_updates(name: str) -> None:
    """More norms than a launch takes, some wider than a block of threads, one strided; momenta on both sides of 1/2."""
    widths = [(7, 300, 64)[i % 3] for i in range(50)]
    momenta = [(0.1, 0.5, 0.9, 1.0)[i % 4] for i in range(50)]
    unbiased = [1.25 if i < 30 else 1.5 for i in range(50)]
    batches = [torch.rand(2, width) for width in widths]
    means, variances = ([torch.rand(width) for width in widths] for _ in range(2))
    variances[1] = torch.rand(600)[::2]
    counts = [torch.tensor(i) for i in range(50)]
    expected = [
        [torch.lerp(mean, batch[0], momentum) for mean, batch, momentum in zip(means, batches, momenta, strict=True)],
        [
            torch.lerp(var, batch[1] * factor, momentum)
            for var, batch, momentum, factor in zip(variances, batches, momenta, unbiased, strict=True)
        ],
    ]
    Emulated(executor(name)).update_running(batches, [means, variances, counts], momenta, unbiased)
    assert [int(count) for count in counts] == list(range(1, 51))
    for ours, theirs in zip([means, variances], expected, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert_within_a_rounding(mine, its)


def assert_within_a_rounding(ours: Tensor, theirs: Tensor) -> None:
    """torch may round the product of lerp before it adds, as its vectors do."""
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(torch.float32).eps, atol=1e-7)
