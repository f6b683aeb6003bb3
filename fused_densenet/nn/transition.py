"""``FusedTransition``: torchvision's transition by signature, state_dict and result; one fused operator inside."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_flags, counts, dimensions
from ..backends import choose
from ..fallback.anatomy import Stage, is_everywhere, replacements, stage_reasons, take_stage, unfit_keys, widths_of
from ..fallback.checks import check_parameters
from ..fallback.reasons import autocasts, meets, uses_batch_stats
from ..fallback.standing import Known
from ..ops.block import Parameters
from ..ops.functional import NormReluConv
from ..ops.network import Reduction
from ..ops.ranks import sync_group
from ..ops.statistics import BatchMoments, BatchStatistics, moments_of, statistics_of
from ..ops.transition import Arguments
from ..ops.transition import transition as transition_op
from .block import CONV, NORM, norm_relu_conv_of
from .chain import Link
from .gate import Gate
from .passage import Passage, alone, passes_on
from .running import RunningStatistics

_NAMES = ("norm", "relu", "conv", "pool")
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class TransitionParts(NamedTuple):
    """A transition taken apart.

    Attributes:
        modules: by name, all that it calls.
        stage: its norm-relu-conv.
        pool: its pooling, where it has one.
        changes: what is not as ``fuse`` found it.
        drop_rate: of a dropout between the convolution and the pooling, 0 where it does nothing.
        drops_channels: whether that drops whole channels.
    """

    modules: dict[str, Any]
    stage: Stage
    pool: nn.Module | None
    changes: Sequence[str] = ()
    drop_rate: float = 0.0
    drops_channels: bool = False

    def structure_reasons(self) -> list[str]:
        """Why a transition that looks like this cannot run fused, whatever the input."""
        reasons = [*self.changes, *stage_reasons(self.stage)]
        if not reasons:
            conv, norm, (norm_name, _, conv_name) = self.stage.conv, self.stage.norm, self.stage.names
            if any(size != 1 for size in conv.kernel_size):
                reasons.append(f"{conv_name} is no 1x1 convolution")
            for width in widths_of(norm) - {conv.weight.shape[1]}:
                reasons.append(f"{norm_name} has {width} channels and {conv_name} reads {conv.weight.shape[1]}")
        if self.pool is not None and not halves(self.pool):
            reasons.append(f"pool is no average pooling of window and stride 2: {self.pool}")
        return reasons


@dataclass
class TransitionPlan:
    """What the modules of a transition say.

    Attributes:
        parts: the modules, taken apart.
        structure: why they cannot run fused as they are.
        reasons: those, and what follows or replaces one of them.
        running: the running statistics of the norm, where there is no reason in ``structure``.
    """

    parts: TransitionParts
    structure: list[str]
    reasons: list[str]
    running: RunningStatistics | None

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.parts.stage.conv.weight
        return weight

    def fits(self, x: Tensor) -> bool:
        if self.reasons or isinstance(self.parts.stage.norm, nn.SyncBatchNorm) or not meets(x, self.weight):
            return False
        return x.numel() > x.shape[1] and (self.parts.pool is None or min(x.shape[2:]) > 1)


class FusedTransition(Gate, nn.Sequential):
    """BN-ReLU-conv1 and 2^d average pooling in one operator; a drop-in for torchvision's ``_Transition``.

    Equivalent to ``pool(conv(relu(norm(x))))`` (arXiv 1608.06993, section 3, "pooling layers"), with the same children,
    parameter names, gradients and running statistics. Pooling is done before the product, with which it commutes, and
    nothing is kept for backward but the input.

    Args:
        num_input_features: channels of the input.
        num_output_features: channels of the result.
        spatial_dims: 1, 2 or 3.
        pool: halve each size.

    Shape:
        ``(N, num_input_features, *spatial)`` to ``(N, num_output_features, *spatial)``, each size halved (rounded down)
        where ``pool``, channels-last in memory; float32, bfloat16, float16 or float64. Under autocast the result has
        autocast's dtype, as the convolution's has.

    Raises:
        ValueError, TypeError: a bad argument or input; raised before anything is written.
    """

    gate_name, input_name = "FusedTransition", "input"

    def __init__(
        self, num_input_features: int, num_output_features: int, *, spatial_dims: int = 2, pool: bool = True
    ) -> None:
        num_input_features, num_output_features = counts(
            num_input_features=num_input_features, num_output_features=num_output_features
        )
        spatial_dims = dimensions(spatial_dims)
        check_flags(pool=pool)
        parts = OrderedDict[str, nn.Module](
            norm=NORM[spatial_dims](num_input_features),
            relu=nn.ReLU(),
            conv=CONV[spatial_dims](num_input_features, num_output_features, kernel_size=1, bias=False),
        )
        if pool:
            parts["pool"] = AVG_POOL[spatial_dims](kernel_size=2, stride=2)
        super().__init__(parts)

    @passes_on
    def forward(self, input: Tensor) -> Tensor:
        return alone(self, input)

    def _fused(self, x: Tensor, known: Known, passage: Passage) -> Tensor:
        plan: TransitionPlan = known.plan
        stage, pool, dropping = plan.parts.stage, plan.parts.pool, plan.parts.drop_rate > 0
        convolution, pools = norm_relu_conv_of(stage), pool is not None and not dropping
        group, taken = sync_group(stage.norm), passage.statistics
        out, statistics = transition(x, convolution, pool=pools, group=group, statistics=taken)
        passage.statistics = None
        if dropping:
            passage.convolved(stage.conv)
            out = _dropped(out, plan.parts, passage.layout or torch.contiguous_format)
            out = out if pool is None else pool(out)
        passage.convolved(stage.conv, pool)
        if statistics is not None and plan.running is not None:
            plan.running.update([(BatchMoments(statistics.moments, None, statistics.pixels), x)], known.tensors)
        return out

    def link(self, plan: "TransitionPlan") -> Link | None:
        stage, pool = plan.parts.stage, plan.parts.pool
        in_training = uses_batch_stats(stage.norm)
        if plan.reasons or plan.parts.drop_rate or (in_training and isinstance(stage.norm, nn.SyncBatchNorm)):
            return None
        weight, biased = stage.conv.weight, stage.conv.bias is not None
        part = Reduction(tuple(weight.shape), biased, stage.norm.eps, stage.slope, pool is not None, in_training)

        def parameters() -> Parameters:
            c = norm_relu_conv_of(stage)
            running = [] if in_training else [t for t in (c.running_mean, c.running_var) if t is not None]
            return Parameters([c.weight], [] if c.bias is None else [c.bias], [c.gamma], [c.beta], running)

        return Link(part, weight.dim() - 2, parameters, plan.running if in_training else None, (stage.conv, pool))

    def parts(self) -> TransitionParts:
        """Its modules, taken apart."""
        modules: dict[str, Any] = {name: module for name, module in self._modules.items() if module is not None}
        pool = modules.get("pool")
        unfit = unfit_keys(modules, _NAMES, "", "a transition", True)
        return TransitionParts(modules, take_stage(modules), None if isinstance(pool, nn.Identity) else pool, unfit)

    def work_out(self) -> tuple["TransitionPlan", list[nn.Module]]:
        parts = self.parts()
        structure = parts.structure_reasons()
        reasons = structure + replacements(parts.modules.items())
        running = None if structure else RunningStatistics([parts.stage.norm])
        return TransitionPlan(parts, structure, reasons, running), list(self.modules())[1:]

    def _check_parameters(self, x: Tensor, plan: "TransitionPlan") -> bool:
        norm = plan.parts.stage.norm
        if plan.parts.pool is not None and min(x.shape[2:]) < 2:
            raise ValueError(f"input: expected sizes of at least 2 to pool, got shape {tuple(x.shape)}")
        check_parameters(x, self.input_name, plan.parts.modules.items(), plan.weight.dtype, [norm])
        return x.numel() > 0 or sync_group(norm) is not None

    def _operator_by_operator(self, x: Tensor) -> Tensor:
        return super().forward(x)


def transition(
    x: Tensor,
    convolution: NormReluConv,
    *,
    pool: bool = True,
    group: str | None = None,
    statistics: BatchStatistics | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """A transition on plain tensors: ``avg_pool(conv1(relu(bn(x))))``, of window and stride 2.

    Args:
        x: ``(N, C, *spatial)``, 1 to 3 spatial dimensions, any strides; float32, bfloat16, float16 or float64.
        convolution: the norm and the 1x1 convolution; the weight in the dtype of ``x`` or float32.
        pool: halve each size, which must be 2 at least.
        group: name of the process group over whose ranks batch statistics are taken; None for this process alone.
        statistics: those of ``x``, where they are known.

    Returns:
        ``(N, K, *spatial)``, channels-last, in the dtype of ``x``, or autocast's where that is on; and the statistics
        of the batch that ``x`` was normalised by, or None where it was normalised by those of the norm.

    Raises:
        RuntimeError: the backend that was asked for cannot run on this device or dtype.
    """
    backend = choose(x.device, x.dtype) if x.numel() else "eager"
    c = convolution
    statistics = statistics_of(x, backend, group, statistics) if c.batch_stats else None
    tensors = (x, [c.weight], [] if c.bias is None else [c.bias], [c.gamma], [c.beta])
    normalised_by = moments_of(statistics, c.running_mean, c.running_var)
    out = transition_op(Arguments(*tensors, *normalised_by, c.eps, c.slope, c.batch_stats, pool, backend, group)).out
    if autocasts(x) and x.dtype == torch.float32:
        out = out.to(torch.get_autocast_dtype(x.device.type))
    return out, statistics


def _dropped(out: Tensor, parts: TransitionParts, layout: torch.memory_format) -> Tensor:
    """Dropout of ``out`` as torch would draw it, in the order of memory, for a tensor of ``layout``."""
    draw, rate = torch.feature_dropout if parts.drops_channels else F.dropout, parts.drop_rate
    kept = draw(torch.ones_like(out, memory_format=layout, requires_grad=False), rate, True) != 0
    return out * kept * (1 / (1 - rate) if rate < 1 else 0.0)


def halves(pool: Any) -> bool:
    """Whether a module averages windows of two with stride two, like ``nn.AvgPool2d(2)``."""
    if type(pool) not in AVG_POOL.values():
        return False
    plain = not pool.ceil_mode and getattr(pool, "divisor_override", None) is None
    settings = ((pool.kernel_size, 2), (pool.stride, 2), (pool.padding, 0))
    return plain and all(is_everywhere(size, number) for size, number in settings)
