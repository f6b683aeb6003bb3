"""Primitives executed in a program of its own (serving.h), which may die of what it executes."""

import ctypes
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from arena import Arena


class ProgramError(AssertionError):
    """What the program said before it ended, or of a request."""


class Program:
    """``command`` reads requests from its input and writes results to its output until it is closed."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, the program writes to it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
        )

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def request(self, head: bytes, problem: ctypes.Structure, arena: Arena | None = None) -> int:
        """Executes ``problem``, whose tensors are in ``arena``; ``head`` says how. What the program returns."""
        buffers = [] if arena is None else arena.buffers()
        workspace = 0 if arena is None else arena.workspace()
        parts = [head, struct.pack("=3Q", ctypes.sizeof(problem), len(buffers), workspace), bytes(problem)]
        for buffer in buffers:
            parts += [struct.pack("=2Q", buffer.data_ptr(), buffer.numel()), buffer.numpy().tobytes()]
        code, length = struct.unpack("=qQ", self._ask(b"".join(parts)))
        error = self._read(length).decode()
        for buffer in buffers:
            buffer.numpy()[:] = memoryview(bytearray(self._read(buffer.numel())))
        if error:
            raise ProgramError(error)
        return code

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

    def _report(self) -> ProgramError:
        status = self._process.wait()
        self._log.seek(0)
        return ProgramError(f"status {status}: {self._log.read().decode(errors='replace')}")
