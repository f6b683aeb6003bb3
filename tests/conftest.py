"""For every test: memory that nobody wrote is NaN, the random numbers are fixed, fallbacks are not silent."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import report
import torch

from fused_densenet import use_backend
from fused_densenet.fallback import reasons

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # without it cuBLAS is not deterministic, which torch refuses

SLOW = {
    "test_claims.py",
    "test_cuda_ptx.py",
    "test_cuda_work.py",
    "test_gpu_report.py",
    "test_instruction_sets.py",
    "test_interpreted.py",
    "test_offline.py",
    "test_ptx.py",
}
"""Files that take longer than a minute."""

with contextlib.suppress(ModuleNotFoundError):  # the tests of a GPU need no hypothesis
    import strategies  # noqa: F401


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """torch fills what ``torch.empty`` and C++'s ``at::empty`` return with NaN (integers with their maximum)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _fallbacks_warn_again() -> None:
    """A fallback warns once per process and reason: each test starts anew."""
    reasons.warn_once.cache_clear()


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUSED_DENSENET_BACKEND", "FUSED_DENSENET_STRICT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each backend of the CPU."""
    with use_backend(request.param):
        yield request.param


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, which share the cores, as do those that they start
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    elif hasattr(config.option, "loadscopereorder"):  # by the number of tests, of which the slowest files have few
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes come first: one begun last would leave every other process without work."""
    items.sort(key=lambda item: item.path.name not in SLOW)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["sections"] = dict(report.sections)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What the tests of a process measured goes to the one that prints."""
    for title, lines in getattr(node, "workeroutput", {}).get("sections", {}).items():
        report.sections[title] += lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in report.sections.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
