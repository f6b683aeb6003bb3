"""The repaired interpreter comes before everything that imports triton."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import triton_cpu  # noqa: E402, F401
