"""Warnings that name the line which called this package, not one inside of it or of what called it in between."""

import sys
import warnings

_BETWEEN = ("fused_densenet", "torch", "torchvision", "timm", "monai", "torchxrayvision", "segmentation_models_pytorch")


def warn(message: str, category: type[Warning]) -> None:
    """A warning whose place is the nearest caller that is neither this package, nor torch, nor a package of models."""
    here = frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "torch").partition(".")[0] in (*_BETWEEN, "importlib"):
        if frame.f_back is None:  # nobody else: a thread of torch's own
            frame = here
            break
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        names.get("__name__"),
        names.setdefault("__warningregistry__", {}),
    )
