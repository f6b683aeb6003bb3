"""Making a snapshot: what other threads do meanwhile, what a copy takes, and under which modes and default devices."""

import concurrent.futures
import copy
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import torchvisions
from snapshots import assert_served, segments, small
from tolerances import assert_largest
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Proxy
from torch.nn.utils import prune

from fused_densenet import DenseNet, explain, optimize_for_inference
from fused_densenet.adopt import serving
from fused_densenet.nn.serving import Segment

IMAGE = (2, 3, 40, 33)


def image() -> Tensor:
    return torch.randn(IMAGE, dtype=torch.float64)


class Meanwhile(nn.Module):
    """A network that lets another thread work while its ``forward`` is followed."""

    work: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Any) -> Any:
        if isinstance(x, Proxy):
            thread = threading.Thread(target=Meanwhile.work)
            thread.start()
            thread.join()
        return self.net(x)


def test_other_threads_go_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain, served, model = image(), torchvisions().eval(), optimize_for_inference(small()), Meanwhile()
    done: list[tuple[Tensor, Tensor]] = []

    def work() -> None:
        with torch.no_grad():
            done.append((plain(x), served(x)))

    work()
    monkeypatch.setattr(Meanwhile, "work", staticmethod(work))
    assert_served(model, x)
    assert len(done) == 2
    for found, expected in zip(done[1], done[0], strict=True):
        assert torch.equal(found, expected)


def test_made_while_another_thread_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    followed, images = threading.Event(), serving.images

    class Slow(Meanwhile):
        def forward(self, x: Any) -> Any:
            if isinstance(x, Proxy):
                followed.set()
                time.sleep(0.3)
            return self.net(x)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        others = []

        def images_meanwhile(module: nn.Module) -> Any:  # asked for between a graph and its programs
            if not others:
                others.append(threads.submit(optimize_for_inference, Slow()))
                followed.wait()
            return images(module)

        monkeypatch.setattr(serving, "images", images_meanwhile)
        served = [optimize_for_inference(small()), others[0].result()]
    assert [len(segments(one)) for one in served] == [1, 1]


def test_made_by_several_threads_at_once() -> None:
    called, x, models = nn.Module.__call__, image(), [small() for _ in range(3)]
    expected = optimize_for_inference(models[0])(x)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for _ in range(4):
            for served in threads.map(optimize_for_inference, models):
                assert served.notes and torch.equal(served(x), expected)
    assert nn.Module.__call__ is called


def test_nothing_of_its_making_is_kept() -> None:
    model = small()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())

    optimize_for_inference(model)
    before = alive()
    for _ in range(3):
        optimize_for_inference(model)
    assert alive() == before


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.features.norm5, "weight", 0.3)


def pruned_inside(model: Any) -> None:
    prune.l1_unstructured(model.features.denseblock1.denselayer1.conv1, "weight", 0.3)


def keeping(model: Any) -> None:
    model.seen = {"last": [torch.ones(3, requires_grad=True) * 2]}


@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("change", [pruned, pruned_inside, keeping])
@pytest.mark.filterwarnings("ignore::fused_densenet.FallbackWarning")
def test_tensors_that_were_computed(change: Callable[[Any], None], records: bool) -> None:
    """``copy.deepcopy`` refuses those that have a gradient's history."""
    model = torchvisions().eval()
    change(model)
    with torch.set_grad_enabled(records):
        model(image())
    assert_served(model, image())
    model.float()
    with torch.set_grad_enabled(records):
        model(image().float())
    reports = explain(optimize_for_inference(model)).others
    assert not [report for report in reports if "something else" in str(report)]


def test_what_cannot_be_copied_is_said() -> None:
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"expected a module that can be copied.*lock"):
        optimize_for_inference(model)


def test_a_first_call_with_fake_tensors() -> None:
    model, x = small(), image()
    served = optimize_for_inference(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert served(mode.from_tensor(x)).shape == (2, 5)
    assert_largest(served(x), model(x), "float64 whole block", "output")


@pytest.mark.parametrize("called_before", [True, False])
def test_other_weights_by_a_functional_call(called_before: bool) -> None:
    model, x = small(), image()
    served = optimize_for_inference(model)
    if called_before:
        served(x)
    zeros = {name: torch.zeros_like(t) for name, t in served.named_buffers()}
    with pytest.raises(RuntimeError, match="keeps the weights"):
        torch.func.functional_call(served, zeros, (x,))
    assert_largest(served(x), model(x), "float64 whole block", "output")
    assert_largest(copy.deepcopy(served)(x), model(x), "float64 whole block", "output")


@pytest.mark.parametrize("assign", [True, False])
def test_the_same_weights_again(assign: bool) -> None:
    served, x = optimize_for_inference(small()), image()
    expected = served(x)
    around = nn.Sequential(served)
    around.load_state_dict(copy.deepcopy(around.state_dict()), assign=assign)
    assert torch.equal(around(x), expected)
    assert torch.equal(torch.func.functional_call(served, copy.deepcopy(served.state_dict()), (x,)), expected)


def test_one_that_was_pickled_before_it_knew_layouts() -> None:
    served, x = optimize_for_inference(small().features), image()
    [segment] = segments(served)
    state = segment.__getstate__()
    del state["layout"], state["arranges"]
    earlier = Segment.__new__(Segment)
    earlier.__setstate__(copy.deepcopy(state))
    assert torch.equal(earlier(x), served(x))


class Maps(nn.Module):
    """Every feature map of a network, as an encoder gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.features: Any = torchvisions().features

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for module in self.features:
            x = module(x)
            maps.append(x)
        return maps


def test_a_segment_reads_what_a_segment_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout in which it was written; who else reads that gets the model's layout."""
    x, model = image(), Maps().eval()
    served = assert_served(model, x)
    read: list[bool] = []
    run = Segment._run

    def looked_at(segment: Segment, x: Tensor) -> Tensor:
        read.append(x.is_contiguous(memory_format=torch.channels_last))
        return run(segment, x)

    monkeypatch.setattr(Segment, "_run", looked_at)
    found, expected = served(x), model(x)
    assert len(read) > 2 and all(read[1:])
    assert [one.stride() for one in found] == [one.stride() for one in expected]


def test_under_another_default_device() -> None:
    x = image()
    model: Any = DenseNet(5, (1, 3), 6, bn_size=3, num_classes=2).double().eval()  # of no other test
    with torch.device("meta"):
        served = optimize_for_inference(model)
        found = served(x)
    assert_largest(found, model(x), "float64 whole block", "output")


def test_a_block_called_by_name_and_what_is_no_tensor() -> None:
    block = torchvisions().features.denseblock1.eval()  # type: ignore[union-attr,operator]
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    served: Any = optimize_for_inference(block)  # type: ignore[arg-type]
    assert torch.equal(served(init_features=x), served(x))
    for wrong in (x.numpy(), [1]):
        with pytest.raises(TypeError, match="input: expected a Tensor"):
            served(wrong)
