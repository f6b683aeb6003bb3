"""Builds the compiled extension with torch's own tools, or says what to do.

The extension is linked against the torch that is installed here, so it is built without isolation; its name carries
that torch's version (fused_densenet/_extension.py). The README lists the variables that steer the build.
"""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

MINIMUM_TORCH, TORCH_END = (2, 11), (2, 14)
MINIMUM_GCC = (11, 3)  # torch's headers are C++20 and its developers ask for this one
INSTALL = "pip install torch==2.13.0 'setuptools>=77' ninja && pip install --no-build-isolation -e ."
FLAGS = ["-std=c++20", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"]
OPTIMISE = ["-O3", "-g0"]
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer", "-O1", "-g"]


def main() -> None:
    build = option("FUSED_DENSENET_BUILD", "auto", "required", "off")
    if build == "off":
        setup()
        return
    problem = torch_problem()
    if problem is not None:
        raise SystemExit(f"fused_densenet: {problem}")
    problem = compiler_problem()
    if problem is None:
        setup(**extension())
    elif build == "required":
        raise SystemExit(f"fused_densenet: the C++ extension cannot be compiled: {problem}")
    else:
        say(f"installing without the C++ extension: it works, slower. The reason: {problem}")
        setup()


def option(name: str, *choices: str) -> str:
    """The value of an environment variable; the first choice is the default."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise SystemExit(f"{name}: expected {' or '.join(c for c in choices if c)}, got {value!r}")
    return value


def say(message: str) -> None:
    print(f"\nfused_densenet: {message}\n", file=sys.stderr)


def torch_problem() -> str | None:
    """Why the torch of this environment cannot be built against, and what to run, or None."""
    try:
        import torch
    except ImportError as error:
        return (
            f"torch cannot be imported in the build environment ({error}). The extension is compiled against the torch "
            f"that it will run with, so install that first and build without isolation:\n\n    {INSTALL}\n"
        )
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if not MINIMUM_TORCH <= version < TORCH_END:
        return (
            f"torch {torch.__version__} is installed, and {dotted(MINIMUM_TORCH)} up to, but not including, "
            f"{dotted(TORCH_END)} is needed. Run:\n\n    {INSTALL}\n"
        )
    return None


def compiler_problem() -> str | None:
    """Why there is no compiler to build with, and what to do, or None. Sets CXX for torch's tools."""
    install = f"install g++ {dotted(MINIMUM_GCC)} or newer (Debian, Ubuntu: apt install g++) and install again"
    wanted = os.environ.get("CXX")
    found = shutil.which((wanted or "g++").split()[0])
    if found is None:
        where = f"CXX is {wanted!r}, which is not a program" if wanted else "there is no g++ on PATH"
        return f"no C++ compiler was found ({where}); {install}"
    command = wanted or found
    try:
        macros = predefined_macros(command)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler does not run ({error}); {install}"
    if "__clang__" in macros or "__GNUC__" not in macros:
        return f"{command} is not GCC, which the kernels are built and tested with; set CXX to g++, or {install}"
    version = (int(macros["__GNUC__"]), int(macros["__GNUC_MINOR__"]))
    if version < MINIMUM_GCC:
        return f"{command} is GCC {dotted(version)}, too old for torch's C++20 headers; {install}, or set CXX to it"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (Python.h) are missing; install them (Debian, Ubuntu: apt install python3-dev)"
    os.environ["CXX"] = command
    return None


def predefined_macros(compiler: str) -> dict[str, str]:
    command = [*compiler.split(), "-dM", "-E", "-x", "c++", os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    definitions = [line.split(maxsplit=2) for line in lines if line.startswith("#define ")]
    return {name: "".join(value) for _, name, *value in definitions}


def extension() -> dict[str, Any]:
    """The arguments of ``setup`` that compile csrc."""
    import torch

    tools = importlib.import_module("torch.utils.cpp_extension")
    if hasattr(os, "sched_getaffinity"):
        os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    major, minor = torch.__version__.split(".")[:2]
    sanitize = option("FUSED_DENSENET_SANITIZE", "", "address")
    root = Path(__file__).parent
    sources = [*root.glob("csrc/*.cpp"), *root.glob("csrc/cpu/*.cpp")]
    kernels = list(root.glob("csrc/cuda/*.cu"))
    cuda = bool(
        option("FUSED_DENSENET_CUDA", "auto", "off") == "auto" and kernels and torch.version.cuda and tools.CUDA_HOME
    )
    flags = {"cxx": [*FLAGS, *(SANITIZE if sanitize else OPTIMISE)], "nvcc": ["-O3", "-std=c++20"]}
    module = (tools.CUDAExtension if cuda else tools.CppExtension)(
        name=f"fused_densenet._C_torch_{major}_{minor}",
        sources=sorted(str(path.relative_to(root)) for path in sources + (kernels if cuda else [])),
        define_macros=[("WITH_CUDA", None)] if cuda else [],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp", *(["-fsanitize=address"] if sanitize else [])],
    )
    # As system headers, torch's own do not drown this project's warnings.
    for arguments in flags.values():
        arguments += [f"-isystem{path}" for path in module.include_dirs]
    module.include_dirs = []
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": tools.BuildExtension},
        "options": {"build_ext": {"force": True}},  # a build with other flags replaces this one; ninja knows which
    }


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)


if __name__ == "__main__":
    main()
