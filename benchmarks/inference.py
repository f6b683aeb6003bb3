"""Inference of a DenseNet on the CPU: torchvision's, compiled, by two inference engines, and ours.

    python benchmarks/inference.py

All hold the same weights, with running statistics of a batch, and get images in the dtype and the layout that they like
best. In a dtype and batch, everything runs once in each round, so that a change in the machine's speed meets all; ratios
are taken within a round, and medians and quartiles over the rounds are reported. The error is that of the logits against
float64, relative, in Euclidean norm. GFLOP/s are those of torchvision's model (two per multiply-add), beside those of a
large matrix product timed in each round. An engine that is not installed, or has no such dtype, is named and left out.
"""

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import io
import statistics
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import options
import torch
from baselines import torchvision_densenets
from common import (
    COLOURS,
    DTYPES,
    console,
    in_layout,
    plot_axes,
    progress,
    save_plot,
    write_json,
)
from provenance import describe, environment
from rich.table import Table
from timing import CPU, flops, limits, measure, product_size, rates, spread
from torch import Tensor, nn

import fused_densenet

Run = Callable[[], Any]


class Peer(NamedTuple):
    """``make(model, x, dtype, threads)`` gives what is timed, of a float32 network of its own; it returns the logits.

    ``packages`` must be installed, ``bfloat16`` says whether there is one, and ``engine`` what ours is compared with.
    """

    make: Callable[[nn.Module, Tensor, torch.dtype, int], Run]
    packages: tuple[str, ...] = ()
    bfloat16: bool = True
    engine: bool = False

    def missing(self, dtype: torch.dtype) -> str | None:
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        return None if dtype == torch.float32 or self.bfloat16 else f"no {dtype_name(dtype)}"


def eager(layout: torch.memory_format, model: nn.Module, x: Tensor, dtype: torch.dtype, _: int) -> Run:
    model, x = in_layout(model.to(dtype), layout), x.to(dtype).contiguous(memory_format=layout)
    return functools.partial(model, x)


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype, _: int) -> Run:
    model, x = (
        in_layout(model.to(dtype), torch.channels_last),
        x.to(dtype).contiguous(memory_format=torch.channels_last),
    )
    return functools.partial(torch.compile(model, dynamic=False, options={"freezing": True}), x)


def exported(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # the exporter's own, of torch's functions that it uses
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=True, external_data=False, verbose=False)
    return file.getvalue()


def onnx_runtime(model: nn.Module, x: Tensor, _: torch.dtype, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(exported(model, x), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    import openvino as ov

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    graph = ov.Core().read_model(exported(model, x))
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    image = x.numpy()
    return lambda: torch.from_numpy(next(iter(request.infer([image]).values())))


def ours(model: nn.Module, x: Tensor, dtype: torch.dtype, threads: int) -> Run:
    return eager(torch.channels_last, fused_densenet.fuse(model, strict=True), x, dtype, threads)


def snapshot(model: nn.Module, x: Tensor, dtype: torch.dtype, _: int) -> Run:
    optimize = fused_densenet.optimize_for_inference
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return functools.partial(optimize(model, dtype=None if dtype == torch.float32 else dtype), x)


PEERS = {
    "torchvision, NCHW": Peer(functools.partial(eager, torch.contiguous_format)),
    "torchvision, channels-last": Peer(functools.partial(eager, torch.channels_last)),
    "torch.compile, freezing": Peer(compiled, engine=True),
    "ONNX Runtime": Peer(onnx_runtime, ("onnxruntime", "onnxscript"), bfloat16=False, engine=True),
    "OpenVINO": Peer(openvino, ("openvino", "onnxscript"), engine=True),
    "fuse": Peer(ours),
}
if hasattr(fused_densenet, "optimize_for_inference"):
    PEERS["optimize_for_inference"] = Peer(snapshot)
OURS = ("fuse", "optimize_for_inference")


PAUSE = 0.2
"""Seconds before each run: ONNX Runtime's threads go on spinning for some 50 ms, and whoever comes next would share the cores."""


def missing_peers(peers: list[str], dtype: torch.dtype) -> dict[str, str]:
    reasons = {peer: PEERS[peer].missing(dtype) for peer in peers}
    return {peer: reason for peer, reason in reasons.items() if reason is not None}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MOST_BLOCKS = 5
"""Of which the last sees one pixel of each image that the statistics are taken of."""


def network(layers: list[int]) -> nn.Module:
    """torchvision's with so many layers in each block, the running statistics those of one batch."""
    model = torchvision_densenets().DenseNet(32, tuple(layers), 64)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    return model.eval()


class Setting(NamedTuple):
    """A dtype and a batch, in which everything is timed together."""

    dtype: torch.dtype
    x: Tensor

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}, batch {len(self.x)}"


def time_all(
    model: nn.Module, peers: list[str], setting: Setting, rounds: int, threads: int, advance: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each of ``peers``, and the rates of a product and a copy, in units a second."""
    dtype, x = setting
    runs: dict[Any, Run] = dict(limits(dtype))
    for name in peers:
        runs[name] = PEERS[name].make(copy.deepcopy(model), x, dtype, threads)
        advance(f"{setting}: {name}")
    exact = copy.deepcopy(model).double()(x.double())
    errors = {name: float((runs[name]().double() - exact).norm() / exact.norm()) for name in peers}
    times = measure(runs, rounds, lambda text: advance(f"{setting}: {text}"), PAUSE)
    limit = rates(times, dtype)
    work = flops(functools.partial(model, x))
    engines = [name for name in peers if PEERS[name].engine]
    best = min(engines, key=lambda name: statistics.median(times[name]), default=None)
    rows = []
    for name in peers:
        middle = statistics.median(times[name])
        row = {"peer": name, "dtype": dtype_name(dtype), "batch": len(x), "size": x.shape[-1], "seconds": times[name]}
        row |= {"latency": spread(times[name]), "images_per_second": len(x) / middle, "error": errors[name]}
        row |= {"gflop_per_second": work / middle / 1e9, "of_the_product": work / middle / limit["product"]}
        if name in OURS and best is not None:
            ratios = [theirs / own for theirs, own in zip(times[best], times[name], strict=True)]
            row["times_as_fast_as"] = {"peer": best, **spread(ratios)}
        rows.append(row)
    return rows, limit


def table(title: str, rows: list[dict[str, Any]], missing: dict[str, str]) -> Table:
    result = Table(title=title, caption="ms (quartiles); images a second; ours: times as fast as the best engine")
    result.add_column("", no_wrap=True)
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for heading in (*(f"batch {batch}" for batch in batches), "error"):
        result.add_column(heading, justify="right")
    for peer in PEERS:
        if peer in missing:
            result.add_row(peer, *[missing[peer]] * len(batches), "", end_section=True, style="dim")
        found = [row for row in rows if row["peer"] == peer]
        if not found:
            continue
        cells = []
        for row in found:
            low, middle, high = (1e3 * seconds for seconds in row["latency"].values())
            cell = f"[bold]{middle:.1f}[/] ({low:.1f} to {high:.1f})\n{row['images_per_second']:.1f} a second"
            if "times_as_fast_as" in row:
                ratio = row["times_as_fast_as"]
                cell += f"\n[bold]{ratio['median']:.2f}[/] {ratio['peer']}"
            cells.append(cell)
        result.add_row(peer, *cells, f"{max(row['error'] for row in found):.1e}", end_section=True)
    return result


def draw(rows: list[dict[str, Any]]) -> Any:
    """Images a second, a panel for each dtype and batch; whiskers are quartiles."""
    panels = list(dict.fromkeys((row["dtype"], row["batch"]) for row in rows))
    figure, axes = plot_axes(1, len(panels), figsize=(3.6 * len(panels) + 2, 3.6), sharey=True, squeeze=False)
    names = list(PEERS)[::-1]
    for axis, panel in zip(axes[0], panels, strict=True):
        for row in (row for row in rows if (row["dtype"], row["batch"]) == panel):
            place = names.index(row["peer"])
            high, middle, low = (row["batch"] / seconds for seconds in row["latency"].values())
            axis.barh(place, middle, 0.7, color=COLOURS["ours" if row["peer"] in OURS else "reference"])
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", lw=1, capsize=2)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("images per second")
        axis.set_title(f"{panel[0]}, batch {panel[1]}", loc="left")
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    return figure


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=options.positive, nargs="+", default=[6, 12, 24, 16], help="of each block")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", type=options.positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--size", type=options.positive, default=224)
    parser.add_argument("--rounds", type=options.positive, default=15)
    parser.add_argument("--threads", type=options.positive, default=2)
    options.add_output_options(parser)
    args = parser.parse_args()
    if len(args.layers) > MOST_BLOCKS:
        parser.error(f"argument --layers: expected at most {MOST_BLOCKS} blocks, got {len(args.layers)}")
    options.check_image(parser, args.size, len(args.layers))
    missing = {name: missing_peers(args.peers, DTYPES[name]) for name in args.dtypes}
    if all(len(reasons) == len(set(args.peers)) for reasons in missing.values()):
        parser.error(f"argument --peers: nothing to measure: {missing}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = network(args.layers)
    rows: list[dict[str, Any]] = []
    seen: dict[Setting, dict[str, float]] = {}
    for name in args.dtypes:
        peers = [peer for peer in args.peers if peer not in missing[name]]
        settings = [Setting(DTYPES[name], torch.randn(batch, 3, args.size, args.size)) for batch in args.batches]
        found = []
        with progress(len(settings) * (len(peers) + args.rounds + 1)) as advance:
            for setting in settings:
                new, seen[setting] = time_all(model, peers, setting, args.rounds, args.threads, advance)
                found += new
        rows += found
        title = f"DenseNet of {args.layers} layers, {name}, {args.size}×{args.size}, {args.threads} threads"
        console.print(table(title, found, missing[name]))
    for setting, rate in seen.items():
        product = f"matrix product {product_size(setting.dtype)}³ {rate['product'] / 1e9:.0f} GFLOP/s"
        console.print(f"{setting}: {product}, copy {rate['copy'] / 1e9:.1f} GB/s", highlight=False)
    where = environment(CPU, torch.float32)
    packages = {package for peer in PEERS.values() for package in peer.packages if importlib.util.find_spec(package)}
    where["versions"] |= {package: importlib.metadata.version(package) for package in sorted(packages)}
    console.print(describe(where), highlight=False)
    if args.json:
        write_json(
            args.json,
            where,
            rows,
            missing=missing,
            flop_and_bytes_per_second={str(setting): rate for setting, rate in seen.items()},
        )
    if args.plot:
        save_plot(draw(rows), args.plot)


if __name__ == "__main__":
    main()
