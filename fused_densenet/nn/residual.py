"""``FusedResidualDenseBlock``: the dense block without norms of super-resolution, one buffer inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import counts, dimensions, number, rate
from ..fallback.anatomy import convolution_reasons, replacements
from ..fallback.checks import check_parameters
from ..fallback.reasons import meets
from ..fallback.standing import Known
from ..ops.block import Form, Parameters, run_block
from .block import CONV
from .gate import Gate
from .passage import Passage, alone, passes_on


class ResidualParts(NamedTuple):
    """A dense block without norms, taken apart.

    Attributes:
        modules: by name, all that it calls.
        convs: names of the convolutions of its layers, in order.
        slopes: of the activations behind them, for negative numbers.
        last: name of the convolution that reads all features; "" where they are the result.
        scale: what that is multiplied by.
        residual: whether the input is added.
        changes: what is not as ``fuse`` found it.
        seen: whether the convolutions' classes were seen to compute what torch's do, so that a subclass will do.
    """

    modules: dict[str, Any]
    convs: Sequence[str]
    slopes: Sequence[float]
    last: str
    scale: float
    residual: bool
    changes: Sequence[str] = ()
    seen: bool = False

    def structure_reasons(self) -> list[str]:
        """Why a block that looks like this cannot run fused, whatever the input."""
        names = [*self.convs, *filter(None, [self.last])]
        reasons = list(self.changes)
        for name in names if not reasons else ():
            reasons += convolution_reasons(self.modules.get(name), name, self.seen)
        for name, slope in zip(self.convs, self.slopes, strict=True):
            if not 0 <= slope <= 1:
                reasons.append(f"{name}'s activation has a slope of {slope} for negative numbers")
        if reasons:
            return reasons
        shapes = [self.modules[name].weight.shape for name in names]
        width = inputs = shapes[0][1]
        for name, (made, read, *_) in zip(names, shapes, strict=True):
            if read != width:
                reasons.append(f"{name} reads {read} channels where there are {width}")
            width += made
        if self.last and self.residual and shapes[-1][0] != inputs:
            reasons.append(f"{self.last} makes {shapes[-1][0]} channels where {inputs} are added")
        return reasons


@dataclass
class ResidualPlan:
    """What the modules of a block say.

    Attributes:
        parts: the modules, taken apart.
        structure: why they cannot run fused as they are.
        reasons: those, and what follows or replaces one of them.
    """

    parts: ResidualParts
    structure: list[str]
    reasons: list[str]

    def __post_init__(self) -> None:
        self.convs = [] if self.structure else [self.parts.modules[name] for name in self.parts.convs]
        self._biased = [conv for conv in self.convs if conv.bias is not None]
        self.form = Form([conv.bias is not None for conv in self.convs], list(self.parts.slopes), [], [], 1)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.convs[0].weight
        return weight

    def fits(self, x: Tensor) -> bool:
        return not self.reasons and x.numel() > 0 and meets(x, self.weight)

    def parameters(self) -> Parameters:
        return Parameters([conv.weight for conv in self.convs], [conv.bias for conv in self._biased], [], [], [])


class FusedResidualDenseBlock(Gate, nn.Module):
    """A residual dense block without norms; a drop-in for the one of ESRGAN (arXiv 1809.00219, section 3.1, figure 4).

    Equivalent to::

        features = x
        for conv in (conv1, conv2, ...):
            features = torch.cat([features, leaky_relu(conv(features))], dim=1)
        x + scale * last_conv(features)

    with the names, parameters and gradients of BasicSR's ``ResidualDenseBlock``. One buffer holds ``features``, and nothing
    else is kept for backward: an activation's derivative is taken from the sign of what it gave.

    Args:
        num_features: channels of the input and of the result.
        growth_rate: feature maps that each layer adds.
        num_layers: layers; ``conv{num_layers + 1}`` comes after them.
        negative_slope: of the activations for negative numbers, 0 (ReLU) to 1.
        scale: what the last convolution's result is multiplied by.
        spatial_dims: 1, 2 or 3.

    Shape:
        ``(N, num_features, *spatial)`` to the same; float32, bfloat16, float16 or float64. Under autocast the layers run in
        the dtype of the input, as concatenation would make them, the last convolution in autocast's.

    Raises:
        ValueError, TypeError: a bad argument or input; raised before anything is written.
    """

    gate_name, input_name = "FusedResidualDenseBlock", "x"

    def __init__(
        self,
        num_features: int = 64,
        growth_rate: int = 32,
        num_layers: int = 4,
        *,
        negative_slope: float = 0.2,
        scale: float = 0.2,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        num_features, growth_rate, num_layers = counts(
            num_features=num_features, growth_rate=growth_rate, num_layers=num_layers
        )
        spatial_dims, negative_slope = dimensions(spatial_dims), rate("negative_slope", negative_slope, "a number")
        for i in range(num_layers + 1):
            outputs = growth_rate if i < num_layers else num_features
            conv = CONV[spatial_dims](num_features + i * growth_rate, outputs, 3, padding=1)
            setattr(self, f"conv{i + 1}", conv)
        self.lrelu = nn.LeakyReLU(negative_slope, inplace=True)
        self.scale = number("scale", scale)

    @passes_on
    def forward(self, x: Tensor) -> Tensor:
        return alone(self, x)

    def parts(self) -> ResidualParts:
        """Its modules, taken apart."""
        modules: dict[str, Any] = {name: module for name, module in self._modules.items() if module is not None}
        *convs, last = [name for name in modules if name != "lrelu"]
        slope = getattr(modules.get("lrelu"), "negative_slope", 0.0)
        kinds = (nn.LeakyReLU, nn.ReLU)
        changes = [f"{n} is a {type(m).__name__}" for n, m in modules.items() if n == "lrelu" and type(m) not in kinds]
        return ResidualParts(modules, convs, [slope] * len(convs), last, self.scale, True, changes)

    def work_out(self) -> tuple[ResidualPlan, list[nn.Module]]:
        parts = self.parts()
        structure = parts.structure_reasons()
        return ResidualPlan(parts, structure, structure + replacements(parts.modules.items())), list(self.modules())[1:]

    def _fused(self, x: Tensor, known: Known, passage: Passage) -> Tensor:
        passage.statistics, plan = None, known.plan
        out, _ = run_block(x, plan.parameters(), plan.form, False, None)
        parts = plan.parts
        if not parts.last:
            return out
        out = parts.modules[parts.last](out)
        if out.dtype != x.dtype:
            out = out * parts.scale
            return out + x if parts.residual else out
        if parts.scale != 1:
            out = out.mul_(parts.scale)
        return out.add_(x) if parts.residual else out

    def _check_parameters(self, x: Tensor, plan: ResidualPlan) -> bool:
        check_parameters(x, self.input_name, plan.parts.modules.items(), plan.weight.dtype, [])
        return x.numel() > 0

    def _operator_by_operator(self, x: Tensor) -> Tensor:
        modules, features = self._modules, x
        *convs, last = [name for name in modules if name != "lrelu"]
        for name in convs:
            features = torch.cat([features, modules["lrelu"](modules[name](features))], dim=1)  # type: ignore[misc]
        return x + modules[last](features) * self.scale  # type: ignore[misc]
