"""torchvision's own DenseNet, the peer: imported, never copied."""

import sys
import types
from typing import Any


def torchvision_densenets() -> Any:
    """The module ``torchvision.models.densenet``.

    torchvision's wheel for another build of torch (CUDA beside CPU, say) does not load its C++ operators, and then fails
    to describe them to the compiler. DenseNet uses none of them, so that registration is left out.

    Raises:
        SystemExit: torchvision is not installed; the message says how to install it.
    """
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    try:
        from torchvision.models import densenet
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error}: this benchmark measures against torchvision; pip install --no-deps torchvision pillow"
        ) from error
    return densenet
