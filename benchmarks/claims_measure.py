"""What claims.py measures: counts, gradients by layer, effective rank, feature reuse, duplicate gradient terms."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_densenet import reference


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def multiply_adds(network: nn.Module, *shape: int) -> int:
    """Multiply-adds of convolutions and matrix products in one forward pass, by torch's flop counter (two each)."""
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(shape, device=device))
    return counter.get_total_flops() // 2


class LayerGradient(NamedTuple):
    """Frobenius norms of the loss's gradient by a convolution's output and by its weight; the convolution's kernel."""

    output: float
    weight: float
    kernel: int


def layer_gradients(network: nn.Module, images: Tensor, labels: Tensor) -> list[LayerGradient]:
    """Of every convolution, in the order of execution, for the mean cross-entropy of one batch in training mode."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, _: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append((module, output))

    hooks = [m.register_forward_hook(keep) for m in network.modules() if isinstance(m, nn.Conv2d)]
    network.train().zero_grad()
    F.cross_entropy(network(images), labels).backward()
    for hook in hooks:
        hook.remove()
    return [LayerGradient(_norm(out.grad), _norm(conv.weight.grad), conv.kernel_size[0]) for conv, out in seen]  # type: ignore


def _norm(x: Tensor) -> float:
    return x.double().norm().item()


def decades(values: Sequence[float]) -> float:
    """How many powers of ten lie between the smallest and the largest value."""
    return math.log10(max(values) / min(values))


def effective_rank(singular_values: Tensor) -> float:
    """``exp(-sum p_i log p_i)`` with ``p_i = s_i / sum s`` (Roy and Vetterli, EUSIPCO 2007): 1 to the full rank."""
    p = singular_values.double().clamp_min(0)
    p = p / p.sum()
    return math.exp(-torch.xlogy(p, p).sum().item())


def feature_rank(features: Tensor) -> float:
    """Effective rank of ``(N, C, *spatial)``: pixels by channels, each channel standardised as BN shows it to readers."""
    rows = features.double().movedim(1, -1).flatten(0, -2)
    rows = rows - rows.mean(0)
    rows = rows / rows.std(0).clamp_min(1e-12)
    return effective_rank(torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0).sqrt())


@torch.no_grad()
def seen_features(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The output of each dense block, CSP stage or stage, and the pooled features that the classifier sees."""
    result: dict[str, Tensor] = {}
    hooks = []
    children = network.get_submodule("features").named_children()
    blocks = [module for name, module in children if name.startswith(("denseblock", "stage"))]
    for i, block in enumerate(blocks, 1):
        hooks.append(block.register_forward_hook(lambda _m, _i, out, i=i: result.__setitem__(f"block {i}", out)))
    classifier = network.get_submodule("classifier")
    hooks.append(classifier.register_forward_pre_hook(lambda _, args: result.__setitem__("classifier", args[0])))
    network.eval()(images)
    for hook in hooks:
        hook.remove()
    return result


@torch.no_grad()
def feature_reuse(network: nn.Module, start: nn.Module | None = None) -> list[Tensor]:
    """Per block the mean absolute weight from each source to each target, as figure 5 of arXiv 1608.06993.

    A block of L layers gives ``(L + 1, L + 1)``: row s is the block's input (s = 0) or layer s, column t is layer t + 1
    or, the last, what reads the whole block: the transition's convolution or the classifier. NaN where t < s. With
    ``start``, the network before training, it is the mean absolute change of the weights instead.
    """
    weights = {
        name: p.detach() - (0 if start is None else start.get_parameter(name)) for name, p in network.named_parameters()
    }
    children = dict(network.get_submodule("features").named_children())
    result = []
    for i in range(1, sum(name.startswith("denseblock") for name in children) + 1):
        block = f"features.denseblock{i}"
        readers = [weights[f"{block}.{name}.conv1.weight"] for name, _ in children[f"denseblock{i}"].named_children()]
        growth_rate, inputs = len(readers[0]), readers[0].shape[1]
        last = f"features.transition{i}.conv" if f"transition{i}" in children else "classifier"
        readers.append(weights[f"{last}.weight"])
        sizes = [inputs] + [growth_rate] * (len(readers) - 1)
        table = torch.full((len(readers), len(readers)), math.nan)
        for t, weight in enumerate(readers):
            by_channel = weight.abs().transpose(0, 1).flatten(1).mean(1)
            for s, part in enumerate(by_channel.split(sizes[: t + 1])):
                table[s, t] = part.mean()
        result.append(table)
    return result


class Duplication(NamedTuple):
    """Over all channels of a network's stages, see :func:`duplicate_gradients`: means over channels.

    Attributes:
        terms: n_c, weight gradients that are computed together with the channel's gradient, one per reader.
        cosine: mean absolute cosine between the terms of a channel, over channels with two or more.
        duplicates: n_c less the effective rank of the terms at unit length.
        per_layer: cosine between the terms of the readers i and j of a stage, ``(readers, readers)``, one per stage.
    """

    terms: float
    cosine: float
    duplicates: float
    per_layer: list[Tensor]


def duplicate_gradients(network: nn.Module, images: Tensor, labels: Tensor) -> Duplication:
    """How often a channel's gradient is used for weights, and how alike the uses are.

    Let channel c of a stage be read by the layers R(c): dense layers, transitions, the classifier's norm. With g_m the
    gradient at reader m's output, W_m its weights and a_c the channel as m's BN and ReLU show it,

        dL/dW_m[:, c] = g_m * a_c,        dL/dx_c = sum over m in R(c) of g_c^(m),   g_c^(m) = BN-ReLU'(W_m[:, c]^T g_m)

    (* the correlation over pixels). So n_c = |R(c)| weight gradients draw on one channel and send one term each to its
    gradient: the sets {g_0, g_1, ...} that CSPNet's equation 3 finds in the updates of several layers (arXiv
    1911.11929, section 3). The terms are measured, by autograd: n_c counts those that are not zero. They are duplicates
    as far as they point in one direction, so with unit vectors u_m = g_c^(m) / |g_c^(m)| over batch and pixels

        likeness_c = mean over pairs of |u_m . u_m'|,      duplicates_c = n_c - effective rank of [u_m, m in R(c)].

    ``network`` is the plain twin of a DenseNet or CSPDenseNet.
    """
    stages: dict[str, list[Tensor]] = {}
    hooks = []
    for stage, reader in _readers(network):

        def observe(_: nn.Module, args: tuple[Tensor], stage: str = stage) -> tuple[Tensor]:
            term = args[0].view_as(args[0])
            term.retain_grad()
            stages.setdefault(stage, []).append(term)
            return (term,)

        hooks.append(reader.register_forward_pre_hook(observe))
    network.train().zero_grad()
    F.cross_entropy(network(images), labels).backward()
    for hook in hooks:
        hook.remove()
    counts, cosines, duplicates, per_layer = [], [], [], []
    for terms in stages.values():
        channels = terms[-1].shape[1]
        unit = torch.zeros(channels, len(terms), terms[0].numel() // terms[0].shape[1], dtype=torch.float64)
        for m, term in enumerate(terms):
            assert term.grad is not None
            flat = term.grad.double().movedim(1, 0).flatten(1)
            unit[: len(flat), m] = F.normalize(flat, dim=1, eps=1e-300)
        gram = unit @ unit.transpose(1, 2)
        present = gram.diagonal(dim1=1, dim2=2) > 0.5
        pairs = present[:, :, None] & present[:, None, :] & ~torch.eye(len(terms), dtype=torch.bool)
        per_layer.append((gram.abs() * pairs).sum(0) / pairs.sum(0))
        for c in range(channels):
            n = int(present[c].sum())
            counts.append(n)
            rank = effective_rank(torch.linalg.eigvalsh(gram[c]).clamp_min(0).sqrt()) if n else 0.0
            duplicates.append(n - rank)
            if n > 1:
                cosines.append((gram[c].abs() * pairs[c]).sum().item() / (n * (n - 1)))
    mean = [sum(values) / len(values) if values else 0.0 for values in (counts, cosines, duplicates)]
    return Duplication(mean[0], mean[1], mean[2], per_layer)


def _readers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """(stage's concatenation, module that reads a prefix of it), in the order of execution."""
    result: list[tuple[str, nn.Module]] = []
    open_stage = "stem"
    for name, module in network.get_submodule("features").named_children():
        if isinstance(module, reference.DenseBlock):
            open_stage = name
            result += [(name, layer) for layer in module.children()]
        elif isinstance(module, reference.CSPDenseBlock):
            result += [(name, layer) for layer in module.denseblock.children()]
            before = name
            for part in ("dense_transition", "transition"):
                if hasattr(module, part):
                    result.append((before, getattr(module, part)))
                    before = f"{name} after {part}"
            open_stage = before
        elif isinstance(module, reference.Transition) or name == "norm5":
            result.append((open_stage, module))
    return result


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"
