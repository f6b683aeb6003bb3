"""``python -m fused_densenet.info``: versions, and which backends run here, or why not."""

import os
import platform
import warnings

import torch

from . import __version__
from .backends import BACKENDS, choice, choose, cpu, cuda, extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """What the package was built with and what it runs with, as plain text: one section for each device and dtype."""
    lines = [
        f"fused_densenet {__version__}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU capability "
        f"{torch.backends.cpu.get_cpu_capability()}, CUDA {torch.version.cuda or 'not built in'}",
        f"extension: {_extension_line()}",
        f"CUDA kernels: {_cuda_line()}",
    ]
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("FUSED_DENSENET_")]
    for device in _devices():
        if device.type == "cuda":
            lines += ["", f"{device}: {torch.cuda.get_device_name(device)}"]
        for dtype in DTYPES:
            lines += ["", f"{device}, {str(dtype).removeprefix('torch.')}: {_chosen(device, dtype)}"]
            for name, backend in BACKENDS.items():
                reason = backend.unavailable(device, dtype)
                lines.append(f"    {name:8}{'available' if reason is None else f'not available: {reason}'}")
    lines += ["", "where cuda is chosen, by primitive, kernel and pixels:"]
    return "\n".join([*lines, *(f"    {row}" for row in choice.report())])


def _extension_line() -> str:
    if extension.cpu is None:
        return f"none; {extension.cpu_missing}"
    sets = (cpu.instruction_set(extension.cpu, dtype) for dtype in (torch.float32, torch.bfloat16))
    return (
        f"{extension.library_name(torch.__version__)}, compiled by GCC {cpu.compiler(extension.cpu)}; "
        f"kernels {next(sets)}, for bfloat16 {next(sets)}"
    )


def _cuda_line() -> str:
    if extension.cuda is None:
        return f"none; {extension.cuda_missing}"
    return f"compiled for compute capability {', '.join(cuda.architectures(extension.cuda))}"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _chosen(device: torch.device, dtype: torch.dtype) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report itself says what is missing
        try:
            return f"runs on {choose(device, dtype)}"
        except (RuntimeError, ValueError) as error:
            return f"does not run: {error}"


if __name__ == "__main__":
    print(report())
