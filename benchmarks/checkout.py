"""The commit of this checkout, and how it was asked for a figure. Needs nothing but Python and git."""

import pathlib
import shlex
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """``-dirty`` if the tree differs from it, None where there is no checkout."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """As one would write it in the repository: a file elsewhere is its name."""
    return shlex.join(["python", *map(_portable, sys.argv)])


def _portable(argument: str) -> str:
    path = pathlib.Path(argument)
    if path.resolve().is_relative_to(REPOSITORY) and path.exists():
        return str(path.resolve().relative_to(REPOSITORY))
    return path.name if path.is_absolute() else argument
