"""Time of the CPU's primitives beside ATen's bare convolutions and beside the machine's limits.

    python benchmarks/primitives.py

A dense layer's two convolutions (1x1 of C channels to 128, 3x3 of 128 to 32), forward and backward, ours with BatchNorm,
ReLU and statistics, ATen's with nothing, in the same dtype and channels-last. Everything runs once in each round, so that
a change in the machine's speed meets all; ratios are taken within a round, and medians and quartiles over the rounds are
reported. GFLOP/s count a direct convolution, two per multiply-add (Winograd's filtering, which both use, makes do with
fewer), twice as much backward. The roof is the time that the arithmetic takes at the rate of a large matrix product, or
the operands, each once, at the rate of a copy, whichever is longer; both are measured in every round.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import options
import torch
import torch.nn.functional as F
from common import DTYPES, console, plot_axes, progress, save_plot, write_json
from provenance import describe, environment
from rich.table import Table
from timing import CPU, limits, measure, product_size, rates, spread

from fused_densenet.backends import BACKENDS, choose
from fused_densenet.backends.contract import Gradient, Norm, Owed, accumulate_dtype

BLOCKS = ("56x64", "56x224", "28x128", "28x480", "14x992", "7x992")
"""Pixels of a side x channels read: layers of DenseNet-121 at 224x224."""
BOTTLENECK, GROWTH_RATE = 128, 32


class Layer(NamedTuple):
    """One convolution of a layer."""

    block: str
    channels: int
    out_channels: int
    kernel: int
    batch: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return int(self.block.partition("x")[0])

    def flops(self, direction: str) -> int:
        products = self.batch * self.size**2 * self.channels * self.out_channels * self.kernel**2
        return products * (2 if direction == "forward" else 4)

    def bytes(self, direction: str) -> int:
        """Every operand once: x, out and the weights; backward x, out, both their gradients, the weights and theirs."""
        passes = 1 if direction == "forward" else 2
        pixels = self.batch * self.size**2 * (self.channels + self.out_channels) * self.dtype.itemsize
        weights = self.channels * self.out_channels * self.kernel**2 * torch.float32.itemsize
        return passes * (pixels + weights)


def layers(blocks: list[str], batch: int, dtype: torch.dtype) -> list[Layer]:
    found = []
    for block in blocks:
        channels = int(block.partition("x")[2])
        found.append(Layer(block, channels, BOTTLENECK, 1, batch, dtype))
        found.append(Layer(block, BOTTLENECK, GROWTH_RATE, 3, batch, dtype))
    return found


def runs(layer: Layer) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by direction and by whose it is."""
    backend = BACKENDS[choose(CPU, layer.dtype)]
    c, k, wide = layer.channels, layer.out_channels, accumulate_dtype(layer.dtype)
    x, grad = (torch.randn(layer.batch, 1, layer.size, layer.size, count).to(layer.dtype) for count in (c, k))
    norm = Norm(torch.zeros(c, dtype=wide), *(torch.ones(c, dtype=wide) for _ in range(3)), 1e-5)
    weight = torch.randn(k, c, layer.kernel, layer.kernel) / (c * layer.kernel**2) ** 0.5
    # Of networks in channels-last; ours are float32, as autocast leaves them.
    weight = weight.contiguous(memory_format=torch.channels_last)
    out, moments = torch.empty_like(grad), torch.empty(2, k, dtype=wide)
    loaded = Gradient(grad, out, torch.zeros(k, dtype=wide), torch.zeros(2, k, dtype=wide))
    dx, dweight, sums = torch.zeros_like(x), torch.empty_like(weight), torch.zeros(4, c, dtype=wide)
    owed = Owed(sums[0], sums[1], sums[2:])
    ours = (weight.unsqueeze(2), dweight.unsqueeze(2))
    image, gradient = (t[:, 0].permute(0, 3, 1, 2) for t in (x, grad))
    theirs, padding = weight.to(layer.dtype), layer.kernel // 2
    conv_backward = functools.partial(
        torch.ops.aten.convolution_backward, gradient, image, theirs, None, [1, 1], [padding, padding], [1, 1]
    )
    return {
        ("forward", "ours"): lambda: backend.norm_relu_conv(x, norm, ours[0], out, *moments),
        ("forward", "bare"): lambda: F.conv2d(image, theirs, padding=padding),
        ("backward", "ours"): lambda: backend.norm_relu_conv_backward(
            loaded, x, norm, ours[0], dx, False, ours[1], owed
        ),
        ("backward", "bare"): lambda: conv_backward(False, [0, 0], 1, [True, True, False]),
    }


def summarise(layer: Layer, direction: str, times: dict[Any, list[float]], limit: dict[str, float]) -> dict[str, Any]:
    ours, bare = (times[layer, direction, whose] for whose in ("ours", "bare"))
    product, copied = layer.flops(direction) / limit["product"], layer.bytes(direction) / limit["copy"]
    return {
        "block": layer.block,
        "kernel": layer.kernel,
        "direction": direction,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "batch": layer.batch,
        "seconds": ours,
        "bare_seconds": bare,
        "gflop_per_second": layer.flops(direction) / statistics.median(ours) / 1e9,
        "bare_gflop_per_second": layer.flops(direction) / statistics.median(bare) / 1e9,
        "times_as_fast_as_bare": spread([b / a for a, b in zip(ours, bare, strict=True)]),
        "of_the_roof": spread([max(product, copied) / a for a in ours]),
        "roof": "product" if product >= copied else "copy",
    }


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    result = Table(title=title, caption="GFLOP/s, ATen's bare convolution in brackets; its time over ours (quartiles)")
    result.add_column("pixels x channels", no_wrap=True)
    columns = list(dict.fromkeys((row["kernel"], row["direction"]) for row in rows))
    for kernel, direction in columns:
        result.add_column(f"{kernel}×{kernel} {direction}", justify="right")
    for block in dict.fromkeys(row["block"] for row in rows):
        cells = []
        for column in columns:
            row = next(r for r in rows if (r["block"], r["kernel"], r["direction"]) == (block, *column))
            ratio, roof = row["times_as_fast_as_bare"], row["of_the_roof"]["median"]
            cells.append(
                f"{row['gflop_per_second']:.0f} ({row['bare_gflop_per_second']:.0f})\n"
                f"[bold]{ratio['median']:.2f}[/] ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})\n"
                f"{roof:.0%} of {row['roof']}"
            )
        result.add_row(block, *cells, end_section=True)
    return result


def draw(rows: list[dict[str, Any]]) -> Any:
    """How much faster than the bare convolution, a panel for each dtype; whiskers are quartiles."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plot_axes(1, len(dtypes), figsize=(6 * len(dtypes), 7), sharey=True, squeeze=False)
    names = list(dict.fromkeys((row["block"], row["kernel"], row["direction"]) for row in rows))[::-1]
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for row in (row for row in rows if row["dtype"] == dtype):
            place = names.index((row["block"], row["kernel"], row["direction"]))
            low, middle, high = row["times_as_fast_as_bare"].values()
            axis.barh(place, middle, 0.7, color="#2a6f97" if row["direction"] == "forward" else "#4aa27a")
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", lw=1, capsize=2)
        axis.axvline(1, color="black", lw=1)
        axis.set_yticks(range(len(names)), [f"{block}, {k}×{k} {direction}" for block, k, direction in names])
        axis.set_xlabel("times as fast as ATen's bare convolution")
        axis.set_title(dtype, loc="left")
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=options.block, nargs="+", default=list(BLOCKS), metavar="PIXELSxCHANNELS")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--batch", type=options.positive, default=8)
    parser.add_argument("--rounds", type=options.positive, default=15)
    parser.add_argument("--threads", type=options.positive, default=2)
    options.add_output_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rows: list[dict[str, Any]] = []
    seen: dict[str, dict[str, float]] = {}
    for name in args.dtypes:
        found = layers(args.blocks, args.batch, DTYPES[name])
        timed: dict[Any, Callable[[], object]] = dict(limits(DTYPES[name]))
        for layer in found:
            timed |= {(layer, *key): run for key, run in runs(layer).items()}
        with progress(args.rounds + 1) as advance:
            times = measure(timed, args.rounds, advance)
        seen[name] = rates(times, DTYPES[name])
        new = [summarise(layer, way, times, seen[name]) for layer in found for way in ("forward", "backward")]
        rows += new
        console.print(table(f"{name}, batch {args.batch}, {args.threads} threads", new))
        limit = f"matrix product {product_size(DTYPES[name])}³: {seen[name]['product'] / 1e9:.0f} GFLOP/s"
        console.print(f"{limit}; copy: {seen[name]['copy'] / 1e9:.1f} GB/s", highlight=False)
    where = environment(CPU, DTYPES[args.dtypes[0]])
    console.print(describe(where), highlight=False)
    if args.json:
        write_json(args.json, where, rows, flop_and_bytes_per_second=seen)
    if args.plot:
        save_plot(draw(rows), args.plot)


if __name__ == "__main__":
    main()
