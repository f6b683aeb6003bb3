"""Each primitive against float64, entry by entry, and in 16 bits against the operators' own error."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from primitives import (
    LAYOUTS,
    Debts,
    Guarded,
    Shape,
    backward_magnitude,
    check_moments,
    clear_of_zero,
    draw_norm,
    exact_backward,
    exact_forward,
    forward_magnitude,
    load,
    load_magnitude,
    loaded_gradient,
    make_weight,
    operators,
    source,
    vector,
)
from stem_cases import STEMS, StemCase, run_stem, run_stem_nan
from strategies import margins, shapes
from tolerances import assert_entries, assert_error_ratio, tolerance, ulp

from fused_densenet.backends import BACKENDS
from fused_densenet.backends.contract import Gradient, Norm, Owed, accumulate_dtype
from fused_densenet.ops.block import Parameters
from fused_densenet.ops.network import Convolution, Network, Parts
from fused_densenet.ops.program import Bound

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ["float64", "float32", "bfloat16", "float16"]
WIDE = [
    Shape((1, 1, 28, 28), 128, 32, (1, 3, 3)),
    Shape((2, 1, 14, 14), 480, 128, (1, 1, 1)),
    Shape((1, 1, 13, 11), 1000, 128, (1, 1, 1)),
    Shape((2, 1, 9, 17), 192, 48, (1, 3, 3)),
    Shape((2, 1, 15, 18), 70, 50, (1, 3, 3)),
    Shape((1, 1, 12, 64), 16, 16, (1, 3, 3)),
    Shape((1, 5, 6, 7), 48, 12, (3, 3, 3)),
    Shape((3, 1, 1, 65), 33, 20, (1, 1, 3)),
    Shape((2, 1, 1, 1), 512, 128, (1, 1, 1)),
    Shape((1, 1, 2, 3), 304, 12, (1, 3, 3)),
    Shape((1, 1, 28, 28), 256, 128, (1, 1, 1), pool=True),
    Shape((3, 1, 15, 17), 200, 100, (1, 1, 1), pool=True),
    Shape((1, 5, 4, 7), 70, 35, (1, 1, 1), pool=True),
]

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
all_backends = pytest.mark.parametrize("backend", ["eager", "cpu"])
wide = pytest.mark.parametrize("shape", WIDE, ids=str)


@all_backends
@all_dtypes
@given(
    shape=shapes(),
    layout=st.sampled_from(LAYOUTS),
    weight_in_float32=st.booleans(),
    before=margins,
    after=margins,
    moments=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norm_relu_conv(
    backend: str,
    dtype: torch.dtype,
    shape: Shape,
    layout: str,
    weight_in_float32: bool,
    before: int,
    after: int,
    moments: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    check_forward(backend, shape, dtype, layout, weight_in_float32, before, after, moments)


@all_dtypes
@wide
def test_norm_relu_conv_of_many_channels(dtype: torch.dtype, shape: Shape) -> None:
    check_forward("cpu", shape, dtype, "contiguous", False, 0, 8, True)


def check_forward(
    backend: str,
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    weight_in_float32: bool,
    before: int,
    after: int,
    moments: bool,
) -> None:
    weight_dtype = _weight_dtype(dtype, weight_in_float32)
    norm = draw_norm(shape.channels, dtype, weight_dtype)
    values = clear_of_zero(torch.randn(*shape.pixels, shape.channels).to(dtype), norm)
    x = source(values, before, after)
    weight = make_weight(shape, weight_dtype, layout)
    out = Guarded((*shape.out_pixels, shape.out_channels), dtype, after, before + 1)
    out.data.fill_(float("nan"))
    mean, var = (vector(shape.out_channels, dtype) if moments else None for _ in range(2))
    mean_data, var_data = (None if v is None else v.data for v in (mean, var))
    BACKENDS[backend].norm_relu_conv(x, norm, weight, out.data, mean_data, var_data)
    exact = exact_forward(values, norm, weight, shape.pool)
    magnitude = forward_magnitude(values, norm, weight, shape.pool)
    assert_entries(out.data, exact, magnitude, dtype, "out")
    out.check("out")
    if mean is not None and var is not None:
        check_moments(out.data, mean, var)
    if dtype in (torch.bfloat16, torch.float16):
        grad = loaded_gradient(shape.out_pixels, shape.out_channels, dtype)
        theirs, _ = operators(grad, values, norm, weight, shape.pool)
        assert_error_ratio(out.data, theirs, exact, dtype, "out", magnitude)


@all_backends
@all_dtypes
@given(
    shape=shapes(),
    layout=st.sampled_from(LAYOUTS),
    weight_in_float32=st.booleans(),
    before=margins,
    after=margins,
    accumulate=st.booleans(),
    want_dweight=st.booleans(),
    batch_stats=st.booleans(),
    plain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norm_relu_conv_backward(
    backend: str,
    dtype: torch.dtype,
    shape: Shape,
    layout: str,
    weight_in_float32: bool,
    before: int,
    after: int,
    accumulate: bool,
    want_dweight: bool,
    batch_stats: bool,
    plain: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options = (accumulate, want_dweight, batch_stats, plain)
    check_backward(backend, shape, dtype, layout, weight_in_float32, before, after, *options)


@all_dtypes
@wide
@pytest.mark.parametrize("accumulate", [False, True])
def test_norm_relu_conv_backward_of_many_channels(dtype: torch.dtype, shape: Shape, accumulate: bool) -> None:
    check_backward("cpu", shape, dtype, "contiguous", False, 0, 8, accumulate, True)


@all_backends
def test_weight_gradient_of_an_image_of_depth_two(backend: str) -> None:
    """Where torch's own, channels-last in bfloat16, is wrong."""
    check_backward(
        backend, Shape((2, 2, 5, 6), 8, 4, (3, 3, 3)), torch.bfloat16, "contiguous", False, 0, 0, False, True
    )


def check_backward(
    backend: str,
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    weight_in_float32: bool,
    before: int,
    after: int,
    accumulate: bool,
    want_dweight: bool,
    batch_stats: bool = True,
    plain: bool = False,
) -> None:
    weight_dtype = _weight_dtype(dtype, weight_in_float32)
    norm = draw_norm(shape.channels, dtype, weight_dtype)
    values = clear_of_zero(torch.randn(*shape.pixels, shape.channels).to(dtype), norm)
    x = source(values, before, after)
    weight = make_weight(shape, weight_dtype, layout)
    grad = loaded_gradient(shape.out_pixels, shape.out_channels, dtype, plain)
    dx = Guarded(values.shape, dtype, after, before + 1)
    old = dx.data.clone()
    if not accumulate:
        dx.data.fill_(float("nan"))
    dweight = torch.full(weight.shape, float("nan"), dtype=weight_dtype) if want_dweight else None
    debts = Debts(norm, batch_stats)
    arguments = (grad, x, norm, weight, dx.data, accumulate, dweight, debts.owed())
    BACKENDS[backend].norm_relu_conv_backward(*arguments)
    exact = exact_backward(grad, values, norm, weight, shape.pool)
    magnitude = backward_magnitude(grad, values, norm, weight, shape.pool)
    found = {"dx": dx.data, **debts.found(accumulate)} | ({} if dweight is None else {"dweight": dweight})
    dx.check("dx")
    if accumulate:
        exact.dx, magnitude.dx = old.double() + exact.dx, old.double().abs() + magnitude.dx
        magnitude.constant, magnitude.slope = (
            magnitude.constant + debts.old[0].abs(),
            magnitude.slope + debts.old[1].abs(),
        )
    for name, result in found.items():
        assert_entries(result, getattr(exact, name), getattr(magnitude, name), dtype, name)
    if dtype in (torch.bfloat16, torch.float16):
        _, theirs = operators(grad, values, norm, weight, shape.pool)
        if accumulate:
            theirs["dx"] = old + theirs["dx"]
        for name in found.keys() & theirs.keys():
            of = (found[name], theirs[name], getattr(exact, name), dtype, name, getattr(magnitude, name))
            assert_error_ratio(*of)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_statistics_of_more_pixels(backend: str) -> None:
    """Those of several ranks: what they owe is shared among all their pixels."""
    x, weight, norm = torch.randn(2, 1, 3, 4, 8), torch.randn(5, 8, 1, 1, 1), draw_norm(8, torch.float32)
    grad, found = Gradient(torch.randn(2, 1, 3, 4, 5)), []
    for pixels in (None, torch.tensor([240.0])):
        debts = Debts(norm, True)
        arguments = (grad, x, norm, weight, torch.empty_like(x), False, None, debts.owed(pixels))
        BACKENDS[backend].norm_relu_conv_backward(*arguments)
        found.append(debts.found(False))
    for name, times in (("dgamma", 1), ("dbeta", 1), ("constant", 10), ("slope", 10)):
        torch.testing.assert_close(found[1][name] * times, found[0][name], rtol=1e-5, atol=0)


@all_backends
@all_dtypes
@given(
    shape=shapes(),
    layout=st.sampled_from(["channels first", "channels last", "expanded", "reversed"]),
    before=margins,
    after=margins,
    moments=st.booleans(),
    copy=st.booleans(),
)
def test_place(
    backend: str, dtype: torch.dtype, shape: Shape, layout: str, before: int, after: int, moments: bool, copy: bool
) -> None:
    n, d, h, w = shape.pixels
    c = shape.channels
    x = {
        "channels first": torch.randn(n, c, d, h, w).permute(0, 2, 3, 4, 1),
        "channels last": torch.randn(n, d, h, w, c),
        "expanded": torch.randn(1, d, 1, w, c).expand(n, d, h, w, c),
        "reversed": torch.randn(c, w, h, d, 2 * n).permute(4, 3, 2, 1, 0)[::2],
    }[layout].to(dtype)
    out = Guarded((*shape.pixels, c), dtype, before, after)
    mean, var = (vector(c, dtype) if moments else None for _ in range(2))
    BACKENDS[backend].place(x, out.data if copy else None, *(None if v is None else v.data for v in (mean, var)))
    if copy:
        assert torch.equal(out.data, x)
    out.check("out")
    if mean is not None and var is not None:
        check_moments(x, mean, var)


@all_backends
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=NAMES[2:])
def test_means_of_halves_are_not_biased(backend: str, dtype: torch.dtype) -> None:
    """Few digits less something with many: differences that would all be rounded the same way."""
    x, mean, var = torch.randn(2, 3, 5, 11, 1000).to(dtype), vector(1000, dtype), vector(1000, dtype)
    BACKENDS[backend].place(x, None, mean.data, var.data)
    check_moments(x, mean, var)


@all_backends
@all_dtypes
@given(shape=shapes(), channels_first=st.booleans(), plain=st.booleans())
def test_place_backward(backend: str, dtype: torch.dtype, shape: Shape, channels_first: bool, plain: bool) -> None:
    n, d, h, w = shape.pixels
    grad = loaded_gradient(shape.pixels, shape.channels, dtype, plain)
    out = torch.empty(n, d, h, w, shape.channels, dtype=dtype)
    if channels_first:
        out = torch.empty(n, shape.channels, d, h, w, dtype=dtype).permute(0, 2, 3, 4, 1)
    expected, magnitude = load(grad), load_magnitude(grad)
    BACKENDS[backend].place_backward(grad, out)
    assert_entries(out, expected, magnitude, dtype, "out")
    BACKENDS[backend].place_backward(grad, grad.stored)
    assert_entries(grad.stored, expected, magnitude, dtype, "out in place")


@all_backends
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=NAMES[1:])
@pytest.mark.parametrize("case", [*STEMS, StemCase((2, 5, 6, 7), 20), StemCase((3, 1, 20, 19), 70)], ids=str)
def test_norm_relu_pool(backend: str, dtype: torch.dtype, case: StemCase) -> None:
    """What the norm is owed is summed in the accumulation type, however many windows a pixel lies in."""
    run_stem(case, dtype, BACKENDS[backend])


@all_backends
def test_norm_relu_pool_of_a_nan(backend: str) -> None:
    run_stem_nan(StemCase((2, 1, 5, 6), 24), BACKENDS[backend])


@all_backends
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=NAMES[2:])
def test_halves_are_rounded_to_even(backend: str, dtype: torch.dtype) -> None:
    """All instruction sets round as torch does; every other result lies halfway between two numbers of 16 bits."""
    x = (1 + torch.arange(48) * ulp(dtype) / 2).to(dtype).repeat(3, 1)[None, None, None]
    half = torch.full((48,), ulp(dtype) / 2)
    out = torch.empty_like(x)
    BACKENDS[backend].norm_relu_pool(x, Norm(torch.zeros(48), torch.ones(48), torch.ones(48), half, 0.0), out)
    assert torch.equal(out, (x.float() + half).to(dtype))


@all_backends
@all_dtypes
@pytest.mark.parametrize("shape", [(2, 1, 3, 5, 21), (1, 1, 1, 1, 130), (3, 2, 9, 11, 8), (1, 1, 40, 70, 65)])
def test_norm_relu_mean(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """From a slice of channels to a slice of channels; what lies beside is not touched."""
    channels, wide = shape[-1], accumulate_dtype(dtype)
    whole = torch.randn(*shape[:-1], channels + 5).to(dtype)
    x, out = whole[..., 2 : 2 + channels], torch.full((shape[0], 1, 1, 1, channels + 3), 7.0).to(dtype)
    vectors = torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)
    norm = Norm(*(t.to(wide) for t in vectors), 1e-5, 0.1)
    BACKENDS[backend].norm_relu_mean(x, norm, out[..., 1 : 1 + channels])
    mean, var, gamma, beta = (t.double() for t in norm[:4])
    a = F.leaky_relu((x.double() - mean) / (var + norm.eps).sqrt() * gamma + beta, norm.negative_slope)
    exact, magnitude = a.mean((1, 2, 3), keepdim=True), a.abs().mean((1, 2, 3), keepdim=True)
    assert_entries(out[..., 1 : 1 + channels], exact, magnitude, dtype, "means")
    assert (out[..., 0] == 7).all() and (out[..., 1 + channels :] == 7).all()


def test_long_means_round_seldom() -> None:
    """40,000 equal terms, which one chain of additions would round the same way over and over."""
    x, ones, out = torch.full((1, 1, 200, 200, 16), 0.9), torch.ones(16), torch.empty(1, 1, 1, 1, 16)
    BACKENDS["cpu"].norm_relu_mean(x, Norm(torch.zeros(16), ones, ones, torch.zeros(16), 0.0), out)
    exact = torch.full_like(out, x[0, 0, 0, 0, 0].double().item(), dtype=torch.float64)
    assert_entries(out, exact, exact, torch.float32, "means")


def test_means_refuse_other_sizes() -> None:
    x, vector = torch.randn(2, 1, 3, 4, 5), torch.ones(5)
    with pytest.raises(ValueError, match="out: expected sizes"):
        BACKENDS["cpu"].norm_relu_mean(x, Norm(*[vector] * 4, 0.0), torch.empty(2, 1, 2, 2, 5))


@all_dtypes
@pytest.mark.parametrize("shape", [shape for shape in WIDE if not shape.pool], ids=str)
def test_a_constant_weight_is_packed_once(shape: Shape, dtype: torch.dtype) -> None:
    """With the bits that it has when it is packed at each call, for images of several sizes; no change of it is seen."""
    channels, kernel = (shape.out_channels, shape.channels), [k for k in shape.kernel if k > 1] or [1]
    weight = torch.randn(*channels, *kernel).to(dtype)
    run = Network(Parts([Convolution(tuple(weight.shape), False)]))
    parameters = Parameters([weight], [], [], [], [])
    bound, spatial = Bound.by(BACKENDS["cpu"], parameters, constant=True), shape.pixels[4 - len(kernel) :]
    images = [torch.randn(n, shape.channels, *spatial).to(dtype) for n in (1, shape.pixels[0], 4, 1)]
    expected = [run(x, parameters, "cpu") for x in images]
    for begin in (0, 1):
        for x, out in zip(images, expected, strict=True):
            found = run(x, parameters, "cpu", bound)
            assert found is not None and out is not None and torch.equal(found, out)
        if not begin:
            weight.zero_()


def test_long_sums_round_seldom() -> None:
    """4096 equal terms, which one chain of additions would round the same way over and over: off by 300 ulp."""
    ones = torch.ones(4096)
    x, weight = torch.full((1, 1, 1, 16, 4096), 0.9), torch.ones(32, 4096, 1, 1, 1)
    out = torch.empty(1, 1, 1, 16, 32)
    BACKENDS["cpu"].norm_relu_conv(
        x, Norm(torch.zeros(4096), ones, ones, torch.zeros(4096), 0.0), weight, out, None, None
    )
    exact = torch.full_like(out, 4096 * x[0, 0, 0, 0, 0].double().item(), dtype=torch.float64)
    assert_entries(out, exact, exact, torch.float32, "output")


@all_backends
@pytest.mark.parametrize(
    ("pixels", "distance"), [((8, 1, 28, 28), 1e3), ((2, 3, 5, 7), 1e3), ((2, 3, 5, 7), 1e6)], ids=str
)
def test_variance_of_a_distant_channel(backend: str, pixels: tuple[int, int, int, int], distance: float) -> None:
    """Deviation 1: sums of squares in float32 would lose it; of one tile, not even the rounding of its mean tells."""
    x = torch.randn(*pixels, 16) + distance
    out, mean, var = torch.empty_like(x), torch.empty(16), torch.empty(16)
    BACKENDS[backend].place(x, out, mean, var)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance("variance"), atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=tolerance("mean") * ulp(torch.float32), atol=0)


@all_backends
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3)], ids=str)
def test_variance_of_a_distant_output(backend: str, kernel: tuple[int, int, int]) -> None:
    x = torch.randn(4, 1, 20, 20, 8)
    norm = Norm(torch.zeros(8), torch.ones(8), torch.ones(8), torch.full((8,), 1000.0), 0.0)
    weight = torch.zeros(24, 8, *kernel)
    weight[torch.arange(24), torch.arange(24) % 8, kernel[0] // 2, kernel[1] // 2, kernel[2] // 2] = 1
    out, mean, var = torch.empty(4, 1, 20, 20, 24), torch.empty(24), torch.empty(24)
    BACKENDS[backend].norm_relu_conv(x, norm, weight, out, mean, var)
    exact_var, exact_mean = torch.var_mean(out.double(), (0, 1, 2, 3), correction=0)
    assert exact_var.min() > 0.8 and exact_mean.min() > 999
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance("variance"), atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=tolerance("mean") * ulp(torch.float32), atol=0)


@all_backends
def test_nan_and_infinity_pass_through(backend: str) -> None:
    """A NaN in one pixel reaches every output of its neighbourhood: it is not turned into zero by ReLU."""
    x = torch.randn(1, 1, 5, 5, 16)
    x[0, 0, 2, 2, 3] = float("nan")
    norm = draw_norm(16, torch.float32)
    out = torch.empty(1, 1, 5, 5, 8)
    BACKENDS[backend].norm_relu_conv(x, norm, torch.randn(8, 16, 1, 3, 3), out, None, None)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(out[0, 0].isnan().all(-1), expected)
    assert torch.equal(out[0, 0].isnan().any(-1), expected)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
@wide
def test_two_runs_give_the_same_bits(dtype: torch.dtype, threads: int, shape: Shape) -> None:
    torch.set_num_threads(threads)
    module = BACKENDS["cpu"]
    norm = draw_norm(shape.channels, dtype)
    x = torch.randn(*shape.pixels, shape.channels).to(dtype)
    weight = make_weight(shape, dtype, "contiguous")
    grad = loaded_gradient(shape.out_pixels, shape.out_channels, dtype)
    runs = []
    for _ in range(3):
        out = torch.empty(*shape.out_pixels, shape.out_channels, dtype=dtype)
        mean, var = (torch.empty(shape.out_channels, dtype=torch.float32) for _ in range(2))
        module.norm_relu_conv(x, norm, weight, out, mean, var)
        dx, dweight = torch.ones_like(x), torch.empty_like(weight)
        sums = torch.zeros(4, shape.channels)
        owed = Owed(sums[0], sums[1], sums[2:])
        module.norm_relu_conv_backward(grad, x, norm, weight, dx, True, dweight, owed)
        placed, placed_mean, placed_var = torch.empty_like(x), *torch.empty(2, shape.channels)
        module.place(x, placed, placed_mean, placed_var)
        runs.append([out, mean, var, dx, dweight, sums, placed_mean, placed_var])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def _weight_dtype(dtype: torch.dtype, in_float32: bool) -> torch.dtype:
    return accumulate_dtype(dtype) if in_float32 else dtype
