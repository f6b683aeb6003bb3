"""What gpu_model.py predicted for a GPU, to be printed beside what is measured: read from docs/gpu_model.json."""

import functools
import json
from typing import Any

import torch
from checkout import REPOSITORY

ALONE = "blocks alone"
"""The situation of gpu_model.py that the report measures."""
FILE = REPOSITORY / "docs" / "gpu_model.json"


def of_primitive(problem: str, backend: str, arithmetic: str) -> float | None:
    """Microseconds; None where nothing was predicted: for other backends than CUDA, other arithmetic, another GPU."""
    if (backend, arithmetic) != ("cuda", "bfloat16"):
        return None
    found = (row["of_primitives"].get(problem) for row in rows(this_gpu()))
    return next((microseconds for microseconds in found if microseconds is not None), None)


def of_blocks(network: str, batch: int, backend: str) -> float | None:
    """Milliseconds of a training step of the dense blocks alone, or None."""
    here = [row for row in rows(this_gpu()) if (row["network"], row["batch"]) == (network, batch)]
    parts = [row["predicted_microseconds"] for row in here if row["situation"] == ALONE]
    return sum(parts) / 1e3 if parts and backend == "cuda" else None


def this_gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def rows(gpu: str) -> list[dict[str, Any]]:
    """Those for the GPU that has this name of a product."""
    if not FILE.exists():
        return []
    return [row for row in json.loads(FILE.read_text())["rows"] if row["gpu"] in gpu]
