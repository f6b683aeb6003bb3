"""Runs a test's function in several processes that form a process group, connected through a file."""

import concurrent.futures
import datetime
import functools
import multiprocessing
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


@functools.cache
def _workers() -> concurrent.futures.ProcessPoolExecutor:
    """Processes that stay for the next test: importing torch takes longer than most of them."""
    return concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))


def run(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> Any:
    """Calls ``function(rank, *arguments)`` in every process and returns rank 0's result; the first error is raised.

    Memory that nobody wrote is NaN and warnings are errors there, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(pathlib.Path(folder) / "store")
        futures = [_workers().submit(_process, rank, ranks, store, function, arguments) for rank in range(ranks)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            _workers().shutdown(wait=False, cancel_futures=True)  # the other ranks may wait for the one that failed
            _workers.cache_clear()
            raise
        return futures[0].result()


def _process(rank: int, ranks: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return function(rank, *arguments)
    finally:
        dist.destroy_process_group()
