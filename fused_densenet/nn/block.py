"""``FusedDenseBlock``: torchvision's dense block by signature, state_dict and result; one fused operator inside."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_image, counts, dimensions, rate
from ..fallback.anatomy import LayerParts, Stage, is_memory_efficient, structure_reasons, take_apart
from ..fallback.checks import check_parameters
from ..fallback.reasons import (
    fallback_reasons,
    meets,
    statistics_groups,
    structure_and_hook_reasons,
    uses_batch_stats,
)
from ..fallback.recomputation import concatenated, recomputed
from ..fallback.standing import Known
from ..ops.block import Form, Parameters, run_block
from ..ops.functional import NormReluConv
from ..ops.schedule import Structure
from .chain import Link
from .gate import Gate
from .passage import Passage, alone, passes_on
from .running import RunningStatistics

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LEGACY_KEY = re.compile(r"(denselayer\d+)\.(norm|conv)\.([12]\.\w+)")
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class FusedDenseLayer(nn.Module):
    """One dense layer, its parameters named as torchvision names them. Called by itself it runs operator by operator.

    Equivalent to::

        x = torch.cat(inputs, dim=1)
        dropout(conv2(relu(norm2(bottleneck_dropout(conv1(relu(norm1(x))))))))  # dropout(conv1(relu(norm1(x)))) without bottleneck

    H_l of arXiv 1608.06993, equation 2 (section 3, "composite function" and "bottleneck layers").

    Args:
        num_input_features: channels of the inputs together.
        growth_rate, bn_size, drop_rate, memory_efficient, spatial_dims, bias, negative_slope, bottleneck_drop_rate: as
            :class:`FusedDenseBlock`'s.

    Shape:
        ``(N, num_input_features, *spatial)``, or a list of tensors of so many channels together, to the new feature maps
        ``(N, growth_rate, *spatial)``; the dtypes of its parameters, as torch's operators take and give them.

    Raises:
        ValueError, TypeError: a bad argument. An input that does not fit is the error of torch's operators.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        spatial_dims: int = 2,
        bias: bool = False,
        negative_slope: float = 0.0,
        bottleneck_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        num_input_features, growth_rate = counts(num_input_features=num_input_features, growth_rate=growth_rate)
        (bn_size,) = (None,) if bn_size is None else counts(bn_size=bn_size)
        spatial_dims, negative_slope = dimensions(spatial_dims), rate("negative_slope", negative_slope, "a number")
        check_flags(memory_efficient=memory_efficient, bias=bias)
        self.drop_rate = rate("drop_rate", drop_rate)
        self.bottleneck_drop_rate = rate("bottleneck_drop_rate", bottleneck_drop_rate)
        if bn_size is None and bottleneck_drop_rate:
            raise ValueError(f"bottleneck_drop_rate: expected 0 where bn_size is None, got {bottleneck_drop_rate}")
        self.memory_efficient = memory_efficient
        conv, norm = CONV[spatial_dims], NORM[spatial_dims]
        width = growth_rate if bn_size is None else bn_size * growth_rate
        first_kernel = 3 if bn_size is None else 1
        self.norm1 = norm(num_input_features)
        self.relu1 = nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()
        self.conv1 = conv(num_input_features, width, first_kernel, padding=first_kernel // 2, bias=bias)
        if bn_size is not None:
            self.norm2 = norm(width)
            self.relu2 = nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()
            self.conv2 = conv(width, growth_rate, kernel_size=3, padding=1, bias=bias)

    @property
    def bottleneck(self) -> bool:
        return hasattr(self, "conv2")

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        inputs = [input] if isinstance(input, Tensor) else input
        run = recomputed if self.memory_efficient else concatenated
        out = run((self.norm1, self.relu1, self.conv1), *inputs)
        if self.bottleneck:
            if self.bottleneck_drop_rate > 0:
                out = nn.functional.dropout(out, p=self.bottleneck_drop_rate, training=self.training)
            out = self.conv2(self.relu2(self.norm2(out)))
        if self.drop_rate > 0:
            out = nn.functional.dropout(out, p=self.drop_rate, training=self.training)
        return out


class FusedDenseBlock(Gate, nn.ModuleDict):
    """A dense block in one preallocated buffer; a drop-in for torchvision's ``_DenseBlock``.

    Equivalent to::

        for layer in layers:
            x = torch.cat([x, dropout(layer.conv2(relu(layer.norm2(layer.conv1(relu(layer.norm1(x)))))))], dim=1)

    (arXiv 1608.06993, equation 2), with the same parameter names, gradients, running statistics and random numbers.

    Args:
        num_layers: dense layers in the block.
        num_input_features: channels of the input.
        bn_size: width of the bottleneck in multiples of ``growth_rate``; None for layers without one.
        growth_rate: feature maps that each layer adds.
        drop_rate: dropout of each layer's new feature maps, 0 to 1.
        memory_efficient: compute the bottleneck again in backward instead of keeping it.
        spatial_dims: 1, 2 or 3.
        bias: the convolutions have one.
        negative_slope: of the activations for negative numbers, 0 (ReLU) to 1.
        return_new: the result is the new feature maps alone.
        bottleneck_drop_rate: dropout of each bottleneck, the result of a layer's first convolution, 0 to 1.

    Shape:
        ``(N, num_input_features, *spatial)`` to ``(N, num_input_features + num_layers * growth_rate, *spatial)``, with
        ``return_new`` ``(N, num_layers * growth_rate, *spatial)``, channels-last in memory;
        float32, bfloat16, float16 or float64. Under autocast a block runs in the dtype of its input, as concatenation
        would make it.

    Raises:
        ValueError, TypeError: a bad argument or input; raised before anything is written.

    Example:
        >>> block = FusedDenseBlock(num_layers=6, num_input_features=64, bn_size=4, growth_rate=32)
        >>> block(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 256, 7, 7])
    """

    _version = 2
    gate_name, input_name = "FusedDenseBlock", "init_features"
    layer_class: type[nn.Module] | None = FusedDenseLayer
    prepends = False
    """Whether new feature maps stand before those that their layer read."""
    return_new = False

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        spatial_dims: int = 2,
        bias: bool = False,
        negative_slope: float = 0.0,
        return_new: bool = False,
        bottleneck_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        num_layers, num_input_features, growth_rate = counts(
            num_layers=num_layers, num_input_features=num_input_features, growth_rate=growth_rate
        )
        check_flags(return_new=return_new)
        self.return_new = return_new
        for i in range(num_layers):
            self[f"denselayer{i + 1}"] = FusedDenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                memory_efficient,
                spatial_dims=spatial_dims,
                bias=bias,
                negative_slope=negative_slope,
                bottleneck_drop_rate=bottleneck_drop_rate,
            )

    @property
    def num_input_features(self) -> int:
        """Channels that its first layer reads."""
        width: int = self.parts()[0].stages[0].conv.weight.shape[1]
        return width

    @property
    def spatial_dims(self) -> int:
        """Of its first convolution."""
        dims: int = self.parts()[0].stages[0].conv.weight.dim() - 2
        return dims

    @property
    def memory_efficient(self) -> bool:
        """Whether any of its layers is set to compute its bottleneck again in backward; setting it sets all."""
        return any(map(is_memory_efficient, self.children()))

    @memory_efficient.setter
    def memory_efficient(self, value: bool) -> None:
        for layer in self.children():
            layer.memory_efficient = value  # type: ignore[assignment]

    @passes_on
    def forward(self, init_features: Tensor) -> Tensor:
        return alone(self, init_features)

    def _fused(self, x: Tensor, known: Known, passage: Passage) -> Tensor:
        plan: BlockPlan = known.plan
        (group,) = plan.groups() or {None}
        out, moments = run_block(
            x,
            plan.operands(known.tensors),
            plan.form,
            plan.memory_efficient,
            group,
            passage.layout or torch.contiguous_format,
        )
        passage.statistics = None
        first = plan.convs[0].weight.shape[1] if self.return_new else 0
        if moments is not None and plan.running is not None:
            plan.running.update([(moments, x)], known.tensors)
            passage.statistics = moments.result(first)
        return out[:, first:] if first else out

    def link(self, plan: "BlockPlan") -> Link | None:
        form = plan.form
        mixed = any(form.batch_stats) and (plan.synchronised or not all(form.batch_stats))
        if plan.reasons or self.return_new or form.drop_rate or form.drop_inside or mixed:
            return None
        in_training = any(form.batch_stats)
        shapes = tuple([tuple(conv.weight.shape) for conv in plan.convs])
        structure = Structure(
            shapes,
            tuple(form.biased),
            tuple(form.slopes),
            tuple(form.eps),
            tuple(form.batch_stats),
            form.per_layer,
            keep_bottleneck=in_training and form.per_layer == 2 and not plan.memory_efficient,
            prepends=form.prepends,
        )
        return Link(structure, self.spatial_dims, plan.parameters, plan.running if in_training else None)

    def work_out(self) -> tuple["BlockPlan", list[nn.Module]]:
        layers = self.parts()
        reasons = structure_and_hook_reasons(layers, self.layer_class)
        return BlockPlan.of(layers, reasons, self.memory_efficient, self.prepends), list(self.modules())[1:]

    def parts(self) -> list[LayerParts]:
        """Its layers, taken apart."""
        return [take_apart(layer, name) for name, layer in self._modules.items() if layer is not None]

    def _reasons_for(self, x: Tensor, plan: "BlockPlan") -> list[str]:
        return fallback_reasons(x, plan.reasons, plan.dtype, statistics_groups(plan.layers))

    def _check(self, x: Any, plan: "BlockPlan") -> None:
        """That ``x`` fits its layers as they are; layers that do not follow one another judge it themselves."""
        # Their weights are not looked at: one that is computed has a state, which every look may move on.
        if isinstance(x, Tensor) and plan.reasons and structure_reasons(plan.layers, self.layer_class):
            return
        check_image(x, self.input_name, self.num_input_features, self.spatial_dims)

    def _check_parameters(self, x: Tensor, plan: "BlockPlan") -> bool:
        if x.numel() == 0 and not any(plan.groups()):
            return False
        modules = [named for parts in plan.layers for named in parts.modules.items()]
        check_parameters(x, self.input_name, modules, plan.dtype, plan.norms)
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the keys of torchvision's first checkpoints (``norm.1`` for ``norm1``) as well."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            match = _LEGACY_KEY.fullmatch(key[len(prefix) :])
            layer = self._modules.get(match[1]) if match else None
            if match and layer is not None and match[2] not in layer._modules:
                nested = "layers." if "layers" in layer._modules else ""
                state_dict[f"{prefix}{match[1]}.{nested}{match[2]}{match[3]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _operator_by_operator(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features[self.return_new :], dim=1)


@dataclass
class BlockPlan:
    """What the layers of a block say, in the order of execution; all but the first two only where there are no ``reasons``.

    Attributes:
        layers: the layers, taken apart.
        reasons: why they cannot run fused, whatever the input.
        norms: their norms; the block's convolutions are ``convs``.
        form: what they are beside tensors.
        running: their running statistics.
        synchronised: whether one of the norms may take its statistics over the ranks of a group.
        memory_efficient: bottlenecks are computed again in backward.
    """

    layers: list[LayerParts]
    reasons: list[str]
    norms: list[Any] = field(default_factory=list)
    convs: list[Any] = field(default_factory=list)
    form: Form = field(default_factory=lambda: Form([], [], [], [], 1))
    running: RunningStatistics | None = None
    synchronised: bool = True
    memory_efficient: bool = False

    @classmethod
    def of(cls, layers: list[LayerParts], reasons: list[str], memory_efficient: bool, prepends: bool) -> "BlockPlan":
        if reasons:
            return cls(layers, reasons)
        stages = [stage for parts in layers for stage in parts.stages]
        norms, convs = [stage.norm for stage in stages], [stage.conv for stage in stages]
        first = layers[0]
        form = Form(
            [conv.bias is not None for conv in convs],
            [stage.slope for stage in stages],
            [norm.eps for norm in norms],
            [uses_batch_stats(norm) for norm in norms],
            len(first.stages),
            first.drop_rate,
            first.drop_inside,
            first.drops_channels,
            prepends,
        )
        synchronised = any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
        running = RunningStatistics(norms)
        return cls(layers, reasons, norms, convs, form, running, synchronised, memory_efficient)

    def __post_init__(self) -> None:
        self._weights = [conv._parameters for conv in self.convs]
        self._biased = [conv for conv in self.convs if conv.bias is not None]
        self._affine = [norm._parameters for norm in self.norms]
        frozen = [norm._buffers for norm, batch in zip(self.norms, self.form.batch_stats, strict=True) if not batch]
        self._frozen = [(held, name) for held in frozen for name in ("running_mean", "running_var")]
        self._any_batch_stats = any(self.form.batch_stats)
        self._parameters: tuple[object | None, Parameters] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the first convolution; float32 where there are ``reasons``, and it does not matter."""
        return torch.float32 if self.reasons else self.convs[0].weight.dtype

    def groups(self) -> set[str | None]:
        """The process groups over which the norms take batch statistics; None for this process alone."""
        return statistics_groups(self.layers) if self.synchronised else {None}

    def fits(self, x: Tensor) -> bool:
        if self.reasons or self.synchronised or not meets(x, self.convs[0].weight):
            return False
        return x.numel() > (x.shape[1] if self._any_batch_stats else 0)

    def parameters(self, tensors: object | None = None) -> Parameters:
        """What the modules hold, looked up anew unless the ``tensors`` are those of the last time."""
        kept = self._parameters
        if tensors is None or kept is None or kept[0] is not tensors:
            kept = tensors, self._look_up()
            self._strided = not all(t.is_contiguous() for t in kept[1].running)
            self._parameters = None if tensors is None else kept
        return kept[1]

    def operands(self, tensors: object | None) -> Parameters:
        """:meth:`parameters` as the operator reads them: running statistics contiguous."""
        found = self.parameters(tensors)
        return found._replace(running=[t.contiguous() for t in found.running]) if self._strided else found

    def _look_up(self) -> Parameters:
        weights = [held.get("weight") for held in self._weights]
        gammas, betas = ([held.get(name) for held in self._affine] for name in ("weight", "bias"))
        if any(t is None for t in (*weights, *gammas, *betas)):
            for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
                if weights[i] is None:  # a replica of nn.DataParallel, whose parameters are plain attributes
                    weights[i] = conv.weight
                if gammas[i] is None or betas[i] is None:
                    gammas[i], betas[i] = affine_of(norm, weights[i])
        biases = [conv.bias for conv in self._biased]
        return Parameters(weights, biases, gammas, betas, [held[name] for held, name in self._frozen])


def norm_relu_conv_of(stage: Stage) -> NormReluConv:
    norm, conv = stage.norm, stage.conv
    gamma, beta = affine_of(norm, conv.weight)
    statistics = norm.running_mean, norm.running_var, norm.eps, uses_batch_stats(norm)
    return NormReluConv(conv.weight, gamma, beta, *statistics, conv.bias, stage.slope)


def affine_of(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's weight and bias, contiguous; where it has none, ones and zeros for the channels ``like.shape[1]``, of its dtype."""
    gamma, beta = norm.weight, norm.bias
    return (
        like.new_ones(like.shape[1]) if gamma is None else gamma.contiguous(),
        like.new_zeros(like.shape[1]) if beta is None else beta.contiguous(),
    )
