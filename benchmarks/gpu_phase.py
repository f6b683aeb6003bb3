"""A phase of gpu_report.py, in a process of its own: its items one after the other, from the one it is told.

    python gpu_phase.py NAME ROWS [--smoke] [--order ORDER]

It imports everything, then waits for its order, a line of JSON on its standard input: ``first``, the number of the item
to begin with, and ``seconds``, the time that there is. Every item is a row when it begins and when it has ended, so that whoever
started the process can go on behind an item that took the process with it. An item that takes too long ends the process,
with a traceback of where it was.
"""

import argparse
import faulthandler
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from checkout import REPOSITORY
from gpu_run import Run


class Item(NamedTuple):
    """``seconds`` is what it may take, ``need`` those without which it is not begun."""

    name: str
    work: Callable[[], object]
    seconds: float = 60.0
    need: float = 2.0


PHASES = {
    "where": ("gpu_small", "where"),
    "small": ("gpu_small", "items"),
    "warm kernels": ("gpu_warm", "kernels"),
    "warm peers": ("gpu_warm", "peers"),
    "warm networks": ("gpu_warm", "networks"),
    "primitives": ("gpu_primitives", "items"),
    "kernelbench": ("gpu_kernelbench", "items"),
    "networks": ("gpu_networks", "items"),
}
"""By name, the module and its function that lists the items."""
ALONE = ("networks",)
"""Phases of which a process does one item and ends: what it leaves on the device is no other's."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PHASES)
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--order", help="instead of a line on standard input")
    args = parser.parse_args()
    if args.smoke:
        interpret()
    run = Run(args.rows, 0.0, args.smoke)
    module, function = PHASES[args.name]
    items_of = getattr(importlib.import_module(module), function)
    from gpu_timing import tf32

    line = args.order or sys.stdin.readline()
    if not line:
        raise SystemExit("gpu_phase.py: ended without an order")
    order = json.loads(line)
    run.end = time.monotonic() + order["seconds"]
    with tf32(True):
        work_through(args.name, items_of(run), order["first"], run)
    if args.name == "small" and run.failures:  # a sanitizer that found nothing in what did not run
        raise SystemExit(1)


def interpret() -> None:
    """Triton's interpreter, with the repairs that the tests make to it."""
    sys.path.append(str(REPOSITORY / "tests" / "triton_backend"))
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton_cpu")


def work_through(name: str, items: list[Item], first: int, run: Run) -> None:
    dropped = []
    for index, item in enumerate(items[first:], first):
        if run.left() < item.need:
            dropped.append(item.name)
            continue
        run.add("begun", phase=name, index=index, what=item.name, process=os.getpid())
        began = time.monotonic()
        faulthandler.dump_traceback_later(item.seconds, exit=True)
        run.attempt(item.name, item.work)
        faulthandler.cancel_dump_traceback_later()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()  # other processes are on the device
        run.add("ended", phase=name, index=index, what=item.name, seconds=time.monotonic() - began)
        if name in ALONE:
            break
    else:
        run.add("finished", phase=name)
    if dropped:
        run.add("dropped", what=f"{name}: {'; '.join(dropped)}")


if __name__ == "__main__":
    main()
