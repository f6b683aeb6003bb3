"""Trains DenseNet-BC (L = 40, k = 12) on scikit-learn's handwritten digits, fused and as the paper writes it.

    python benchmarks/train.py

The data are the 1,797 real 8x8 images that scikit-learn carries; every fifth image of each class is for testing. Both
networks begin with the same weights and see the same batches in the same order, an epoch each in turn, and neither
draws random numbers. In float32 a value within rounding of zero may fall on the other side of a ReLU, in any two
implementations, and the curves drift apart from there: a third run, the reference with its weights channels-last in
memory, shows how far they drift without us. ``--dtype float64`` leaves no such values, and the curves coincide.

Ends with status 1 if a test accuracy is not above 97 %, or if the curves of fused and reference differ by more than
0.03 (float64: 1e-9) in an epoch's mean loss.
"""

import argparse
import copy
import sys
import time
from typing import Any

import numpy as np
import options
import torch
import torch.nn.functional as F
from allocator import MIB, StepMemory, step_memory
from common import (
    COLOURS,
    DTYPES,
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
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

from fused_densenet.reference import DenseNet

GROWTH_RATE, LAYERS_PER_BLOCK = 12, (40 - 4) // 6
LEARNING_RATE = 0.02
ACCURACY = 0.97
CURVE_DIFFERENCE = {"float32": 0.03, "float64": 1e-9}


def digits(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on and to test on; images ``(N, 1, 8, 8)``, mean 0 and deviation 1 in training."""
    data = load_digits()
    test = np.zeros(len(data.target), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(data.target == digit)[4::5]] = True
    images = torch.tensor(data.images, dtype=dtype, device=device).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64, device=device)
    train = torch.from_numpy(~test).to(device)
    images = (images - images[train].mean()) / images[train].std()
    return (images[train], labels[train]), (images[~train], labels[~train])


class Run:
    """One network in training, with its curves."""

    def __init__(self, network: nn.Module, steps: int, channels_last: bool = False) -> None:
        self.network = in_layout(network, torch.channels_last if channels_last else torch.preserve_format)
        parameters = network.parameters()
        self.optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, total_steps=steps)
        self.losses: list[list[float]] = []
        self.accuracies: list[float] = []
        self.seconds = 0.0

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), labels)

    def epoch(self, images: Tensor, labels: Tensor, batches: list[Tensor]) -> None:
        self.network.train()
        losses = []
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            loss = self.loss(images[batch], labels[batch])
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        self.losses.append(losses)

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        self.network.eval()
        self.accuracies.append((self.network(images).argmax(1) == labels).double().mean().item())

    def memory(self, images: Tensor, labels: Tensor) -> StepMemory:
        self.network.train()
        return step_memory(lambda: self.loss(images, labels), self.optimizer.zero_grad, images.device)

    def curve(self) -> list[float]:
        """The mean loss of each epoch."""
        return [sum(losses) / len(losses) for losses in self.losses]


def difference(a: Run, b: Run) -> float:
    """The largest difference of an epoch's mean loss."""
    return max(abs(x - y) for x, y in zip(a.curve(), b.curve(), strict=True))


def draw(runs: dict[str, Run]) -> Any:
    """Left: mean loss of each epoch, and its difference from the reference's. Right: test accuracy."""
    figure, (left, right) = plot_axes(1, 2, figsize=(11, 4.2))
    styles = {
        "reference": (COLOURS["reference"], "-", 4.0, 0.45),
        "ours": (COLOURS["ours"], "-", 1.5, 1.0),
        "reference, channels-last": (COLOURS["reference, checkpointed"], ":", 1.5, 1.0),
    }
    for name, run in runs.items():
        colour, line, width, alpha = styles[name]
        epochs = range(1, len(run.losses) + 1)
        style = {"color": colour, "ls": line, "lw": width, "alpha": alpha}
        left.plot(epochs, run.curve(), label=name, **style)
        right.plot(epochs, [100 * (1 - accuracy) for accuracy in run.accuracies], label=name, **style)
    for axis, title in ((left, "Training loss, mean of each epoch"), (right, "Test error, %")):
        axis.set(xlabel="epoch", yscale="log")
        axis.set_title(title, loc="left")
        axis.grid(color="#dddddd", lw=0.6)
    right.axhline(100 * (1 - ACCURACY), color="black", ls="--", lw=1, label="3 %")
    left.legend(frameon=False)
    right.legend(frameon=False)
    return figure


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=options.positive, default=8)
    parser.add_argument("--batch", type=options.positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=options.device, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options.add_output_options(parser)
    args = parser.parse_args()
    device, dtype = args.device, DTYPES[args.dtype]
    torch.manual_seed(args.seed)

    (images, labels), test = digits(device, dtype)
    if args.batch > len(images):
        parser.error(f"argument --batch: expected at most {len(images)}, the digits to train on, got {args.batch}")
    steps = len(images) // args.batch
    reference = DenseNet(
        GROWTH_RATE, (LAYERS_PER_BLOCK,) * 3, 2 * GROWTH_RATE, in_channels=1, num_classes=10, small_inputs=True
    ).to(device, dtype)
    runs = {
        "reference": Run(reference, args.epochs * steps),
        "ours": Run(fuse(reference), args.epochs * steps),
        "reference, channels-last": Run(copy.deepcopy(reference), args.epochs * steps, channels_last=True),
    }
    memory = {name: run.memory(images[: args.batch], labels[: args.batch]) for name, run in runs.items()}
    with progress(args.epochs * len(runs)) as advance:
        for epoch in range(1, args.epochs + 1):
            batches = list(torch.randperm(len(images)).to(device).split(args.batch))[:steps]
            for name, run in runs.items():
                run.epoch(images, labels, batches)
                run.test(*test)
                advance(f"epoch {epoch}: {name}, loss {run.curve()[-1]:.4f}")

    table = Table(
        title=f"DenseNet-BC (L = 40, k = 12) on {len(images)} digits, {args.dtype}, {args.epochs} epochs of batch {args.batch}"
    )
    for heading in ("", "test accuracy", "last loss", "kept for backward, MiB", "peak, MiB", "training, s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, run in runs.items():
        kept, peak = (f"{value / MIB:.1f}" for value in memory[name])
        table.add_row(name, f"{run.accuracies[-1]:.2%}", f"{run.curve()[-1]:.4f}", kept, peak, f"{run.seconds:.1f}")
    console.print(table)
    ours, yardstick = difference(runs["ours"], runs["reference"]), difference(*list(runs.values())[::2])
    console.print(
        f"Largest difference of an epoch's mean loss: ours from the reference {ours:.1e}, "
        f"the reference channels-last from the reference {yardstick:.1e}",
        highlight=False,
    )
    where = environment(device, dtype)
    console.print(describe(where), highlight=False)
    if args.json:
        rows = [
            {
                "network": "densenet-bc-40-12",
                "variant": name,
                "device": device.type,
                "dtype": args.dtype,
                "batch": args.batch,
                "size": 8,
                **memory[name]._asdict(),
                "seconds": run.seconds,
                "step_losses": run.losses,
                "test_accuracies": run.accuracies,
                "test_accuracy": run.accuracies[-1],
            }
            for name, run in runs.items()
        ]
        write_json(args.json, where, rows, largest_difference=ours, largest_difference_of_layouts=yardstick)
    if args.plot:
        save_plot(draw(runs), args.plot)
    low = [f"{name}: {run.accuracies[-1]:.2%}" for name, run in runs.items() if run.accuracies[-1] <= ACCURACY]
    if low:
        return f"test accuracy: expected above {ACCURACY:.0%}, got {'; '.join(low)}"
    if not ours <= CURVE_DIFFERENCE[args.dtype]:
        return f"loss curves: expected to differ by at most {CURVE_DIFFERENCE[args.dtype]}, got {ours:.1e}"
    return None


if __name__ == "__main__":
    sys.exit(main())
