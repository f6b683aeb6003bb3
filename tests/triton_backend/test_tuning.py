"""Which tile is taken: the fixed choice, or the fastest, which is kept for the process and on disk."""

import json
import math
import os
import pathlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fused_densenet.backends.triton import tiles_on_disk, tuning
from fused_densenet.backends.triton.tiles_on_disk import Tile
from fused_densenet.backends.triton.tuning import ShapeClass

SHAPE = ShapeClass("norm_relu_conv", "half", 128, 1, 256, 4096, False)
CPU, PIXELS = torch.device("cpu"), 4096


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Where choices are kept."""
    path = tmp_path / "fused_densenet" / "tiles.json"
    monkeypatch.setattr(tiles_on_disk, "file", lambda device: path)
    monkeypatch.setattr(tuning, "_chosen", {})
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tile], None]:
    """Runs a candidate; the last one is the fastest. ``run.tiles`` are those that were run."""
    choices = tuning.candidates(SHAPE, "sm_90")

    def run(tile: Tile) -> None:
        run.tiles.append(tile)

    run.tiles = []
    monkeypatch.setattr(tuning, "_milliseconds", lambda work, device: len(choices) - choices.index(work.args[0]))
    return run


def test_the_fixed_choice_is_the_default() -> None:
    assert not tuning.AUTOTUNE
    assert tuning.tile(SHAPE, CPU, PIXELS) == tuning.candidates(SHAPE, "sm_90")[0]


@pytest.mark.parametrize(
    ("capability", "hip", "family"),
    [
        ((8, 0), None, "sm_80"),
        ((8, 9), None, "sm_80"),
        ((9, 0), None, "sm_90"),
        ((10, 3), None, "sm_100"),
        ((12, 0), None, "sm_120"),
        ((9, 4), "7.0", "gfx942"),
        ((11, 0), "7.0", "gfx1100"),
        ((12, 0), "7.0", "gfx1100"),
    ],
)
def test_families(capability: tuple[int, int], hip: str | None, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert tuning.family.__wrapped__(torch.device("cuda", 0)) == family


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize(("kernel", "k", "c"), [("norm_relu_conv", 128, 512), ("backward_data", 32, 128)])
@pytest.mark.parametrize("side", [56, 28, 14, 7])
def test_a_batch_of_64_gives_every_multiprocessor_a_program(
    side: int, kernel: str, k: int, c: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the 132 of an H100, and with the largest tile that does: at 56 x 56 the first, at 7 x 7 a small one."""
    monkeypatch.setattr(tuning, "family", lambda device: family)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    pixels = 64 * side**2
    shape = ShapeClass(kernel, "half", k, 1, c, pixels, False)
    tile = tuning.tile(shape, CPU, pixels)
    columns = -(-k // tile.k) if kernel == "norm_relu_conv" else -(-c // tile.c)
    assert -(-pixels // tile.p) * columns >= 132
    assert (tile == tuning.candidates(shape, family)[0]) or side <= 14


def test_the_fastest_is_kept(file: pathlib.Path, run: Callable[[Tile], None]) -> None:
    choices = tuning.candidates(SHAPE, "sm_90")
    assert len(choices) > 1
    assert tuning.tune(SHAPE, CPU, run)
    assert tuning.tile(SHAPE, CPU, PIXELS) == choices[-1] and run.tiles == choices
    assert not tuning.tune(SHAPE, CPU, run) and run.tiles == choices
    tuning._chosen.clear()  # another process
    assert tuning.tune(SHAPE, CPU, run) and run.tiles == choices
    assert tuning.tile(SHAPE, CPU, PIXELS) == choices[-1]


def test_choices_of_other_shapes_stay(file: pathlib.Path, run: Callable[[Tile], None]) -> None:
    other = SHAPE._replace(pixels=64)
    for shape in (SHAPE, other):
        tuning.tune(shape, CPU, run)
    assert tiles_on_disk.read(file).keys() == {str(SHAPE), str(other)}
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '{"a": 3}', '{"a": [1, 2, 3, 4, 5, 6]}'])
def test_a_file_that_is_something_else_counts_for_nothing(
    content: str, file: pathlib.Path, run: Callable[[Tile], None]
) -> None:
    file.parent.mkdir()
    file.write_text(content)
    assert tuning.tune(SHAPE, CPU, run)
    assert json.loads(file.read_text())[str(SHAPE)] == list(tuning.tile(SHAPE, CPU, PIXELS))


def test_a_choice_that_is_no_candidate_is_made_again(file: pathlib.Path, run: Callable[[Tile], None]) -> None:
    tiles_on_disk.write(file, str(SHAPE), Tile(1024, 1024, 128, 8, 5))
    tuning.tune(SHAPE, CPU, run)
    assert tuning.tile(SHAPE, CPU, PIXELS) in tuning.candidates(SHAPE, "sm_90")


def test_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, run: Callable[[Tile], None]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tiles_on_disk, "file", lambda device: tmp_path / "file" / "tiles.json")
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.tune(SHAPE, CPU, run)


def test_a_candidate_that_does_not_fit_is_left_out(file: pathlib.Path, run: Callable[[Tile], None]) -> None:
    choices = tuning.candidates(SHAPE, "sm_90")

    def only_the_first_fits(tile: Tile) -> None:
        if tile != choices[0]:
            raise OutOfResources(200000, 100000, "shared memory")

    assert tuning.tune(SHAPE, CPU, only_the_first_fits)
    assert tuning.tile(SHAPE, CPU, PIXELS) == choices[0]
    assert tuning._fastest(lambda: only_the_first_fits(choices[-1]), CPU) == math.inf


def test_nothing_is_tuned_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, file: pathlib.Path, run: Callable[[Tile], None]
) -> None:
    monkeypatch.setattr(torch, "get_device_module", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuning.tune(SHAPE, torch.device("cuda", 0), run)
    assert not run.tiles and not file.exists()


def test_a_file_for_each_gpu_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ["GPU A", "GPU B", "GPU A"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.pop(0))
    a, b, again = (tiles_on_disk.file(torch.device("cuda", 0)) for _ in range(3))
    assert a == again != b and a.parent == tmp_path / "fused_densenet"
    monkeypatch.setattr(tiles_on_disk, "__version__", "0.0.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")
    assert tiles_on_disk.file(torch.device("cuda", 0)) != a


def test_timed_on_the_device_of_the_tensors(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["elsewhere"]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.name = str(device)

        def __enter__(self) -> None:
            current.append(self.name)

        def __exit__(self, *_: object) -> None:
            current.pop()

    seen = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: mock.Mock(device=Device))
    monkeypatch.setattr(tuning, "_milliseconds", lambda *_: seen.append(current[-1]) or 1.0)
    assert tuning.tune(SHAPE, torch.device("xpu", 1), lambda tile: None)
    assert set(seen) == {"xpu:1"} and current == ["elsewhere"]
