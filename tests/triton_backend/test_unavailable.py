"""Without what triton compiles with at run time its backend says so, and the choice falls to torch's operators."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime import build

from fused_densenet import backends
from fused_densenet.backends import extension, triton

GPU = torch.device("cuda", 0)
SOURCE = """
#include "Python.h"
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe"};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&module); }
"""


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(extension, "cuda", None)
    monkeypatch.setattr(extension, "cuda_missing", "it was lost")
    remembered = [
        triton._no_compiler,
        *([build._find_compiler] if hasattr(build, "_find_compiler") else []),
    ]  # from 3.9 on
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def _triton_compiles() -> bool:
    """Whether triton's own way to compile what launches a kernel works."""
    try:
        build.compile_module_from_src(SOURCE, "probe")
    except (RuntimeError, OSError):
        return False
    return True


def test_with_a_compiler_it_runs() -> None:
    assert _triton_compiles()
    assert triton.unavailable(GPU, torch.bfloat16) is None
    assert backends.choose(GPU, torch.bfloat16) == "triton"


@pytest.mark.parametrize(("variable", "value"), [("PATH", ""), ("CC", "there-is-no-such-program")])
def test_without_a_compiler_torch_runs(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    assert not _triton_compiles()
    reason = triton.unavailable(GPU, torch.bfloat16)
    assert reason == f"triton needs a C compiler at run time and finds no {value or 'gcc or clang'}"
    assert backends.choose(GPU, torch.bfloat16) == "eager"
    assert ("triton", reason) in backends.rejected(GPU, torch.bfloat16, "eager")
    with pytest.raises(RuntimeError, match="C compiler"), backends.use_backend("triton"):
        backends.choose(GPU, torch.bfloat16)


def test_without_the_headers_torch_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    assert "Python.h" in str(triton.unavailable(GPU, torch.bfloat16))
    assert backends.choose(GPU, torch.bfloat16) == "eager"
