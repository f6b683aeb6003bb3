"""Tensors that are made once and read by kernels from then on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def constant(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values that any stream may read from now on, to be kept for good: a CUDA graph may have them.

    A thread of its own allocates: memory that the caller allocates may be a CUDA graph's, while one is captured or (in
    torch.compile's modes with graphs) warmed up. The copy to the device is waited for.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.tensor, values, dtype=dtype, device=device).result()
