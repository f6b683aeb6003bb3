"""A prediction of a DenseNet's training step on GPUs that nobody measured, from what its CUDA kernels would execute.

    python benchmarks/gpu_model.py --json docs/gpu_model.json --markdown docs/gpu-model.md

For each primitive the kernels' own host code says the launches, their blocks and what fits on a multiprocessor;
nvcc's PTX, executed for one block, says the instructions of a warp. They are added up for two situations: a network, whose
blocks, transitions and stem are one function, so that what precedes a block writes into its buffer; and its blocks alone,
as gpu_report.py measures them, each with its input placed in the buffer, its result's gradient in another, and its input's
gradient out of that. Weights are prepared once for a program, 32 calls by a launch: four launches of a network, one or two
of a block, none in backward. A launch takes as long as the longest of

- the instructions of a multiprocessor's blocks, at an assumed rate of issue: :data:`RATES` for each of four schedulers;
- the bytes that must move once, at 0.9 of the memory's bandwidth; what its blocks ask for, at that of the cache;
- its multiplications at the rate of a large matrix product; :data:`LAUNCH` microseconds.

What the last block of a launch does after the others, which merges moments and adds splits, is not in it. What kernels
read is zero where they are counted: the stem's backward, which adds the gradients of maxima alone, adds none.

Every figure that comes out is a prediction and is called one; none was measured. The floor beside it is what
gpu_report.py measures against: bytes once, or multiplications.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import options
from baselines import NETWORKS, Architecture
from checkout import commit
from common import console
from gpu_model_launches import PREPARED_TOGETHER, Cost, Kind, cost_of, launches_of, together
from gpu_primitives import (
    BACKWARD,
    FORWARD,
    MOMENTS,
    PLACE_BACKWARD,
    POOL,
    POOL_BACKWARD,
    Problem,
    block_problems,
    layer_problems,
)
from gpu_text import table
from ptx_launch import Launch
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
    """Of a primitive: microseconds, launches by kernel, and what the launch that multiplies (or the first) is like; beside
    them what it has prepared, alone or with others."""

    microseconds: float
    floor: float
    launches: Counter[str]
    main: Cost
    prepared: Cost | None


def microseconds(cost: Cost, moved: int, flops: int, gpu: Gpu) -> float:
    """Of a launch."""
    busiest = math.ceil(cost.blocks / gpu.kind.multiprocessors)
    warps = cost.threads / 32 / 4  # of a block, for each scheduler
    rate = RATES[min(cost.resident, busiest) * warps >= 2]
    issue = busiest * warps * sum(cost.instructions.values()) / rate / (gpu.clock * 1e3)
    return max(issue, moved / gpu.memory * 1e6, cost.requested / gpu.cache * 1e6, flops / gpu.products * 1e6, LAUNCH)


def predict(problem: Problem, gpu: Gpu) -> Prediction:
    costs = [cost_of(launch, problem, gpu.kind) for launch in launches_of(problem, gpu.kind)]
    prepared = costs.pop(0) if costs[0].kernel == PREPARE else None
    main = max(costs, key=lambda cost: (cost.products, cost.requested))
    moved, flops = problem.moved(2, 4), problem.flops()
    total = 0.0
    for cost in costs:
        if cost is main:
            total += microseconds(cost, min(moved, cost.requested), flops, gpu)
        else:
            total += microseconds(cost, cost.requested, 0, gpu)
    floor = max(moved / gpu.memory, flops / gpu.products) * 1e6
    return Prediction(total, floor, Counter(cost.kernel for cost in costs), main, prepared)


PREPARE = "prepare_kernel"


def preparation(program: list[Problem], gpu: Gpu) -> list[Prediction]:
    """Of a program's weights and counters, by launch; the floor is that of the calls which they are for."""
    costs = [
        cost_of(launch, p, gpu.kind) for p in program for launch in launches_of(p, gpu.kind)[:1] if _prepares(launch)
    ]
    batches = [costs[i : i + PREPARED_TOGETHER] for i in range(0, len(costs), PREPARED_TOGETHER)]
    launches = map(together, batches)
    return [Prediction(microseconds(c, c.requested, 0, gpu), 0.0, Counter([PREPARE]), c, None) for c in launches]


def _prepares(launch: Launch) -> bool:
    return PREPARE in launch.kernel


Groups = dict[str, list[Problem]]
NETWORK, ALONE = "in a network", "blocks alone"
SITUATIONS = (NETWORK, ALONE)
PREPARATION = "blocks and transitions, preparation"


def groups(network: Architecture, batch: int, image: int, situation: str) -> Groups:
    """The primitives of a training step: of each block by kind, of its transition, of the stem, of the last norm.

    In a network the stem's input has its moments taken, as has the first block's, and gradients are paid where they leave
    both. What stands beside the groups, :data:`PREPARATION`, follows from them.
    """
    found: Groups = {}
    channels, scale, last = network.num_init_features, 4, len(network.block_config)

    def image_of(scale: int) -> tuple[int, int, int, int]:
        return (batch, 1, image // scale, image // scale)

    def of_stem(primitive: str, scale: int) -> Problem:
        return Problem(primitive, image_of(scale), channels, channels, 0, pool=primitive in (POOL, POOL_BACKWARD))

    if situation == NETWORK:
        order = (MOMENTS, 2), (POOL, 2), (PLACE_BACKWARD, 4), (POOL_BACKWARD, 2), (PLACE_BACKWARD, 2)
        found["stem"] = [of_stem(*one) for one in order]
        found["block 1, moments of its input"] = [of_stem(MOMENTS, 4)]
    of_block = layer_problems if situation == NETWORK else block_problems
    for number, layers in enumerate(network.block_config, 1):
        for problem in of_block(batch, image // scale, layers, channels):
            kind = f"{problem.side}×{problem.side}" if problem.side else problem.primitive
            direction = {FORWARD: "forward ", BACKWARD: "backward "}.get(problem.primitive, "")
            found.setdefault(f"block {number}, {direction}{kind}", []).append(problem)
        channels += layers * network.growth_rate
        if number < last:
            both = [Problem(p, image_of(scale), channels, channels // 2, 1, pool=True) for p in (FORWARD, BACKWARD)]
            if situation == NETWORK:
                found[f"transition {number}"] = both
            channels, scale = channels // 2, 2 * scale
    if situation == NETWORK:
        norms = [Problem(primitive, image_of(scale), channels, channels, 0) for primitive in (POOL, POOL_BACKWARD)]
        found["last norm"] = norms
    return found


def programs(found: Groups, situation: str) -> list[list[Problem]]:
    """The primitives that one preparation serves: of the network, or of each block."""
    if situation == NETWORK:
        return [[problem for problems in found.values() for problem in problems]]
    numbers = dict.fromkeys(group.partition(",")[0] for group in found)
    return [[p for group, problems in found.items() if group.startswith(f"{n},") for p in problems] for n in numbers]


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
    """A row for each group of primitives of each step, in both situations."""
    for gpu, name, batch, situation in itertools.product(gpus, names, batches, SITUATIONS):
        about = {"gpu": gpu, "network": name, "batch": batch, "situation": situation}
        found = groups(NETWORKS[name], batch, image, situation)
        for group, problems in found.items():
            predicted = predictions(problems, GPUS[gpu])
            alone = {
                str(problem): p.microseconds + _alone(p.prepared, GPUS[gpu])
                for problem, p in zip(problems, predicted, strict=True)
            }
            yield about | row(group, problems, predicted, GPUS[gpu]) | {"of_primitives": alone}
        prepared = [p for program in programs(found, situation) for p in preparation(program, GPUS[gpu])]
        yield about | row(PREPARATION, [], prepared, GPUS[gpu]) | {"of_primitives": {}}


def _alone(prepared: Cost | None, gpu: Gpu) -> float:
    """Microseconds of a preparation that serves one call."""
    return 0.0 if prepared is None else microseconds(prepared, prepared.requested, 0, gpu)


def row(group: str, problems: list[Problem], found: list[Prediction], gpu: Gpu) -> dict[str, Any]:
    middle = found[len(found) // 2].main
    return {
        "group": group,
        "calls": len(problems),
        "launches": sum((p.launches for p in found), Counter()),
        "bytes": sum(p.moved(2, 4) for p in problems),
        "flops": sum(p.flops() for p in problems),
        "kernel": middle.kernel,
        "blocks": middle.blocks,
        "threads": middle.threads,
        "waves": middle.blocks / (middle.resident * gpu.kind.multiprocessors),
        "instructions": by_kind(middle.instructions),
        "predicted_microseconds": sum(p.microseconds for p in found),
        "floor_microseconds": sum(p.floor for p in found),
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


PARTS = ("blocks", "transitions", "stem", "last norm")


def part(row: dict[str, Any]) -> str:
    """Preparation is counted with the blocks, which have nearly all of it."""
    first = row["group"].split()[0]
    return {"block": "blocks", "blocks": "blocks", "transition": "transitions"}.get(first, row["group"])


def sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a step's parts, in milliseconds."""
    found = []
    names = "gpu", "network", "batch", "situation"
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in names) == key]
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        for name in dict.fromkeys(map(part, here)):
            line[name] = sum(row["predicted_microseconds"] for row in here if part(row) == name) / 1e3
            line[f"{name}, floor"] = sum(row["floor_microseconds"] for row in here if part(row) == name) / 1e3
        line["launches"] = sum(sum(row["launches"].values()) for row in here)
        found.append(line)
    return found


HEADER = ("prediction", "launches", *(f"{name}, ms {what}" for name in PARTS for what in ("predicted", "floor")))


def sum_cells(line: dict[str, Any]) -> list[str]:
    values = [f"{line[key]:.2f}" if key in line else "" for name in PARTS for key in (name, f"{name}, floor")]
    return ["{gpu}, {network}, batch {batch}, {situation}".format(**line), str(line["launches"]), *values]


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
        str(sum(row["launches"].values())),
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['flops'] / 1e9:.0f}",
        f"{row['blocks']} × {row['threads']}",
        f"{row['waves']:.1f}",
        *map(str, row["instructions"].values()),
        f"{row['predicted_microseconds']:.0f}",
        f"{row['floor_microseconds']:.0f}",
    ]


class Before(NamedTuple):
    """What was said of earlier kernels, kept in the JSON file from one time to the next: sentences, and :func:`sums`."""

    sentences: Sequence[str] = ()
    sums: Sequence[dict[str, Any]] = ()

    def markdown(self) -> list[str]:
        table_of_sums = [table(HEADER, map(sum_cells, self.sums))] if self.sums else []
        return ["## Before", *self.sentences, *table_of_sums] if self.sentences else []


def markdown(rows: list[dict[str, Any]], made: str, before: Before) -> str:
    cases = (
        (s, [r for r in rows if (r["gpu"], r["network"], r["batch"]) == SHOWN and r["situation"] == s])
        for s in SITUATIONS
    )
    tables = [
        text
        for situation, chosen in cases
        for text in (
            "## Predicted: {}, {}, batch {}, {}".format(*SHOWN, situation),
            table(DETAIL, map(detail_cells, chosen)),
        )
        if chosen
    ]
    doc = (__doc__ or "").split("\n\n", 2)
    return (
        "\n\n".join(
            [
                "# Predicted times on GPUs",
                f"Nothing here was measured: these are predictions of `benchmarks/gpu_model.py`, made at commit {made}. "
                "bfloat16 data, float32 parameters, images of 224 × 224, a training step's dense blocks, transitions, stem "
                "and last norm; what updates running statistics, and what torch does beside them, is not in it. "
                + doc[2].strip().replace(":data:", ""),
                f"Assumed: {RATES[1]} instructions a cycle and scheduler ({RATES[0]} where it has one warp), {LAUNCH} µs a "
                "launch at least, and of each GPU "
                + "; ".join(
                    f"{name}: {gpu.kind.multiprocessors} multiprocessors at {gpu.clock} GHz, {gpu.memory / 1e12:.2f} TB/s, "
                    f"cache {gpu.cache / 1e12:.1f} TB/s, {gpu.products / 1e12:.0f} TFLOP/s"
                    for name, gpu in GPUS.items()
                )
                + ".",
                table(HEADER, map(sum_cells, sums(rows))),
                *before.markdown(),
                *tables,
                "Instructions are of one warp of the kernel that multiplies, in the group's middle layer, by nvcc's PTX, "
                "branches aside.",
            ]
        )
        + "\n"
    )


SHOWN = ("H100", "densenet121", 64)
"""The step whose groups the page shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["densenet121", "densenet201"], choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=options.positive, default=[8, 64, 256])
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), choices=GPUS)
    parser.add_argument("--size", type=options.positive, default=224, help="side of the images")
    parser.add_argument("--json", type=options.file, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=options.file, metavar="FILE", help="write the tables")
    args = parser.parse_args()
    options.check_image(parser, args.size, 4)
    rows = list(model(args.networks, args.batches, args.gpus, args.size))
    names = "gpu", "network", "batch"
    first = [row for row in rows if all(row[name] == rows[0][name] for name in names)]
    for title, header, lines in (
        ("Predictions, none measured: training steps", HEADER, map(sum_cells, sums(rows))),
        ("Predictions: {gpu}, {network}, batch {batch}".format(**rows[0]), DETAIL, map(detail_cells, first)),
    ):
        printed = Table(title=title)
        for i, name in enumerate(header):
            printed.add_column(name, justify="right" if i else "left")
        for cells in lines:
            printed.add_row(*cells)
        console.print(printed)
    made = commit() or "unknown"
    kept = json.loads(args.json.read_text()).get("before", {}) if args.json and args.json.exists() else {}
    before = Before(**kept)
    if args.json:
        about = {"about": "predictions, none measured", "commit": made, "before": before._asdict()}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(rows, made, before))


if __name__ == "__main__":
    main()
