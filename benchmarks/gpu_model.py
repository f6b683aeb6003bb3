"""A prediction of a DenseNet's training step on GPUs that nobody measured, from what its CUDA kernels would execute.

    python benchmarks/gpu_model.py --json docs/gpu_model.json --markdown docs/gpu-model.md

For each primitive the kernels' own host code says the launches, their blocks and what fits on a multiprocessor;
nvcc's PTX, executed for one block, says the instructions of a warp. A launch takes as long as the longest of

- the instructions of a multiprocessor's blocks, at an assumed rate of issue: :data:`RATES` for each of four schedulers;
- the bytes that must move once, at 0.9 of the memory's bandwidth; what its blocks ask for, at that of the cache;
- its multiplications at the rate of a large matrix product; :data:`LAUNCH` microseconds.

What the last block of a launch does after the others, which merges moments and adds splits, is not in it.

Every figure that comes out is a prediction and is called one; none was measured. The floor beside it is what
gpu_report.py measures against: bytes once, or multiplications.
"""

import argparse
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from baselines import NETWORKS, Architecture
from common import console
from gpu_model_launches import POOL, POOL_BACKWARD, Cost, Kind, cost_of, launches_of
from gpu_primitives import BACKWARD, FORWARD, Problem, block_problems
from gpu_text import table
from provenance import commit
from rich.table import Table

RATES = (0.5, 0.7)
"""Instructions that a scheduler is assumed to issue in a cycle: of one warp, and of two and more."""
LAUNCH = 2.5
"""Microseconds that a launch in a CUDA graph is assumed to take at least."""


class Gpu(NamedTuple):
    """``clock`` in GHz; bytes per second of memory (0.9 of the published) and of the second-level cache, multiplications
    and additions per second of bfloat16 products, as large ones reach them: all assumed."""

    kind: Kind
    clock: float
    memory: float
    cache: float
    products: float


_HOPPER = Kind("90a", 132, 227 << 10, 90)
GPUS = {
    "H100": Gpu(_HOPPER, 1.755, 3.0e12, 5.5e12, 798e12),
    "H200": Gpu(_HOPPER, 1.755, 4.3e12, 5.5e12, 798e12),
    "A100": Gpu(Kind("80", 108, 163 << 10, 80), 1.41, 1.84e12, 3.6e12, 250e12),
}


class Prediction(NamedTuple):
    """Of a primitive: microseconds, launches, and what the launch that multiplies (or the first) is like."""

    microseconds: float
    floor: float
    launches: int
    main: Cost

    @property
    def waves(self) -> str:
        return f"{self.main.blocks} × {self.main.threads}"


def microseconds(cost: Cost, moved: int, flops: int, gpu: Gpu) -> float:
    """Of a launch."""
    busiest = math.ceil(cost.blocks / gpu.kind.multiprocessors)
    warps = cost.threads / 32 / 4  # of a block, for each scheduler
    rate = RATES[min(cost.resident, busiest) * warps >= 2]
    issue = busiest * warps * sum(cost.instructions.values()) / rate / (gpu.clock * 1e3)
    return max(issue, moved / gpu.memory * 1e6, cost.requested / gpu.cache * 1e6, flops / gpu.products * 1e6, LAUNCH)


def predict(problem: Problem, gpu: Gpu) -> Prediction:
    costs = [cost_of(launch, problem, gpu.kind) for launch in launches_of(problem, gpu.kind)]
    main = max(costs, key=lambda cost: (cost.products, cost.requested))
    moved, flops = problem.moved(2, 4), problem.flops()
    total = 0.0
    for cost in costs:
        if cost is main:
            total += microseconds(cost, min(moved, cost.requested), flops, gpu)
        else:
            total += microseconds(cost, cost.requested, 0, gpu)
    floor = max(moved / gpu.memory, flops / gpu.products) * 1e6
    return Prediction(total, floor, len(costs), main)


Groups = dict[str, list[Problem]]


def groups(network: Architecture, batch: int, image: int) -> Groups:
    """The primitives of a training step: of each block by kind, of its transition, of the stem."""
    found: Groups = {}
    channels, scale = network.num_init_features, 4
    stem = (batch, 1, image // 2, image // 2)
    found["stem"] = [Problem(primitive, stem, channels, channels, 0) for primitive in (POOL, POOL_BACKWARD)]
    for number, layers in enumerate(network.block_config, 1):
        for problem in block_problems(batch, image // scale, layers, channels):
            kind = f"{problem.side}×{problem.side}" if problem.side else problem.primitive
            direction = {FORWARD: "forward ", BACKWARD: "backward "}.get(problem.primitive, "")
            found.setdefault(f"block {number}, {direction}{kind}", []).append(problem)
        channels += layers * network.growth_rate
        if number < len(network.block_config):
            pixels = (batch, 1, image // scale, image // scale)
            both = [Problem(p, pixels, channels, channels // 2, 1, pool=True) for p in (FORWARD, BACKWARD)]
            found[f"transition {number}"] = both
            channels, scale = channels // 2, 2 * scale
    return found


def predictions(problems: list[Problem], gpu: Gpu) -> list[Prediction]:
    """Of many layers that differ in their channels the first, the middle and the last; between them along a line."""
    if len({problem._replace(C=0) for problem in problems}) > 1 or len(problems) < 4:
        known = {problem: predict(problem, gpu) for problem in set(problems)}
        return [known[problem] for problem in problems]
    picked = [0, len(problems) // 2, len(problems) - 1]
    at = {i: predict(problems[i], gpu) for i in picked}
    found = []
    for i in range(len(problems)):
        low, high = (picked[0], picked[1]) if i < picked[1] else (picked[1], picked[2])
        share = (i - low) / (high - low)
        between = (1 - share) * at[low].microseconds + share * at[high].microseconds
        floor = (1 - share) * at[low].floor + share * at[high].floor
        found.append(at.get(i, at[low]._replace(microseconds=between, floor=floor)))
    return found


def model(names: Iterable[str], batches: Iterable[int], gpus: Iterable[str], image: int) -> Iterator[dict[str, Any]]:
    """A row for each group of primitives of each step."""
    for gpu in gpus:
        for name in names:
            for batch in batches:
                for group, problems in groups(NETWORKS[name], batch, image).items():
                    found = predictions(problems, GPUS[gpu])
                    middle = found[len(found) // 2].main
                    yield {
                        "gpu": gpu,
                        "network": name,
                        "batch": batch,
                        "group": group,
                        "calls": len(problems),
                        "launches": sum(p.launches for p in found),
                        "bytes": sum(p.moved(2, 4) for p in problems),
                        "flops": sum(p.flops() for p in problems),
                        "kernel": middle.kernel,
                        "blocks": middle.blocks,
                        "threads": middle.threads,
                        "waves": middle.blocks / (middle.resident * GPUS[gpu].kind.multiprocessors),
                        "instructions": by_kind(middle.instructions),
                        "predicted_microseconds": sum(p.microseconds for p in found),
                        "floor_microseconds": sum(p.floor for p in found),
                        "of_primitives": {
                            str(problem): prediction.microseconds
                            for problem, prediction in zip(problems, found, strict=True)
                        },
                    }


KINDS = {
    "products": ("mma",),
    "shared memory": ("ldmatrix", "cp"),
    "memory": ("ld", "st"),
    "floating point": ("add", "sub", "mul", "fma", "cvt", "max", "min", "neg", "sqrt", "rcp", "div"),
    "exchange": ("shfl", "bar"),
}


def by_kind(instructions: Counter[str]) -> dict[str, int]:
    """Of a warp; arithmetic of indices, comparisons and moves are the rest."""
    found = {kind: sum(instructions[op] for op in ops) for kind, ops in KINDS.items()}
    return {**found, "rest": sum(instructions.values()) - sum(found.values())}


PARTS = ("blocks", "transitions", "stem")


def part(row: dict[str, Any]) -> str:
    return {"block": "blocks", "transition": "transitions"}.get(row["group"].split()[0], "stem")


def sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a step's parts, in milliseconds."""
    found = []
    for key in dict.fromkeys((row["gpu"], row["network"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["gpu"], row["network"], row["batch"]) == key]
        line: dict[str, Any] = dict(zip(("gpu", "network", "batch"), key, strict=True))
        for name in PARTS:
            line[name] = sum(row["predicted_microseconds"] for row in here if part(row) == name) / 1e3
            line[f"{name}, floor"] = sum(row["floor_microseconds"] for row in here if part(row) == name) / 1e3
        line["launches"] = sum(row["launches"] for row in here)
        found.append(line)
    return found


HEADER = ("prediction", "launches", *(f"{name}, ms {what}" for name in PARTS for what in ("predicted", "floor")))


def sum_cells(line: dict[str, Any]) -> list[str]:
    values = [f"{line[key]:.2f}" for name in PARTS for key in (name, f"{name}, floor")]
    return [f"{line['gpu']}, {line['network']}, batch {line['batch']}", str(line["launches"]), *values]


DETAIL = (
    "",
    "calls",
    "launches",
    "MB",
    "GFLOP",
    "blocks × threads",
    "waves",
    *KINDS,
    "rest",
    "µs predicted",
    "µs floor",
)


def detail_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["group"],
        str(row["calls"]),
        str(row["launches"]),
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['flops'] / 1e9:.0f}",
        f"{row['blocks']} × {row['threads']}",
        f"{row['waves']:.1f}",
        *map(str, row["instructions"].values()),
        f"{row['predicted_microseconds']:.0f}",
        f"{row['floor_microseconds']:.0f}",
    ]


def markdown(rows: list[dict[str, Any]], made: str) -> str:
    first = [row for row in rows if (row["gpu"], row["network"], row["batch"]) == ("H100", "densenet121", 64)] or rows
    about = "{gpu}, {network}, batch {batch}".format(**first[0])
    doc = (__doc__ or "").split("\n\n", 2)
    return (
        "\n\n".join(
            [
                "# Predicted times on GPUs",
                f"Nothing here was measured: these are predictions of `benchmarks/gpu_model.py`, made at commit {made}. "
                "bfloat16 data, float32 parameters, images of 224 × 224, a training step's dense blocks, transitions and "
                "stem; what torch does beside them is not in it. " + doc[2].strip().replace(":data:", ""),
                f"Assumed: {RATES[1]} instructions a cycle and scheduler ({RATES[0]} where it has one warp), {LAUNCH} µs a "
                "launch at least, and of each GPU "
                + "; ".join(
                    f"{name}: {gpu.kind.multiprocessors} multiprocessors at {gpu.clock} GHz, {gpu.memory / 1e12:.2f} TB/s, "
                    f"cache {gpu.cache / 1e12:.1f} TB/s, {gpu.products / 1e12:.0f} TFLOP/s"
                    for name, gpu in GPUS.items()
                )
                + ".",
                table(HEADER, map(sum_cells, sums(rows))),
                f"## Predicted: {about}",
                "Instructions are of one warp of the kernel that multiplies, in the group's middle layer, by nvcc's PTX, "
                "branches aside.",
                table(DETAIL, map(detail_cells, first)),
            ]
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["densenet121", "densenet201"], choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64, 256])
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=GPUS)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=pathlib.Path, metavar="FILE", help="write the tables")
    args = parser.parse_args()
    rows = list(model(args.networks, args.batches, args.gpus, args.size))
    for title, header, lines in (
        ("Predictions, none measured: training steps", HEADER, map(sum_cells, sums(rows))),
        (
            "Predictions: {gpu}, {network}, batch {batch}".format(**rows[0]),
            DETAIL,
            map(detail_cells, rows[: len(groups(NETWORKS[args.networks[0]], 1, 224))]),
        ),
    ):
        printed = Table(title=title)
        for i, name in enumerate(header):
            printed.add_column(name, justify="right" if i else "left")
        for cells in lines:
            printed.add_row(*cells)
        console.print(printed)
    made = commit() or "unknown"
    if args.json:
        args.json.write_text(
            json.dumps({"about": "predictions, none measured", "commit": made, "rows": rows}, indent=1) + "\n"
        )
    if args.markdown:
        args.markdown.write_text(markdown(rows, made))


if __name__ == "__main__":
    main()
