"""Loads the compiled extension, and knows why there is none.

The extension's name carries the torch version that it was compiled for: a library built for one torch and loaded by
another misreads tensors without an error, so only the exact one is ever loaded.
"""

import importlib
import importlib.machinery
import importlib.util
import pathlib

import torch


def extension_name(torch_version: str) -> str:
    """The module that serves a torch version: ``2.13.0+cpu`` is served by ``_C_torch_2_13``."""
    major, minor = torch_version.split(".")[:2]
    return f"_C_torch_{major}_{minor}"


REBUILD = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout of fused_densenet"


def _load() -> str | None:
    name = extension_name(torch.__version__)
    folder = pathlib.Path(__file__).parent
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    built = sorted({path.name.split(".")[0] for path in folder.glob("_C_torch_*") if path.name.endswith(suffixes)})
    if name in built:
        try:
            importlib.import_module(f"{__package__}.{name}")
        except ImportError as error:
            return f"the compiled extension {name} does not load ({error}); {REBUILD}"
        return None
    if built:
        versions = ", ".join(found.removeprefix("_C_torch_").replace("_", ".") for found in built)
        return f"the extension was compiled for torch {versions} and torch {torch.__version__} is running; {REBUILD}"
    return f"the C++ extension was not compiled when fused_densenet was installed; install g++ 10 or newer and {REBUILD}"


missing: str | None = _load()
"""Why there is no compiled extension, or None where it is loaded."""
