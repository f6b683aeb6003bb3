"""A network as it is served: programs that hold constants of their own, and whatever stands around them."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..arguments import check_image
from ..backends import BACKENDS, choose
from ..fallback.reasons import foreign_function_modes, has_global_hooks
from ..fallback.recording import one_call, refuse_script
from ..ops.block import Parameters
from ..ops.network import Network, NormReluPool, Parts, StridedConvolution, places
from ..ops.program import Bound
from ..ops.subclasses import on_plain
from .graphs import Graphs
from .passage import layout_of

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_KINDS = Parameters._fields
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEEPS = (
    "a snapshot keeps the weights that it was made with: load others into the model and call "
    "optimize_for_inference again; to keep a snapshot, torch.save it whole"
)


class Stem(NamedTuple):
    """How torch's convolution is called that stands before a program, or is its first part where a backend has that."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def is_plain(self) -> bool:
        """Whether it is a :class:`fused_densenet.ops.network.StridedConvolution`."""
        return self.groups == 1 and set(self.dilation) == {1} and not isinstance(self.padding, str)


class Frozen(nn.Module):
    """What has one dtype for good: the constants that it was made with."""

    dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        converted = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        if converted != self.dtype:
            raise RuntimeError(
                f"a snapshot's weights were rounded to {self.dtype} when it was made: for {converted}, "
                "call optimize_for_inference(model, dtype=...) of the model"
            )

        def on_bits(t: Tensor) -> Tensor:  # vectors are wider than the data: a change of dtype does not reach them
            return fn(t.view(_BITS[t.itemsize])).view(t.dtype) if t.is_floating_point() else fn(t)

        return super()._apply(on_bits, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """What a module around a snapshot loads: nothing but the weights that are there."""
        if not all(
            name in state_dict and _equal(t, state_dict[name]) for name, t in self.state_dict(prefix=prefix).items()
        ):
            raise RuntimeError(_KEEPS)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script()


class Segment(Frozen):
    """Parts of a network that follow one another as one program, perhaps behind a convolution that torch runs.

    Args:
        parts: what the program computes.
        parameters: its constants: weights in the dtype of the data, vectors in that of its sums.
        stem: the convolution that reads the input, if there is one, and its weight, which has no bias.
        flat: a result of one pixel is ``(N, C)``.
        layout: that the modules whose place it takes give to feature maps; None for that of what they read. A result has it
            unless :attr:`arranges` is False, where it is left to an :class:`Arrangement` for whoever reads it.
    """

    stem_weight: Tensor
    weights0: Tensor
    _plans: "dict[str, _Plan]"

    def __init__(
        self,
        parts: Parts,
        parameters: Parameters,
        stem: tuple[Stem, Tensor] | None = None,
        flat: bool = False,
        layout: torch.memory_format | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.flat, self.layout, self.arranges = tuple(parts), flat, layout, True
        self.stem = None if stem is None else stem[0]
        self.register_buffer("stem_weight", None if stem is None else stem[1])
        for kind, tensors in zip(_KINDS, parameters, strict=True):
            for i, tensor in enumerate(tensors):
                self.register_buffer(f"{kind}{i}", tensor)
        self._counts = [len(tensors) for tensors in parameters]
        self.dtype = parameters.weights[0].dtype
        self._forget()
        super().train(False)

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, *spatial)``, in the dtype of the constants, to the result of the last part.

        Raises:
            ValueError, TypeError: the input is none of that, or too small to be pooled as often.
        """
        if isinstance(input, torch.fx.Proxy):
            result: Tensor = one_call(self, input)
            return result
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace cannot record a snapshot: trace the model that it was made from")
        if torch.compiler.is_exporting():
            raise RuntimeError("torch.export cannot record a snapshot: export the model that it was made from")
        if not isinstance(input, Tensor):
            return self._run(input)  # which says so
        return _outside_of_graphs(self, input) if torch.compiler.is_compiling() else on_plain(input, self._run)

    def _run(self, x: Tensor) -> Tensor:
        first = self._first_weight()
        if first is not self._first and not torch.compiler.is_compiling() and not _equal(first, self._first):
            raise RuntimeError(_KEEPS)
        self._check(x, first)
        backend = choose(x.device, x.dtype)
        plan = self._plans.get(backend)
        if plan is None:
            if first is not self._first:
                plan = _Plan.of(self, backend)
            else:
                with _disable_current_modes():  # of one that fakes tensors, the plan would keep those
                    plan = self._plans[backend] = _Plan.of(self, backend)
        image = plan.convolve(x)
        flat = self.flat and plan.head is _nothing
        out = plan.network(image, plan.parameters, backend, plan.bound, image is not x, flat)
        if out is None:
            raise ValueError(f"input: expected larger images, got shape {tuple(x.shape)}")
        out = plan.head(out)
        if self.flat and out.dim() > 2:
            return out.flatten(1)
        return _arranged(out, x, self.layout) if self.arranges else out

    def _check(self, x: Tensor, first: Tensor) -> None:
        groups = 1 if self.stem is None else self.stem.groups
        check_image(x, "input", first.shape[1] * groups, first.dim() - 2)
        if x.dtype != self.dtype:
            raise TypeError(f"input: expected {self.dtype}, the snapshot's, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"input: expected a tensor on {first.device}, where the snapshot is, got one on {x.device}"
            )

    def extra_repr(self) -> str:
        stem = "" if self.stem is None else "a convolution, then "
        return f"{stem}{len(self.parts)} parts as one program, {self.dtype}"

    def _first_weight(self) -> Tensor:
        first = self._buffers["weights0" if self.stem is None else "stem_weight"]
        assert first is not None
        return first

    def constants(self) -> Parameters:
        """What the program reads, by kind."""
        named = dict(self.named_buffers())
        counts = zip(_KINDS, self._counts, strict=True)
        return Parameters(*[[named[f"{kind}{i}"] for i in range(count)] for kind, count in counts])

    def _forget(self) -> None:
        """What was worked out of constants that are others now; in place of the first, tracers and torch.func put theirs."""
        self._plans, self._first = {}, self._first_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_plans", "_first")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"layout": None, "arranges": True, **state})  # which those of earlier versions lack
        self._forget()


class Arrangement(nn.Module):
    """The result of a segment for those of its readers that are none."""

    def __init__(self, layout: torch.memory_format | None) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        return _arranged(out, x, self.layout)


def _arranged(out: Tensor, x: Tensor, layout: torch.memory_format | None) -> Tensor:
    """A feature map in the layout that it would have without a program, which read ``x``."""
    return out if out.dim() != x.dim() else out.contiguous(memory_format=layout or layout_of(x))


@torch._disable_dynamo  # torch.compiler.disable, but for the import of the compiler
def _outside_of_graphs(segment: Segment, x: Tensor) -> Tensor:
    """A compiler has nothing to gain from what is one call, with memory of its own."""
    return on_plain(x, segment._run)


class _Plan(NamedTuple):
    """What a backend runs of a segment, and what torch does before and behind it: the network's first convolution, and its
    end, where the backend has no primitives for them."""

    convolve: Callable[[Tensor], Tensor]
    network: Network
    parameters: Parameters
    bound: Bound | None
    head: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, segment: "Segment", backend: str) -> "_Plan":
        kernels, head, parts, constants = BACKENDS[backend], _nothing, Parts(segment.parts), segment.constants()
        stem, convolve = segment.stem, _nothing
        if stem is not None and hasattr(kernels, "strided_conv") and stem.is_plain():
            weight = segment.stem_weight.movedim(1, -1).contiguous().movedim(-1, 1)
            parts = Parts([StridedConvolution(tuple(weight.shape), stem.stride, stem.padding), *parts])
            constants = constants._replace(weights=[weight, *constants.weights])
        elif stem is not None:
            convolve = functools.partial(_convolve, weight=segment.stem_weight, stem=stem)
        cut = next((i for i, part in enumerate(parts) if isinstance(part, NormReluPool) and part.means), None)
        if cut is not None and not hasattr(kernels, "norm_relu_mean"):
            before, layers = places(parts)[cut + 1], parts[cut + 1 :]
            weights, biases = constants.weights[before.weight :], constants.biases[before.bias :]
            head = functools.partial(_mean_and_linear, layers, weights, biases)
            norm = parts[cut]
            assert isinstance(norm, NormReluPool)
            parts = Parts([*parts[:cut], norm._replace(means=False)])
        end = places(parts)[-1]
        ends = end.weight, end.bias, end.norm, end.norm, end.running
        parameters = Parameters(*[kind[:count] for kind, count in zip(constants, ends, strict=True)])
        return cls(convolve, Network(parts), parameters, Bound.by(kernels, parameters, constant=True), head)


def _nothing(x: Tensor) -> Tensor:
    return x


def _convolve(x: Tensor, weight: Tensor, stem: Stem) -> Tensor:
    return _CONVOLVE[x.dim() - 2](x, weight, None, *stem)


def _mean_and_linear(layers: Sequence[Any], weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    """The mean of the pixels, and convolutions of it."""
    dims, rest = x.dim() - 2, iter(biases)
    x = x.mean(tuple(range(2, x.dim())))
    for layer, weight in zip(layers, weights, strict=True):
        x = F.linear(x, weight.flatten(1), next(rest).to(x.dtype) if layer.biased else None)
        x = x if layer.slope == 1 else F.leaky_relu(x, layer.slope)
    return x.reshape(*x.shape, *[1] * dims)


class Snapshot(Frozen):
    """What :func:`fused_densenet.optimize_for_inference` returns: a network with the weights that it was made with.

    Called as the network that it was made from. Calls of several threads do not disturb one another.

    Args:
        inside: the network, :class:`Segment` in place of what runs as one.
        dtype: of its weights and images.
        notes: what :func:`fused_densenet.explain` says of its parts.
        cuda_graphs: replay a captured CUDA graph for each shape of an image.
        programs: what is the ``forward`` of modules inside.
    """

    def __init__(
        self,
        inside: nn.Module,
        dtype: torch.dtype,
        notes: Any,
        cuda_graphs: bool = False,
        programs: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.inside, self.dtype, self.notes, self.cuda_graphs = inside, dtype, notes, cuda_graphs
        self.programs = nn.ModuleList(programs)  # of which the modules inside do not tell
        self._whole = _only_segment(inside)
        self._graphs: Graphs | None = None
        self._autocasts: str | None = None  # the kind of device whose autocast there is, "" where there is none
        super().train(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The network's own result, without gradients, in the snapshot's dtype whatever autocast says.

        Raises:
            RuntimeError: gradients by an input are asked for, hooks on all modules are registered, or somebody's
                TorchFunctionMode is active.
        """
        if module_hooks._has_any_global_hook() and has_global_hooks():
            raise RuntimeError(
                "hooks on all modules are registered, which a snapshot's programs do not call: "
                "call the model that it was made from"
            )
        if modes := foreign_function_modes():
            raise RuntimeError(
                f"a TorchFunctionMode is active ({', '.join(modes)}), which a snapshot's programs do not "
                "ask: call the model that it was made from"
            )
        if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in _tensors((inputs, options))):
            raise RuntimeError(
                "input: expected a tensor without a tangent: a snapshot is for inference, and has no forward-mode "
                "derivative; call the model that it was made from"
            )
        records = torch.is_grad_enabled()
        if records and any(t.requires_grad for t in _tensors((inputs, options))):
            raise RuntimeError(
                "input: expected a tensor that requires no gradient: a snapshot is for inference, and has none; "
                "call it in torch.no_grad() or with input.detach()"
            )
        if self._autocasts is None:
            device = self.device.type
            self._autocasts = device if torch.amp.is_autocast_available(device) else ""
        kind = self._autocasts
        autocasts = kind != "" and torch.is_autocast_enabled(kind)
        if not records and not autocasts:
            return self._run(*inputs, **options)
        with torch.no_grad(), torch.autocast(kind, enabled=False) if autocasts else contextlib.nullcontext():
            return self._run(*inputs, **options)

    def _run(self, *inputs: Any, **options: Any) -> Any:
        x, inside = inputs[0] if len(inputs) == 1 and not options else None, self._modules["inside"]
        assert inside is not None
        if self.cuda_graphs and isinstance(x, Tensor) and x.is_cuda and not torch.cuda.is_current_stream_capturing():
            if self._graphs is None:
                self._graphs = Graphs(inside)
            return self._graphs(x)
        segment = None if self._whole is None or x is None else inside._modules[self._whole]
        if segment is not None and not inside._forward_hooks and not inside._forward_pre_hooks:
            return segment(x)
        if isinstance(inside, Segment) and not inputs:  # by the name that the model has for it
            return inside(*options.values())
        return inside(*inputs, **options)

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return next((t.device for t in _held(self)), torch.device("cpu"))

    def train(self, mode: bool = True) -> "Snapshot":
        """Raises RuntimeError unless ``mode`` is False."""
        if mode:
            raise RuntimeError(
                "a snapshot is for inference, and has no training mode: train the model that it was made from"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Snapshot":
        """Raises RuntimeError unless ``requires_grad`` is False."""
        if requires_grad:
            raise RuntimeError("a snapshot's weights are constants: train the model that it was made from")
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> NoReturn:
        """Raises RuntimeError: weights were folded and packed when the snapshot was made."""
        raise RuntimeError(_KEEPS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._graphs = self._autocasts = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": None, "_autocasts": None}


def _only_segment(module: nn.Module) -> str | None:
    """The name of the one child that does all that a graph does with its first argument, None where there is none."""
    if not isinstance(module, torch.fx.GraphModule):
        return None
    calls = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    inputs, end = module.graph.find_nodes(op="placeholder"), module.graph.output_node()
    alone = len(calls) == 1 and calls[0].op == "call_module" and end.args == (calls[0],)
    return str(calls[0].target) if alone and inputs and calls[0].args == (inputs[0],) else None


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and "meta" not in (a.device.type, b.device.type)
        and torch.equal(a, b.to(a.device))
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
