"""Memory of DenseNet's training step: concatenating, checkpointing, and one buffer per dense block.

    python benchmarks/memory.py

Variants: ``reference`` (DenseNet as the paper writes it, concatenating for every layer), ``reference, checkpointed``
(with torchvision's ``memory_efficient`` recipe: each layer's concatenation, first norm, ReLU and 1x1 convolution run
again in backward), ``ours`` and ``ours, memory_efficient`` (:class:`fused_densenet.FusedDenseBlock`, in a whole network
fused transitions and stem too), and for whole networks, where it is installed, ``torchvision`` in both of its modes.
Every figure is measured from the allocator in one real training step (see allocator.py). The floor is the dense blocks'
concatenations alone, computed: what no implementation that keeps its feature maps can go below.

Three kinds of rows:

- one dense block of 4 to 64 layers (k = 32, 64 input channels, bottleneck 4k), at an eighth of ``--size``;
- a network's dense blocks alone. A block's input is allocated inside the measurement, as in a network, so it counts if
  it is kept; the blocks are joined by strided copies in place of the transitions, which keep nothing;
- the whole network: stem, dense blocks, transitions, classifier, cross-entropy.

``--networks rrdb`` is another kind, ESRGAN's generator (see rrdb.py) on 64x64 crops with an L1 loss; it has dense blocks
without norms, and two variants, ``reference`` and ``ours``.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import options
import torch
import torch.nn.functional as F
from allocator import MIB, step_memory
from baselines import NETWORKS, Architecture, checkpointed, torchvision_densenets
from common import (
    COLOURS,
    DTYPES,
    console,
    fuse,
    plot_axes,
    progress,
    save_plot,
    write_json,
)
from provenance import describe, environment
from rich.table import Table
from rrdb import RRDBNet, floor_bytes
from torch import Tensor, nn

import fused_densenet
from fused_densenet.reference import DenseNet

RRDB = "rrdb"
DEPTHS = (4, 8, 16, 32, 48, 64)


VARIANTS: dict[str, Callable[[DenseNet], nn.Module]] = {
    "reference": lambda network: network,
    "reference, checkpointed": checkpointed,
    "ours": fuse,
    "ours, memory_efficient": functools.partial(fuse, memory_efficient=True),
}


def variants(blocks_only: bool) -> list[str]:
    """The variants to measure: torchvision's own are whole networks."""
    theirs = not blocks_only and importlib.util.find_spec("torchvision") is not None
    return [*VARIANTS, *(["torchvision", "torchvision, memory_efficient"] if theirs else [])]


def build(architecture: Architecture, variant: str) -> nn.Module:
    if variant in VARIANTS:
        return VARIANTS[variant](DenseNet(*architecture))
    return torchvision_densenets().DenseNet(*architecture, memory_efficient=variant.endswith("memory_efficient"))


class DenseBlocks(nn.Module):
    """A network's dense blocks alone, joined by copies of half the channels of every second pixel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        features = network.get_submodule("features")
        self.blocks = nn.ModuleList(m for name, m in features.named_children() if name.startswith("denseblock"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x.clone())
        for block in self.blocks[1:]:
            x = block(x[:, : x.shape[1] // 2, ::2, ::2].clone())
        return x


class Case(NamedTuple):
    """One network to measure in every variant; ``size`` is that of the image, or of one block's feature maps."""

    network: str
    architecture: Architecture
    size: int
    blocks_only: bool

    @property
    def layers(self) -> int:
        return sum(self.architecture.block_config)

    def floor_bytes(self, batch: int, dtype: torch.dtype) -> int:
        """The dense blocks' outputs."""
        width, size = self.architecture.num_init_features, self._first_map()
        values = 0
        for layers in self.architecture.block_config:
            width += layers * self.architecture.growth_rate
            values += width * size * size
            width, size = width // 2, size // 2
        return batch * values * dtype.itemsize

    def input(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.blocks_only:
            shape = (batch, self.architecture.num_init_features, self._first_map(), self._first_map())
            return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        return torch.randn(batch, 3, self.size, self.size, device=device, dtype=dtype)

    def _first_map(self) -> int:
        if len(self.architecture.block_config) == 1:
            return self.size
        after_stem = (self.size + 1) // 2
        return (after_stem + 1) // 2


def cases(networks: Sequence[str], depths: Sequence[int], size: int) -> list[Case]:
    sweep = [Case(f"block of {n} layers", Architecture(32, (n,), 64), max(size // 8, 2), True) for n in depths]
    blocks = [Case(f"{name}, dense blocks", NETWORKS[name], size, True) for name in networks]
    return [*sweep, *blocks, *(Case(name, NETWORKS[name], size, False) for name in networks)]


def measure(case: Case, variant: str, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    network = build(case.architecture, variant).to(device, dtype)
    module = DenseBlocks(network) if case.blocks_only else network
    x = case.input(batch, device, dtype)
    labels = torch.arange(batch, device=device)

    def loss_of() -> Tensor:
        out = module(x)
        return (-out).mean() if case.blocks_only else F.cross_entropy(out, labels)

    def release() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None

    memory = step_memory(loss_of, release, device)
    return {
        "network": case.network,
        "variant": variant,
        "layers": case.layers,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "size": case.size,
        "saved_bytes": memory.saved_bytes,
        "peak_bytes": memory.peak_bytes,
        "floor_bytes": case.floor_bytes(batch, dtype),
    }


def measure_rrdb(variant: str, batch: int, crop: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    network = RRDBNet().to(device, dtype)
    if variant == "ours":
        fused_densenet.fuse(network, strict=True)
    crops = torch.rand(batch, 3, crop, crop, device=device, dtype=dtype)
    targets = torch.rand(batch, 3, 4 * crop, 4 * crop, device=device, dtype=dtype)
    memory = step_memory(
        lambda: F.l1_loss(network(crops), targets), lambda: network.zero_grad(set_to_none=True), device
    )
    return {
        "network": RRDB,
        "variant": variant,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "size": crop,
        "saved_bytes": memory.saved_bytes,
        "peak_bytes": memory.peak_bytes,
        "floor_bytes": floor_bytes(batch * crop * crop, dtype),
    }


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Kept for backward / peak, MiB per image, a line per network."""
    result = Table(title=title, caption="kept for backward / peak of a training step, MiB per image")
    result.add_column("", no_wrap=True)
    result.add_column("floor", justify="right", style="dim")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        result.add_column(variant, justify="right")
    for network in dict.fromkeys(row["network"] for row in rows):
        by_variant = {row["variant"]: row for row in rows if row["network"] == network}
        cells = [f"{_mib(row, 'saved_bytes'):.1f} / {_mib(row, 'peak_bytes'):.1f}" for row in by_variant.values()]
        result.add_row(network, f"{_mib(by_variant['reference'], 'floor_bytes'):.1f}", *cells)
    return result


def _mib(row: dict[str, Any], key: str) -> float:
    return row[key] / row["batch"] / MIB


def print_ratios(networks: list[dict[str, Any]]) -> None:
    """How many times the peak of each other variant torchvision's is, without its own checkpointing."""
    peaks = {(row["network"], row["variant"]): row["peak_bytes"] for row in networks}
    for (network, variant), peak in peaks.items():
        theirs = peaks.get((network, "torchvision"))
        if theirs is not None and variant != "torchvision":
            console.print(f"{network}: torchvision's peak is {theirs / peak:.2f} times that of: {variant}")


def draw(sweep: list[dict[str, Any]], networks: list[dict[str, Any]]) -> Any:
    """Left: one block against its depth. Right: whole networks. Dark or solid is kept for backward, light is peak."""
    figure, (left, right) = plot_axes(1, 2, figsize=(12.5, 4.6), width_ratios=(1, 1.35))
    for variant in VARIANTS:
        rows = [row for row in sweep if row["variant"] == variant]
        layers = [row["layers"] for row in rows]
        colour = COLOURS[variant]
        left.plot(layers, [_mib(row, "saved_bytes") for row in rows], "o-", color=colour, ms=4, label=variant)
        left.plot(layers, [_mib(row, "peak_bytes") for row in rows], ":", color=colour, lw=1.2)
    floors = [row for row in sweep if row["variant"] == "reference"]
    left.plot(
        [r["layers"] for r in floors],
        [_mib(r, "floor_bytes") for r in floors],
        "--",
        color="black",
        lw=1,
        label="floor",
    )
    left.set(xlabel="layers in one dense block (k = 32)", ylabel="MiB per image", ylim=0)
    if sweep:
        left.set_title(f"One block, {sweep[0]['size']}×{sweep[0]['size']} feature maps", loc="left")
    left.legend(frameon=False)
    left.grid(axis="y", color="#dddddd", lw=0.6)

    names = list(dict.fromkeys(row["network"] for row in networks))
    shown = list(dict.fromkeys(row["variant"] for row in networks))
    width = 0.8 / max(len(shown), 1)
    for i, variant in enumerate(shown):
        rows = [row for row in networks if row["variant"] == variant]
        places = [n + (i - (len(shown) - 1) / 2) * width for n in range(len(rows))]
        saved, peak = ([_mib(row, key) for row in rows] for key in ("saved_bytes", "peak_bytes"))
        light = right.bar(places, peak, width * 0.92, color=COLOURS[variant], alpha=0.35)
        label = variant if variant not in VARIANTS else None
        dark = right.bar(places, saved, width * 0.92, color=COLOURS[variant], label=label)
        right.bar_label(light, fmt="%.0f", fontsize=8, padding=1, color="#666666")
        right.bar_label(dark, fmt="%.0f", fontsize=8, label_type="center", color="white", weight="bold")
    for n, name in enumerate(names):
        floor = next(_mib(row, "floor_bytes") for row in networks if row["network"] == name)
        right.hlines(floor, n - 0.42, n + 0.42, color="black", ls="--", lw=1)
    right.set_xticks(range(len(names)), [name.replace("densenet", "DenseNet-") for name in names])
    right.set_ylabel("MiB per image")
    if set(shown) - set(VARIANTS):
        right.legend(frameon=False)
    if networks:
        size, dtype = networks[0]["size"], networks[0]["dtype"]
        right.set_title(f"Whole networks, {size}×{size} images, {dtype}", loc="left")
    right.grid(axis="y", color="#dddddd", lw=0.6)
    right.set_axisbelow(True)
    figure.supxlabel(
        "Solid: kept for backward. Light or dotted: peak of a training step. Dashed: the concatenations alone.",
        fontsize=9,
        color="#444444",
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=options.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=options.positive, default=4)
    parser.add_argument("--size", type=options.positive, default=224, help="of the image")
    parser.add_argument(
        "--crop", type=options.positive, default=64, help="side of the images that RRDBNet makes four times as large"
    )
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS, RRDB], default=list(NETWORKS), metavar="NAME")
    parser.add_argument(
        "--depths", nargs="*", type=options.positive, default=list(DEPTHS), metavar="LAYERS", help="of one block"
    )
    options.add_output_options(parser)
    args = parser.parse_args()
    device, dtype = args.device, DTYPES[args.dtype]
    densenets = [name for name in args.networks if name != RRDB]
    if densenets:
        options.check_image(parser, args.size, 4, args.batch)
    if not args.networks and not args.depths:
        parser.error("nothing to measure: neither --networks nor --depths")

    todo = [(c, variant) for c in cases(densenets, args.depths, args.size) for variant in variants(c.blocks_only)]
    others = ["reference", "ours"] if RRDB in args.networks else []
    rows = []
    with progress(len(todo) + len(others)) as advance:
        for case, variant in todo:
            rows.append(measure(case, variant, args.batch, device, dtype))
            advance(f"{case.network}: {variant}")
        for variant in others:
            rows.append(measure_rrdb(variant, args.batch, args.crop, device, dtype))
            advance(f"{RRDB}: {variant}")

    sweep = [row for row in rows if row["network"].startswith("block of")]
    blocks = [row for row in rows if row["network"].endswith("dense blocks")]
    networks = [row for row in rows if row["network"] in NETWORKS]
    setting = f"{args.dtype}, batch {args.batch}"
    if sweep:
        console.print(table(f"One dense block, {sweep[0]['size']}×{sweep[0]['size']}, {setting}", sweep))
    if blocks:
        console.print(table(f"Dense blocks alone, {args.size}×{args.size} images, {setting}", blocks))
    if networks:
        console.print(table(f"Whole networks, {args.size}×{args.size} images, {setting}", networks))
        print_ratios(networks)
    if others:
        rrdb = [row for row in rows if row["network"] == RRDB]
        console.print(table(f"RRDBNet, {args.crop}×{args.crop} crops, {setting}", rrdb))
    where = environment(device, dtype)
    console.print(describe(where), highlight=False)
    if args.json:
        write_json(args.json, where, rows)
    if args.plot:
        save_plot(draw(sweep, networks), args.plot)


if __name__ == "__main__":
    main()
