"""The PTX that Triton emits for sm_80 and sm_90, executed on the CPU for every kernel, against autograd in float64."""

import blocks
import cases
import pytest
import tolerances
import torch
from cases import ALL, CUBE, IMAGE, LEAKY, LINE, NAN, ONE, POOLED, RESIDUAL, RESIDUAL_RELU, ROW, SQUARE, VOLUME, Case
from stem_cases import STEMS, StemCase, run_stem, run_stem_nan
from triton_ptx import executing_ptx

from fused_densenet import FusedDenseBlock, reference
from fused_densenet.backends import BACKENDS, triton
from fused_densenet.backends.contract import Norm
from fused_densenet.backends.triton import tuning

CASES = [
    Case(LINE, 36, 48, ONE),
    Case(LINE, 96, 128, ONE),
    Case(LINE, 144, 192, ONE),
    Case(IMAGE, 48, 12, SQUARE, accumulate=False),
    Case(IMAGE, 128, 32, SQUARE, accumulate=False),
    Case(IMAGE, 192, 48, SQUARE, accumulate=False),
    Case(LINE, 36, 12, ROW),
    Case(VOLUME, 24, 12, CUBE),
    Case(LINE, 36, 48, ONE, weight=False),
    Case(IMAGE, 36, 12, SQUARE, weight=False),
    Case(LINE, 36, 48, ONE, form=ALL),
    Case(LINE, 96, 128, ONE, form=RESIDUAL_RELU),
    Case(IMAGE, 48, 12, SQUARE, accumulate=False, form=RESIDUAL),
    Case(IMAGE, 36, 12, SQUARE, form=ALL),
]
ARITHMETIC = {  # dtype of the data, torch's switch, dtype of the rounding
    "bfloat16": (torch.bfloat16, "ieee", torch.bfloat16),
    "tf32": (torch.float32, "tf32", torch.float16),
    "ieee": (torch.float32, "ieee", torch.float32),
}
PRODUCTS = {"norm_relu_conv", "backward_pointwise", "backward_data", "backward_weight"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_relu_conv(case: Case, arithmetic: str, target: str) -> None:
    run(case, arithmetic, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", [POOLED[0], POOLED[2], POOLED[0]._replace(form=LEAKY)], ids=str)
def test_pooled(case: Case, target: str) -> None:
    run(case, "bfloat16", target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_tiles_of_few_pixels(case: Case, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU of 132 multiprocessors takes for so small a problem, and shares of pixels between as many programs."""
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    run(case, "bfloat16", target)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_norm_relu_conv_in_ieee_float32(case: Case) -> None:
    run(case, "ieee", "sm_80")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32"])
@pytest.mark.parametrize("case", NAN, ids=str)
def test_nan_reaches_what_it_reaches_in_torch(case: Case, arithmetic: str, target: str) -> None:
    dtype, switch, _ = ARITHMETIC[arithmetic]
    with cases.float32_products(switch), executing_ptx(target):
        cases.run_nan(case, dtype)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("sm_80", torch.bfloat16), ("sm_80", torch.float32), ("sm_80", torch.float16), ("sm_90", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("case", STEMS[:5], ids=str)
def test_stem(case: StemCase, dtype: torch.dtype, target: str) -> None:
    with executing_ptx(target):
        run_stem(case, dtype)


@pytest.mark.parametrize("case", STEMS[:5], ids=str)
def test_nan_in_a_stem(case: StemCase) -> None:
    with executing_ptx("sm_80"):
        run_stem_nan(case)


def run(case: Case, arithmetic: str, target: str) -> None:
    dtype, switch, rounding = ARITHMETIC[arithmetic]
    with cases.float32_products(switch), executing_ptx(target) as machines:
        cases.run_case(case, dtype, rounding=rounding)
    for name, machine in machines:
        products = machine.counts["mma"] + machine.counts["wgmma"]
        assert (products > 0) == (name in PRODUCTS and arithmetic != "ieee"), name
        assert target == "sm_90" or machine.counts["wgmma"] == 0


@pytest.mark.parametrize("kernel", [ONE, SQUARE], ids=str)
def test_variance_of_a_distant_output(kernel: tuple[int, int, int]) -> None:
    """Mean 1000 and deviation 1, added in the order of a GPU's threads."""
    x, out, moments = torch.randn(2, 1, 9, 10, 8), torch.empty(2, 1, 9, 10, 16), torch.empty(2, 16)
    norm = Norm(torch.zeros(8), torch.ones(8), torch.ones(8), torch.full((8,), 1000.0), 0.0)
    weight = torch.zeros(16, 8, *kernel)
    weight[torch.arange(16), torch.arange(16) % 8, 0, kernel[1] // 2, kernel[2] // 2] = 1
    with cases.float32_products("ieee"), executing_ptx("sm_80"):
        triton.norm_relu_conv(x, norm, weight, out, *moments)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 1, 2, 3), correction=0)
    assert exact_var.min() > 0.5 and exact_mean.min() > 999
    mean, var = moments.double()
    torch.testing.assert_close(var, exact_var, rtol=tolerances.tolerance("variance"), atol=0)
    ulps = tolerances.tolerance("mean") * tolerances.ulp(torch.float32)
    torch.testing.assert_close(mean, exact_mean, rtol=ulps, atol=0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_whole_block(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the place and place_backward kernels, in bfloat16."""
    monkeypatch.setattr(triton, "unavailable", lambda device, dtype: None)
    monkeypatch.setitem(BACKENDS, "cpu", triton)
    theirs = reference.DenseBlock(2, 16, 4, 8)
    x = blocks.bimodal(2, 16, 7, 5)
    blocks.keep_clear_of_zero(theirs, x)
    ours = FusedDenseBlock(2, 16, 4, 8)
    ours.load_state_dict(theirs.state_dict())
    exact_block = reference.DenseBlock(2, 16, 4, 8).bfloat16()
    exact_block.load_state_dict(theirs.state_dict())
    exact = blocks.step(exact_block.double(), x.bfloat16().double())
    operators = blocks.step(theirs.bfloat16(), x.bfloat16())
    with executing_ptx(target) as machines:
        results = blocks.step(ours.bfloat16(), x.bfloat16())
    assert {"place", "place_backward", *PRODUCTS} <= {name for name, _ in machines}
    for name, value in results.items():
        if value.is_floating_point():
            tolerances.assert_error_ratio(value, operators[name], exact[name], torch.bfloat16, name)
