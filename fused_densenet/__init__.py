"""Dense blocks in one preallocated buffer: BN-ReLU-convolutions fused, memory linear in depth.

``FusedDenseBlock`` is the drop-in module; ``reference`` holds DenseNet as its paper writes it, in plain torch.nn.
"""

from . import reference
from .backends import use_backend
from .csp import CSPDenseBlock, CSPDenseNet, csp_densenet121, csp_densenet169, csp_densenet201, csp_densenet264
from .explanation import explain
from .fallback import FallbackError, FallbackWarning, strict
from .functional import dense_block
from .fusing import fuse, unfuse
from .models import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc,
    densenet_cifar,
)
from .modules import FusedDenseBlock, FusedDenseLayer
from .stem import FusedFeatures
from .transition import FusedTransition

__version__ = "0.1.0"

__all__ = [
    "CSPDenseBlock",
    "CSPDenseNet",
    "DenseNet",
    "FallbackError",
    "FallbackWarning",
    "FusedDenseBlock",
    "FusedDenseLayer",
    "FusedFeatures",
    "FusedTransition",
    "csp_densenet121",
    "csp_densenet169",
    "csp_densenet201",
    "csp_densenet264",
    "dense_block",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc",
    "densenet_cifar",
    "explain",
    "fuse",
    "reference",
    "strict",
    "unfuse",
    "use_backend",
]
