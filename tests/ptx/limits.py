"""What a launch may ask for: CUDA programming guide, "Technical Specifications per Compute Capability"."""

from .parser import Kernel, PtxError

BLOCKS = {"x": 2**31 - 1, "y": 65535, "z": 65535}
PARAMETER_BYTES = 32764
SHARED_PER_BLOCK = {  # by what the kernel was compiled for, of the GPU among those it runs on that has the least
    "75": 64 << 10,
    "80": 163 << 10,
    "86": 99 << 10,
    "89": 99 << 10,
    "90": 227 << 10,
    "100": 227 << 10,
    "103": 227 << 10,
    "120": 99 << 10,
}


def check_launch(kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int) -> None:
    """Refuses what a driver would: ``shared`` are all bytes of a block, dynamic ones included."""
    shared_most = SHARED_PER_BLOCK.get(kernel.target.rstrip("af"))
    if shared_most is None:
        raise PtxError(f"the limits of sm_{kernel.target} are not known")
    requests = [(f"blocks in {axis}", size, BLOCKS[axis]) for axis, size in zip("xyz", grid, strict=True)]
    requests += [
        ("threads of a block", threads, kernel.most_threads),
        ("bytes of shared memory", shared, shared_most),
        ("bytes of parameters", kernel.parameter_bytes, PARAMETER_BYTES),
    ]
    for what, asked, most in requests:
        if asked > most:
            raise PtxError(f"{kernel.name}: {asked} {what}, at most {most} on sm_{kernel.target}")
    if min(*grid, threads) < 1 or threads % 32:
        raise PtxError(f"{kernel.name}: a grid of {grid} blocks of {threads} threads")
