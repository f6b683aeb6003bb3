"""Which versions of Python, torch and triton are served: the docs, the build and the package say the same."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from fused_densenet import __version__
from fused_densenet.backends import extension

ROOT = Path(__file__).parent.parent
README, TABLE, MESSAGES = (
    (ROOT / name).read_text() for name in ("README.md", "docs/versions.md", "docs/troubleshooting.md")
)
PROJECT = (ROOT / "pyproject.toml").read_text()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("script", ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minors(first: str, last: str) -> list[str]:
    """Of one major version: 2.11, 2.12, ..."""
    (major, begin), (_, end) = (map(int, version.split(".")) for version in (first, last))
    return [f"{major}.{minor}" for minor in range(begin, end + 1)]


def promised(what: str) -> list[str]:
    """By README's table of what is supported."""
    match = re.search(rf"^\| {what} \| (\d+\.\d+) to (\d+\.\d+)\b", README, re.MULTILINE)
    assert match is not None
    return minors(match[1], match[2])


def tried(column: str) -> set[str]:
    """By the first table of docs/versions.md."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    place = rows[0].index(column)
    return {version for row in rows[2:] for version in re.findall(r"\b\d+\.\d+", row[place])}


def test_torch() -> None:
    served = promised("torch")
    wheels = script("packaging/build_wheels.py")
    assert [release.rpartition(".")[0] for release in wheels.TORCHES] == served
    assert script("setup.py").dotted(script("setup.py").MINIMUM_TORCH) == served[0]
    assert ".".join(map(str, extension.NEWEST_TORCH)) == served[-1]
    assert re.findall(r'"torch([<>=!~].*?)"', PROJECT) == [f">={served[0]}"]  # nothing turns tomorrow's away
    assert tried("torch") == set(served)


def test_python() -> None:
    served = promised("Python")
    assert re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT) == served
    assert re.findall(r'requires-python = "(.*)"', PROJECT) == [f">={served[0]}"]
    assert tried("Python") == set(served)


def test_triton() -> None:
    assert tried("triton") == set(promised("triton"))


def test_first_screen() -> None:
    first = README.partition("\n## ")[0]
    torch, python = promised("torch"), promised("Python")
    assert re.findall(r"torch from (\S+) to (\d+\.\d+)", first) == [(torch[0], torch[-1])]
    assert re.findall(r"Python from (\S+) on", first) == [python[0]]
    assert set(re.findall(r"fused_densenet-(\d.*?)-", README)) == {__version__}


def test_messages() -> None:
    """A newer torch is one that is newer than the newest that is served."""
    assert re.findall(r"is newer than (\d+\.\d+)", MESSAGES) == [promised("torch")[-1]]


@pytest.mark.parametrize("page", [README, (ROOT / ".ci/run").read_text(), script("setup.py").INSTALL])
def test_what_is_installed_to_develop_is_served(page: str) -> None:
    for what in ("torch", "triton"):
        assert set(re.findall(rf"\b{what}==(\d+\.\d+)", page)) <= set(promised(what))
