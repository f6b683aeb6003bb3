"""benchmarks/gpu_model.py: what it counts is what the kernels execute, and its predictions are consistent with it."""

import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest
from building import HERE

BENCHMARKS = HERE.parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_model  # noqa: E402
import gpu_model_launches  # noqa: E402
import gpu_predictions  # noqa: E402
from gpu_model_launches import Cost, Kind  # noqa: E402
from gpu_primitives import BACKWARD, FORWARD, Problem  # noqa: E402
from ptx.counting import count_block  # noqa: E402

FEW = Kind("80", 2, 163 << 10, 80)
"""Multiprocessors, so that blocks of small problems have many tiles."""
# Sizes of whole tiles and boxes: what sticks out beyond an image asks for fewer bytes.
PROBLEMS = [
    Problem(FORWARD, (4, 1, 16, 24), 64, 128, 1),
    Problem(FORWARD, (4, 1, 28, 28), 64, 32, 3),
    Problem(BACKWARD, (4, 1, 16, 32), 64, 32, 3),
    Problem(BACKWARD, (4, 1, 20, 20), 128, 128, 1, accumulate=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_is_counted(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles or boxes stand for all of a block's: nearly as many instructions and as many products as executed."""
    executed = []

    def count(*launch: object) -> object:
        executed.append(count_block(*launch))  # type: ignore[arg-type]
        return executed[-1]

    monkeypatch.setattr(gpu_model_launches, "count_block", count)
    (launch,) = (
        it for it in gpu_model_launches.launches_of(problem, FEW) if "conv" in it.kernel or "backward" in it.kernel
    )
    cost = gpu_model_launches.cost_of(launch, problem, FEW)
    monkeypatch.setattr(gpu_model_launches, "count_tiles", lambda launch, problem, count: count(launch))
    monkeypatch.setattr(gpu_model_launches, "count_boxes", lambda launch, count: count(launch))
    before = len(executed)
    exact = gpu_model_launches._count(launch, problem, FEW)
    assert before == 2 and len(executed) == 3
    assert cost.products == exact.products > 0
    assert sum(cost.instructions.values()) == pytest.approx(sum(exact.instructions.values()), rel=0.03)
    assert cost.requested == pytest.approx(exact.requested, rel=0.05)


def test_a_launch_takes_as_long_as_the_longest_part() -> None:
    gpu = gpu_model.GPUS["H100"]
    cost = Cost("kernel", Counter(mma=700_000), threads=256, blocks=264, resident=1, requested=10**9)
    issue = 2 * 2 * 700_000 / 0.7 / 1755  # two blocks one after the other, of two warps for each scheduler
    assert gpu_model.microseconds(cost, 0, 0, gpu) == pytest.approx(issue)
    assert gpu_model.microseconds(cost, 3 * 10**11, 0, gpu) == pytest.approx(1e5)
    assert gpu_model.microseconds(cost, 0, 798 * 10**10, gpu) == pytest.approx(1e4)
    nothing = cost._replace(instructions=Counter(mov=1), requested=0)
    assert gpu_model.microseconds(nothing, 0, 0, gpu) == gpu_model.LAUNCH


def test_the_command(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    sizes = ["--networks", "densenet121", "--batches", "1", "--gpus", "A100", "--size", "32"]
    files = ["--json", tmp_path / "model.json", "--markdown", tmp_path / "model.md"]
    command = [sys.executable, BENCHMARKS / "gpu_model.py", *sizes, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Predictions, none measured" in done.stdout
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert {gpu_model.part(row) for row in rows} == set(gpu_model.PARTS)
    assert sum(row["calls"] for row in rows) == 58 * 4 + 4 * 3 + 3 * 2 + 2
    for row in rows:
        assert row["predicted_microseconds"] >= max(row["floor_microseconds"], gpu_model.LAUNCH * row["calls"])
    text = (tmp_path / "model.md").read_text()
    assert "Nothing here was measured" in text and "| A100, densenet121, batch 1 |" in text


def test_what_the_report_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the GPU and the primitives that were predicted, and nothing for others."""
    monkeypatch.setattr(gpu_predictions, "this_gpu", lambda: "NVIDIA H100 80GB HBM3")
    problem = str(Problem(BACKWARD, (64, 1, 56, 56), 160, 128, 1, accumulate=True))
    predicted = gpu_predictions.of_primitive(problem, "cuda", "bfloat16")
    assert predicted is not None and predicted > 90  # its bytes at 3 TB/s
    blocks = gpu_predictions.of_blocks("densenet121", 64, "cuda")
    assert blocks is not None and 3.0 < blocks < 20.0
    for backend, arithmetic in (("triton", "bfloat16"), ("cuda", "tf32")):
        assert gpu_predictions.of_primitive(problem, backend, arithmetic) is None
    monkeypatch.setattr(gpu_predictions, "this_gpu", lambda: "NVIDIA L4")
    assert gpu_predictions.of_primitive(problem, "cuda", "bfloat16") is None
    assert gpu_predictions.of_blocks("densenet121", 64, "cuda") is None
