"""Environment variables that switch something on or off."""

import os

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def is_on(name: str) -> bool:
    """Whether an environment variable says so, in whatever case; unset or empty, it is off.

    Raises:
        ValueError: it says something else.
    """
    value = os.environ.get(name, "").strip().lower()
    if value and value not in _ON + _OFF:
        raise ValueError(f"{name}: expected {', '.join(_ON)}, or {', '.join(_OFF)}, got {os.environ[name]!r}")
    return value in _ON
