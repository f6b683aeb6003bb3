"""The kernels under g++'s sanitizers, in a process of their own: what they report is an error here."""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import building
import problems
from arena import Arena
from emulated import default_library
from served import Program

_FLAGS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"],
}
_RUNNER = {"thread": "-DRUNNER_TSAN", "address": "-DRUNNER_ASAN"}
_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0",
    "ASAN_OPTIONS": "detect_leaks=0 detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Sanitized(Program):
    """Executes primitives in a program built with a sanitizer, "thread" or "address" (with "undefined").

    The thread sanitizer knows of no order but that of barriers, so a race is found whatever the schedule. It takes the
    blocks of a launch to follow each other: races between blocks are found where PTX is executed.
    """

    shared_per_block = 227 << 10

    def __init__(self, sanitizer: str, sources: Sequence[Path] | None = None, seed: int = 0) -> None:
        self.library = default_library()
        self._seed = seed
        program = building.build(
            sources or building.kernels(),
            ["-O1", *_FLAGS[sanitizer]],
            [_RUNNER[sanitizer]],
            _FLAGS[sanitizer],
            main=["main.cpp"],
        )
        # the thread sanitizer needs the usual places of memory
        super().__init__(["setarch", "-R", program], {**os.environ, **_OPTIONS})

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None:
        head = struct.pack("=32si12sQ", name.encode(), arithmetic, bytes(device), self._seed)
        self.request(head, problem, arena)
