"""The pictures of claims.py, one function per claim, each from the claim's results."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from common import COLOURS

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def efficiency(result: dict[str, Any]) -> Figure:
    """Published ImageNet error against counted parameters and multiply-adds; cost of one more layer."""
    figure, (by_parameters, by_macs, by_depth) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, key, unit, label in (
        (by_parameters, "parameters", 1e6, "parameters, 10⁶ (counted)"),
        (by_macs, "macs", 1e9, "multiply-adds of one image, 10⁹ (counted)"),
    ):
        for family in ("ResNet", "DenseNet"):
            rows = [r for r in result["networks"] if r["published_error"] and r["network"].startswith(family)]
            rows.sort(key=lambda r: r[key])
            x, y = [r[key] / unit for r in rows], [r["published_error"] for r in rows]
            axis.plot(x, y, "o-", color=COLOURS[family], label=family)
            for row, a, b in zip(rows, x, y, strict=True):
                depth = row["network"].split("-")[1].split(" ")[0]
                axis.annotate(depth, (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axis.set(xlabel=label, ylabel="ImageNet top-1 error, % (published by torchvision)")
        axis.legend()
    cost = result["layer_cost"]
    for family, letter in (("dense", "k"), ("residual", "C")):
        for width, style in zip(cost["widths"], (":", "--", "-"), strict=True):
            name = "DenseNet" if family == "dense" else "ResNet"
            values = cost[family][width]
            label = f"{name}, {letter} = {width}"
            by_depth.plot(range(1, len(values) + 1), values, style, color=COLOURS[name], label=label)
    by_depth.set(xlabel="layer", ylabel="multiply-adds of the layer per pixel and tap", yscale="log")
    by_depth.legend(fontsize=8)
    return figure


def gradient_flow(result: dict[str, Any]) -> Figure:
    rows = result["rows"]
    depths = sorted({r["depth"] for r in rows})
    times = ("initialisation", "training")
    figure, axes = plt.subplots(len(depths), 4, figsize=(15, 3.2 * len(depths)), layout="constrained", squeeze=False)
    for i, depth in enumerate(depths):
        for j, (kind, when) in enumerate((kind, when) for kind in ("output", "weight") for when in times):
            axis = axes[i, j]
            for name in ("plain", "ResNet", "DenseNet"):
                group = [r for r in rows if (r["depth"], r["when"], r["network"]) == (depth, when, name)]
                _band(axis, [r[kind] for r in group], name)
            steps = max(r["steps"] for r in rows)
            moment = "at initialisation" if when == times[0] else f"after {steps} steps"
            axis.set(yscale="log", title=f"depth {depth}, {moment}", xlabel="convolution, in order")
            axis.set_ylabel(f"gradient norm by the layer's {kind}")
    axes[0, 0].legend()
    return figure


def _band(axis: Any, curves: Sequence[Sequence[float]], name: str) -> None:
    """The geometric mean of the seeds' curves and the range between them."""
    values = np.array(curves)
    x = np.arange(1, values.shape[1] + 1)
    axis.plot(x, np.exp(np.log(values).mean(0)), color=COLOURS[name], label=name, linewidth=1.3)
    axis.fill_between(x, values.min(0), values.max(0), color=COLOURS[name], alpha=0.25, linewidth=0)


def feature_reuse(result: dict[str, Any]) -> Figure:
    """The heat map of figure 5, sources down, targets across, and below it the same of what training changed.

    Each block is scaled to its largest value, its last column by itself.
    """
    figure, grid = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    for axes, key in zip(grid, ("mean_absolute_weight", "mean_absolute_change"), strict=True):
        blocks = [np.array(block) for block in result[key]]
        for number, (axis, block) in enumerate(zip(axes, blocks, strict=True), 1):
            inner = block[:, :-1]
            scaled = np.concatenate([inner / np.nanmax(inner), block[:, -1:] / np.nanmax(block[:, -1])], axis=1)
            image = axis.imshow(scaled, cmap="viridis", vmin=0, vmax=1)
            last = "classifier" if number == len(blocks) else "transition"
            axis.set(title=f"block {number}", xlabel=f"target (the last: {last})", ylabel="source (0: the input)")
            ticks = range(0, len(block), 2)
            axis.set_xticks(ticks, [str(t + 1) for t in ticks])
        figure.colorbar(image, ax=axes, label=key.replace("_", " ") + " / largest")
    return figure


def diverse_features(result: dict[str, Any]) -> Figure:
    figure, (absolute, share) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    places = ("block 1", "block 2", "block 3", "classifier")
    networks = list(dict.fromkeys(r["network"] for r in result["rows"]))
    for i, name in enumerate(networks):
        groups = [[r for r in result["rows"] if (r["network"], r["place"]) == (name, place)] for place in places]
        x = np.arange(len(places)) + (i - (len(networks) - 1) / 2) * 0.26
        ranks = np.array([[r["effective_rank"] for r in group] for group in groups])
        channels = np.array([group[0]["channels"] for group in groups])[:, None]
        for axis, values in ((absolute, ranks), (share, ranks / channels)):
            axis.bar(x, values.mean(1), 0.24, yerr=values.std(1, ddof=1), color=COLOURS[name], label=name, capsize=2)
    for axis, label in ((absolute, "effective rank"), (share, "effective rank / channels")):
        axis.set_xticks(range(len(places)), places)
        axis.set_ylabel(label)
    absolute.legend()
    return figure


def duplicate_gradients(result: dict[str, Any]) -> Figure:
    """Likeness of the terms by pairs of readers, stage by stage, and the three summary figures."""
    pair = ("DenseNet", "CSPDenseNet")
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    largest = max(np.nanmax(stage) for name in pair for stage in result["per_layer"][name] if len(stage) > 1)
    for i, name in enumerate(pair):
        stages = [s for s in (np.array(stage) for stage in result["per_layer"][name]) if len(s) > 1]
        for j, stage in enumerate(stages[:3]):
            axis = figure.add_subplot(grid[i, j])
            np.fill_diagonal(stage, np.nan)
            image = axis.imshow(stage, cmap="magma", vmin=0, vmax=largest)
            axis.set(title=f"{name}, stage {j + 1}", xlabel="reader", ylabel="reader")
        figure.colorbar(image, ax=axis, label="mean |cosine| of terms")
    for i, (key, label) in enumerate(
        (("terms", "weight gradients per channel"), ("duplicates", "duplicates per channel"))
    ):
        axis = figure.add_subplot(grid[i, 3])
        for x, name in enumerate(pair):
            values = np.array([r[key] for r in result["rows"] if r["network"] == name])
            axis.bar(x, values.mean(), 0.6, yerr=values.std(ddof=1), color=COLOURS[name], capsize=3)
        axis.set_xticks(range(2), pair)
        axis.set_ylabel(label)
    return figure
