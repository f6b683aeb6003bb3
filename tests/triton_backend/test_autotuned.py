"""What only a GPU can show of the Triton backend alone: autotuning."""

import pathlib

import cases
import pytest
import torch
from cases import LINE, ONE, Case

from fused_densenet.backends.triton import plans, tiles_on_disk, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_autotuned(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases.run_case(Case(LINE, 96, 128, ONE), torch.bfloat16, device="cuda")
    assert {shape.kernel for shape, _ in tuning._chosen} == {"norm_relu_conv", "backward_pointwise"}
    plans.forget()
    [file] = (tmp_path / "fused_densenet").iterdir()
    assert {shape.partition("kernel='")[2].partition("'")[0] for shape in tiles_on_disk.read(file)} == {
        "norm_relu_conv",
        "backward_pointwise",
    }
