"""Installs a wheel into an empty environment and tests what is installed there: ``python packaging/try_wheel.py FILE.whl``.

There is no compiler on PATH, and the checkout is not importable: of it the tests of the CPU's kernels are copied. ``--python``
names the Python, ``--torch`` the release of torch; ``--environment`` an existing environment that has torch, pytest,
hypothesis and numpy.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEST = ROOT / "tests/test_cpu_primitives.py"
CHECK = """
import fused_densenet, sys
from fused_densenet.backends import cpu, extension
assert fused_densenet.__file__.startswith(sys.prefix), fused_densenet.__file__
assert extension.cpu is not None, extension.cpu_missing
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default="python3", help="default: python3")
    parser.add_argument("--torch", help="default: the newest that pip finds")
    parser.add_argument("--environment", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = arguments.environment or new_environment(folder, arguments.python, arguments.torch)
        python = environment.absolute() / "bin/python"
        variables = {**os.environ, "PATH": str(python.parent)}
        variables.pop("PYTHONPATH", None)

        def run(*command: str | Path) -> None:
            subprocess.run([python, *command], check=True, cwd=folder, env=variables)

        began = time.monotonic()
        run("-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", arguments.wheel.absolute())
        print(f"installed in {time.monotonic() - began:.1f} s", flush=True)
        run("-m", "pip", "check")
        run("-c", CHECK)
        run("-m", "fused_densenet.info")
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "tests").mkdir()
        helpers = [path for path in TEST.parent.glob("*.py") if not path.name.startswith("test_")]
        for path in [TEST, *helpers]:
            shutil.copy(path, folder / "tests")
        run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")


def new_environment(folder: Path, python: str, torch: str | None) -> Path:
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    packages = [f"torch=={torch}" if torch else "torch", "hypothesis", "numpy", "pytest"]
    subprocess.run([folder / "venv/bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return folder / "venv"


if __name__ == "__main__":
    main()
