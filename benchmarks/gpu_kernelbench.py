"""KernelBench's problems 14 to 16 of level 3 (ScalingIntelligence/KernelBench, arXiv 2502.10517), fused and not.

A dense block of plain 3×3 layers, and the networks of 121 and 201 layers made of such blocks, in shapes and mode as
published: float32 by torch's defaults, batch 10, 224 × 224, the forward pass alone, batch statistics. The baselines that
are printed beside it are those that KernelBench publishes for an H100 (results/timing/H100_Modal), not of this machine.
"""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_phase import Item
from gpu_primitives import backends
from gpu_run import Run
from gpu_timing import Work, graph_of, interleaved, milliseconds
from torch import Tensor, nn

from fused_densenet import fuse, use_backend

GROWTH, BATCH = 32, 10


class ConcatenatingBlock(nn.Module):
    """Every layer reads all maps before it, by norm, ReLU and a 3×3 convolution."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(plain_layer(width + i * GROWTH) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(x))
            x = torch.cat(maps, 1)
        return x


def plain_layer(width: int) -> nn.Sequential:
    conv = nn.Conv2d(width, GROWTH, 3, padding=1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv, nn.Dropout(0.0))


def network(*config: int) -> nn.Module:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    parts: list[nn.Module] = [*stem]
    width = 64
    for number, layers in enumerate(config):
        parts.append(ConcatenatingBlock(layers, width))
        width += layers * GROWTH
        if number + 1 < len(config):
            conv = nn.Conv2d(width, width // 2, 1, bias=False)
            parts.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv, nn.AvgPool2d(2)))
            width //= 2
    parts += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*parts)


class Problem(NamedTuple):
    """``eager`` and ``compiled`` are the published milliseconds."""

    name: str
    build: Callable[[], nn.Module]
    channels: int
    eager: float
    compiled: float


PROBLEMS = [
    Problem("14, dense block", lambda: ConcatenatingBlock(6, 32), 32, 7.47, 4.62),
    Problem("15, DenseNet-121", lambda: network(6, 12, 24, 16), 3, 6.68, 8.93),
    Problem("16, DenseNet-201", lambda: network(6, 12, 48, 32), 3, 10.4, 21.8),
]
SMOKE = [Problem("tiny", lambda: network(1, 1), 3, 0.0, 0.0)]


def measure(problem: Problem, run: Run, seconds: float) -> None:
    """A row for each variant, as soon as it ran and again from all variants' interleaved rounds."""
    torch.manual_seed(0)
    side = 16 if run.smoke else 224
    plain = problem.build().to(run.device)
    x = torch.rand(2 if run.smoke else BATCH, problem.channels, side, side, device=run.device)
    published = {"published_eager": problem.eager, "published_compiled": problem.compiled}

    def work(model: nn.Module, backend: str) -> Tensor:
        with torch.no_grad(), use_backend(backend):
            return model(x)

    def add(name: str, ms: float) -> None:
        run.add("kernelbench", problem=problem.name, variant=name, milliseconds=ms, error=errors[name], **published)

    expected = work(plain, "auto")
    works: dict[str, Work] = {"eager": functools.partial(work, plain, "auto")}
    errors = {"eager": 0.0}
    for backend in backends(run, torch.float32):
        what, name = f"KernelBench {problem.name}, {backend}", f"fused {backend}"
        model = problem.build().to(run.device)
        model.load_state_dict(plain.state_dict())
        model = fuse(model, strict=True)
        found = run.attempt(what, functools.partial(work, model, backend))
        if found is None:
            continue
        errors[name] = errors[f"{name}, CUDA graph"] = float((found - expected).norm() / expected.norm())
        works[name] = functools.partial(work, model, backend)
        graph = run.attempt(f"{what}, graph", functools.partial(graph_of, works[name], run))
        if graph is not None:
            works[f"{name}, CUDA graph"] = graph
    for name, call in works.items():
        add(name, milliseconds(call, run.device))
    for name, times in interleaved(works, run, seconds).items():
        add(name, statistics.median(times))


def items(run: Run) -> list[Item]:
    return [
        Item(f"KernelBench {problem.name}", functools.partial(measure, problem, run, 2.0))
        for problem in (SMOKE if run.smoke else PROBLEMS)
    ]
