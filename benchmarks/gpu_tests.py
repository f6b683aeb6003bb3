"""A plugin of pytest (``-p gpu_tests``): every test is a row as soon as it ran, and a failure is printed at once.

GPU_REPORT_ROWS names the file, GPU_REPORT_SUITE what the rows call these tests. Of several processes, the one that
hears of all tests writes.
"""

import os
import pathlib
from typing import Any

import pytest
from gpu_run import ROWS, SUITE, add_row


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(pathlib.Path(os.environ[ROWS]), os.environ[SUITE]))


class Writer:
    def __init__(self, rows: pathlib.Path, suite: str) -> None:
        self.rows, self.suite = rows, suite

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # pytest-xdist's first process has none
            self.add("collected", count=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.add("collected", count=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed(report)
        elif report.when == "call" or report.skipped:
            self.add("test", test=report.nodeid, outcome=report.outcome, seconds=report.duration)

    def failed(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        text = report.longreprtext
        print(f"\n{report.nodeid}\n{text}", flush=True)
        last = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
        self.add("test", test=report.nodeid, outcome="failed", error=" ".join(" ".join(last[:3]).split())[:400])

    def add(self, kind: str, **row: Any) -> None:
        add_row(self.rows, kind, suite=self.suite, **row)
