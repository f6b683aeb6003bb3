"""The report of ``python -m fused_densenet.info``."""

import subprocess
import sys

import pytest
import torch

import fused_densenet
from fused_densenet import backends, info
from fused_densenet.backends import choice, extension
from fused_densenet.backends.choice import ShapeClass


def section(report: str, title: str) -> list[str]:
    """The lines of one device and dtype, the title first."""
    return next(part for part in report.split("\n\n") if part.startswith(title)).splitlines()


def test_names_every_version_in_use() -> None:
    head = info.report().split("\n\n")[0]
    assert f"fused_densenet {fused_densenet.__version__}" in head
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in head
    assert torch.backends.cpu.get_cpu_capability() in head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_says_of_every_backend_whether_it_runs(dtype: str) -> None:
    title, *lines = section(info.report(), f"cpu, {dtype}:")
    assert title.endswith(f"runs on {backends.choose(torch.device('cpu'), getattr(torch, dtype))}")
    assert [line.split()[0] for line in lines] == list(backends.BACKENDS)
    for line in lines:
        name, said = line.split(maxsplit=1)
        reason = backends.BACKENDS[name].unavailable(torch.device("cpu"), getattr(torch, dtype))
        assert said == ("available" if reason is None else f"not available: {reason}")


def test_says_why_there_is_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cpu", None)
    monkeypatch.setattr(extension, "cpu_missing", "it was lost")
    report = info.report()
    assert "extension: none; it was lost" in report
    title, *lines = section(report, "cpu, float32:")
    assert title.endswith("runs on eager")
    assert "    cpu     not available: it was lost" in lines


def test_says_what_compiled_the_extension_and_what_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {torch.float32: "avx2", torch.bfloat16: "avx512_bf16"}
    monkeypatch.setattr(backends.cpu, "instruction_set", lambda library, dtype: sets[dtype])
    monkeypatch.setattr(backends.cpu, "compiler", lambda library: "99.1")
    file = extension.library_name(torch.__version__)
    assert f"extension: {file}, compiled by GCC 99.1; kernels avx2, for bfloat16 avx512_bf16" in info.report()


def test_says_which_backend_runs_what_on_nvidia_gpus() -> None:
    title = "where cuda is chosen, by primitive, kernel and pixels:"
    assert "    norm_relu_conv 3: cuda, triton, eager" in section(info.report(), title)
    with choice.preferring({ShapeClass("norm_relu_conv", "3", "few"): ("triton", "cuda")}):
        lines = section(info.report(), title)
    assert "    norm_relu_conv 3, few pixels: triton, cuda" in lines
    assert "    norm_relu_conv 3, many pixels: cuda, triton, eager" in lines


def test_says_what_the_cuda_kernels_were_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cuda", object())
    monkeypatch.setattr(backends.cuda, "architectures", lambda library: ["8.0", "9.0+PTX"])
    assert "CUDA kernels: compiled for compute capability 8.0, 9.0+PTX" in info.report()
    monkeypatch.setattr(extension, "cuda", None)
    monkeypatch.setattr(extension, "cuda_missing", "they were lost")
    assert "CUDA kernels: none; they were lost" in info.report()


def test_a_backend_that_was_asked_for_and_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DENSENET_BACKEND", "cpu")
    monkeypatch.setattr(backends.cpu, "unavailable", lambda device, dtype: "the machine is on strike")
    report = info.report()
    assert "FUSED_DENSENET_BACKEND=cpu" in report
    assert section(report, "cpu, float32:")[0].endswith(
        "does not run: backend 'cpu' was asked for and cannot run: the machine is on strike"
    )


def test_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fused_densenet.info"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fused_densenet ")
    assert "cpu, float32: runs on " in done.stdout
