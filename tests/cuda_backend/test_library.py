"""The library of CUDA kernels as users get it: what setup.py makes of csrc/cuda, loaded where there may be no GPU."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import building
import pytest
import torch

from fused_densenet.backends import choice, extension

ROOT = building.CSRC.parent
NAMES = list(choice.KERNELS)


@pytest.fixture(scope="module")
def library() -> Path:
    """The installed library, or one made for this test."""
    if extension.cuda is not None:
        return ROOT / "fused_densenet/_cuda.so"
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    sources = [ROOT / "setup.py", *sorted(building.CSRC.glob("**/*.*")), *building.headers()]

    def make(made: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", building.COMPILER)
            patch.setenv("MAX_JOBS", str(building.JOBS))
            patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
            setup.build({}, made, made.parent / "objects")

    return building.cached(".so", [torch.__version__, *sources], make)


def python(*statements: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(statements)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ORDERS = {
    "alone": ["import torch", "torch.ops.load_library({path!r})"],
    "before the package": ["import torch", "torch.ops.load_library({path!r})", "import fused_densenet"],
    "after the package": ["import torch, fused_densenet", "torch.ops.load_library({path!r})"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_loads_in_any_order(library: Path, order: str) -> None:
    checks = [
        f"assert torch._C._dispatch_has_kernel_for_dispatch_key('fused_densenet::{name}', 'CUDA')" for name in NAMES
    ]
    if order != "alone":
        checks += [
            "x = torch.randn(2, 1, 3, 3, 4)",
            "torch.ops.fused_densenet.place(x, out := torch.empty_like(x), None, None)",
            "assert torch.equal(x, out)",
            "assert 'bool tf32=False' in str(torch.ops.fused_densenet.norm_relu_conv.default._schema)",
        ]
    python(*(line.format(path=str(library)) for line in ORDERS[order]), *(checks if order != "alone" else []))


def test_needs_no_gpu_no_driver_and_no_python(library: Path) -> None:
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"\(NEEDED\).*\[(.+?)\]", needed)
    assert "libtorch.so" in names and "libtorch_cpu.so" in names
    assert not [name for name in names if re.match(r"libcud|libpython|libnv", name)]
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert not re.findall(r" U _?Py\w+", symbols)
    assert re.findall(r" w aoti_torch_get_current_cuda_stream", symbols), "torch without CUDA does not have it"


def test_says_what_it_was_compiled_for_and_what_is_missing(library: Path) -> None:
    loaded = python(
        "import ctypes, torch",
        "from fused_densenet.backends import cuda",
        f"torch.ops.load_library({str(library)!r})",
        f"library = ctypes.CDLL({str(library)!r})",
        "print(cuda.architectures(library), cuda.problem(library, 0), cuda.problem(library, 63), sep='\\n')",
    ).splitlines()
    assert all(re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", entry) for entry in eval(loaded[0]))
    if not torch.cuda.is_available():
        assert re.match(r"CUDA error \d+ \(cudaError\w+\): .*(driver|device)", loaded[1])
    assert loaded[2].startswith("CUDA error")


def test_a_tensor_of_another_device_is_refused(library: Path) -> None:
    """The operator for CUDA, called with a CPU tensor behind the dispatcher's back."""
    said = python(
        "import torch, fused_densenet",
        f"torch.ops.load_library({str(library)!r})",
        "x = torch.ones(1, 1, 2, 2, 4)",
        "keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)",
        "try:",
        "    torch.ops.fused_densenet.place.default.redispatch(keys, x, x, None, None)",
        "except RuntimeError as error:",
        "    print(error)",
    )
    assert said.strip() == "x: expected a tensor of CUDA, got one on cpu"
