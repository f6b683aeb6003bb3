"""Triton interprets or compiles, one or the other in a process: ``interpreted/`` is collected where it interprets."""

import os

import pytest
import report

if os.environ.get("TRITON_INTERPRET", "0") == "0":
    collect_ignore = ["interpreted"]
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in report.sections.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
