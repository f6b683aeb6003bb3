"""What every kernel needs on a GPU at the shapes of real networks.

``PYTHONPATH=tests python tests/cuda_backend/resources.py`` writes what the compiler says to ``resources.json``, what the tests expect.
"""

import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nvcc
import problems
import torch
from building import kernels
from emulated import ARITHMETIC, default_library
from ptx_launch import Launch, launches
from torch import Tensor

from fused_densenet.backends.contract import Gradient, Norm, Owed

EXPECTED = Path(__file__).with_name("resources.json")
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
_H200 = problems.Device(132, 227 << 10, 90)
_A100 = problems.Device(108, 163 << 10, 80)
_B200 = problems.Device(148, 227 << 10, 100)
DEVICES = {"80": _A100, "90a": _H200, "100": _B200}
SMALL_DEVICES = {  # T4, RTX 3090, RTX 5090: less shared memory for a block
    "75": problems.Device(40, 64 << 10, 75),
    "86": problems.Device(82, 99 << 10, 86),
    "120": problems.Device(170, 99 << 10, 120),
}


class Layer(NamedTuple):
    """Sizes of x (N, D, H, W), channels read and written, and kernel sizes."""

    pixels: tuple[int, int, int, int]
    channels: int
    out_channels: int
    kernel: tuple[int, int, int]


LAYERS = [
    Layer((32, 1, 56, 56), 256, 128, (1, 1, 1)),
    Layer((32, 1, 56, 56), 128, 32, (1, 3, 3)),
    Layer((32, 1, 14, 14), 1000, 128, (1, 1, 1)),
    Layer((2, 1, 7, 7), 1024, 128, (1, 1, 1)),
    Layer((2, 1, 7, 7), 128, 32, (1, 3, 3)),
    Layer((64, 1, 32, 32), 448, 12, (1, 3, 3)),
    Layer((32, 1, 28, 28), 512, 192, (1, 1, 1)),
    Layer((32, 1, 28, 28), 192, 48, (1, 3, 3)),
    Layer((2, 16, 16, 16), 128, 32, (3, 3, 3)),
    Layer((8, 1, 1, 512), 128, 32, (1, 1, 3)),
]


class Need(NamedTuple):
    """Of a kernel on an architecture: registers, bytes of shared memory, threads, blocks on a multiprocessor."""

    registers: int
    shared: int
    threads: int
    blocks: int


class _Nowhere:
    """In place of an arena: no launch is executed, so every tensor may lie at one address."""

    def address(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else 1 << 40


def every_launch(device: problems.Device, layers: Sequence[Layer] = LAYERS) -> Iterator[Launch]:
    """All launches of all layers, in every arithmetic, forward and backward, and of placing their inputs."""
    library, noted = default_library(), []
    with launches(library, noted.append):
        for layer in layers:
            for name, arithmetic in ARITHMETIC.items():
                for primitive, problem in _problems(layer, _DTYPES[name]):
                    code = library[f"cuda_host_{primitive}"](
                        ctypes.byref(problem), arithmetic, ctypes.byref(device), ctypes.c_void_p(1 << 40)
                    )
                    assert code == 0, f"{primitive} of {layer}: CUDA error {code}"
    return iter(noted)


def _problems(layer: Layer, dtype: torch.dtype) -> Iterator[tuple[str, ctypes.Structure]]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vectors(length: int, count: int) -> list[Tensor]:
        return [torch.empty(length, device="meta") for _ in range(count)]

    at = _Nowhere()
    x, out = empty(*layer.pixels, layer.channels), empty(*layer.pixels, layer.out_channels)
    weight = empty(layer.out_channels, layer.channels, *layer.kernel)
    norm, moments = Norm(*vectors(layer.channels, 4), 1e-5), vectors(layer.out_channels, 2)
    grad = Gradient(out, out, *vectors(layer.out_channels, 1), torch.empty(2, layer.out_channels, device="meta"))
    owed = Owed(*vectors(layer.channels, 2), torch.empty(2, layer.channels, device="meta"))
    yield "place", problems.place(at, x, x, *vectors(layer.channels, 2))  # type: ignore[arg-type]
    yield "place_backward", problems.place_backward(at, grad, out)  # type: ignore[arg-type]
    pooled = empty(layer.pixels[0], *((size + 1) // 2 for size in layer.pixels[1:]), layer.channels)
    for a in (x, pooled):
        yield "norm_relu_pool", problems.norm_relu_pool(at, x, norm, a)  # type: ignore[arg-type]
        yield "norm_relu_pool_backward", problems.norm_relu_pool_backward(at, a, x, norm, x, owed)  # type: ignore[arg-type]
    buffers = [
        vectors(layer.channels, 1),
        vectors(layer.channels, 1),
        [torch.empty((), dtype=torch.int64, device="meta")],
    ]
    batch = torch.empty(2, layer.channels, device="meta")
    yield "update_running", problems.update_running(at, [batch], buffers, [0.1], [1.0])  # type: ignore[arg-type]
    yield "forward", problems.forward(at, x, norm, weight, out, *moments)  # type: ignore[arg-type]
    for accumulate in (False, True):
        arguments = (grad, x, norm, weight, x, accumulate, weight, owed)
        yield "backward", problems.backward(at, *arguments)  # type: ignore[arg-type]


def compiled(architecture: str) -> dict[str, nvcc.Resources]:
    """By plain name, of all kernels."""
    paths = nvcc.all_ptx(kernels(), [nvcc.PTX_OF.get(architecture, architecture)]).values()
    return {nvcc.plain(n): used for path in paths for n, used in nvcc.resources(path, architecture).items()}


def needs(architecture: str) -> dict[str, Need]:
    """By readable name, of the kernels that networks launch; of a kernel's launches the one that needs most."""
    used, found = compiled(architecture), dict[str, Need]()
    for launch in every_launch(DEVICES[architecture]):
        kernel = used[launch.kernel]
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        blocks = nvcc.blocks_per_multiprocessor(kernel, threads, launch.shared, architecture)
        need = Need(kernel.registers, kernel.shared + launch.shared, threads, blocks)
        name = nvcc.readable(launch.kernel)
        if name not in found or need.shared > found[name].shared:
            found[name] = need
    return dict(sorted(found.items()))


if __name__ == "__main__":
    table = {architecture: needs(architecture) for architecture in nvcc.ARCHITECTURES}
    lines = [
        f'  "{architecture}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(need)}" for name, need in rows.items())
        + "\n  }"
        for architecture, rows in table.items()
    ]
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
