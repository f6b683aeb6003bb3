"""Running statistics: torch's rules for what is counted, and that a batch counts once, wherever its forward pass runs."""

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from networks import torchvisions
from tolerances import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from fused_densenet import FusedDenseBlock, FusedFeatures, FusedTransition, fuse, reference
from fused_densenet.backends import cpu
from fused_densenet.fallback.reasons import quiet

Call = Callable[[Tensor], Tensor]


def block() -> FusedDenseBlock:
    return FusedDenseBlock(2, 4, 2, 4).double()


def images() -> Tensor:
    return torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "block": block,
    "transition": lambda: FusedTransition(4, 3).double(),
    "stem": lambda: FusedFeatures(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)).double(),
}

UNFUSED: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: reference.DenseBlock(2, 4, 2, 4),
    "transition": lambda: reference.Transition(4, 3),
    "stem": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
}


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """A fused module and the unfused one with the same parameters, in float64."""
    ours, theirs = MODULES[kind](), UNFUSED[kind]().double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def norms_of(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def assert_counted_once(module: nn.Module, before: nn.Module, x: Tensor) -> None:
    """That the buffers of ``module`` are those of ``before`` after one forward pass on ``x``."""
    before(x.detach())
    assert_same(dict(module.named_buffers()), dict(before.named_buffers()), "float64 whole block")


def hook(call: Call, x: Tensor) -> Callable[[Tensor], None]:
    def run(_: Tensor) -> None:
        call(x)

    return run


def in_a_tensor_hook(call: Call, x: Tensor) -> None:
    y = x.detach().requires_grad_().sin()
    y.register_hook(hook(call, x))
    y.sum().backward()


def in_a_hook_after_accumulation(call: Call, x: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(hook(call, x))
    leaf.sin().sum().backward()


class _Trains(torch.autograd.Function):
    """Trains another function in its backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, call: Call, x: Tensor) -> Tensor:
        ctx.call, ctx.x = call, x
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            ctx.call(ctx.x)
        return dout, None, None


def in_a_functions_backward(call: Call, x: Tensor) -> None:
    _Trains.apply(x.detach().requires_grad_(), call, x).sum().backward()


def in_a_backward_of_a_checkpoint(call: Call, x: Tensor, *, use_reentrant: bool) -> None:
    """Where a hook of the checkpointed function runs: not when it is computed again, but in the pass through it."""

    def function(v: Tensor) -> Tensor:
        y = v.sin()
        if y.requires_grad and torch._C._current_graph_task_id() != -1:
            y.register_hook(hook(call, x))
        return y.cos()

    checkpoint(function, x.detach().requires_grad_(), use_reentrant=use_reentrant).sum().backward()


PLACES: dict[str, Callable[[Call, Tensor], None]] = {
    "tensor hook": in_a_tensor_hook,
    "hook after accumulation": in_a_hook_after_accumulation,
    "backward of a Function": in_a_functions_backward,
    "backward inside a reentrant checkpoint's": partial(in_a_backward_of_a_checkpoint, use_reentrant=True),
}


def trained(module: Call, x: Tensor) -> Tensor:
    with torch.enable_grad():
        out = module(x.detach().requires_grad_())
        out.sin().sum().backward()
    return out


def checkpointed(module: Call, x: Tensor, *, use_reentrant: bool) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out: Tensor = checkpoint(module, x, use_reentrant=use_reentrant)
        out.sin().sum().backward()
    return out


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_forward_in_another_backward_pass_counts(kind: str, place: str, use_reentrant: bool | None) -> None:
    """A teacher's, or an inner model's; once where a checkpoint of its own computes it again there."""
    module, x = MODULES[kind](), images()
    before = copy.deepcopy(module)
    run = trained if use_reentrant is None else partial(checkpointed, use_reentrant=use_reentrant)
    PLACES[place](lambda v: run(module, v), x)
    assert_counted_once(module, before, x)


@pytest.mark.parametrize("place", PLACES)
def test_network_in_another_backward_pass_counts_as_the_unfused_one(place: str) -> None:
    theirs = torchvisions()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for network in (ours, theirs):
        PLACES[place](partial(trained, network), x)
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


def sequential(module: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    out: Tensor = checkpoint_sequential([nn.Identity(), module, nn.Tanh()], 2, x, use_reentrant=use_reentrant)
    return out


def nested(module: nn.Module, x: Tensor, *, outer: bool, inner: bool) -> Tensor:
    def function(v: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda w: module(w).tanh(), v.clone(), use_reentrant=inner)
        return out.cos()

    out: Tensor = checkpoint(function, x, use_reentrant=outer)
    return out


def selective(module: nn.Module, x: Tensor, *, policy: CheckpointPolicy) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)
    out: Tensor = checkpoint(lambda v: module(v).tanh(), x, use_reentrant=False, context_fn=contexts)
    return out


def without_early_stop(module: nn.Module, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        out: Tensor = checkpoint(module, x, use_reentrant=False)
        return out


def through_a_gradient(module: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    """A checkpointed function that differentiates, and runs the module in a hook of that."""

    def function(v: Tensor) -> Tensor:
        with torch.enable_grad():
            y = v.detach().requires_grad_().sin()
            y.register_hook(hook(module, v.detach()))
            y.sum().backward()
        return v.tanh().sin()

    out: Tensor = checkpoint(function, x, use_reentrant=use_reentrant)
    return out


class _Another(torch.autograd.Function):
    """A checkpoint as DeepSpeed's, Megatron's and others' are: the function is called ``run_function``."""

    @staticmethod
    def forward(ctx: Any, run_function: Call, x: Tensor) -> Tensor:
        ctx.run_function, ctx.x = run_function, x
        with torch.no_grad():
            return run_function(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run_function(x)
        torch.autograd.backward(out, dout)
        return None, x.grad


CHECKPOINTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "another package's": lambda module, x: _Another.apply(module, x),  # type: ignore[no-untyped-call]
    "without early stop": without_early_stop,
}
for _kind in (True, False):
    CHECKPOINTS[f"sequential, {_kind}"] = partial(sequential, use_reentrant=_kind)
    CHECKPOINTS[f"gradient inside, {_kind}"] = partial(through_a_gradient, use_reentrant=_kind)
    for _inner in (True, False):
        CHECKPOINTS[f"nested, {_kind} and {_inner}"] = partial(nested, outer=_kind, inner=_inner)
for _policy in CheckpointPolicy:
    CHECKPOINTS[f"selective, {_policy.name}"] = partial(selective, policy=_policy)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("kind", MODULES)
def test_checkpoint_counts_once(kind: str, name: str) -> None:
    module, x = MODULES[kind](), images()
    before = copy.deepcopy(module)
    CHECKPOINTS[name](module, x).square().sum().backward()
    assert_counted_once(module, before, x)


def test_computed_again_outside_of_a_backward_pass() -> None:
    """As torchviz does, which reads what a graph has saved."""
    module, x = block(), images()
    before = copy.deepcopy(module)
    out = checkpoint(lambda v: module(v).sin(), x, use_reentrant=False)
    assert out.grad_fn._saved_self.shape == out.shape
    assert_counted_once(module, before, x)


def test_saved_tensor_hooks_are_no_checkpoint() -> None:
    module, x = block(), images()
    before = copy.deepcopy(module)
    with torch.autograd.graph.save_on_cpu():
        module(x)
    assert_counted_once(module, before, x)


def without_running(norm: Any) -> None:
    norm.running_mean = norm.running_var = None


def without_count(norm: Any) -> None:
    norm.num_batches_tracked = None


def untracked(norm: Any) -> None:
    norm.track_running_stats = False


def cumulative(norm: Any) -> None:
    norm.momentum = None


def evaluating(norm: Any) -> None:
    norm.eval()


CHANGES = [without_running, without_count, untracked, cumulative, evaluating]


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("where", ["all norms", "one norm"])
@pytest.mark.parametrize("kind", MODULES)
def test_rules_of_torchs_norm(
    kind: str, where: str, first: Callable[[Any], None], second: Callable[[Any], None]
) -> None:
    ours, theirs = pair(kind)
    x = images().detach()
    for module in (ours, theirs):
        module(x)
        norms = norms_of(module)
        for norm in norms if where == "all norms" else norms[:1]:
            first(norm), second(norm)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x))
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def outcome(module: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """Its result, or the error."""
    try:
        return module(x), ""
    except (RuntimeError, ValueError) as error:
        return torch.empty(0), f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("missing", [names for n in range(4) for names in itertools.combinations(BUFFERS, n)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", MODULES)
def test_missing_buffers(
    kind: str, momentum: float | None, tracked: bool, training: bool, missing: Sequence[str]
) -> None:
    """Also the error that torch's norm raises, and what the norms before it have counted by then."""
    ours, theirs = pair(kind)
    x = images().detach()
    for module in (ours, theirs):
        module(x)
        module.train(training)
        last = norms_of(module)[-1]
        last.momentum, last.track_running_stats = momentum, tracked
        for name in missing:
            setattr(last, name, None)
    for _ in range(2):
        with quiet():
            (actual, error), (expected, their_error) = outcome(ours, x), outcome(theirs, x)
        assert error == their_error
        torch.testing.assert_close(actual, expected)
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_norm_counts_every_batch(momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: a GPU's one launch for all norms would write to the same buffers at once."""
    monkeypatch.setattr(cpu, "update_running", None)
    ours, theirs = pair("block")
    for module in (ours, theirs):
        norm: Any = module.get_submodule("denselayer1.norm2")
        norm.momentum = momentum
        module.get_submodule("denselayer2").norm2 = norm
    x = images().detach()
    torch.testing.assert_close(ours(x), theirs(x))
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")
    assert ours.get_buffer("denselayer1.norm2.num_batches_tracked") == 2


GROUPS = {
    "more norms than there are": ([2, -1, 0], "groups: expected 1 norms in all"),
    "fewer norms": ([0, -1, 0], "groups: expected 1 norms in all"),
    "no such tensor": ([1, 1, 0], "inside: there is no tensor 1"),
    "two numbers": ([1, -1], "expected three numbers and a factor"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_that_do_not_fit_are_refused(case: str) -> None:
    groups, message = GROUPS[case]
    buffers = [torch.zeros(4), torch.ones(4), torch.tensor(0)]
    with pytest.raises(ValueError, match=message):
        cpu.update_running([torch.rand(2, 4)], [torch.rand(2, 1, 4)], groups, buffers, [0.1], [1.0])
    assert not buffers[0].any() and buffers[2] == 0


def test_buffers_of_different_strides() -> None:
    mean, var = torch.zeros(4, 2)[:, 0], torch.ones(4, 3)[:, 1]
    rows = torch.rand(2, 4)
    cpu.update_running([rows], [], [1, -1, 0], [mean, var, torch.tensor(0)], [0.5], [1.0])
    torch.testing.assert_close(mean, rows[0] / 2)
    torch.testing.assert_close(var, (1 + rows[1]) / 2)
    for buffer in (mean, var):
        assert torch.equal(buffer._base[:, 0 if buffer is var else 1], torch.full((4,), float(buffer is var)))


def test_modules_that_share_a_norm_count_every_batch() -> None:
    """Two parts of one network."""
    norm = nn.BatchNorm2d(8, dtype=torch.float64)
    modules = [norm, nn.ReLU(), norm, nn.ReLU()]
    theirs, ours = nn.Sequential(*copy.deepcopy(modules)), FusedFeatures(*modules)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int32], ids=str)
def test_counts_of_another_dtype(dtype: torch.dtype) -> None:
    """As the average of several checkpoints has them."""
    theirs = torchvisions()
    ours = fuse(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in (theirs, ours):
        counts = {name: t.to(dtype) for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}
        model.load_state_dict(counts, strict=False, assign=True)
        for _ in range(2):
            model(x)
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), "float64 whole block")


@pytest.mark.parametrize("kind", [*MODULES, "network"])
def test_backward_is_by_the_statistics_of_its_forward(kind: str) -> None:
    """Another step, or a checkpoint, may change a frozen norm's before gradients are asked for.

    Not the network's last norm, which is torch's, and refuses.
    """
    module = fuse(torchvisions()) if kind == "network" else MODULES[kind]()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True) if kind == "network" else images()
    module.eval()
    gradients = []
    for change in (False, True):
        out = module(x)
        for norm in norms_of(module)[: -1 if kind == "network" else None] if change else []:
            for buffer in norm.buffers():
                buffer += 1
        gradients.append(torch.autograd.grad(out.sin().sum(), [x, *module.parameters()]))
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*MODULES, "network"])
def test_statistics_in_strided_buffers(kind: str, training: bool, backend: str) -> None:
    plain, x = (fuse(torchvisions()), torch.randn(2, 3, 32, 32).double())
    if kind != "network":
        plain, x = MODULES[kind](), images()
    strided = copy.deepcopy(plain)
    for norm in norms_of(strided):
        for name, buffer in norm._buffers.items():
            if buffer is not None and buffer.dim():
                norm._buffers[name] = torch.stack([buffer, buffer], -1)[..., 0]
    for _ in range(2):
        with torch.no_grad():
            assert_same({"": strided.train(training)(x)}, {"": plain.train(training)(x)}, "float64 whole block")
            for norm in (*norms_of(strided), *norms_of(plain)):
                norm.running_mean += 0.5
    assert_same(dict(strided.named_buffers()), dict(plain.named_buffers()), "float64 whole block")
