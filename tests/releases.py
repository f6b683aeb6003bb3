"""What older releases of torch that are served do otherwise, to a module's own operators as well."""

import torch
from torch import Tensor

OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""``fully_shard`` refuses every nn.ModuleDict; sharded tensors have no batch norm; an exported pooling keeps the parity of the
size it saw; the third derivative of a convolution cannot be traced for sizes that are symbols."""


def same(compiled: Tensor, eager: Tensor) -> bool:
    """Bit by bit; a compiler of an older torch takes running statistics apart into operators that round otherwise."""
    return torch.allclose(compiled, eager, rtol=1e-6) if OLD else torch.equal(compiled, eager)
