"""Runs the tests of ``interpreted/`` in a process in which triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import report


def test_interpreted() -> None:
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    report.sections["Interpreted"] = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
