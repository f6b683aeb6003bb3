"""The memory of large images on the CPU: pages that one gives back become another's, and nobody else's change."""

import concurrent.futures
import gc
import multiprocessing
import os
import pathlib
import resource
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_densenet import FusedDenseBlock, empty_cache
from fused_densenet.backends import extension
from fused_densenet.ops.layout import empty

pytestmark = pytest.mark.skipif(extension.cpu is None, reason="needs the compiled extension")
MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
ELSEWHERE = 4 * MIB
"""Bytes that the rest of the process may take or give back meanwhile."""


def image(mib: float) -> torch.Tensor:
    count = int(mib * MIB) // 4
    return empty((count,), (1,), torch.empty(0))


def resident() -> int:
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.fixture(autouse=True, scope="module")
def _what_other_tests_left_is_not_collected() -> Iterator[None]:
    """:func:`resident` collects garbage, and would look at all of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    gc.collect()
    empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_starts_as_nan(dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    for _ in range(2):
        found = empty((3, 5 * MIB), (5 * MIB, 1), like)
        assert found.dtype == dtype and found.isnan().all()
        found.zero_()


def test_pages_move_to_images_of_other_sizes() -> None:
    first = [image(mib).fill_(1) for mib in (10, 21, 33)]
    before, held = faults(), resident()
    first.clear()
    for mibs in ((40, 20), (64,), (9, 9, 9, 9, 9, 9), (16, 48)):  # 66 MiB at most, in units of 2
        again = [image(mib).fill_(2) for mib in mibs]
        assert resident() - held < ELSEWHERE
        del again
    assert (faults() - before) * PAGE < ELSEWHERE


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    before = resident()
    for mib in (16, 24, 12, 40, 30, 10):
        image(mib).fill_(1)
    assert 0 < resident() - before < 40 * MIB + ELSEWHERE


def test_given_back_to_the_system() -> None:
    before = resident()
    image(64).fill_(1)
    assert resident() - before > 60 * MIB
    empty_cache()
    assert resident() - before < ELSEWHERE


def test_what_a_module_kept_goes_with_it() -> None:
    torch.manual_seed(0)
    block = FusedDenseBlock(2, 32, 2, 16)
    x = torch.randn(4, 32, 96, 96)
    block(x).sum().backward()
    before = resident()
    del block
    assert before - resident() > 9 * MIB


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([8, 9.5, 10, 12.25, 17, 24])), max_size=24))
def test_nobody_elses_numbers_change(steps: list[tuple[int, float]]) -> None:
    held: dict[int, tuple[torch.Tensor, float]] = {}
    for number, (place, mib) in enumerate(steps):
        held.pop(place, None)
        tensor = image(mib)
        assert tensor.data_ptr() % 64 == 0
        held[place] = tensor.fill_(number), number
        if number % 7 == 6:
            empty_cache()
    for tensor, value in held.values():
        assert (tensor == value).all()


def test_from_several_threads() -> None:
    wrong: list[int] = []

    def work(own: int) -> None:
        for i in range(30):
            tensor = image(8 + (own + i) % 5).fill_(own)
            if not (tensor == own).all():
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def forked_while_others_allocate() -> list[int]:
    """How a hundred children ended that allocate an image."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            image(8)
            empty_cache()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    states: list[int] = []
    for _ in range(100):
        child = os.fork()
        if child == 0:
            signal.alarm(5)  # ends it where it waits for ever
            image(8)[0] = 1
            os._exit(0)
        states.append(os.waitpid(child, 0)[1])
    done.set()
    for thread in threads:
        thread.join()
    return states


def test_in_a_child_that_was_forked_while_another_thread_gave_pages_back() -> None:
    """In a process of its own, of which a fork has little to copy."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert process.submit(forked_while_others_allocate).result() == [0] * 100


def test_a_switch_to_evaluation_keeps_them() -> None:
    torch.manual_seed(0)
    block = FusedDenseBlock(2, 32, 2, 16)
    block(torch.randn(4, 32, 96, 96)).sum().backward()
    before = resident()
    for training in (False, True):
        block.train(training)
        block(torch.randn(1, 32, 8, 8))
    assert abs(resident() - before) < ELSEWHERE


def test_is_a_tensor_like_every_other() -> None:
    tensor = image(9).fill_(3)
    assert (tensor.resize_(4 * MIB)[: int(9 * MIB) // 4] == 3).all()
    assert (tensor.clone() == tensor).sum() >= 9 * MIB // 4
    beside = empty((3 * MIB,), (1,), torch.empty(1, requires_grad=True))
    assert beside.is_leaf and not beside.requires_grad
    shared = image(9).fill_(4).share_memory_()
    assert shared.is_shared() and (shared == 4).all()
    small = image(9).resize_(3).fill_(5)
    small.untyped_storage().resize_(0)
    assert small.untyped_storage().nbytes() == 0
