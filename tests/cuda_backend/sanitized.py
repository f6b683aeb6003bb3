"""The kernels under g++'s sanitizers, in a process of their own: what they report is an error here."""

import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import building
import problems
from arena import Arena
from emulated import default_library

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


class SanitizerError(AssertionError):
    """A sanitizer's report, or the runner's."""


class Sanitized:
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
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, the program writes to it
        self._process = subprocess.Popen(
            ["setarch", "-R", program],  # the thread sanitizer needs the usual places of memory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **_OPTIONS},
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def execute(
        self, name: str, problem: ctypes.Structure, arithmetic: int, device: problems.Device, arena: Arena
    ) -> None:
        buffers = arena.buffers()
        head = struct.pack(
            "=32si12s4Q",
            name.encode(),
            arithmetic,
            bytes(device),
            self._seed,
            ctypes.sizeof(problem),
            len(buffers),
            arena.workspace(),
        )
        parts = [head, bytes(problem)]
        for buffer in buffers:
            parts += [struct.pack("=2Q", buffer.data_ptr(), buffer.numel()), buffer.numpy().tobytes()]
        code, length = struct.unpack("=2Q", self._ask(b"".join(parts)))
        error = self._read(length).decode()
        for buffer in buffers:
            buffer.numpy()[:] = memoryview(bytearray(self._read(buffer.numel())))
        if code:
            raise SanitizerError(f"{name}: CUDA error {code}: {error}")

    def _ask(self, request: bytes) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._report() from error
        return self._read(16)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise self._report()
        return data

    def _report(self) -> SanitizerError:
        self._process.wait()
        self._log.seek(0)
        return SanitizerError(self._log.read().decode(errors="replace"))
