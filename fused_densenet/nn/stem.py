"""``FusedFeatures``: a ``nn.Sequential`` in which BN, ReLU and max pooling that follow each other run as one operator."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..backends import choose
from ..backends.contract import accumulate_dtype
from ..fallback.anatomy import (
    interceptions,
    is_batch_norm,
    is_everywhere,
    norm_relu_reasons,
    own_activation,
    replacements,
    widths_of,
)
from ..fallback.reasons import announce, context_reasons, surroundings_reasons, uses_batch_stats
from ..fallback.recording import exports_operators, refuse_script
from ..fallback.standing import Known, Remembered, known_of
from ..ops.block import Parameters
from ..ops.network import NormReluPool
from ..ops.ranks import sync_group
from ..ops.statistics import BatchMoments, moments_of, statistics_of
from ..ops.stem import Arguments, stem
from ..ops.subclasses import on_plain
from .block import affine_of
from .chain import Chain, Link, chains
from .gate import Gate
from .passage import Kind, Passage, channels_last, kind_of, layout_of
from .running import RunningStatistics

BATCH_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MAX_POOLS: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class Run(NamedTuple):
    """Neighbours in a ``nn.Sequential`` that one operator can replace, by name: a norm, its ReLU, perhaps a pooling."""

    modules: list[tuple[str, nn.Module]]
    norm: Any
    pool: bool
    running: RunningStatistics
    slope: float = 0.0  # of the activation; 1 where there is none

    def link(self) -> Link | None:
        """What it is in a chain."""
        norm, in_training = self.norm, uses_batch_stats(self.norm)
        affine, running = [norm.weight, norm.bias], [] if in_training else [norm.running_mean, norm.running_var]
        if any(t is None for t in (*affine, *running)) or (in_training and isinstance(norm, nn.SyncBatchNorm)):
            return None
        dims = MAX_POOLS.index(type(self.modules[-1][1])) + 1 if self.pool else None
        part = NormReluPool(norm.weight.shape[0], norm.eps, self.pool, in_training, self.slope)

        def parameters() -> Parameters:
            running = [] if in_training else [norm.running_mean, norm.running_var]
            return Parameters([], [], [norm.weight], [norm.bias], running)

        return Link(part, dims, parameters, self.running if in_training else None)

    def interceptions(self) -> list[str]:
        """Which of the modules something follows or replaces."""
        return replacements(self.modules)


class FusedFeatures(Remembered, nn.Sequential):
    """A ``nn.Sequential`` that runs ``norm, relu`` and ``norm, relu, pool`` as one operator each.

    Such a run is ``max_pool(relu((x - mean) * weight / sqrt(var + eps) + bias))`` (arXiv 1502.03167, algorithm 1; the stem
    of arXiv 1608.06993, table 1); of it nothing but its input is kept for backward, the rest is computed again. Norms are
    batch normalisations (timm's, which contain the activation, too), pools ``MaxPool(kernel_size=3, stride=2, padding=1)``;
    everything else, and what has hooks, is called as it is. Neighbours that are such runs, dense blocks and transitions
    run as one program.

    Args:
        args: modules, or an OrderedDict of them, as ``nn.Sequential`` takes them.

    Shape:
        The children, their names and the result, its layout too, are those of ``nn.Sequential``; runs are of
        ``(N, C, *spatial)``, 1 to 3 spatial dimensions, float32, bfloat16, float16 or float64.

    Raises:
        TypeError: an argument is no module. Any other error is that of the child that is called.

    Example:
        >>> stem = FusedFeatures(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        >>> stem(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 8, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or exports_operators():  # torch.fx's proxies, say
            return super().forward(input)
        plan, tensors = known_of(self, self.work_out)
        passage = Passage(layout_of(input))
        if not passage.is_calm() and (reasons := surroundings_reasons()):  # every module needs to be called
            if any(step.run for step in plan.steps):
                announce(reasons, type(self).__name__, self)
            return super().forward(input)
        x, i = channels_last(input) if plan.channels_last else input, 0
        while i < len(plan.steps):
            step, chain = plan.steps[i], plan.chains.get(i) if passage.undisturbed and passage.is_calm() else None
            if chain is not None and (out := chain.run(x, tensors, passage)) is not None:
                x, i = out, chain.end
                continue
            if step.run is not None and _fits(x, step.run):
                reasons = context_reasons(x) + step.reasons
                if not reasons:
                    x = on_plain(x, functools.partial(_fused, run=step.run, tensors=tensors, passage=passage))
                    i += len(step.run.modules)
                    continue
                announce(reasons, type(self).__name__, self)
            known = Known(step.plan, tensors) if step.plan is not None and passage.undisturbed else None
            x = passage.through(step.module, x, step.kind, known)
            i += 1
        return passage.arranged(x)

    def work_out(self) -> tuple["FeaturesPlan", list[nn.Module]]:
        modules = self._present()
        steps = [Step(module, kind_of(module), run_at(modules, i)) for i, (_, module) in enumerate(modules)]
        inside = [module for step in steps if step.run is not None for _, module in step.run.modules]
        looked_at = [step.module for step in steps] + [part for module in inside for part in module.modules()]
        if torch.compiler.is_compiling():  # which traces what is read here
            return FeaturesPlan(steps, _for_the_run(modules), {}), looked_at
        for step in steps:
            looked_at += step.look_inside()
        return FeaturesPlan(steps, _for_the_run(modules), chains(_links(steps))), looked_at

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script()

    def runs(self) -> list[Run]:
        """What it replaces by one operator each."""
        modules = self._present()
        return [run for i in range(len(modules)) if (run := run_at(modules, i)) is not None]

    def fallback_reasons(self, x: Tensor | None = None) -> list[str]:
        """Why its runs cannot run fused for the input ``x``, or for any if None; empty if they can."""
        reasons = [reason for run in self.runs() for reason in run.interceptions()]
        return reasons if x is None else context_reasons(x) + reasons

    def _present(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self._modules.items() if module is not None]


class Step:
    """A module of a sequence: what calling it means to a passage, and the run that begins with it, or None.

    ``reasons`` say why that run cannot run fused, whatever the input; ``plan`` is the module's own where it has one.
    """

    def __init__(self, module: nn.Module, kind: Kind, run: Run | None) -> None:
        self.module, self.kind, self.run = module, kind, run
        self.reasons = [] if run is None else run.interceptions()
        self.plan: Any = None

    def look_inside(self) -> Iterable[nn.Module]:
        """Works out the module's plan; what that depends on."""
        if self.kind != "bare" or not isinstance(self.module, Gate):
            return []
        self.plan, inside = self.module.work_out()
        return inside

    def link(self) -> Link | None:
        if self.run is not None:
            return None if self.reasons else self.run.link()
        if self.kind == "any layout" and type(self.module) in BATCH_NORMS:
            return _of_norm(self.module)
        return self.module.link(self.plan) if self.plan is not None else None  # type: ignore[operator]


class FeaturesPlan(NamedTuple):
    """What a sequence of modules says.

    ``channels_last``: its input goes to a convolution before a run, which in another layout would copy the feature maps,
    many times more than the image. ``chains``: what can run as one program, by the place where it begins.
    """

    steps: list[Step]
    channels_last: bool
    chains: Mapping[int, Chain]


def _of_norm(norm: Any) -> Link | None:
    """A norm that no activation follows, as that of DenseNet's end: no run of its own, but part of a chain."""
    if (norm.running_mean is None) != (norm.running_var is None) or not norm.eps > 0:
        return None
    link = Run([("", norm)], norm, False, RunningStatistics([norm]), slope=1.0).link()
    return None if link is None else link._replace(dims=BATCH_NORMS.index(type(norm)) + 1)


def _links(steps: Sequence[Step]) -> list[tuple[int, Link | None]]:
    """What each run, and each module outside of the runs, is in a chain, and the place where it begins; the end at last."""
    links, i = [], 0
    while i < len(steps):
        links.append((i, steps[i].link()))
        run = steps[i].run
        i += 1 if run is None else len(run.modules)
    return [*links, (i, None)]


def _for_the_run(modules: Sequence[tuple[str, nn.Module]]) -> bool:
    plain = len(modules) > 0 and type(modules[0][1]) in (nn.Conv2d, nn.Conv3d) and not interceptions(modules[:1])
    return plain and len(modules) > 1 and run_at(modules, 1) is not None


def run_at(modules: Sequence[tuple[str, nn.Module]], i: int) -> Run | None:
    """The run that begins with ``modules[i]``, if one does."""
    norm: Any = modules[i][1]
    if not is_batch_norm(norm):
        return None
    activation = own_activation(norm)
    end = i + 1
    if activation is None and end < len(modules):
        activation = modules[end][1]
        end += 1
    if activation is None or norm_relu_reasons(norm, [activation], "norm", "relu", leaky=False):
        return None
    pool = end < len(modules) and is_stems_pooling(modules[end][1])
    return Run(list(modules[i : end + pool]), norm, pool, RunningStatistics([norm]))


def is_stems_pooling(pool: Any) -> bool:
    if type(pool) not in MAX_POOLS or pool.ceil_mode or pool.return_indices:
        return False
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return all(map(is_everywhere, settings, (3, 2, 1, 1)))


def _fits(x: Tensor, run: Run) -> bool:
    """Whether the operator takes ``x``; what it does not take goes to the modules, which have errors of their own."""
    norm = run.norm
    pooled_dims = MAX_POOLS.index(type(run.modules[-1][1])) + 1 if run.pool else x.dim() - 2
    wide = accumulate_dtype(x.dtype) if x.dtype.is_floating_point else None
    tensors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    return (
        3 <= x.dim() <= 5
        and x.dim() == pooled_dims + 2
        and widths_of(norm) <= {x.shape[1]}
        and (x.numel() > x.shape[1] or sync_group(norm) is not None)
        and all(t.dtype in (x.dtype, wide) and t.device == x.device for t in tensors)
    )


def _fused(x: Tensor, run: Run, tensors: object | None, passage: Passage) -> Tensor:
    norm, batch_stats, group = run.norm, uses_batch_stats(run.norm), sync_group(run.norm)
    backend = choose(x.device, x.dtype) if x.numel() else "eager"
    statistics = statistics_of(x, backend, group, passage.statistics) if batch_stats else None
    normalised_by = moments_of(statistics, norm.running_mean, norm.running_var)
    passage.statistics = None
    gamma, beta = affine_of(norm, x)
    arguments = Arguments(x, [gamma], [beta], *normalised_by, norm.eps, batch_stats, run.pool, backend, group)
    out = stem(arguments).out
    if statistics is not None:
        run.running.update([(BatchMoments(statistics.moments, None, statistics.pixels), x)], tensors)
    return out
