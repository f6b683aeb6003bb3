"""The benchmarks run, write the JSON that they promise, and memory.py's bytes are those that the algorithm must keep."""

import json
import os
import pathlib
import runpy
import shlex
import subprocess
import sys
from typing import Any

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
BATCH, PIXELS, FLOAT = 2, 8 * 8, 4
DEPTHS = (4, 8, 12, 16)
WIDTH, GROWTH_RATE, BOTTLENECK = 64, 32, 128
WAYS = ("forward", "backward")


def run(script: str, *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    file, plot = folder / "memory.json", folder / "memory.png"
    depths = [str(depth) for depth in DEPTHS]
    sizes = ["--device", "cpu", "--batch", str(BATCH), "--size", "64"]
    done = run("memory.py", *sizes, "--networks", "densenet121", "--depths", *depths, "--json", file, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    return json.loads(file.read_text())


def saved_by_depth(memory: dict[str, Any], variant: str) -> list[int]:
    rows = {row["network"]: row for row in memory["rows"] if row["variant"] == variant}
    return [rows[f"block of {depth} layers"]["saved_bytes"] for depth in DEPTHS]


def second_differences(values: list[int]) -> list[int]:
    return [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]


def test_memory_json(memory: dict[str, Any]) -> None:
    assert {"machine", "versions", "commit", "backend", "command", "rows"} <= memory.keys()
    expected = {"network": str, "variant": str, "device": str, "dtype": str, "batch": int, "size": int}
    for row in memory["rows"]:
        for key, kind in {**expected, "saved_bytes": int, "peak_bytes": int, "floor_bytes": int}.items():
            assert type(row[key]) is kind, (row, key)
        assert (row["device"], row["dtype"], row["batch"]) == ("cpu", "float32", BATCH)
        assert row["peak_bytes"] > row["saved_bytes"] > 0
    blocks = [f"block of {depth} layers" for depth in DEPTHS] + ["densenet121, dense blocks"]
    variants = ["reference", "reference, checkpointed", "ours", "ours, memory_efficient"]
    whole = [*variants, "torchvision", "torchvision, memory_efficient"]
    expected_rows = [(n, v) for n in blocks for v in variants] + [("densenet121", v) for v in whole]
    assert [(r["network"], r["variant"]) for r in memory["rows"]] == expected_rows


@pytest.mark.parametrize("variant", ["ours", "ours, memory_efficient"])
def test_a_block_keeps_its_buffer_and_its_statistics_alone(memory: dict[str, Any], variant: str) -> None:
    """Exactly: the concatenation, the bottlenecks where they are kept, every channel's mean and variance."""
    for depth, saved in zip(DEPTHS, saved_by_depth(memory, variant), strict=True):
        channels, bottlenecks = WIDTH + depth * GROWTH_RATE, depth * BOTTLENECK
        values = channels + (bottlenecks if variant == "ours" else 0)
        assert saved == (BATCH * PIXELS * values + 2 * (channels + bottlenecks)) * FLOAT


def test_growth_with_depth(memory: dict[str, Any]) -> None:
    """Concatenating keeps every layer's input twice (before and after norm and ReLU): quadratic. One buffer: linear."""
    step = DEPTHS[1] - DEPTHS[0]
    quadratic = 2 * GROWTH_RATE * step**2 * BATCH * PIXELS * FLOAT
    for difference in second_differences(saved_by_depth(memory, "reference")):
        assert difference == pytest.approx(quadratic, rel=0.02)  # batch normalisation keeps two vectors besides
    for variant in ("ours", "ours, memory_efficient"):
        assert set(second_differences(saved_by_depth(memory, variant))) == {0}


def test_floor_of_a_network(memory: dict[str, Any]) -> None:
    """DenseNet-121's dense blocks end with 256, 512, 1024 and 1024 channels, at a quarter of the image and less."""
    rows = {row["variant"]: row for row in memory["rows"] if row["network"] == "densenet121, dense blocks"}
    floor = BATCH * FLOAT * (256 * 16**2 + 512 * 8**2 + 1024 * 4**2 + 1024 * 2**2)
    assert {row["floor_bytes"] for row in rows.values()} == {floor}
    statistics = 2 * FLOAT * (256 + 512 + 1024 + 1024 + 58 * BOTTLENECK)
    assert rows["ours, memory_efficient"]["saved_bytes"] == floor + statistics


def test_memory_of_super_resolution(tmp_path: pathlib.Path) -> None:
    """Of each of RRDBNet's 69 dense blocks 192 channel planes are kept, one buffer, where concatenation keeps 768."""
    crop, file = 4, tmp_path / "memory.json"
    sizes = ["--device", "cpu", "--batch", str(BATCH), "--crop", str(crop)]
    done = run("memory.py", *sizes, "--networks", "rrdb", "--depths", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"reference", "ours"}
    planes = 69 * BATCH * crop**2 * FLOAT
    for row in rows.values():
        assert (row["network"], row["size"], row["floor_bytes"]) == ("rrdb", crop, 192 * planes)
        assert row["peak_bytes"] > row["saved_bytes"] > row["floor_bytes"]
    assert rows["reference"]["saved_bytes"] - rows["ours"]["saved_bytes"] == (768 - 192) * planes


def test_train(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "train.json"
    done = run("train.py", "--epochs", "1", "--batch", "256", "--json", file, "--plot", tmp_path / "train.png")
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"reference", "ours"} <= rows.keys()
    first = [row["step_losses"][0][0] for row in rows.values()]
    assert first == pytest.approx([first[0]] * len(first), rel=1e-5)
    assert rows["ours"]["saved_bytes"] < rows["reference"]["saved_bytes"]
    passes = all(row["test_accuracy"] > 0.97 for row in rows.values())
    assert not passes, "5 steps should not be enough: is the test set in the training set?"
    assert done.returncode == 1 and "test accuracy: expected above 97%" in done.stderr


def test_speed(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "speed.json"
    arguments = ["--batch", "2", "--size", "64", "--rounds", "1", "--threads", "1"]
    done = run("speed.py", *arguments, "--json", file, "--plot", tmp_path / "speed.png")
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert {(row["mode"], len(row["seconds"])) for row in written["rows"]} == {("training", 1), ("inference", 1)}
    fused = next(r for r in written["rows"] if (r["mode"], r["variant"]) == ("training", "fused"))
    assert fused["times_as_fast_as"].keys() == {"torchvision, NCHW", "torchvision, channels-last"}
    assert 0 < written["parity"]["densenet121"]["fused"]["inference output"] < 1e-4


def test_inference(tmp_path: pathlib.Path) -> None:
    """Engines may be absent: then the table and the JSON say so."""
    file, plot = tmp_path / "inference.json", tmp_path / "inference.png"
    small = ["--layers", "1", "--size", "32", "--batches", "2", "--rounds", "1", "--threads", "1"]
    done = run("inference.py", *small, "--json", file, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "backend", "command"} <= written.keys()
    for dtype, error in (("float32", 1e-5), ("bfloat16", 0.05)):
        rows = {row["peer"]: row for row in written["rows"] if row["dtype"] == dtype}
        missing = written["missing"][dtype]
        always = {"torchvision, NCHW", "torchvision, channels-last", "torch.compile, freezing", "fuse"}
        assert always <= rows.keys()
        assert {"ONNX Runtime", "OpenVINO"} - rows.keys() <= missing.keys() and not missing.keys() & rows.keys()
        assert all(name in done.stdout and reason.split()[0] in done.stdout for name, reason in missing.items())
        for row in rows.values():
            (seconds,) = row["seconds"]
            assert row["error"] < error and row["images_per_second"] == pytest.approx(2 / seconds)
        engines = {"torch.compile, freezing", "ONNX Runtime", "OpenVINO"} & rows.keys()
        fastest, ours = min(rows[name]["seconds"][0] for name in engines), rows["fuse"]["seconds"][0]
        assert rows["fuse"]["times_as_fast_as"]["median"] == pytest.approx(fastest / ours)
    assert "ONNX Runtime" in written["missing"]["bfloat16"]


def test_primitives(tmp_path: pathlib.Path) -> None:
    file, plot = tmp_path / "primitives.json", tmp_path / "primitives.png"
    arguments = ["--blocks", "7x40", "5x16", "--batch", "1", "--rounds", "1", "--threads", "1"]
    done = run("primitives.py", *arguments, "--json", file, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "backend", "command"} <= written.keys()
    expected = [(d, b, k, w) for d in ("float32", "bfloat16") for b in ("7x40", "5x16") for k in (1, 3) for w in WAYS]
    assert [(r["dtype"], r["block"], r["kernel"], r["direction"]) for r in written["rows"]] == expected
    for row in written["rows"]:
        rates = written["flop_and_bytes_per_second"][row["dtype"]]
        seconds, bare = row["seconds"][0], row["bare_seconds"][0]
        channels, out = (int(row["block"].partition("x")[2]), 128) if row["kernel"] == 1 else (128, 32)
        pixels, passes = int(row["block"].partition("x")[0]) ** 2, 1 + (row["direction"] == "backward")
        flops = 2 * passes * pixels * channels * out * row["kernel"] ** 2
        moved = passes * pixels * (channels + out) * (4 if row["dtype"] == "float32" else 2)
        moved += passes * channels * out * row["kernel"] ** 2 * FLOAT
        roof = max(flops / rates["product"], moved / rates["copy"])
        assert row["gflop_per_second"] == pytest.approx(flops / seconds / 1e9)
        assert row["times_as_fast_as_bare"]["median"] == pytest.approx(bare / seconds)
        assert row["of_the_roof"]["median"] == pytest.approx(roof / seconds)


BAD = [
    ("host.py --rounds 0", "--rounds: expected an integer of at least 1, got '0'"),
    ("host.py --size 28", "--size: expected at least 29 for 4 blocks and a batch of 2, got 28"),
    ("primitives.py --blocks 7by32", "--blocks: expected PIXELSxCHANNELS, such as 56x64, got '7by32'"),
    ("speed.py --networks nonsense", "--networks: invalid choice: 'nonsense'"),
    ("speed.py --threads 0", "--threads: expected an integer of at least 1"),
    ("speed.py --batch 1 --size 60", "--size: expected at least 61 for 4 blocks and a batch of 1, got 60"),
    ("speed.py --device nonsense", "--device: expected a device that torch has, got 'nonsense'"),
    ("train.py --batch 3000", "--batch: expected at most 1442, the digits to train on, got 3000"),
    ("train.py --epochs 0", "--epochs: expected an integer of at least 1"),
    ("memory.py --depths 0", "--depths: expected an integer of at least 1"),
    ("memory.py --networks --depths", "nothing to measure"),
    ("inference.py --size 28", "--size: expected at least 29 for 4 blocks, got 28"),
    ("inference.py --layers 1 1 1 1 1 1", "--layers: expected at most 5 blocks, got 6"),
    ("inference.py --dtypes bfloat16 --peers 'ONNX Runtime'", "--peers: nothing to measure"),
    ("memory.py --json {tmp}/file/below", "--json: '{tmp}/file' cannot be made: "),
    ("train.py --json {tmp}", "--json: '{tmp}' cannot be written"),
    ("speed.py --plot {tmp}/plot.txt", "--plot: expected a name that ends in .png, .pdf or .svg"),
    ("gpu_report.py --smoke --minutes 0", "--minutes: expected a time above 0, got '0'"),
    ("gpu_report.py --smoke --output {tmp}/file", "--output: '{tmp}/file' cannot be made: File exists"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[command for command, _ in BAD])
def test_a_bad_value_is_an_error_before_anything_is_measured(
    command: str,
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    script, *arguments = (word.format(tmp=tmp_path) for word in shlex.split(command))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert stopped.value.code == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err.splitlines()[-1]
