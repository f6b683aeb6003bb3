"""The kernels of lesser machines compute the same: the primitives' tests again, with torch told to use less."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent / "test_cpu_primitives.py"
REPORT = (
    "import torch; from fused_densenet.backends import cpu, extension; "
    "print(*(cpu.instruction_set(extension.cpu, dtype) for dtype in (torch.float32, torch.bfloat16)))"
)
ARM = platform.machine() == "aarch64"
LACKS_AVX512 = pytest.mark.skipif(
    not ARM and not torch.cpu._is_avx512_supported(), reason="a processor without AVX-512"
)
CAPABILITIES = ["DEFAULT"] if ARM else ["DEFAULT", "AVX2", pytest.param("AVX512", marks=LACKS_AVX512), "AVX512_BF16"]
"""As torch names them, and ours for AVX-512's dot products of bfloat16, which torch takes for its default."""


def here(capability: str) -> tuple[str, str]:
    """The instruction sets for float32 and bfloat16 that this machine has of a capability."""
    most = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512") and most == "AVX512":
        # Intel's dot products are slower than float32's arithmetic.
        gain = capability == "AVX512_BF16" or "GenuineIntel" not in pathlib.Path("/proc/cpuinfo").read_text()
        return "avx512", "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() and gain else "avx512"
    name = "avx2" if capability != "DEFAULT" and most in ("AVX2", "AVX512") else "neon" if ARM else "portable"
    return name, name


def reported(environment: dict[str, str]) -> tuple[str, ...]:
    command = [sys.executable, "-c", REPORT]
    folder = TESTS.parent.parent
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=folder)
    return tuple(run.stdout.split())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_primitives_with(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "HYPOTHESIS_PROFILE": "quick"}
    assert reported(environment) == here(capability)
    if here(capability) == reported(dict(os.environ)):
        return  # those that test_cpu_primitives.py itself runs here
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not eager and not same_bits", str(TESTS)]
    command += ["-W", "ignore:ignoring invalid value for ATEN_CPU_CAPABILITY"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent.parent)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-1000:]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a processor without AMX")
def test_bfloat16_runs_in_amx_tiles_where_the_system_lends_them() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    assert reported(environment) == (("avx512", "avx512_amx") if torch.cpu._init_amx() else here("AVX512"))
