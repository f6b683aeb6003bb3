"""A machine with nothing on it: a copy of the checkout, and a Python that can import no more than it is given."""

import functools
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys

from packaging.requirements import Requirement

REPOSITORY = pathlib.Path(__file__).parents[1]


def checkout(folder: pathlib.Path) -> pathlib.Path:
    """What git has or would take of this checkout: nothing that was built or installed."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (REPOSITORY / name).is_file():  # one that was deleted is listed until that is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def python(folder: pathlib.Path, *distributions: str) -> pathlib.Path:
    """An environment with the distributions that are named and what they need, linked to those installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    for name in needed(*distributions):
        installed = importlib.metadata.distribution(name)
        for top in sorted(
            {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}
        ):
            if not (site / top).exists():
                (site / top).symlink_to(pathlib.Path(str(installed.locate_file(top))).resolve())
    return folder / "bin" / "python"


@functools.cache
def needed(*distributions: str) -> list[str]:
    """They, and every distribution that one of them requires here."""
    found: list[str] = []
    waiting = list(distributions)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found
