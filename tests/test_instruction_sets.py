"""The kernels of lesser machines compute the same: the primitives' tests again, with torch told to use less."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent / "test_cpu_primitives.py"
REPORT = (
    "import torch; from fused_densenet.backends import cpu, extension; "
    "print(cpu.instruction_set(extension.cpu, torch.float32))"
)


@pytest.mark.parametrize(("capability", "instruction_set"), [("avx2", "avx2"), ("default", "portable")])
def test_primitives_with(capability: str, instruction_set: str) -> None:
    has_avx2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "HYPOTHESIS_PROFILE": "quick"}
    reported = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=TESTS.parent.parent,
    ).stdout.strip()
    assert reported == (instruction_set if has_avx2 else "portable")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not eager and not same_bits", str(TESTS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent.parent)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-1000:]
