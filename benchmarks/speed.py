"""Time of torchvision's DenseNet, as it is and with its dense blocks, transitions and stem running fused.

    python benchmarks/speed.py

Both hold the same weights. Before anything is timed, outputs and gradients are compared: a fused variant's error
against float64 may be at most twice torchvision's in the same precision. Then every variant runs once in each round,
A B C ... A B C ..., so that a change in the machine's speed meets all of them; a ratio is taken within a round, and its
median and quartiles over the rounds are reported. The GFLOP/s are those of torchvision's model (two per multiply-add;
what a variant computes twice counts once), beside those of a large matrix product timed in each round. A training step
is forward, cross-entropy and backward; the update is the same for all and left out.
"""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import options
import torch
import torch.nn.functional as F
from baselines import NETWORKS, torchvision_densenets
from common import (
    COLOURS,
    console,
    fuse,
    in_layout,
    plot_axes,
    progress,
    save_plot,
    write_json,
)
from provenance import describe, environment
from rich.table import Table
from timing import flops, matrix_product, product_size, quartiles, seconds, spread
from torch import Tensor, nn


class Variant(NamedTuple):
    """``peer`` names the variants of torchvision that a fused one is compared with."""

    fused: bool
    channels_last: bool = True
    memory_efficient: bool = False
    bfloat16: bool = False
    peers: tuple[str, ...] = ()


VARIANTS = {
    "torchvision, NCHW": Variant(False, channels_last=False),
    "torchvision, channels-last": Variant(False),
    "torchvision, memory_efficient": Variant(False, memory_efficient=True),
    "torchvision, bfloat16 autocast": Variant(False, bfloat16=True),
    "fused, NCHW": Variant(True, channels_last=False, peers=("torchvision, NCHW",)),
    "fused": Variant(True, peers=("torchvision, NCHW", "torchvision, channels-last")),
    "fused, memory_efficient": Variant(True, memory_efficient=True, peers=("torchvision, memory_efficient",)),
    "fused, bfloat16 autocast": Variant(
        True, bfloat16=True, peers=("torchvision, channels-last", "torchvision, bfloat16 autocast")
    ),
}


class Timed(NamedTuple):
    """A model in one variant, with its input."""

    variant: Variant
    model: nn.Module
    x: Tensor
    labels: Tensor

    def logits(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.variant.bfloat16):
            logits = self.model(self.x)
        return logits.float() if self.variant.bfloat16 else logits

    def train(self) -> None:
        self.model.zero_grad(set_to_none=True)
        F.cross_entropy(self.logits(), self.labels).backward()

    @torch.inference_mode()
    def infer(self) -> None:
        self.logits()


def build(network: str, batch: int, size: int, device: torch.device) -> dict[str, Timed]:
    torch.manual_seed(0)
    make = getattr(torchvision_densenets(), network)
    plain = make().to(device)
    x, labels = torch.randn(batch, 3, size, size, device=device), torch.arange(batch, device=device)
    result = {}
    for name, variant in VARIANTS.items():
        if variant.fused:
            model = fuse(plain, memory_efficient=variant.memory_efficient)
        else:
            model = make(memory_efficient=variant.memory_efficient).to(device)
            model.load_state_dict(plain.state_dict())
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        result[name] = Timed(variant, in_layout(model, layout), x.contiguous(memory_format=layout), labels)
    return result


def results(t: Timed) -> dict[str, Tensor]:
    """The logits in eval mode and in training, and all gradients, in float64."""
    t.model.eval()
    with torch.no_grad():
        inference = t.logits()
    t.model.train()
    t.model.zero_grad(set_to_none=True)
    training = t.logits()
    F.cross_entropy(training, t.labels).backward()
    gradients = torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None])
    t.model.zero_grad(set_to_none=True)
    found = {"inference output": inference, "training output": training, "gradients": gradients}
    return {key: value.detach().double() for key, value in found.items()}


def check_parity(timed: dict[str, Timed]) -> dict[str, dict[str, float]]:
    """The relative errors (Euclidean norm) of every variant's outputs and gradients, against torchvision in float64.

    Raises:
        SystemExit: an error of a fused variant is above twice the largest of torchvision's in the same precision.
    """
    plain = timed["torchvision, NCHW"]
    exact = results(Timed(plain.variant, copy.deepcopy(plain.model).double(), plain.x.double(), plain.labels))
    errors = {}
    for name, t in timed.items():
        errors[name] = {
            key: float((value - exact[key]).norm() / exact[key].norm()) for key, value in results(t).items()
        }
    for name, t in timed.items():
        same = [
            n for n, other in timed.items() if not other.variant.fused and other.variant.bfloat16 == t.variant.bfloat16
        ]
        for key, error in errors[name].items():
            allowed = 2 * max(errors[n][key] for n in same)
            if not error <= allowed:
                raise SystemExit(f"{name}: {key}: expected an error of at most {allowed:.1e}, got {error:.1e}")
    return errors


def products(device: torch.device) -> dict[str, tuple[torch.dtype, int]]:
    """Dtype and size of the matrices whose products are timed, by the name of that."""
    sizes = {dtype: product_size(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return {f"matrix product {n}³, {str(dtype).removeprefix('torch.')}": (dtype, n) for dtype, n in sizes.items()}


def measure(
    timed: dict[str, Timed], mode: str, rounds: int, device: torch.device, advance: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; :func:`products` are timed beside them."""
    runs: dict[str, Callable[[], object]] = {}
    for name, (dtype, size) in products(device).items():
        runs[name] = matrix_product(dtype, size, device)
    for name, t in timed.items():
        if mode == "training" or not t.variant.memory_efficient:
            t.model.train(mode == "training")
            runs[name] = t.train if mode == "training" else t.infer
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    for number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds(run, device)
            if name in timed:
                timed[name].model.zero_grad(set_to_none=True)
            if number > 0:  # the first round warms up
                times[name].append(elapsed)
            advance(f"{mode}: {name}")
        gc.collect()
    gc.enable()
    return times


def summarise(
    network: str, mode: str, times: dict[str, list[float]], model_flops: int, **setting: Any
) -> list[dict[str, Any]]:
    rows = []
    for name, variant in VARIANTS.items():
        if name in times:
            low, middle, high = quartiles(times[name])
            ratios = {}
            for peer in variant.peers:
                if peer in times:
                    per_round = [theirs / ours for theirs, ours in zip(times[peer], times[name], strict=True)]
                    ratios[peer] = spread(per_round)
            row = {"network": network, "mode": mode, "variant": name, **setting, "seconds": times[name]}
            row |= {"median_seconds": middle, "lower_quartile_seconds": low, "upper_quartile_seconds": high}
            rows.append(row | {"gflop_per_second": model_flops / middle / 1e9, "times_as_fast_as": ratios})
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    result = Table(title=title, caption="median (quartiles) of the rounds; ratios are taken within a round")
    result.add_column("", no_wrap=True)
    for heading in ("ms", "GFLOP/s", "times as fast as"):
        result.add_column(heading, justify="right")
    for row in rows:
        low, middle, high = (row[f"{key}_seconds"] * 1e3 for key in ("lower_quartile", "median", "upper_quartile"))
        ratios = [
            f"{peer}: [bold]{r['median']:.2f}[/] ({r['lower_quartile']:.2f} to {r['upper_quartile']:.2f})"
            for peer, r in row["times_as_fast_as"].items()
        ]
        result.add_row(
            row["variant"],
            f"{middle:.0f} ({low:.0f} to {high:.0f})",
            f"{row['gflop_per_second']:.0f}",
            "\n".join(ratios),
        )
    return result


def draw(rows: list[dict[str, Any]]) -> Any:
    """Images per second of every variant, a panel for each network and mode; whiskers are quartiles."""
    panels = list(dict.fromkeys((row["network"], row["mode"]) for row in rows))
    figure, axes = plot_axes(1, len(panels), figsize=(5.5 * len(panels) + 1.5, 3.8), sharey=True)
    names = list(VARIANTS)[::-1]
    for axis, (network, mode) in zip(axes, panels, strict=True):
        for row in (row for row in rows if (row["network"], row["mode"]) == (network, mode)):
            place, variant = names.index(row["variant"]), VARIANTS[row["variant"]]
            low, middle, high = (
                row["batch"] / row[f"{k}_seconds"] for k in ("upper_quartile", "median", "lower_quartile")
            )
            axis.barh(place, middle, 0.7, color=COLOURS["ours" if variant.fused else "reference"])
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", lw=1, capsize=2)
            axis.text(high, place, f"  {middle:.1f}", va="center", fontsize=9)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("images per second")
        axis.set_title(f"{network.replace('densenet', 'DenseNet-')}, {mode}", loc="left")
        axis.margins(x=0.12)
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=options.device, default="cpu")
    parser.add_argument("--networks", nargs="+", default=["densenet121"], choices=NETWORKS)
    parser.add_argument("--batch", type=options.positive, default=8)
    parser.add_argument("--size", type=options.positive, default=224)
    parser.add_argument("--rounds", type=options.positive, default=7)
    parser.add_argument("--threads", type=options.positive, default=2)
    options.add_output_options(parser)
    args = parser.parse_args()
    options.check_image(parser, args.size, 4, args.batch)
    torch.set_num_threads(args.threads)
    device = args.device

    rows: list[dict[str, Any]] = []
    matrix: dict[str, float] = {}
    parity: dict[str, Any] = {}
    for network in args.networks:
        timed = build(network, args.batch, args.size, device)
        parity[network] = check_parity(timed)
        for key in parity[network]["fused"]:
            theirs, ours = (parity[network][name][key] for name in ("torchvision, channels-last", "fused"))
            console.print(f"{network}, {key}: error against float64 {theirs:.1e} (torchvision), {ours:.1e} (fused)")
        for mode in ("training", "inference"):
            plain = timed["torchvision, channels-last"]
            plain.model.train(mode == "training")
            model_flops = flops(plain.train if mode == "training" else plain.infer)
            skipped = 0 if mode == "training" else sum(t.variant.memory_efficient for t in timed.values())
            with progress((args.rounds + 1) * (len(timed) - skipped + 2)) as advance:
                times = measure(timed, mode, args.rounds, device, advance)
            found = summarise(
                network,
                mode,
                times,
                model_flops,
                device=device.type,
                batch=args.batch,
                size=args.size,
                threads=args.threads,
            )
            rows += found
            for name, (_, n) in products(device).items():
                matrix[name] = max(matrix.get(name, 0.0), 2 * n**3 / statistics.median(times[name]) / 1e9)
            title = f"{network}, {mode}, batch {args.batch}, {args.size}×{args.size}, {args.threads} threads"
            console.print(table(title, found))
    where = environment(device, torch.float32)
    console.print("; ".join(f"{name}: {rate:.0f} GFLOP/s" for name, rate in matrix.items()), highlight=False)
    console.print(describe(where), highlight=False)
    if args.json:
        write_json(args.json, where, rows, parity=parity, matrix_product_gflop_per_second=matrix)
    if args.plot:
        save_plot(draw(rows), args.plot)


if __name__ == "__main__":
    main()
