"""Where a figure was taken: the machine, the versions, the commit."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import torch
from checkout import command, commit

import fused_densenet
from fused_densenet.backends import choose


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine, the versions and the commit that a figure belongs to."""
    machine = {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions["fused_densenet"] = fused_densenet.__version__
    versions["numpy"] = importlib.metadata.version("numpy")
    return {
        "machine": machine,
        "versions": versions,
        "commit": commit(),
        "backend": choose(device, dtype),
        "command": command(),
    }


def describe(where: dict[str, Any]) -> str:
    """One line of :func:`environment` to print under a table."""
    machine, versions = where["machine"], where["versions"]
    chip = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    return (
        f"{chip}; torch {versions['torch']}, fused_densenet {versions['fused_densenet']} "
        f"(backend {where['backend']}, commit {where['commit'] or 'unknown'})"
    )


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
