"""CSPDenseNet beside DenseNet: duplicate gradient information, cost and accuracy."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from allocator import MIB, step_memory
from claims_measure import duplicate_gradients, multiply_adds, parameters, spread
from claims_networks import plain_twin
from claims_training import Advance, Settings, Trained
from common import console
from rich.table import Table
from torch import nn

import fused_densenet
from fused_densenet import reference
from fused_densenet.nn.densenet import CONFIGURATIONS


def duplication(settings: Settings, trained: Trained, advance: Advance) -> dict[str, Any]:
    """Duplicate gradient terms of DenseNet and CSPDenseNet, with what each costs and how well it does."""
    pair = ("DenseNet", "CSPDenseNet")
    digits, count = trained.digits, 128
    rows: list[dict[str, Any]] = []
    per_layer: dict[str, list[list[float]]] = {}
    for name in pair:
        for seed in settings.seeds:
            network = trained.networks[name, seed]
            twin = plain_twin(name, network, settings.depth, settings.growth_rate)
            found = duplicate_gradients(twin, digits.images[:count], digits.labels[:count])
            rows.append({"network": name, "seed": seed, **found._asdict()})
            del rows[-1]["per_layer"]
            per_layer[name] = [stage.tolist() for stage in found.per_layer]
            advance()
    costs = _training_costs(settings, trained, pair)
    imagenet = [row for name in settings.imagenet for row in _imagenet_costs(name, settings.kept_size, advance)]
    table = Table(title=f"Duplicate gradient information, digits, depth {settings.depth}, k = {settings.growth_rate}")
    for column in ("", *pair):
        table.add_column(column, justify="left" if not column else "right")
    for key, text in DUPLICATION.items():
        table.add_row(text, *(spread([r[key] for r in rows if r["network"] == name]) for name in pair))
    table.add_row("test accuracy, %", *(spread([100 * a for a in trained.accuracy[name]]) for name in pair))
    for key, text in COSTS.items():
        table.add_row(text, *(f"{costs[name][key]:,.1f}" for name in pair))
    console.print(table)
    table = Table(
        title="CSPDenseNet beside DenseNet, multiply-adds of one 224×224 image",
        caption=f"MiB kept for backward, one {settings.kept_size}×{settings.kept_size} image, float32",
    )
    kept = ("reference", "ours", "ours, memory_efficient")
    for column in ("network", "parameters", "10⁶ multiply-adds", *kept):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in imagenet:
        base = next(r for r in imagenet if r["layers"] == row["layers"])
        cells = [f"{row['parameters']:,} ({row['parameters'] / base['parameters'] - 1:+.1%})"]
        cells.append(f"{row['macs'] / 1e6:,.0f} ({row['macs'] / base['macs'] - 1:+.1%})")
        for key in kept:
            value = row["kept"].get(key)
            cells.append("–" if value is None else f"{value / MIB:.2f} ({value / base['kept'][key] - 1:+.1%})")
        table.add_row(row["network"], *cells)
    console.print(table)
    return {"rows": rows, "per_layer": per_layer, "costs": costs, "accuracy": trained.accuracy, "imagenet": imagenet}


DUPLICATION = {
    "terms": "n_c, layers whose weight gradients draw on a channel",
    "cosine": "likeness, |cosine| of their terms",
    "duplicates": "duplicates, n_c less the effective rank of the terms",
}
COSTS = {
    "parameters": "parameters",
    "macs": "10⁶ multiply-adds of one image",
    "saved_bytes": "kept for backward, MiB, batch 64",
    "peak_bytes": "peak of a training step, MiB, batch 64",
    "seconds": "training step, ms, batch 64, median",
}


def _training_costs(settings: Settings, trained: Trained, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of one training step on 64 digits; the networks take turns, the medians of their times count."""
    digits = trained.digits
    times: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, tuple[nn.Module, Callable[[], torch.Tensor]]] = {}
    for name in names:
        network = trained.networks[name, settings.seeds[0]].train()
        steps[name] = network, lambda n=network: F.cross_entropy(n(digits.images[:64]), digits.labels[:64])  # type: ignore
    for _ in range(12):
        for name, (_, loss) in steps.items():
            begin = time.perf_counter()
            loss().backward()
            times[name].append(time.perf_counter() - begin)
    result = {}
    for name, (network, loss) in steps.items():
        memory = step_memory(loss, functools.partial(network.zero_grad, set_to_none=True), torch.device("cpu"))
        twin = plain_twin(name, network, settings.depth, settings.growth_rate)
        result[name] = {
            "parameters": parameters(network),
            "macs": multiply_adds(twin, 1, *digits.images.shape[1:]) / 1e6,
            "saved_bytes": memory.saved_bytes / MIB,
            "peak_bytes": memory.peak_bytes / MIB,
            "seconds": 1e3 * statistics.median(times[name][2:]),
        }
    return result


def _imagenet_costs(layers: str, kept_size: int, advance: Advance) -> list[dict[str, Any]]:
    """Counts, for 224x224, of a DenseNet and its CSPDenseNets; for 121 layers what a real step keeps as well."""
    configuration = CONFIGURATIONS[layers]
    rows: list[dict[str, Any]] = []
    for fusion in (None, "first", "last", "both"):
        arguments = configuration if fusion is None else {**configuration, "fusion": fusion}
        plain = reference.DenseNet if fusion is None else reference.CSPDenseNet
        fused = fused_densenet.DenseNet if fusion is None else fused_densenet.CSPDenseNet
        with torch.device("meta"):
            network = plain(**arguments)
        row: dict[str, Any] = {"layers": layers, "fusion": fusion, "kept": {}}
        row["network"] = f"DenseNet-{layers}" if fusion is None else f"CSPDenseNet-{layers}, fusion {fusion}"
        row |= {"parameters": parameters(network), "macs": multiply_adds(network, 1, 3, 224, 224)}
        if layers == "121":
            row["kept"] = {
                "reference": _kept(plain(**arguments), kept_size),
                "ours": _kept(fused(**arguments), kept_size),
                "ours, memory_efficient": _kept(fused(**arguments, memory_efficient=True), kept_size),
            }
        rows.append(row)
        advance()
    return rows


def _kept(network: nn.Module, size: int) -> int:
    image = torch.randn(1, 3, size, size)
    release = functools.partial(network.zero_grad, set_to_none=True)
    return step_memory(lambda: network(image).logsumexp(1).sum(), release, torch.device("cpu")).saved_bytes
