"""benchmarks/gpu_report.py goes its whole way on the CPU, and its parts on cases with known answers."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_checks  # noqa: E402
from gpu_primitives import BLOCKS, block_problems, chosen_problems  # noqa: E402
from gpu_run import Process, Run, read_rows  # noqa: E402
from gpu_timing import Rates  # noqa: E402


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu_report")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--smoke", "--output", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((folder / "report.json").read_text())
    return {**written, "markdown": (folder / "report.md").read_text()}


def rows(report: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["kind"] == kind]


def test_nothing_failed_and_nothing_was_dropped(report: dict[str, Any]) -> None:
    assert rows(report, "failed") == rows(report, "dropped") == []
    checks = {row["check"]: row["outcome"] for row in rows(report, "check")}
    assert checks["build"] == checks["tests"] == "passed"


def test_it_says_where(report: dict[str, Any]) -> None:
    assert {"machine", "versions", "commit", "backend", "command", "smoke", "seconds"} <= report.keys()
    assert {"gpu", "driver"} <= report["machine"].keys()
    assert {"torch", "cuda", "triton", "torchvision"} <= report["versions"].keys()


def test_every_backend_is_measured_and_agrees(report: dict[str, Any]) -> None:
    backends = {"cpu", "triton", "eager"}
    primitives = rows(report, "primitive")
    assert {(row["backend"], row["arithmetic"]) for row in primitives} == {
        (backend, arithmetic) for backend in backends for arithmetic in ("bfloat16", "tf32")
    }
    assert all(row["error"] < (1e-2 if row["arithmetic"] == "bfloat16" else 1e-5) for row in primitives)
    assert {row["backend"] for row in rows(report, "blocks")} == backends
    variants = {row["variant"] for row in rows(report, "network")}
    for backend in backends:
        assert {f"fused {backend}", f"fused {backend}, CUDA graph", f"fused {backend}, torch.compile"} <= variants
    assert {"eager, NCHW", "eager, channels-last", "memory_efficient", "torch.compile, channels-last"} <= variants
    errors = [row["gradient_error"] for row in rows(report, "error") if row["precision"] == "float32"]
    assert len(errors) == 4 and max(errors) < 1e-5


def test_markdown_shows_every_row(report: dict[str, Any]) -> None:
    lines = [line for line in report["markdown"].splitlines() if line.startswith("| ")]
    shown = sum(len(rows(report, kind)) for kind in ("primitive", "blocks", "network", "error", "check"))
    titles = sum(line.startswith("#") for line in report["markdown"].splitlines())
    assert shown < len(lines) <= shown + titles
    for row in rows(report, "primitive"):
        assert any(line.startswith(f"| {row['primitive']} | {row['backend']} | ") for line in lines)


def test_floor_of_the_dense_blocks() -> None:
    """Of DenseNet-121 at 224×224: forward 2.4 billion multiply-adds (arXiv 1608.06993, table 1: 2.9 with the rest)."""
    problems = [p for layers, c, scale in BLOCKS for p in block_problems(1, 224 // scale, layers, c)]
    assert sum(p.flops() for p in problems) == pytest.approx(3 * 2 * 2.4e9, rel=0.01)
    first = [p for p in problems if p.pixels == (1, 1, 56, 56)]
    assert first[1].moved(2, 4) == 56 * 56 * (64 + 128) * 2 + 64 * 128 * 4
    assert first[3].moved(2, 4) == 56 * 56 * (2 * 128 + 2 * 32) * 2 + 2 * 128 * 32 * 9 * 4
    assert first[4].moved(2, 4) == 56 * 56 * (3 * 64 + 2 * 128) * 2 + 2 * 64 * 128 * 4
    assert len(problems) == 4 * 58 + 3 * 4
    assert {p.primitive for p in chosen_problems(64, 224)} == {p.primitive for p in problems}


def test_a_floor_is_the_longer_of_bytes_and_multiplications() -> None:
    rates = Rates(copy=1e12, products={"bfloat16": 1e14})
    assert rates.floor(2e9, 1e11, "bfloat16") == pytest.approx(2.0)
    assert rates.floor(2e9, 1e12, "bfloat16") == pytest.approx(10.0)


def test_a_phase_that_takes_too_long_is_stopped_with_its_children(tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "mark"
    process = Process(["sh", "-c", f"(sleep 2; touch {mark}) & sleep 30"], tmp_path / "log")
    assert process.wait(0.2) is None
    time.sleep(2.2)
    assert not mark.exists() and process.seconds() < 10


def test_what_fails_is_a_row(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "rows", 1.0, smoke=True)

    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    assert run.attempt("a big batch", out_of_memory) is None
    assert run.attempt("a sum", lambda: 1 + 1) == 2
    with run.rows.open("a") as file:
        file.write('{"kind": "half a')
    assert read_rows(run.rows) == [{"kind": "failed", "what": "a big batch", "error": "out of memory"}]


def test_checks_report_what_came_of_them(tmp_path: pathlib.Path) -> None:
    row = gpu_checks.check("tests", ["sh", "-c", "echo '=== 1 failed, 2 passed in 3s ==='; exit 1"], {}, 5, tmp_path)
    assert (row["outcome"], row["closing"]) == ("failed (1)", "1 failed, 2 passed in 3s")
    row = gpu_checks.check("memcheck", ["sh", "-c", "echo '========= ERROR SUMMARY: 0 errors'"], {}, 5, tmp_path)
    assert (row["outcome"], row["closing"]) == ("passed", "ERROR SUMMARY: 0 errors")
    assert gpu_checks.check("build", ["sleep", "9"], {}, 0.1, tmp_path)["outcome"] == "stopped after 0 s"


def test_the_sanitized_run_calls_every_primitive(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "rows", 9.0, smoke=True)
    gpu_checks.small_run(run)
    assert {(row["backend"], row["dtype"]) for row in read_rows(run.rows)} >= {("cpu", "torch.float32")}
    assert {p.primitive for p in gpu_checks.SMALL} == {p.primitive for p in block_problems(1, 4, 1, 8)}


def test_without_a_gpu_it_says_so() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "--smoke" in done.stderr
