"""Whether a checkout's library was compiled from the sources that lie there, and a second import in one process."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused_densenet.backends import extension, sources

ROOT = Path(__file__).parents[1]
CPU = extension.library_name(torch.__version__)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what matters of this one, with libraries that name its sources."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the sources are not here")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fused_densenet", tmp_path / "fused_densenet", ignore=ignored)
    for name in (CPU, sources.CUDA):
        build_id = bytes.fromhex(sources.fingerprint(tmp_path, name))
        (tmp_path / "fused_densenet" / name).write_bytes(b"\x7fELF" + bytes(600) + build_id)
    return tmp_path


def stale(checkout: Path) -> set[str]:
    return {name for name in (CPU, sources.CUDA) if sources.is_stale(checkout / "fused_densenet" / name)}


def test_what_does_not_count(checkout: Path) -> None:
    """Line endings, and what builds, interpreters and editors leave."""
    for file in checkout.glob("csrc/**/*.*"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    for name in ("binding.o", "cpu/avx2.cpp~", "cpu/.avx2.cpp.swp", "cpu/.#avx2.cpp", "cpu/__pycache__/a.pyc"):
        (checkout / "csrc" / name).parent.mkdir(exist_ok=True)
        (checkout / "csrc" / name).touch()
    assert stale(checkout) == set()


def changed(checkout: Path) -> Iterator[tuple[str, set[str]]]:
    """Each source, and the libraries that are of other sources when it alone is changed."""
    for file in sorted(file for file in checkout.glob("csrc/**/*") if file.is_file()):
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        yield file.relative_to(checkout / "csrc").as_posix(), stale(checkout)
        file.write_bytes(before)


def test_every_source_counts_for_its_library(checkout: Path) -> None:
    for name, libraries in changed(checkout):
        if name.startswith("cuda") or name in ("binding.cpp", "watch.cpp") or name.startswith("cpu/"):
            assert libraries == {sources.CUDA if name.startswith("cuda") else CPU}, name
        else:
            assert libraries == {CPU, sources.CUDA}, name


def test_a_file_that_comes_or_goes_or_is_renamed(checkout: Path) -> None:
    (checkout / "csrc/cpu/new.h").touch()
    assert stale(checkout) == {CPU}
    (checkout / "csrc/cpu/new.h").unlink()
    assert stale(checkout) == set()
    (checkout / "csrc/cpu/avx2.cpp").rename(checkout / "csrc/cpu/avx3.cpp")
    assert stale(checkout) == {CPU}


def test_libraries_that_name_no_sources(checkout: Path) -> None:
    """Older than the check, or of another torch; where there is no checkout nothing is compared."""
    for name in (CPU, sources.CUDA):
        (checkout / "fused_densenet" / name).write_bytes(b"\x7fELF")
    assert stale(checkout) == {CPU, sources.CUDA}
    (checkout / "setup.py").unlink()  # another package's csrc
    assert stale(checkout) == set()


IMPORT = "from fused_densenet.backends import extension; print(extension.cpu is not None, extension.cpu_missing)"


def imported(folder: Path, code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stale_library_is_not_loaded(checkout: Path) -> None:
    """What was built here, by this checkout's setup.py, names its sources."""
    shutil.copy(ROOT / "fused_densenet" / CPU, checkout / "fused_densenet")
    assert imported(checkout, IMPORT) == "True None\n"
    with (checkout / "csrc/cpu/tile.h").open("a") as file:
        file.write("// changed\n")
    said = imported(checkout, IMPORT)
    assert said.startswith(
        "False the C++ extension was compiled from other sources than csrc has now; run `pip install"
    )


@pytest.mark.parametrize("kept", [True, False], ids=["the first is in use", "the first is gone"])
def test_a_second_import(kept: bool) -> None:
    """As test runners and notebooks make: both run, fused, and torch.compile takes the second."""
    code = f"""
import gc, sys, warnings
import torch
warnings.simplefilter("error")
def run():
    import fused_densenet
    block = fused_densenet.FusedDenseBlock(2, 8, 2, 4)
    return lambda x: block(x).sum().backward() or torch.compile(block, backend="eager", fullgraph=True)(x)
x, first = torch.randn(2, 8, 4, 4), run()
first(x)
for name in [name for name in sys.modules if name.partition(".")[0] == "fused_densenet"]:
    del sys.modules[name]
if not {kept}:
    del first
    gc.collect()
run()(x)
if {kept}:
    first(x)
{IMPORT}
"""
    assert imported(ROOT, code) == "True None\n"


def test_a_second_import_of_other_operators() -> None:
    code = f"""
import sys
import torch
vars(torch.ops.fused_densenet)["_defined"] = ("other(Tensor x) -> ()",), None
{IMPORT}
"""
    assert imported(ROOT, code) == "False this process imported another fused_densenet before; start it again\n"
