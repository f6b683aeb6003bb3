"""Dense blocks in one preallocated buffer: BN-ReLU-convolutions fused, memory linear in depth.

``FusedDenseBlock`` is the drop-in module; ``reference`` holds DenseNet as its paper writes it, in plain torch.nn.
"""

from . import reference
from .backends import use_backend
from .fallback import FallbackError, FallbackWarning, strict
from .functional import dense_block
from .modules import FusedDenseBlock, FusedDenseLayer

__version__ = "0.1.0"

__all__ = [
    "FallbackError",
    "FallbackWarning",
    "FusedDenseBlock",
    "FusedDenseLayer",
    "dense_block",
    "reference",
    "strict",
    "use_backend",
]
