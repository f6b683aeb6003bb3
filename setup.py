"""Builds the compiled extensions, or says what to do.

They are plain libraries, not Python modules, and serve every Python: the CPU's is compiled for the torch that is
installed here, hence without isolation, and named after its version (fused_densenet/backends/extension.py); the CUDA
kernels' serves every torch. The README lists the variables that steer the build.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MINIMUM_TORCH = (2, 11)
MINIMUM_GCC = (11, 3)  # torch's headers are C++20 and its developers ask for this one
INSTALL = "pip install torch==2.13.0 'setuptools>=77' ninja && pip install --no-build-isolation -e ."
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-DNDEBUG", "-Wall", "-Wextra"]
OPTIMISE = ["-O3"]
BUILD = ("FUSED_DENSENET_BUILD", "auto", "required", "off")
CUDA = ("FUSED_DENSENET_CUDA", "auto", "off", "required")
SANITIZER = ("FUSED_DENSENET_SANITIZE", "", "address")
MINIMUM_NVCC = (12, 8)  # the first for capabilities 10.0 and 12.0
MINIMUM_CAPABILITY = (7, 5)
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # for a machine without a GPU, and for others
INSTRUCTION_SETS = {"__x86_64__": ["avx*", "portable"], "__aarch64__": ["neon*"]}  # files, by the compiler's macro
ROOT = Path(__file__).parent.absolute()
fingerprint = runpy.run_path(str(ROOT / "fused_densenet/backends/sources.py"))["fingerprint"]
RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = $cxx -shared $in -o $out $flags
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule nvcc_link
  command = $nvcc -shared $in -o $out $flags
"""
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer", "-O1", "-g1"]


def main() -> None:
    wanted, cuda, _ = (option(*variable) for variable in (BUILD, CUDA, SANITIZER))
    if wanted == "off":
        setup()
        return
    problem = torch_problem()
    if problem is not None:
        raise SystemExit(f"fused_densenet: {problem}")
    problem = compiler_problem()
    if problem is None:
        setup(**libraries())
    elif "required" in (wanted, cuda):
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


def torch_folders() -> list[Path]:
    """Where the torch packages are that the CPU's kernels are compiled for: the one installed, unless others are listed.

    Raises:
        ImportError: there is none.
    """
    listed = os.environ.get("FUSED_DENSENET_TORCH")
    if listed:
        return [Path(folder) for folder in listed.split(os.pathsep)]
    import torch

    return [Path(torch.__file__).parent]


def torch_version(folder: Path) -> tuple[int, int]:
    match = re.search(r"^__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"fused_densenet: {folder}/version.py: expected torch's version")
    return int(match[1]), int(match[2])


def torch_problem() -> str | None:
    """Why the torch of this environment cannot be built against, and what to run, or None."""
    try:
        versions = [torch_version(folder) for folder in torch_folders()]
    except (ImportError, OSError) as error:
        return (
            f"there is no torch in the build environment ({error}). The extension is compiled against the torch "
            f"that it will run with, so install that first and build without isolation:\n\n    {INSTALL}\n"
        )
    old = [version for version in versions if version < MINIMUM_TORCH]
    if old:
        return (
            f"torch {dotted(old[0])} was found, and {dotted(MINIMUM_TORCH)} or newer is needed. Run:\n\n    {INSTALL}\n"
        )
    return None


def compiler_problem() -> str | None:
    """Why there is no compiler to build with, and what to do, or None. Sets CXX."""
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
    if shutil.which("ninja") is None:
        return "ninja was not found: pip install ninja"
    os.environ["CXX"] = command
    return None


def predefined_macros(compiler: str) -> dict[str, str]:
    command = [*compiler.split(), "-dM", "-E", "-x", "c++", os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    definitions = [line.split(maxsplit=2) for line in lines if line.startswith("#define ")]
    return {name: "".join(value) for _, name, *value in definitions}


def libraries() -> dict[str, Any]:
    """The arguments of ``setup`` that compile csrc."""
    folders = {f"_cpu_torch_{'_'.join(map(str, torch_version(folder)))}": folder for folder in torch_folders()}
    names = [*folders, *(["_cuda"] if cuda_wanted() else [])]

    class Build(build_ext):
        """ninja compiles everything at once."""

        def build_extensions(self) -> None:
            files = {name: Path(self.get_ext_fullpath(f"fused_densenet.{name}")).absolute() for name in names}
            cuda = files.pop("_cuda", None)
            build({file: folders[name] for name, file in files.items()}, cuda, Path(self.build_temp).absolute())

        def get_ext_filename(self, name: str) -> str:
            return f"{name.replace('.', os.sep)}.so"

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    sources = sorted(os.path.relpath(file, ROOT) for file in ROOT.glob("csrc/**/*.*"))
    return {
        "ext_modules": [Extension(f"fused_densenet.{name}", [], depends=sources) for name in names],
        "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel},
    }


def build(cpu: dict[Path, Path], cuda: Path | None, folder: Path) -> None:
    """Compiles the CPU's libraries, each for the torch package in a folder, and that of the CUDA kernels.

    Objects and ninja's notes lie in ``folder``; ninja knows what was made of the same sources with the same flags.
    """
    script = [f"cxx = {os.environ['CXX']}", *(cpu_statements(cpu) if cpu else [])]
    if cuda is not None:
        script += [f"nvcc = {find_nvcc()} -ccbin {os.environ['CXX']}", *cuda_statements(cuda, torch_folders()[0])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([RULES, *script, ""]))
    try:
        subprocess.run(["ninja", "-C", str(folder), "-j", str(jobs())], check=True)
    except subprocess.CalledProcessError:
        raise SystemExit(
            "fused_densenet: compiling failed, the compiler's message is above. Where memory ran out, MAX_JOBS=1 takes "
            "less; FUSED_DENSENET_BUILD=off installs without the extension, which works, slower"
        ) from None


def jobs() -> int:
    """How many files to compile at once: MAX_JOBS where it is a number, as torch's own tools take it, or one a core."""
    cores = len(os.sched_getaffinity(0))
    wanted = os.environ.get("MAX_JOBS") or str(cores)
    if re.fullmatch(r"0*[1-9]\d*", wanted, re.ASCII):
        return int(wanted)
    say(f"MAX_JOBS: expected a number from 1 on, got {wanted!r}: compiling {cores} files at once")
    return cores


def cuda_wanted() -> bool:
    """Whether to compile the CUDA kernels: by default where torch has CUDA and there is an nvcc."""
    wanted = option(*CUDA)
    has_cuda = any((folder / "lib/libtorch_cuda.so").exists() for folder in torch_folders())
    if wanted == "off" or (wanted == "auto" and not has_cuda):
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
    return None


def find_nvcc() -> str | None:
    """That of CUDA_HOME, or the one on PATH, or that of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    wanted = [str(Path(home, "bin/nvcc"))] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, wanted) if found), None)


def default_architectures() -> str:
    """Those of this machine's NVIDIA GPUs, as torch's own tools have it; all where there is none that can be served."""
    if os.environ.get("FUSED_DENSENET_TORCH"):
        return ARCHITECTURES
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


def architectures(wanted: str) -> dict[str, str]:
    """Of a list as TORCH_CUDA_ARCH_LIST has it, ``8.0;9.0+PTX``, or spaces between, each entry with nvcc's flag.

    What is older than the kernels support is left out.
    """
    flags = {}
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
        flags[entry] = f"-gencode=arch=compute_{number},code={code}"
    if not flags:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST: expected a GPU of {dotted(MINIMUM_CAPABILITY)} or newer, got {wanted!r}"
        )
    return flags


def kernel_files(compiler: str) -> list[Path]:
    """The CPU's kernels for the machine that a compiler makes code for."""
    macros = predefined_macros(compiler)
    sets = next((files for macro, files in INSTRUCTION_SETS.items() if macro in macros), ["portable"])
    return sorted(file for name in ("dispatch", *sets) for file in ROOT.glob(f"csrc/cpu/{name}.cpp"))


def cpu_statements(libraries: dict[Path, Path]) -> list[str]:
    """ninja's, for libraries of the CPU's kernels, each for the torch package in a folder: the binding alone knows torch."""
    sanitize = option(*SANITIZER)
    flags = [*FLAGS, *(SANITIZE if sanitize else OPTIMISE)]
    files = [*kernel_files(os.environ["CXX"]), ROOT / "csrc/watch.cpp"]
    kernels = {f"{file.stem}.o": file for file in files}
    statements = [statement(made, "cxx", [file], flags) for made, file in kernels.items()]
    for library, folder in libraries.items():
        binding = f"{library.stem}.o"
        # As system headers, torch's own do not drown this project's warnings.
        headers = ["-isystem", str(folder / "include")]
        link = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10", "-lstdc++", "-lm", "-Wl,--no-undefined"]
        link.append(f"-Wl,--build-id=0x{fingerprint(ROOT, library.name)}")
        link += ["-fsanitize=address"] if sanitize else []
        statements.append(statement(binding, "cxx", [ROOT / "csrc/binding.cpp"], [*flags, *headers]))
        statements.append(statement(library, "link", [binding, *kernels], link))
    return statements


def cuda_statements(library: Path, torch: Path) -> list[str]:
    """ninja's, for the library of the CUDA kernels, with the headers of the torch package in a folder.

    The binding uses torch's stable ABI, and the CUDA runtime is linked statically: the library serves every torch from
    MINIMUM_TORCH on, and loads where there is no GPU or where torch has no CUDA.
    """
    target = f"0x{MINIMUM_TORCH[0]:02X}{MINIMUM_TORCH[1]:02X}000000000000"
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    compiled = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures())
    kernel = [*flags, *compiled.values()]
    binding = [*flags, "-Xcompiler=-Wall,-Wextra", f"-DTORCH_TARGET_VERSION={target}", "-DTORCH_STABLE_ONLY"]
    binding += ["-isystem", str(torch / "include")]
    binding.append(f"-DFD_ARCHITECTURES={':'.join(compiled)}")
    # torch's CUDA libraries, where there are any, come with libtorch, of which itself nothing is used. nvcc would put
    # -l before the linker's own options.
    link = ["-cudart=static", f"-L{torch / 'lib'}"]
    link.append("-Xlinker=--no-undefined,--no-as-needed,-ltorch,-ltorch_cpu,--as-needed")
    link.append(f"-Xlinker=--build-id=0x{fingerprint(ROOT, library.name)}")
    kernels = {f"{file.stem}.cuda.o": file for file in sorted(ROOT.glob("csrc/cuda/*.cu"))}
    return [
        statement("cuda_binding.o", "nvcc", [ROOT / "csrc/cuda_binding.cpp"], binding),
        *(statement(made, "nvcc", [file], kernel) for made, file in kernels.items()),
        statement(library, "nvcc_link", ["cuda_binding.o", *kernels], link),
    ]


def statement(made: Path | str, rule: str, sources: Iterable[Path | str], flags: list[str]) -> str:
    names = [re.sub(r"([$ :])", r"$\1", str(name)) for name in (made, *sources)]
    return f"build {names[0]}: {rule} {' '.join(names[1:])}\n  flags = {shlex.join(flags)}"


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)


if __name__ == "__main__":
    main()
