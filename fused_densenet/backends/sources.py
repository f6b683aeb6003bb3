"""Which sources a library was compiled from: setup.py has the linker write it, and a checkout's library is asked for it.

It imports nothing of this package, nor torch: setup.py runs it as a file.
"""

import hashlib
import pathlib

CUDA = "_cuda.so"
_SUFFIXES = (".h", ".cpp", ".inc", ".cu", ".cuh")
_ONLY_OF_ONE = {"binding.cpp": False, "watch.cpp": False, "cuda_binding.cpp": True}  # whether of the CUDA library


def fingerprint(root: pathlib.Path, library: str) -> str:
    """Of what the library is compiled from in a checkout, whatever the line endings; hexadecimal, a linker's build ID."""
    folder = root / "csrc"
    kernels = folder / ("cuda" if library == CUDA else "cpu")
    shared = [file for file in folder.iterdir() if _ONLY_OF_ONE.get(file.name, library == CUDA) == (library == CUDA)]
    files = [file for file in (*shared, *kernels.iterdir()) if file.suffix in _SUFFIXES and file.name[0] != "."]
    found = hashlib.sha1(library.encode(), usedforsecurity=False)
    for file in sorted(files):
        text = file.read_bytes().replace(b"\r\n", b"\n")
        found.update(f"\n{file.relative_to(folder).as_posix()} {len(text)}\n".encode())
        found.update(text)
    return found.hexdigest()


def is_stale(library: pathlib.Path) -> bool:
    """Whether the checkout that a library lies in has other sources than it was compiled from; False in no checkout.

    The file is read, not loaded: what a library of other sources registers with torch cannot be taken back.
    """
    root = library.parents[1]
    if not ((root / "setup.py").is_file() and (root / "csrc/binding.cpp").is_file()):
        return False
    with library.open("rb") as file:
        start = file.read(1 << 12)  # the build ID lies behind the headers
    return bytes.fromhex(fingerprint(root, library.name)) not in start
