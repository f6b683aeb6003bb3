"""What DenseNet and CSPNet claim, measured: a table, a picture and JSON for each claim.

    python benchmarks/claims.py --output claims

Counts are of the networks as published; everything that needs training is trained here on scikit-learn's handwritten
digits (real images) from three seeds, each network beside the one that it is compared with. ``--quick`` does the same
with shallower networks and fewer steps: a check that everything runs, its figures say nothing.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import claims_plots as plots
import numpy as np
import torch
from claims_csp import duplication
from claims_measure import (
    decades,
    feature_rank,
    feature_reuse,
    layer_gradients,
    multiply_adds,
    parameters,
    seen_features,
    spread,
)
from claims_networks import PUBLISHED, Pair, digits_network, plain_twin
from claims_training import COMPARED, FULL, QUICK, Advance, Digits, Settings, Trained, load_digits, train, train_all
from common import console, save_plot
from options import folder
from provenance import describe, environment
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from fused_densenet import reference

FLOW = ("plain", "ResNet", "DenseNet")


def efficiency(settings: Settings, advance: Advance) -> dict[str, Any]:
    """Parameters and multiply-adds as published, and what one more layer costs."""
    rows: list[dict[str, Any]] = []
    for name, known in PUBLISHED.items():
        with torch.device("meta"):
            network = known.build()
        count, macs = parameters(network), multiply_adds(network, 1, 3, known.size, known.size)
        exact = isinstance(known.parameters, int)
        shown = count if exact else f"{count / 1e6:.1f}"
        rows.append(
            {
                "network": name,
                "source": known.source,
                "parameters": count,
                "published_parameters": known.parameters,
                "parameters_agree": None if known.parameters is None else shown == known.parameters,
                "macs": macs,
                "published_macs": None if known.macs is None else known.macs * 1e9,
                "macs_ratio": None if known.macs is None else macs / known.macs / 1e9,
                "published_error": known.error,
            }
        )
        advance()
    table = Table(title="Parameters and multiply-adds of one image, counted and published")
    for column in ("network", "parameters", "published", "10⁶ multiply-adds", "published", "ratio"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        published, macs = row["published_parameters"], row["published_macs"]
        table.add_row(
            row["network"],
            f"{row['parameters']:,}",
            "–" if published is None else f"{published:,}" if isinstance(published, int) else f"{published} M",
            f"{row['macs'] / 1e6:,.0f}",
            "–" if macs is None else f"{macs / 1e6:,.0f}",
            "–" if macs is None else f"{row['macs_ratio']:.4f}",
        )
    cost = layer_cost()
    console.print(table)
    console.print(
        f"One more layer: DenseNet {cost['dense_slope']:.4f}·l·k² + {cost['dense_constant']:.0f}·k, "
        f"ResNet {cost['residual_constant']:.4f}·C² {cost['residual_slope']:+.4f}·l multiply-adds per pixel and tap "
        f"(fitted; exponents of k and C: {cost['exponent_k']:.4f}, {cost['exponent_c']:.4f})",
        highlight=False,
    )
    return {"networks": rows, "layer_cost": cost}


def layer_cost(size: int = 8, depth: int = 12) -> dict[str, Any]:
    """Multiply-adds of the l-th layer per pixel and tap of a 3x3 convolution, from torch's counts of whole blocks.

    A DenseNet layer reads ``C_0 + (l - 1) k`` maps and writes k: ``(l - 1) k k + C_0 k``. A ResNet layer of constant
    width reads and writes C maps: ``C C``; its layers come in pairs. Straight lines are fitted through the costs.
    """

    def counted(block: Callable[[int], nn.Module], channels: int) -> list[float]:
        with torch.device("meta"):
            totals = [0, *(multiply_adds(block(n), 1, channels, size, size) for n in range(1, depth + 1))]
        return [(b - a) / (9 * size * size) for a, b in itertools.pairwise(totals)]

    def dense(k: int) -> list[float]:
        return counted(lambda n: reference.DenseBlock(n, 16, None, k), 16)

    def residual(c: int) -> list[float]:
        pairs = counted(lambda n: nn.Sequential(*(Pair(c, True) for _ in range(n))), c)
        return [cost / 2 for cost in pairs]

    layers = np.arange(depth)
    widths = (8, 16, 32)
    dense_fits = [np.polyfit(layers, dense(k), 1) for k in widths]
    residual_fits = [np.polyfit(layers, residual(c), 1) for c in widths]
    exponent_k = np.polyfit(np.log(widths), np.log([fit[0] for fit in dense_fits]), 1)[0]
    exponent_c = np.polyfit(np.log(widths), np.log([fit[1] for fit in residual_fits]), 1)[0]
    return {
        "widths": widths,
        "dense": {k: dense(k) for k in widths},
        "residual": {c: residual(c) for c in widths},
        "dense_slope": dense_fits[1][0] / widths[1] ** 2,
        "dense_constant": dense_fits[1][1] / widths[1],
        "residual_constant": residual_fits[1][1] / widths[1] ** 2,
        "residual_slope": residual_fits[1][0],
        "exponent_k": exponent_k,
        "exponent_c": exponent_c,
    }


def gradient_flow(settings: Settings, digits: Digits, advance: Advance) -> dict[str, Any]:
    """Gradient norms of every layer at initialisation and after some training steps."""
    rows: list[dict[str, Any]] = []
    for depth in settings.flow_depths:
        for name in FLOW:
            for seed in settings.seeds:
                torch.manual_seed(seed)
                network = digits_network(name, depth, settings.flow_growth_rate)
                for when, steps in (("initialisation", 0), ("training", settings.flow_steps)):
                    losses = train(network, digits, steps, seed=seed, on_step=advance)
                    twin = plain_twin(name, network, depth, settings.flow_growth_rate)
                    found = layer_gradients(twin, digits.images[:128], digits.labels[:128])
                    rows.append(
                        {
                            "network": name,
                            "depth": depth,
                            "seed": seed,
                            "when": when,
                            "steps": steps,
                            "loss": losses[-1] if losses else None,
                            "output": [n.output for n in found],
                            "weight": [n.weight for n in found],
                            "kernel": [n.kernel for n in found],
                        }
                    )
    table = Table(
        title="Gradient flow",
        caption="3x3 layers: powers of ten between the smallest and the largest; geometric mean of the first third / of the last",
    )
    for column in ("depth", "network", "when", "by outputs", "first/last", "by weights", "first/last", "loss"):
        table.add_column(column, justify="right" if "/" in column or "by" in column else "left")
    for depth in settings.flow_depths:
        for when in ("initialisation", "training"):
            for name in FLOW:
                group = [r for r in rows if (r["depth"], r["when"], r["network"]) == (depth, when, name)]
                cells = []
                for kind in ("output", "weight"):
                    norms = [[n for n, k in zip(r[kind], r["kernel"], strict=True) if k == 3] for r in group]
                    cells += [spread([decades(n) for n in norms]), spread([_thirds(n) for n in norms], ".2g")]
                loss = spread([r["loss"] for r in group]) if group[0]["loss"] is not None else "–"
                table.add_row(str(depth), name, when, *cells, loss)
    console.print(table)
    return {"rows": rows}


def _thirds(norms: Sequence[float]) -> float:
    third = len(norms) // 3
    return float(np.exp(np.mean(np.log(norms[:third])) - np.mean(np.log(norms[-third:]))))


def reuse(settings: Settings, trained: Trained) -> dict[str, Any]:
    """Figure 5 of the DenseNet paper, and its four observations in numbers, beside the network before training."""
    tables: dict[str, list[list[torch.Tensor]]] = {state: [] for state in ("trained", "untrained", "learned")}
    rows: list[dict[str, Any]] = []
    for seed in settings.seeds:
        torch.manual_seed(seed)
        network, start = (
            trained.networks["DenseNet", seed],
            digits_network("DenseNet", settings.depth, settings.growth_rate),
        )
        found = (feature_reuse(network), feature_reuse(start), feature_reuse(network, start))
        for blocks, state in zip(found, tables, strict=True):
            tables[state].append(blocks)
        rows.append({"seed": seed, **{state: _observations(tables[state][-1]) for state in tables}})
    table = Table(
        title="Feature reuse: figure 5's observations",
        caption="mean absolute weights of a DenseNet before and after training, and of what training added",
    )
    for column in ("observation", *tables):
        table.add_column(column, justify="left" if column == "observation" else "right")
    for key, text in OBSERVATIONS.items():
        table.add_row(text, *(spread([row[state][key] for row in rows]) for state in tables))
    console.print(table)
    means = {s: [torch.stack(b).mean(0).tolist() for b in zip(*tables[s], strict=True)] for s in ("trained", "learned")}
    return {"rows": rows, "mean_absolute_weight": means["trained"], "mean_absolute_change": means["learned"]}


OBSERVATIONS = {
    "spread": "1. sources that a layer spreads its weight over (effective number / number)",
    "early": "1. weight on the first half of the sources / on the second half",
    "transition": "2. the same ratio for the transitions",
    "first_source": "3. weight on the block's input / on its layers, blocks 2 and 3",
    "classifier": "4. the classifier's weight on the last third of the maps / on the first third",
}


def _observations(blocks: Sequence[torch.Tensor]) -> dict[str, float]:
    columns = [table[: t + 1, t] for table in blocks for t in range(1, len(table) - 1)]
    spreads = [float(torch.exp(-torch.xlogy(p, p).sum())) / len(p) for c in columns for p in [c / c.sum()]]
    readers = [table[:, -1] for table in blocks]
    later = [
        (c[0] / c[1:].mean()).item() for table in blocks[1:] for t in range(1, len(table)) for c in [table[: t + 1, t]]
    ]
    last = readers[-1]
    third = len(last) // 3
    return {
        "spread": statistics.mean(spreads),
        "early": statistics.mean(_halves(c) for c in columns),
        "transition": statistics.mean(_halves(c) for c in readers[:-1]),
        "first_source": statistics.mean(later),
        "classifier": (last[-third:].mean() / last[:third].mean()).item(),
    }


def _halves(column: torch.Tensor) -> float:
    half = len(column) // 2
    return (column[:half].mean() / column[-half:].mean()).item()


def diversity(settings: Settings, trained: Trained) -> dict[str, Any]:
    """Effective rank of what the blocks pass on and of what the classifier sees, on the test images."""
    rows: list[dict[str, Any]] = []
    for (name, seed), network in trained.networks.items():
        for place, features in seen_features(network, trained.digits.test_images).items():
            channels = features.shape[1]
            rank = feature_rank(features)
            rows.append({"network": name, "seed": seed, "place": place, "channels": channels, "effective_rank": rank})
    table = Table(title="Diverse features", caption="effective rank, in brackets its share of the channels")
    for column in ("network", "block 1", "block 2", "block 3", "classifier"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in COMPARED:
        cells = []
        for place in ("block 1", "block 2", "block 3", "classifier"):
            group = [r for r in rows if (r["network"], r["place"]) == (name, place)]
            share = statistics.mean(r["effective_rank"] for r in group) / group[0]["channels"]
            cells.append(
                f"{spread([r['effective_rank'] for r in group], '.1f')} of {group[0]['channels']} ({share:.2f})"
            )
        table.add_row(name, *cells)
    console.print(table)
    return {"rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=folder, default="claims", metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="small networks, few steps: a check that everything runs")
    args = parser.parse_args(arguments)
    settings = QUICK if args.quick else FULL
    digits = load_digits()
    runs = len(settings.seeds)
    work = {
        "efficiency": len(PUBLISHED),
        "gradient flow": len(settings.flow_depths) * len(FLOW) * runs * settings.flow_steps,
        "training": len(COMPARED) * runs * settings.steps,
        "duplicate gradients": 2 * runs + 4 * len(settings.imagenet),
    }
    begin = time.perf_counter()
    columns = (TextColumn("{task.description:20}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {name: progress.add_task(name, total=total, start=False) for name, total in work.items()}

        def advance(name: str) -> Advance:
            progress.start_task(tasks[name])
            return lambda: progress.advance(tasks[name])

        results: dict[str, Any] = {"efficiency": efficiency(settings, advance("efficiency"))}
        results["gradient_flow"] = gradient_flow(settings, digits, advance("gradient flow"))
        trained = train_all(settings, digits, advance("training"))
        results["feature_reuse"] = reuse(settings, trained)
        results["diverse_features"] = diversity(settings, trained)
        results["duplicate_gradients"] = duplication(settings, trained, advance("duplicate gradients"))
    for name, result in results.items():
        save_plot(getattr(plots, name)(result), args.output / f"{name}.png")
    where = environment(torch.device("cpu"), torch.float32)
    seconds = time.perf_counter() - begin
    document = {**where, "quick": args.quick, "settings": settings._asdict(), "seconds": seconds, "claims": results}
    (args.output / "claims.json").write_text(json.dumps(document, indent=1) + "\n")
    console.print("Memory, measured from the allocator: python benchmarks/memory.py", highlight=False)
    console.print(describe(where), f"{seconds:.0f} s; pictures and claims.json in {args.output}", highlight=False)


if __name__ == "__main__":
    main()
