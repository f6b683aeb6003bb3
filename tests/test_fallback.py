"""What the kernels do not cover runs operator by operator: a correct result, one warning that says why, or an error."""

import copy
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from networks import torchvisions
from tolerances import assert_largest
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fused_densenet
from fused_densenet import FallbackError, FallbackWarning, FusedDenseBlock, strict, use_backend
from fused_densenet.backends import BACKENDS, choose
from fused_densenet.fallback import reasons
from fused_densenet.variables import is_on

SIZE = (3, 8, 2, 4)


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ScaledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def _replace(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        owner, _, attribute = name.rpartition(".")
        torch.manual_seed(5)
        setattr(block.get_submodule(owner), attribute, make(block.get_submodule(name)))

    return change


def _hook(name: str, register: str, result: Callable[..., Any]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        getattr(block.get_submodule(name), register)(result)

    return change


def _doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def _doubled_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (2 * inputs[0],)


def _doubled_gradient(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in grad_input)


def _no_dropout(module: nn.Module) -> None:
    module.get_submodule("denselayer2").drop_rate = 1.0  # type: ignore[assignment]


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "forward hook": (_hook("denselayer2.conv1", "register_forward_hook", _doubled), "denselayer2.conv1 has hooks"),
    "forward pre-hook": (_hook("denselayer1.norm2", "register_forward_pre_hook", _doubled_input), "has hooks"),
    "backward hook": (_hook("denselayer2.conv2", "register_full_backward_hook", _doubled_gradient), "has hooks"),
    "hook on relu": (_hook("denselayer3.relu1", "register_forward_hook", _doubled), "denselayer3.relu1 has hooks"),
    "hook on layer": (_hook("denselayer3", "register_forward_hook", _doubled), "denselayer3 has hooks"),
    "other norm": (_replace("denselayer2.norm1", lambda m: nn.GroupNorm(2, m.num_features)), "norm1 is a GroupNorm"),
    "no norm": (_replace("denselayer1.norm2", lambda m: nn.Identity()), "norm2 is a Identity"),
    "subclass of norm": (_replace("denselayer1.norm1", lambda m: ScaledNorm(m.num_features)), "is a ScaledNorm"),
    "other activation": (_replace("denselayer1.relu2", lambda m: nn.SiLU()), "relu2 is a SiLU"),
    "subclass of conv": (
        _replace("denselayer1.conv2", lambda m: ScaledConv(8, 4, 3, padding=1, bias=False)),
        "is a ScaledConv",
    ),
    "groups": (_replace("denselayer2.conv2", lambda m: nn.Conv2d(8, 4, 3, 1, 1, groups=2, bias=False)), "grouped"),
    "dilation": (_replace("denselayer2.conv2", lambda m: nn.Conv2d(8, 4, 3, 1, 2, 2, bias=False)), "dilated"),
    "padding mode": (
        _replace("denselayer2.conv2", lambda m: nn.Conv2d(8, 4, 3, 1, 1, bias=False, padding_mode="reflect")),
        "does not pad with zeros",
    ),
    "even kernel": (
        _replace("denselayer2.conv2", lambda m: nn.Conv2d(8, 4, 2, padding="same", bias=False)),
        "does not pad with zeros to the size of its input",
    ),
    "other kernel": (_replace("denselayer1.conv1", lambda m: nn.Conv2d(8, 8, (3, 1), 1, (1, 0), bias=False)), ""),
    "other padding": (
        _replace("denselayer1.conv2", lambda m: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3, bias=False))),
        "conv2 is a Sequential",
    ),
    "dropout of one layer": (_no_dropout, "differs from denselayer1 in its dropout"),
    "frozen layer": (lambda m: m.get_submodule("denselayer2").eval() and None, ""),
}


def _blocks(change: Callable[[nn.Module], None], **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs, ours = peers.DenseBlock(*SIZE, 0.0), FusedDenseBlock(*SIZE, **options)
    for layer in theirs.children():  # in-place activations and backward hooks do not mix
        layer.relu1, layer.relu2 = nn.ReLU(), nn.ReLU()
    change(theirs)
    change(ours)
    ours.load_state_dict(theirs.state_dict())
    return ours.double(), theirs.double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_changed_block(name: str, backend: str) -> None:
    change, reason = CHANGES[name]
    ours, theirs = _blocks(change)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    expected = theirs(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = ours(x)
    assert_largest(actual, expected, "float64 whole block", "output")
    gradients = [
        torch.autograd.grad(out.square().sum(), [x, *b.parameters()]) for out, b in ((actual, ours), (expected, theirs))
    ]
    for ours_grad, theirs_grad in zip(*gradients, strict=True):
        assert_largest(ours_grad, theirs_grad, "float64 whole block", "gradient")
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_largest(a, b, "float64 whole block", "buffer")
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(messages) == bool(reason)
    if reason:
        assert reason in messages[0]
        assert caught[0].filename == __file__
        with strict(), pytest.raises(FallbackError, match=reason):
            ours(x)


def test_one_warning_for_many_calls() -> None:
    block = FusedDenseBlock(*SIZE)
    block["denselayer1"].conv1.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            block(torch.randn(2, 8, 4, 4))
    assert [w.category for w in caught] == [FallbackWarning]


def test_hook_on_the_block_itself_needs_no_fallback() -> None:
    block, seen = FusedDenseBlock(*SIZE), []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_input[0].shape))
    with strict():
        block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert seen == [(2, 20, 4, 4), (2, 8, 4, 4)]


def test_removed_hook_needs_no_fallback() -> None:
    block = FusedDenseBlock(*SIZE)
    block["denselayer1"].conv1.register_forward_hook(lambda *_: None).remove()
    with strict():
        block(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("where", ["module", "parametrization"])
def test_global_hooks_and_parametrized_weights(where: str) -> None:
    """What every module's forward hook sees, and a weight computed from another, are not lost."""
    ours, theirs = FusedDenseBlock(*SIZE).double(), peers.DenseBlock(*SIZE, 0.0).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    if where == "parametrization":
        for block in (ours, theirs):
            torch.manual_seed(6)
            nn.utils.parametrizations.weight_norm(block.get_submodule("denselayer2.conv1"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            assert_largest(ours(x), theirs(x), "float64 whole block", "output")
        return
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours(x)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 6
    assert [w.category for w in caught] == [FallbackWarning]


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_computed_weights_are_computed_once_for_each_call() -> None:
    """spectral_norm iterates whenever a weight is read in training."""
    ours, theirs = _blocks(lambda _: None)
    for block in (ours, theirs):
        for part in list(block.modules()):
            if isinstance(part, nn.Conv2d):
                torch.manual_seed(6)
                nn.utils.parametrizations.spectral_norm(part)
        for _ in range(2):
            block(torch.ones(2, SIZE[1], 4, 4, dtype=torch.float64).cumsum(2))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_every_kind_of_global_hook(kind: str) -> None:
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        with strict(), pytest.raises(FallbackError, match="hooks on all modules are registered"):
            FusedDenseBlock(*SIZE)(torch.randn(2, SIZE[1], 4, 4))
    finally:
        handle.remove()


@pytest.mark.parametrize("module", [None, "fused_densenet_users", "torch_geometric.nn"])
def test_global_hook_of_any_origin(module: str | None) -> None:
    """Functions made by ``exec`` and callables of C have None for a module."""
    block, seen = FusedDenseBlock(*SIZE), []

    def hook(part: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(type(part).__name__)

    hook.__module__ = module  # type: ignore[assignment]
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.warns(FallbackWarning, match="hooks on all modules are registered"):
            block(torch.randn(2, SIZE[1], 4, 4))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 2 * SIZE[0]


class DoubledReLU(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        return 2 * out if function is nn.functional.relu else out


@pytest.mark.parametrize("part", ["", "features.denseblock2"])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_a_function_mode_is_followed(part: str) -> None:
    whole = torchvisions().eval()
    theirs, ours = (model.get_submodule(part) for model in (whole, fused_densenet.fuse(copy.deepcopy(whole))))
    channels = next(iter(theirs.parameters())).shape
    x = torch.randn(2, channels[1] if part == "" else channels[0], 32, 32, dtype=torch.float64)
    expected = theirs(x)
    for _ in range(2):
        torch.testing.assert_close(ours(x), expected)
        with DoubledReLU():
            torch.testing.assert_close(ours(x), theirs(x))
            with pytest.raises(FallbackError, match="a TorchFunctionMode is active: DoubledReLU"), strict():
                ours(x)
    with strict(), torch.device("cpu"):  # a mode of torch's own
        torch.testing.assert_close(ours(x), expected)


@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_nothing_is_computed_again_outside_of_a_function_mode() -> None:
    kept, ours = (FusedDenseBlock(*SIZE, memory_efficient=efficient).double() for efficient in (False, True))
    ours.load_state_dict(kept.state_dict())
    x = torch.randn(2, SIZE[1], 4, 4, dtype=torch.float64)
    gradients = []
    for block in (kept, ours):
        with DoubledReLU():
            out = block(x)
        gradients.append(torch.autograd.grad(out.square().sum(), list(block.parameters())))
    torch.testing.assert_close(*gradients)


class Negated(Tensor):
    """A weight that convolutions read with the other sign."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **kwargs or {})
        return -out if function in (torch.conv2d, nn.functional.conv2d, nn.functional.batch_norm) else out


WEIGHTS = {
    "features.denseblock1": ["denselayer1.conv2.weight", "denselayer2.norm1.weight"],
    "features.transition1": ["conv.weight", "norm.bias"],
    "features": ["norm0.weight", "norm5.running_mean", "conv0.weight"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in WEIGHTS.items() for name in names])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_a_weight_whose_class_is_asked(module: str, name: str) -> None:
    """Before a call and between two, and away again."""
    theirs = torchvisions().double().eval()
    ours = fused_densenet.fuse(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    path, _, key = f"{module}.{name}".rpartition(".")
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x))
        plain = []
        for model in (theirs, ours):
            owner: Any = model.get_submodule(path)
            place = owner._parameters if key in owner._parameters else owner._buffers
            plain.append((place, place[key]))
            place[key] = place[key].detach().as_subclass(Negated)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
            if name not in ("conv0.weight", "norm5.running_mean"):  # which torch runs
                reason = rf"{name.replace('.', '[.]')} is a Negated"
                with pytest.raises(FallbackError, match=reason), strict():
                    ours(x)
        for place, tensor in plain:
            place[key] = tensor


def test_parameters_that_are_there_in_their_modules_forward_alone() -> None:
    """As DeepSpeed's ZeRO-3 partitions them: empty but between the hooks of the module that has them."""
    network = nn.Sequential(peers.DenseBlock(*SIZE, 0.0), peers.Transition(20, 6), nn.BatchNorm2d(6), nn.ReLU())
    fused = fused_densenet.fuse(copy.deepcopy(network))
    x, whole = torch.randn(2, SIZE[1], 4, 4), {}

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def partition(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for part in fused.modules():
        whole |= {parameter: parameter.data for parameter in part.parameters(recurse=False)}
        part.register_forward_pre_hook(gather)
        part.register_forward_hook(partition)
        partition(part)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(fused(x), network(x))
    assert "has hooks" in str(caught[-1].message) or "another shape" in str(caught[-1].message)


def test_replaced_layer() -> None:
    block = FusedDenseBlock(*SIZE)
    block["denselayer2"] = peers.DenseBlock(1, 12, 2, 4, 0.0)["denselayer1"]
    x = torch.randn(2, 8, 4, 4)
    with pytest.warns(FallbackWarning, match="denselayer2 is a _DenseLayer"):
        assert block(x).shape == (2, 20, 4, 4)


def test_functorch_gradient() -> None:
    ours, theirs = _blocks(lambda _: None)
    ours, theirs = ours.eval(), theirs.eval()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        actual = torch.func.grad(lambda v: ours(v).square().sum())(x)
    expected = torch.func.grad(lambda v: theirs(v).square().sum())(x)
    assert_largest(actual, expected, "float64 whole block", "gradient")


def test_vmap() -> None:
    ours, _ = _blocks(lambda _: None)
    ours.eval()
    x = torch.randn(3, 2, 8, 4, 4, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match=r"vmap"):
        actual = torch.func.vmap(ours)(x)
    assert_largest(actual, torch.stack([ours(v) for v in x]), "float64 whole block", "output")


def test_per_sample_gradients() -> None:
    ours, _ = _blocks(lambda _: None)
    ours.eval()
    parameters = dict(ours.named_parameters())
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        out = torch.func.functional_call(ours, values, (sample[None],))
        return out.square().sum()

    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    ours(x).square().sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert_largest(per_sample[name].sum(0), parameter.grad, "float64 whole block", name)


def test_forward_mode() -> None:
    ours, theirs = _blocks(lambda _: None)
    ours, theirs = ours.eval(), theirs.eval()
    x, tangent = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64)
    with pytest.warns(FallbackWarning):
        _, actual = torch.func.jvp(ours, (x,), (tangent,))
    _, expected = torch.func.jvp(theirs, (x,), (tangent,))
    assert_largest(actual, expected, "float64 whole block", "tangent")
    with torch.autograd.forward_ad.dual_level():
        dual_input = torch.autograd.forward_ad.make_dual(x, tangent)
        with pytest.warns(FallbackWarning, match="forward-mode"):
            dual = ours(dual_input)
        actual = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert_largest(actual, expected, "float64 whole block", "tangent")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_block() -> None:
    block = FusedDenseBlock(*SIZE).eval()
    x = torch.randn(2, 8, 4, 4)
    with pytest.warns(FallbackWarning, match="trace"):
        traced = torch.jit.trace(block, x)
    assert_largest(traced(x), block(x), "float32 whole block", "output")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_agree() -> None:
    """The tracer compares two recordings, whether or not the block has run before."""
    for used in (False, True):
        block, x = FusedDenseBlock(*SIZE).eval(), torch.randn(2, 8, 5, 5)
        if used:
            block(x)
        with pytest.warns(FallbackWarning, match=r"torch\.jit\.trace is recording"):
            traced = torch.jit.trace(block, x, check_trace=True)
        torch.testing.assert_close(traced(x), block(x))
        reasons.warn_once.cache_clear()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_module_inside() -> None:
    ours, theirs = FusedDenseBlock(*SIZE), peers.DenseBlock(*SIZE, 0.0)
    theirs.load_state_dict(ours.state_dict())
    for block in (ours, theirs):
        block.denselayer2.relu1 = torch.jit.script(nn.ReLU())
    x = torch.randn(2, 8, 5, 5)
    with pytest.warns(FallbackWarning, match="denselayer2.relu1 is a RecursiveScriptModule"):
        out = ours(x)
    torch.testing.assert_close(out, theirs(x))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("data", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_that_meet_under_autocast(data: torch.dtype, weights: torch.dtype) -> None:
    """What the unfused block gives, or that it gives an error."""
    ours, theirs = _blocks(lambda _: None)
    outcomes = []
    for block in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16), reasons.quiet():
            try:
                outcomes.append(block.to(weights).eval()(torch.ones(2, SIZE[1], 4, 4, dtype=data)).dtype)
            except RuntimeError as error:
                outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_strict_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedDenseBlock(*SIZE)
    block["denselayer1"].conv1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, 4, 4)
    state = copy.deepcopy(block.state_dict())
    monkeypatch.setenv("FUSED_DENSENET_STRICT", "1")
    with pytest.raises(FallbackError, match=r"denselayer1\.conv1 has hooks"):
        block(x)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    with strict(False), pytest.warns(FallbackWarning):
        block(x)
    monkeypatch.setenv("FUSED_DENSENET_STRICT", "0")
    with strict(), pytest.raises(FallbackError):
        block(x)


@pytest.mark.parametrize(
    ("value", "on"),
    [(v, True) for v in ("1", "true", "YES", "on ")] + [(v, False) for v in ("", "0", "False", "no", "off")],
)
def test_switches(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    monkeypatch.setenv("FUSED_DENSENET_STRICT", value)
    assert is_on("FUSED_DENSENET_STRICT") == on


def test_a_switch_that_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedDenseBlock(*SIZE)
    block["denselayer1"].conv1.register_forward_hook(lambda *_: None)
    monkeypatch.setenv("FUSED_DENSENET_STRICT", "perhaps")
    with pytest.raises(ValueError, match=r"FUSED_DENSENET_STRICT: expected 1, true, .* 0, false, .* got 'perhaps'"):
        block(torch.randn(2, 8, 4, 4))


def test_strict_leaves_a_fused_block_alone() -> None:
    with strict():
        FusedDenseBlock(*SIZE)(torch.randn(2, 8, 4, 4)).sum().backward()


def _used(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> set[str]:
    used: set[str] = set()
    for name in ("cpu", "eager"):
        backend = BACKENDS[name]
        monkeypatch.delattr(backend, "run_program", raising=False)
        whole = backend.place

        def place(*args: Any, name: str = name, whole: Any = whole) -> None:
            used.add(name)
            whole(*args)

        monkeypatch.setattr(backend, "place", place)
    run()
    return used


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    block = FusedDenseBlock(*SIZE)

    def run() -> None:
        block(torch.randn(2, 8, 4, 4))

    assert _used(monkeypatch, run) == {"cpu"}
    monkeypatch.setenv("FUSED_DENSENET_BACKEND", "eager")
    assert _used(monkeypatch, run) == {"eager"}
    with use_backend("cpu"):
        assert _used(monkeypatch, run) == {"cpu"}
        with use_backend("eager"):
            assert _used(monkeypatch, run) == {"eager"}
        with use_backend("auto"):
            assert _used(monkeypatch, run) == {"cpu"}
    monkeypatch.setenv("FUSED_DENSENET_BACKEND", "auto")
    assert _used(monkeypatch, run) == {"cpu"}


def test_backend_that_cannot_run() -> None:
    with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was asked for and cannot run: it serves the CPU"):
        choose(torch.device("cuda"), torch.float32)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"no kernels for torch\.float8_e4m3fn"):
        choose(torch.device("cpu"), torch.float8_e4m3fn)
    assert choose(torch.device("cpu"), torch.float32) == "cpu"


def test_without_the_extension() -> None:
    """The package works without its compiled part: eager primitives, and the reason where ``cpu`` is asked for."""
    program = """
import pathlib, warnings
whole = pathlib.Path.glob
pathlib.Path.glob = lambda self, pattern: [] if pattern.startswith("_cpu_torch") else whole(self, pattern)
import fused_densenet, torch
from fused_densenet.backends import choose, cpu
reason = cpu.unavailable(torch.device("cpu"), torch.float32)
assert "g++" in reason and "pip install" in reason, reason
assert choose(torch.device("cpu"), torch.float32) == "eager"
warnings.simplefilter("ignore")
fused_densenet.FusedDenseBlock(2, 8, 2, 4)(torch.randn(2, 8, 4, 4)).sum().backward()
with fused_densenet.use_backend("cpu"):
    try:
        choose(torch.device("cpu"), torch.float32)
    except RuntimeError as error:
        assert reason in str(error)
    else:
        raise AssertionError("no error")
"""
    folder = pathlib.Path(next(iter(fused_densenet.__path__))).parent
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, timeout=120)
