"""What a fused network costs on the host beside torchvision's: DenseNet-121's depth at a width where arithmetic is next to
nothing, one thread, both networks in turns in one process.

A step is forward and backward; clearing gradients and the optimizer are left out. Parts of a fused step are taken in
rounds of their own, by timing what is called: ``modules and gate`` is ``FusedFeatures.forward`` up to where the network runs
as one (torch's own first convolution in it), ``look`` of that the look at everything that a user may have changed since the
last call; ``autograd`` the differentiable function, its allocations in it; ``program`` what puts a program's operands together,
``kernels`` the C++ that runs it; ``statistics`` the running statistics. What is left is torch's: its engine, the
accumulation of gradients, what comes after the dense blocks.
"""

import argparse
import collections
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import options
import torch
from baselines import torchvision_densenets
from common import console, plot_axes, save_plot, write_json
from provenance import describe, environment
from rich.table import Table
from timing import spread
from torch import nn

import fused_densenet
from fused_densenet.backends import BACKENDS
from fused_densenet.fallback import standing
from fused_densenet.nn import stem
from fused_densenet.ops import network, network_parameters, network_step, operator

GROWTH_RATE, BLOCKS, STEM = 4, (6, 12, 24, 16), 8
MODES = ("training step", "inference")


def networks() -> dict[str, nn.Module]:
    densenet = torchvision_densenets().DenseNet
    theirs = densenet(growth_rate=GROWTH_RATE, block_config=BLOCKS, num_init_features=STEM)
    ours = densenet(growth_rate=GROWTH_RATE, block_config=BLOCKS, num_init_features=STEM)
    ours.load_state_dict(theirs.state_dict())
    return {"torchvision": theirs, "fused": fused_densenet.fuse(ours)}


def train(model: nn.Module, x: torch.Tensor) -> None:
    model(x).sum().backward()


@torch.no_grad()
def infer(model: nn.Module, x: torch.Tensor) -> None:
    model(x)


def once(mode: str, model: nn.Module, x: torch.Tensor) -> float:
    """Milliseconds of this thread."""
    run = train if mode == "training step" else infer
    model.train(mode == "training step")
    for parameter in model.parameters():
        parameter.grad = None
    start = time.thread_time()
    run(model, x)
    return (time.thread_time() - start) * 1e3


@contextlib.contextmanager
def timed_parts(spent: dict[str, float]) -> Iterator[None]:
    """Inside, milliseconds in each part are added to ``spent``."""

    def clocked(part: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(whole)
        def call(*args: Any) -> Any:
            start = time.thread_time()
            result = whole(*args)
            spent[part] = spent.get(part, 0.0) + (time.thread_time() - start) * 1e3
            return result

        return call

    places: list[tuple[str, Any, str]] = [
        ("features", stem.FusedFeatures, "forward"),
        ("network", network.Network, "__call__"),
        ("network", network_step.NetworkStep, "__call__"),
        ("backward", operator._Function, "backward"),
        ("execute", network, "execute"),
        ("execute", network_step, "execute"),
        ("execute", network_parameters, "execute"),
        ("kernels", BACKENDS["cpu"], "run_program"),
        ("whole", BACKENDS["cpu"], "run_network"),
        ("statistics", BACKENDS["cpu"], "update_running"),
        ("look", standing.Standing, "holds"),
    ]
    with contextlib.ExitStack() as stack:
        for part, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, clocked(part, getattr(owner, name))))
        yield


def parts_of(spent: dict[str, float]) -> dict[str, float]:
    """Of times that contain one another, those that do not; but for ``look``, which is part of the first."""
    found = collections.defaultdict(float, spent)
    return {
        "modules and gate": found["features"] - found["network"] - found["statistics"],
        "look": found["look"],
        "autograd": found["network"] + found["backward"] - found["execute"] - found["whole"],
        "program": found["execute"] - found["kernels"],
        "kernels": found["kernels"] + found["whole"],
        "statistics": found["statistics"],
    }


def measure(rounds: int, size: int, batch: int) -> list[dict[str, Any]]:
    models, x, rows = networks(), torch.randn(batch, 3, size, size), []
    for mode in MODES:
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(rounds + 3):
            for name, model in models.items():
                elapsed = once(mode, model, x)
                if number >= 3:
                    times[name].append(elapsed)
        parts: list[dict[str, float]] = []
        for _ in range(rounds):
            once(mode, models["torchvision"], x)
            spent: dict[str, float] = {}
            with timed_parts(spent):
                once(mode, models["fused"], x)
            parts.append(parts_of(spent))
        ratios = [ours / theirs for ours, theirs in zip(times["fused"], times["torchvision"], strict=True)]
        rows.append(
            {
                "mode": mode,
                "batch": batch,
                "size": size,
                "milliseconds": {name: statistics.median(values) for name, values in times.items()},
                "ratio": spread(ratios),
                "parts": {part: statistics.median(p[part] for p in parts) for part in parts[0]},
                "rounds": times,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(
        title="host time of a network without arithmetic, one thread", caption="medians; ratios within a round"
    )
    for heading in ("", "torchvision, ms", "fused, ms", "fused / torchvision", "of which, ms"):
        result.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        ratio, ms = row["ratio"], row["milliseconds"]
        result.add_row(
            row["mode"],
            f"{ms['torchvision']:.2f}",
            f"{ms['fused']:.2f}",
            f"[bold]{ratio['median']:.2f}[/] ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})",
            ", ".join(f"{part} {value:.2f}" for part, value in row["parts"].items()),
        )
    return result


def draw(rows: list[dict[str, Any]]) -> Any:
    figure, axes = plot_axes(1, 1, figsize=(6, 3))
    labels = [f"{row['mode']}, {name}" for row in rows for name in row["milliseconds"]]
    axes.barh(labels, [value for row in rows for value in row["milliseconds"].values()], color="#2a6f97")
    axes.set_xlabel("ms on the host")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=options.positive, default=40)
    parser.add_argument("--size", type=options.positive, default=32)
    parser.add_argument("--batch", type=options.positive, default=2)
    options.add_output_options(parser)
    args = parser.parse_args()
    options.check_image(parser, args.size, len(BLOCKS), args.batch)
    torch.set_num_threads(1)
    rows = measure(args.rounds, args.size, args.batch)
    where = environment(torch.device("cpu"), torch.float32)
    console.print(table(rows))
    console.print(describe(where), highlight=False)
    if args.json:
        write_json(args.json, where, rows)
    if args.plot:
        save_plot(draw(rows), args.plot)


if __name__ == "__main__":
    main()
