"""Triton interprets or compiles, one or the other in a process: ``interpreted/`` is collected where it interprets."""

import os

if os.environ.get("TRITON_INTERPRET", "0") == "0":
    collect_ignore = ["interpreted"]
else:
    collect_ignore_glob = ["test_*.py"]
