"""The handwritten digits, how large a run of claims.py is, and the training of its networks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from claims_networks import digits_network
from sklearn.datasets import load_digits as load
from torch import Tensor, nn

Advance = Callable[[], None]


class Settings(NamedTuple):
    """How large a run is.

    Attributes:
        flow_depths, flow_steps: networks and training steps of the gradient flow claim.
        depth, growth_rate, steps: the networks that are trained for the other claims.
        imagenet: DenseNets beside which a CSPDenseNet is counted.
        kept_size: height and width of the image for which kept bytes are measured.
    """

    flow_depths: tuple[int, ...]
    flow_growth_rate: int
    flow_steps: int
    depth: int
    growth_rate: int
    steps: int
    imagenet: tuple[str, ...]
    kept_size: int
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Settings((40, 100), 8, 20, 40, 12, 210, ("121", "169", "201", "264"), 224)
QUICK = Settings((10, 16), 4, 4, 16, 4, 20, ("121",), 64)
COMPARED = ("ResNet", "DenseNet", "CSPDenseNet")


class Digits(NamedTuple):
    """scikit-learn's handwritten digits, 8x8, scaled to [-1, 1]; three quarters to train on, fixed."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    data = load()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[: 3 * len(order) // 4], order[3 * len(order) // 4 :]
    return Digits(images[train], labels[train], images[test], labels[test])


def train(
    network: nn.Module,
    digits: Digits,
    steps: int,
    *,
    seed: int,
    batch: int = 64,
    learning_rate: float = 0.1,
    on_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """SGD with Nesterov momentum 0.9, weight decay 1e-4 and one cosine cycle; returns the loss of every step."""
    optimizer = torch.optim.SGD(network.parameters(), learning_rate, 0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    network.train()
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = [
                b for b in torch.randperm(len(digits.labels), generator=generator).split(batch) if len(b) == batch
            ]
        chosen = batches.pop()
        loss = F.cross_entropy(network(digits.images[chosen]), digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step()
    return losses


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """Share of the test images that are classified correctly, in eval mode."""
    network.eval()
    return (network(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()


class Trained(NamedTuple):
    """Networks by name and seed, with what their training showed."""

    networks: dict[tuple[str, int], nn.Module]
    accuracy: dict[str, list[float]]
    digits: Digits


def train_all(settings: Settings, digits: Digits, advance: Advance) -> Trained:
    trained = Trained({}, {name: [] for name in COMPARED}, digits)
    for name in COMPARED:
        for seed in settings.seeds:
            torch.manual_seed(seed)
            network = digits_network(name, settings.depth, settings.growth_rate)
            train(network, digits, settings.steps, seed=seed, on_step=advance)
            trained.accuracy[name].append(accuracy(network, digits))
            trained.networks[name, seed] = network
    return trained
