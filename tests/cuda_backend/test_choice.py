"""Which backend runs a primitive on an NVIDIA GPU, and why the CUDA kernels do not."""

from collections.abc import Iterator

import pytest
import small
import torch

from fused_densenet import backends
from fused_densenet.backends import choice, cuda, extension, triton
from fused_densenet.backends.choice import ShapeClass

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of compute capability 9.0 with kernels compiled for 8.0 and 9.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(extension, "cuda", object())
    monkeypatch.setattr(cuda, "architectures", lambda library: ["8.0", "9.0"])
    monkeypatch.setattr(cuda, "problem", lambda library, index: None)
    caches = (cuda._unfit, triton._too_old, choice._preferred)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_cuda_then_triton_then_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(backends.BACKENDS) == ["cpu", "cuda", "triton", "eager"]
    assert backends.choose(GPU, torch.bfloat16) == "cuda"
    monkeypatch.setattr(extension, "cuda", None)
    monkeypatch.setattr(extension, "cuda_missing", "it was lost")
    monkeypatch.setattr(triton, "_installed", lambda: True)
    assert backends.choose(GPU, torch.bfloat16) == "triton"
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert backends.choose(GPU, torch.bfloat16) == "eager"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("capability", "compiled", "reason"),
    [
        ((9, 0), ["9.0"], None),
        ((8, 9), ["8.0"], None),
        ((12, 0), ["8.0", "9.0+PTX"], None),
        ((9, 0), ["9.0a"], None),
        ((12, 0), ["8.0", "9.0"], "it was compiled for compute capability 8.0, 9.0, this GPU has 12.0"),
        ((8, 0), ["8.6+PTX"], "it was compiled for compute capability 8.6+PTX, this GPU has 8.0"),
        ((10, 0), ["9.0a+PTX"], "it was compiled for"),
        ((7, 5), ["7.5+PTX"], None),
        ((9, 0), ["7.5+PTX"], "it was compiled for compute capability 7.5+PTX, this GPU has 9.0"),
        ((7, 0), ["7.5"], "it needs compute capability 7.5, this GPU has 7.0"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], compiled: list[str], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(cuda, "architectures", lambda library: compiled)
    cuda._unfit.cache_clear()
    said = cuda.unavailable(GPU, torch.float16)
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.usefixtures("gpu")
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.unavailable(torch.device("cpu"), torch.float32) == "it serves NVIDIA GPUs, not cpu"
    assert cuda.unavailable(GPU, torch.float64) == "it has no kernels for torch.float64"
    monkeypatch.setattr(cuda, "problem", lambda library, index: "CUDA error 35")
    assert cuda.unavailable(GPU, torch.float32) == "CUDA error 35"
    monkeypatch.setattr(extension, "cuda", None)
    monkeypatch.setattr(extension, "cuda_missing", "it was lost")
    assert cuda.unavailable(GPU, torch.float32) == "it was lost"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert cuda.unavailable(GPU, torch.float32) == "it serves NVIDIA GPUs, not AMD"


@pytest.mark.parametrize(
    ("image", "weight", "result", "expected"),
    [
        ((2, 1, 7, 7, 64), (), (), ("", "few")),
        ((64, 1, 56, 56, 64), (32, 64, 1, 3, 3), (64, 1, 56, 56, 32), ("3", "many")),
        ((2, 1, 1, 50, 64), (32, 64, 1, 1, 3), (2, 1, 1, 50, 32), ("3", "few")),
        ((2, 1, 7, 7, 64), (32, 64, 1, 5, 5), (2, 1, 7, 7, 32), ("other", "few")),
        ((2, 7, 7, 7, 64), (32, 64, 5, 5, 5), (2, 7, 7, 7, 32), ("large", "few")),
        *(((2, 7, 7, 7, 64), (32, 64, *kernel), (2, 7, 7, 7, 32), ("other", "few")) for kernel in small.LARGEST),
        ((2, 1, 7, 7, 64), (32, 64, 1, 1, 1), (2, 1, 7, 7, 32), ("1x1", "few")),
        ((2, 1, 7, 7, 64), (32, 64, 1, 1, 1), (2, 1, 3, 3, 32), ("pooled 1x1", "few")),
    ],
)
def test_classes(
    image: tuple[int, ...], weight: tuple[int, ...], result: tuple[int, ...], expected: tuple[str, str]
) -> None:
    assert choice.classify("norm_relu_conv", image, weight, result) == ShapeClass("norm_relu_conv", *expected)


@pytest.mark.usefixtures("gpu")
def test_the_table_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = (GPU, torch.bfloat16, "norm_relu_conv", (2, 1, 7, 7, 64), (32, 64, 1, 3, 3), (2, 1, 7, 7, 32))
    assert choice.backend(*call) == "cuda"
    monkeypatch.setattr(triton, "_installed", lambda: True)
    with choice.preferring({ShapeClass("norm_relu_conv", "3", "few"): ("triton", "cuda", "eager")}):
        assert choice.backend(*call) == "triton"
        assert "norm_relu_conv 3, few pixels: triton, cuda, eager" in choice.report()
        assert "norm_relu_conv 3, many pixels: cuda, triton, eager" in choice.report()
    assert choice.backend(*call) == "cuda"
    assert "norm_relu_conv 3: cuda, triton, eager" in choice.report()


@pytest.mark.usefixtures("gpu")
def test_kept_for_any_number_of_shapes() -> None:
    """A network's 240 calls at each of 100 image sizes ask once for each class."""
    for _ in range(2):
        for size in range(7, 107):
            for channels in range(64, 304):
                image, weight = (2, 1, size, size, channels), (32, channels, 1, 3, 3)
                assert choice.backend(GPU, torch.bfloat16, "norm_relu_conv", image, weight, (*image[:4], 32)) == "cuda"
    assert choice._preferred.cache_info().misses == 2


@pytest.mark.parametrize(
    ("row", "names", "said"),
    [
        (ShapeClass("norm_relu_conv", "7x7", "few"), ("cuda",), "expected classes of choice.TABLE"),
        (ShapeClass("norm_relu_conv", "3", "few"), ("cpu",), "expected one or more of cuda, triton, eager"),
        (ShapeClass("norm_relu_conv", "3", "few"), (), "expected one or more of cuda, triton, eager"),
    ],
)
def test_rows_that_cannot_be(row: ShapeClass, names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said), choice.preferring({row: names}):
        pass
