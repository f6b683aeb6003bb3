"""Dense blocks in one preallocated buffer: BN-ReLU-convolutions fused, memory linear in depth.

``FusedDenseBlock`` is the drop-in module; ``reference`` holds DenseNet as its paper writes it, in plain torch.nn.
"""

from . import reference
from .adopt.explain import explain
from .adopt.fuse import fuse, unfuse
from .adopt.serving import optimize_for_inference
from .backends import use_backend
from .backends.cpu import empty_cache
from .fallback.reasons import FallbackError, FallbackWarning, strict
from .nn.block import FusedDenseBlock, FusedDenseLayer
from .nn.csp import CSPDenseBlock, CSPDenseNet, csp_densenet121, csp_densenet169, csp_densenet201, csp_densenet264
from .nn.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc,
    densenet_cifar,
)
from .nn.residual import FusedResidualDenseBlock
from .nn.stem import FusedFeatures
from .nn.transition import FusedTransition
from .ops.functional import NormReluConv, dense_block

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
    "FusedResidualDenseBlock",
    "FusedTransition",
    "NormReluConv",
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
    "empty_cache",
    "explain",
    "fuse",
    "optimize_for_inference",
    "reference",
    "strict",
    "unfuse",
    "use_backend",
]
