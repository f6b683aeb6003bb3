"""Compilers run once per content of the sources: what they make is kept among the system's temporary files."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def cached(suffix: str, parts: Sequence[object], make: Callable[[Path], object]) -> Path:
    """A file made from ``parts`` (paths stand for their contents), from the cache where it has been made before."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    folder = Path(tempfile.gettempdir()) / f"fused_densenet_tests_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    result = folder / f"{digest.hexdigest()[:24]}{suffix}"
    with open(f"{result}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the tests wait rather than make it too
        if not result.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / result.name
                make(made)
                made.replace(result)
    return result


def run(command: Sequence[object]) -> str:
    """The command's output; what it said, where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
