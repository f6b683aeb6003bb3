"""Builds the compiled extensions, or says what to do.

The CPU's is linked against the torch that is installed here, by torch's own tools, so it is built without isolation;
its name carries that torch's version (fused_densenet/backends/extension.py). The CUDA kernels become one library for every
torch, compiled by nvcc and ninja. The README lists the variables that steer the build.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

MINIMUM_TORCH, TORCH_END = (2, 11), (2, 14)
MINIMUM_GCC = (11, 3)  # torch's headers are C++20 and its developers ask for this one
INSTALL = "pip install torch==2.13.0 'setuptools>=77' ninja && pip install --no-build-isolation -e ."
FLAGS = ["-std=c++20", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"]
OPTIMISE = ["-O3", "-g0"]
CUDA = ("FUSED_DENSENET_CUDA", "auto", "off", "required")
CUDA_MODULE = "fused_densenet._cuda"
MINIMUM_NVCC = (12, 8)  # the first for capabilities 10.0 and 12.0
MINIMUM_CAPABILITY = (7, 5)
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # for a machine without a GPU
ROOT = Path(__file__).parent
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
        setup(**extensions())
    elif build == "required" or option(*CUDA) == "required":
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


def extensions() -> dict[str, Any]:
    """The arguments of ``setup`` that compile csrc."""
    tools = importlib.import_module("torch.utils.cpp_extension")
    if hasattr(os, "sched_getaffinity"):
        os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    modules = [cpu_extension(tools)]
    if cuda_wanted():
        modules.append(Extension(CUDA_MODULE, sources=["csrc/cuda_binding.cpp"], depends=relative(cuda_sources())))

    class Build(tools.BuildExtension):  # type: ignore[misc, name-defined]
        """torch's build, and for the library that is not a Python module, ninja."""

        def build_extension(self, module: Extension) -> None:
            if module.name == CUDA_MODULE:
                build_cuda(Path(self.get_ext_fullpath(module.name)), Path(self.build_temp, "cuda"))
            else:
                super().build_extension(module)

        def get_ext_filename(self, name: str) -> str:
            file = super().get_ext_filename(name)
            return str(Path(file).with_name("_cuda.so")) if name.endswith("_cuda") else file

    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build},
        "options": {"build_ext": {"force": True}},  # a build with other flags replaces this one; ninja knows which
    }


def cpu_extension(tools: Any) -> Extension:
    """The CPU's kernels, for this version of torch."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    sanitize = option("FUSED_DENSENET_SANITIZE", "", "address")
    module = tools.CppExtension(
        name=f"fused_densenet._C_torch_{major}_{minor}",
        sources=relative([ROOT / "csrc/binding.cpp", *ROOT.glob("csrc/cpu/*.cpp")]),
        extra_link_args=["-fopenmp", *(["-fsanitize=address"] if sanitize else [])],
    )
    # As system headers, torch's own do not drown this project's warnings.
    system = [f"-isystem{path}" for path in module.include_dirs]
    module.include_dirs = []
    module.extra_compile_args = {"cxx": [*FLAGS, *(SANITIZE if sanitize else OPTIMISE), *system]}
    return module


def relative(paths: Iterable[Path]) -> list[str]:
    return sorted(os.path.relpath(path, ROOT) for path in paths)


def cuda_sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/cuda/*.cu"))


def cuda_wanted() -> bool:
    """Whether to compile the CUDA kernels: by default where torch has CUDA and there is an nvcc."""
    import torch

    wanted = option(*CUDA)
    if wanted == "off" or (wanted == "auto" and torch.version.cuda is None):
        return False
    problem = cuda_problem()
    if problem is not None and wanted == "required":
        raise SystemExit(f"fused_densenet: the CUDA kernels cannot be compiled: {problem}")
    if problem is not None:
        say(f"installing without the CUDA kernels: GPUs run Triton's. The reason: {problem}")
    return problem is None


def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot be compiled, and what to do, or None."""
    install = (
        f"install the CUDA toolkit, {dotted(MINIMUM_NVCC)} or newer (Debian, Ubuntu: NVIDIA's package cuda-toolkit-13-0; "
        "conda: conda install -c nvidia cuda-nvcc cuda-cudart-dev), and put nvcc on PATH or set CUDA_HOME"
    )
    nvcc = find_nvcc()
    if nvcc is None:
        return f"nvcc was not found: {install}"
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvcc does not run ({error}): {install}"
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or (int(release[1]), int(release[2])) < MINIMUM_NVCC:
        return f"{nvcc} is {release[0] if release else 'of an unknown release'}: {install}"
    if shutil.which("ninja") is None:
        return "ninja was not found: pip install ninja"
    return None


def find_nvcc() -> str | None:
    """That of CUDA_HOME, or the one on PATH, or that of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    wanted = [str(Path(home, "bin/nvcc"))] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, wanted) if found), None)


def default_architectures() -> str:
    """Those of this machine's NVIDIA GPUs, as torch's own tools have it; all where there is none that can be served."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return ARCHITECTURES
    try:
        every = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        command = [find_nvcc(), "--list-gpu-arch"]
        known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        say(f"this machine's GPUs are not known ({error}): compiling for {ARCHITECTURES}")
        return ARCHITECTURES
    here = sorted(capability for capability in every if capability >= MINIMUM_CAPABILITY)
    if not here or any(f"compute_{major}{minor}" not in known for major, minor in here):
        return ARCHITECTURES
    return ";".join(map(dotted, here)) + "+PTX"


def architectures(wanted: str) -> list[str]:
    """nvcc's flags for a list as TORCH_CUDA_ARCH_LIST has it: ``8.0;9.0+PTX``, or spaces between.

    What is older than the kernels support is left out.
    """
    flags = []
    for entry in wanted.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {entry!r}")
        major, minor, family, ptx = match.groups()
        if (int(major), int(minor)) < MINIMUM_CAPABILITY:
            say(f"compute capability {major}.{minor} is left out: the kernels need {dotted(MINIMUM_CAPABILITY)}")
            continue
        number = f"{major}{minor}{family}"
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    if not flags:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: expected a GPU of {dotted(MINIMUM_CAPABILITY)} or newer, got {wanted!r}"
        )
    return flags


def build_cuda(library: Path, folder: Path) -> None:
    """Compiles csrc/cuda and its binding to ``library``; objects and ninja's notes lie in ``folder``.

    The binding uses torch's stable ABI, and the CUDA runtime is linked statically: the library serves every torch from
    MINIMUM_TORCH on, and loads where there is no GPU or where torch has no CUDA.
    """
    import torch

    site = Path(torch.__file__).parent
    target = f"0x{MINIMUM_TORCH[0]:02X}{MINIMUM_TORCH[1]:02X}000000000000"
    compile_all = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-MMD"]
    compile_binding = ["-Xcompiler=-Wall,-Wextra", f"-DTORCH_TARGET_VERSION={target}", "-DTORCH_STABLE_ONLY"]
    compile_binding += ["-isystem", str(site / "include")]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures()
    compile_kernel = architectures(wanted)
    compile_binding.append(f"-DFD_ARCHITECTURES={':'.join(wanted.replace(';', ' ').split())}")
    # torch's CUDA libraries, where there are any, come with libtorch, of which itself nothing is used. nvcc would put
    # -l before the linker's own options.
    link = [f"-L{site / 'lib'}", "-Xlinker=--no-undefined,--no-as-needed,-ltorch,-ltorch_cpu,--as-needed"]
    rules = {
        "binding": f"$nvcc {shlex.join([*compile_all, *compile_binding])} -MF $out.d -c $in -o $out",
        "kernel": f"$nvcc {shlex.join([*compile_all, *compile_kernel])} -MF $out.d -c $in -o $out",
        "link": f"$nvcc -shared -cudart=static $in -o $out {shlex.join(link)}",
    }
    lines = [f"nvcc = {find_nvcc()} -ccbin {os.environ['CXX']}"]
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}", *(["  depfile = $out.d"] if name != "link" else [])]
    sources = {"binding.o": ROOT / "csrc/cuda_binding.cpp"} | {f"{path.stem}.cuda.o": path for path in cuda_sources()}
    for made, source in sources.items():
        lines.append(f"build {made}: {'binding' if made == 'binding.o' else 'kernel'} {source}")
    lines.append(f"build {library.absolute()}: link {' '.join(sources)}")
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run(["ninja", "-C", str(folder), *jobs], check=True)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)


if __name__ == "__main__":
    main()
