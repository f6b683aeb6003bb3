"""benchmarks/gpu_model.py: what it counts is what the kernels execute, and its predictions are consistent with it."""

import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import counted_cuda
import launch_counts
import nvcc
import pytest
import torch
from building import HERE

from fused_densenet import FusedDenseBlock

BENCHMARKS = HERE.parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_model  # noqa: E402
import gpu_model_launches  # noqa: E402
import gpu_predictions  # noqa: E402
import gpu_primitives  # noqa: E402
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


def test_one_launch_prepares_for_several() -> None:
    costs = [
        Cost("kernel", Counter(ld=10, st=4), threads=256, blocks=3, resident=8, requested=100),
        Cost("kernel", Counter(ld=20), threads=256, blocks=1, resident=8, requested=50),
    ]
    joined = gpu_model_launches.together(costs)
    assert (joined.blocks, joined.requested, joined.instructions) == (4, 150, Counter(ld=12, st=3))


def predicted_launches(batch: int, image: int, situation: str) -> Counter[str]:
    """By kernel, of DenseNet-121 on an H100."""
    kind, found = gpu_model.GPUS["H100"].kind, Counter[str]()
    groups = gpu_model.groups(gpu_model.NETWORKS["densenet121"], batch, image, situation)
    for program in gpu_model.programs(groups, situation):
        kernels = [nvcc.readable(it.kernel) for p in program for it in gpu_model_launches.launches_of(p, kind)]
        own = Counter(kernel.partition("<")[0] for kernel in kernels)
        prepared = own.pop(gpu_model.PREPARE)
        found.update(own)
        found[gpu_model.PREPARE] += -(-prepared // gpu_model_launches.PREPARED_TOGETHER)
    return found


def test_launches_of_a_network() -> None:
    """Those that the binding makes in a training step, but what it does beside: running statistics are updated."""
    made = json.loads(launch_counts.EXPECTED.read_text())["cuda training"]
    own = {kernel: n for kernel, n in made.items() if kernel.endswith("_kernel")}
    assert own.pop("update_running_kernel") > 0
    assert predicted_launches(launch_counts.BATCH, 224, gpu_model.NETWORK) == own


def test_launches_of_blocks_alone() -> None:
    """A training step of each block of DenseNet-121, as the binding launches it."""
    blocks = [
        (FusedDenseBlock(layers, channels, 4, 32), channels, 56 * 4 // scale)
        for layers, channels, scale in gpu_primitives.BLOCKS
    ]

    def step() -> None:
        for block, channels, side in blocks:
            images = torch.empty(64, side, side, channels, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
            block.to("meta")(images.requires_grad_()).sum().backward()

    own = {kernel: n for kernel, n in counted_cuda.launches_in(step).items() if kernel.endswith("_kernel")}
    assert own.pop("update_running_kernel") > 0
    assert predicted_launches(64, 224, gpu_model.ALONE) == own


def test_the_command(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    sizes = ["--networks", "densenet121", "--batches", "1", "--gpus", "A100", "--size", "32"]
    old = {"gpu": "A100", "network": "densenet121", "batch": 1, "situation": "before", "launches": 7, "blocks": 1.25}
    before = {"sentences": ["Said before."], "sums": [old | {"blocks, floor": 0.5}]}
    (tmp_path / "model.json").write_text(json.dumps({"before": before}))
    files = ["--json", tmp_path / "model.json", "--markdown", tmp_path / "model.md"]
    command = [sys.executable, BENCHMARKS / "gpu_model.py", *sizes, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Predictions, none measured" in done.stdout
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert {gpu_model.part(row) for row in rows} == set(gpu_model.PARTS)
    calls = Counter(dict.fromkeys(gpu_model.SITUATIONS, 0))
    for row in rows:
        calls[row["situation"]] += row["calls"]
        assert row["predicted_microseconds"] >= max(row["floor_microseconds"], gpu_model.LAUNCH * row["calls"])
    assert calls == {gpu_model.NETWORK: 58 * 4 + 3 * 2 + 5 + 1 + 2, gpu_model.ALONE: 58 * 4 + 4 * 3}
    assert json.loads((tmp_path / "model.json").read_text())["before"] == before
    text = (tmp_path / "model.md").read_text()
    assert "Nothing here was measured" in text and "| A100, densenet121, batch 1, blocks alone |" in text
    assert "## Before\n\nSaid before.\n" in text
    assert "| A100, densenet121, batch 1, before | 7 | 1.25 | 0.50 |" in text


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
