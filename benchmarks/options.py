"""What an option of a benchmark may be: types for argparse, so that a bad value is an error before anything is measured."""

import argparse
import math
import os
import pathlib
import re

import torch

BLOCK = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a time above 0, got {text!r}")
    return value


def block(text: str) -> str:
    if BLOCK.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"expected PIXELSxCHANNELS, such as 56x64, got {text!r}")
    return text


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a device that torch has, got {text!r}: {error}".splitlines()[0]
        ) from error
    return found


def folder(text: str) -> pathlib.Path:
    """One that can be written; it is made."""
    path = pathlib.Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def file(text: str) -> pathlib.Path:
    """One that can be written, in a :func:`folder`."""
    path = folder(str(pathlib.Path(text).parent)) / pathlib.Path(text).name
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def picture(text: str) -> pathlib.Path:
    if not text.endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, .pdf or .svg, got {text!r}")
    return file(text)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=file, metavar="FILE", help="write every figure and where it was taken")
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help="write the plot")


def check_image(parser: argparse.ArgumentParser, size: int, blocks: int, training_batch: int | None = None) -> None:
    """A DenseNet halves an image twice, and again after every block but the last.

    BatchNorm in training needs two values of a channel: of one image, two pixels a side.
    """
    side = 2 if training_batch == 1 else 1
    least = 4 * (2 ** (blocks - 1) * side - 1) + 1
    if size < least:
        batch = "" if training_batch is None else f" and a batch of {training_batch}"
        parser.error(f"argument --size: expected at least {least} for {blocks} blocks{batch}, got {size}")
