"""Launches that go past Triton's own binder give a kernel what the binder would, and the right kernel."""

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton_offline
from triton import knobs
from triton_offline import offline

from fused_densenet.backends import triton as backend
from fused_densenet.backends.contract import Gradient, Norm, Owed
from fused_densenet.backends.triton import plans
from fused_densenet.backends.triton.launch import Launch
from fused_densenet.backends.triton.problem import Problem

CPU = torch.device("cpu")

_launches: list[tuple[Any, tuple[Any, ...]]] = []  # one list, as triton keeps launchers with the kernels it compiled


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Inside, kernels are compiled for sm_80; collects (source, arguments) of every launch in C."""

    def launcher(driver: Any, source: Any, metadata: Any) -> Any:
        return lambda *arguments: _launches.append((source, arguments))

    _launches.clear()
    monkeypatch.setattr(triton_offline._Driver, "launcher_cls", launcher)
    plans.forget()
    with offline("sm_80"):
        yield _launches
    plans.forget()


def step(dtype: torch.dtype, weights: torch.dtype, channels: int = 32, offset: int = 0, width: int = 4) -> None:
    """A convolution, forward and backward."""
    buffer = torch.empty(2, 1, 4, width, offset + channels + 16, dtype=dtype)
    x, out = buffer[..., offset : offset + channels], buffer[..., offset + channels :]
    norm, weight = Norm(*torch.empty(4, channels), 1e-5), torch.empty(16, channels, 1, 1, 1, dtype=weights)
    backend.norm_relu_conv(x, norm, weight, out, *torch.empty(2, 16))
    grad = Gradient(out, out, torch.empty(16), torch.empty(2, 16))
    dweight, owed = torch.empty_like(weight), Owed(*torch.empty(2, channels), torch.empty(2, channels))
    backend.norm_relu_conv_backward(grad, x, norm, weight, x, True, dweight, owed)


LAUNCHES = 6  # of a step with the weight packed twice
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def test_each_dtype_has_its_kernel(launched: list[tuple[Any, tuple[Any, ...]]]) -> None:
    """Shapes and addresses alike, dtypes not: twice each, so that the second finds the first one's kernels."""
    for dtype, weights in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float16,) * 2] * 2:
        launched.clear()
        step(dtype, weights)
        signatures = {source.fn.__name__: source.signature for source, _ in launched}
        assert ("pack" in signatures) == (dtype != weights)
        assert len(launched) == LAUNCHES - 2 * (dtype == weights)
        for name in ("norm_relu_conv", "backward_pointwise"):
            assert signatures[name]["x"] == signatures[name]["weight"] == NAMES[dtype]
        assert signatures["add_partials"]["dweight"] == NAMES[weights]


def assert_same(bound: list[tuple[Any, tuple[Any, ...]]], direct: list[tuple[Any, tuple[Any, ...]]]) -> None:
    """Launches by way of the binder, and the same past it."""
    for (source, binders), (again, ours) in zip(bound, direct, strict=True):
        assert source is again
        assert binders[:4] == ours[:4]  # grid and stream
        for theirs, mine, kind in zip(binders[9:], ours[9:], source.signature.values(), strict=True):
            if kind.startswith("*"):
                address = theirs if isinstance(theirs, int) else theirs.data_ptr()  # the weight is packed twice
                assert type(mine) is int and mine % 16 == address % 16
            elif kind != "constexpr":
                assert mine == theirs
            else:
                assert mine == (0 if theirs is None else theirs)


@pytest.mark.parametrize(("channels", "offset"), [(32, 0), (32, 1), (17, 0)])
def test_the_arguments_are_those_of_the_binder(
    launched: list[tuple[Any, tuple[Any, ...]]], channels: int, offset: int
) -> None:
    """The first launch goes through the binder, the second does not."""
    for _ in range(2):
        step(torch.bfloat16, torch.float32, channels, offset)
    first, second = launched[:LAUNCHES], launched[LAUNCHES:]
    assert len(second) == LAUNCHES
    assert_same(first, second)


@pytest.mark.parametrize("channels", [32, 17])
def test_images_of_another_size_have_the_same_kernels(
    launched: list[tuple[Any, tuple[Any, ...]]], channels: int
) -> None:
    """Those after the first go to C at once, with what the binder gives for each alone."""
    widths = (5, 16, 1, 300)
    for width in (4, *widths):
        step(torch.bfloat16, torch.float32, channels, width=width)
    direct = launched[LAUNCHES:]
    launched.clear()
    for width in widths:
        plans.forget()
        step(torch.bfloat16, torch.float32, channels, width=width)
    assert_same(launched, direct)


def test_many_sizes_of_images_are_planned_once_each() -> None:
    """Of 120 convolutions each, as in DenseNet-121, in turn."""
    plans.forget()
    for _ in range(2):
        for width in range(1, 101):
            for layer in range(120):
                plans.norm_relu_conv(problem((1, 1, 1, width), 64 + layer), True)
    kept = plans.norm_relu_conv.cache_info()
    assert kept.misses == kept.hits == 12000


@triton.jit
def _copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


def test_a_profiler_hears_of_every_launch(launched: list[tuple[Any, tuple[Any, ...]]]) -> None:
    it = Launch(_copy, (1, 1, 1), (16,), 4, 1, BLOCK=16)
    tensors = torch.empty(2, 16)
    it(*tensors)
    it(*tensors)
    assert launched[-1][1][7:9] == (None, None)
    hook = launched.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        it(*tensors)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert launched[-1][1][7] is knobs.runtime.launch_enter_hook


def problem(size: tuple[int, ...], channels: int, kernel: int = 1, pool: bool = False, half: bool = True) -> Problem:
    out = (size[0], *(n // 2 for n in size[1:])) if pool else size
    strides = [tuple(math.prod(shape[i:]) for i in range(1, 6)) for shape in ((*size, channels), (*out, channels))]
    weight = (16, channels, *(1 if pool else kernel,) * 3)
    dtype, arithmetic = (torch.bfloat16, "half") if half else (torch.float32, "ieee")
    return Problem(
        (*size, channels), strides[0], (*out, 16), strides[1], weight, weight, dtype, dtype, arithmetic, 0, CPU
    )


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_volumes_of_many_pixels_fit_a_grid(kernel: int, half: bool, pool: bool) -> None:
    """Two of 256 x 256 x 256: four times 65535 tiles of 128, which the second and third axis of a grid do not take."""
    it = problem((2, 256, 256, 256), 64, kernel, pool, half)
    owes = plans.Owes(1e-5, 2 * 256**3, 64, (torch.float32, True, False))
    forward = plans.norm_relu_conv(it, True)
    backward = plans.norm_relu_conv_backward(it, it.out_strides, it.x_strides, it.weight, False, owes)
    place = plans.place(it.x, it.x_strides, 64, (it.dtype, it.dtype), True)
    assert place is not None
    for launch in (forward.product, forward.merge, backward.data, backward.weight, backward.add, place.copy):
        assert launch is None or (max(launch.grid[1:]) <= 65535 and launch.grid[0] < 2**31)


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="a grid of"):
        Launch(_copy, (1, 65536, 1), (16,), 4, 1, BLOCK=16)


class _Tensor:
    """Of a GPU that is not there."""

    device = torch.device("cuda", 1)

    def get_device(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return 4096


def test_the_device_of_the_tensors_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    seen = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch, "get_device_module", lambda device_: SimpleNamespace(device=device))
    active = SimpleNamespace(get_current_device=lambda: current[0], get_current_stream=lambda index: 100 + index)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    it = Launch(_copy, (3, 1, 1), (16,), 4, 1, BLOCK=16)
    compiled = SimpleNamespace(
        function="function", packed_metadata="metadata", run=lambda *arguments: seen.append((current[0], arguments))
    )
    it._compiled = {(1, 0, 0): compiled}
    it(_Tensor(), _Tensor())
    it(_Tensor(), _Tensor())
    launch = (1, (3, 1, 1, 101, "function", "metadata", None, None, None, 4096, 4096, 16, 16))
    assert seen == [launch, launch] and current == [0]
