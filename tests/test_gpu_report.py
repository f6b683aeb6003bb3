"""benchmarks/gpu_report.py goes its whole way on the CPU, from a bare checkout, and outlives what is killed."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import bare
import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_checks  # noqa: E402
import gpu_networks  # noqa: E402
import gpu_primitives  # noqa: E402
import gpu_report  # noqa: E402
import gpu_small  # noqa: E402
import gpu_text  # noqa: E402
from gpu_primitives import BLOCKS, COPY, block_problems, chosen_problems, copies  # noqa: E402
from gpu_run import POISONED, Process, Run, latest, read_rows  # noqa: E402
from gpu_timing import Rates  # noqa: E402

from fused_densenet.backends import BACKENDS  # noqa: E402

Rows = list[dict[str, Any]]
PACKAGES = ("torch", "triton", "numpy", "pytest")
SUITES = ("CUDA", "Triton")


class Bare:
    """A copy of the checkout, and a Python with nothing but what the report needs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.checkout = bare.checkout(folder / "checkout")
        self.python = bare.python(folder / "environment", *PACKAGES)
        kept = {name: os.environ[name] for name in ("PATH", "OPENBLAS_CORETYPE") if name in os.environ}
        self.environment = {**kept, "HOME": str(folder), "OMP_NUM_THREADS": "1"}

    def start(self, output: pathlib.Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        script = [self.python, self.checkout / "benchmarks/gpu_report.py"]
        command = [*script, "--smoke", "--minutes", "30", "--output", output, *arguments]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**self.environment, **variables}, cwd=output.parent, **options)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    return Bare(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def report(machine: Bare, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu_report") / "output"
    process = machine.start(folder)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return read(folder)


def read(folder: pathlib.Path) -> dict[str, Any]:
    return {**json.loads((folder / "report.json").read_text()), "markdown": (folder / "report.md").read_text()}


def of(kind: str, rows: Rows) -> Rows:
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("name", ["fused_densenet", "hypothesis", "rich", "torchvision", "xdist"])
def test_the_machine_is_bare(machine: Bare, name: str) -> None:
    command = [machine.python, "-c", f"import {name}"]
    done = subprocess.run(command, cwd=machine.python.parent, env=machine.environment, capture_output=True)
    assert b"ModuleNotFoundError" in done.stderr
    assert not list(machine.checkout.rglob("*.so"))


def test_nothing_failed_and_nothing_was_dropped(report: dict[str, Any]) -> None:
    rows = report["rows"]
    assert of("failed", rows) == of("dropped", rows) == []
    assert report["status"] == "complete"
    checks = {row["check"]: row["outcome"] for row in of("check", rows)}
    assert checks.pop("compute-sanitizer", "not installed") == "not installed"
    assert checks == {"build": "passed", "tests, CUDA": "ran nothing", "tests, Triton": "ran nothing"}


def test_it_says_where(report: dict[str, Any], machine: Bare) -> None:
    assert {"machine", "versions", "commit", "backend", "command", "smoke", "seconds"} <= report.keys()
    assert {"gpu", "driver"} <= report["machine"].keys()
    assert {"torch", "cuda", "triton"} <= report["versions"].keys()
    assert report["versions"]["torchvision"] is None
    assert pathlib.Path(report["package"]) == machine.checkout / "fused_densenet/__init__.py"
    assert "Beside: reference (torchvision is not installed)." in report["markdown"]
    assert "pytest-xdist missing" in report["markdown"]


def test_the_tests_that_need_a_gpu_are_those_marked_so_each_once(report: dict[str, Any]) -> None:
    tests = bare.REPOSITORY / "tests"
    marked = [file for file in tests.rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()]
    assert {str(file.relative_to(bare.REPOSITORY)) for file in marked if file != pathlib.Path(__file__)} == {
        gpu_checks.GPU_TESTS,
        gpu_checks.AUTOTUNED,
    }
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    listed = subprocess.run(
        [*command, gpu_checks.GPU_TESTS, gpu_checks.AUTOTUNED], cwd=tests.parent, capture_output=True
    )
    every = sorted(line for line in listed.stdout.decode().splitlines() if "::" in line)
    suites = {suite: [row["test"] for row in of("test", report["rows"]) if row["suite"] == suite] for suite in SUITES}
    assert every and every == sorted(test for suite in suites.values() for test in suite)
    assert not [test for test in suites["CUDA"] if "triton" in test]
    assert not [test for test in suites["Triton"] if "cuda]" in test]


def test_every_backend_is_measured_and_agrees(report: dict[str, Any]) -> None:
    backends = {"triton", "eager"}
    rows = report["rows"]
    primitives = of("primitive", rows)
    assert {(row["backend"], row["arithmetic"]) for row in primitives} == {
        (backend, arithmetic) for backend in backends for arithmetic in ("bfloat16", "tf32")
    }
    bounds = {"bfloat16": 1e-2, "tf32": 1e-3}  # roundings of operands to 8 and to 11 bits
    assert not [row for row in primitives if not row["error"] < bounds[row["arithmetic"]]]
    assert {row["backend"] for row in of("blocks", rows)} == backends
    kernelbench = {row["variant"]: row["error"] for row in of("kernelbench", rows)}
    assert kernelbench.keys() > {"eager", *(f"fused {backend}" for backend in backends)}
    assert max(kernelbench.values()) < bounds["tf32"]
    variants = {row["variant"] for row in of("network", rows)}
    for backend in backends:
        assert {f"fused {backend}", f"fused {backend}, CUDA graph", f"fused {backend}, torch.compile"} <= variants
    assert {"eager, NCHW", "eager, channels-last", "memory_efficient", "torch.compile, channels-last"} <= variants
    errors = [row["gradient_error"] for row in of("error", rows) if row["precision"] == "float32"]
    assert len(errors) == 3 and max(errors) < bounds["tf32"]  # which is allowed while networks are measured


def test_markdown_shows_every_row(report: dict[str, Any]) -> None:
    lines = [line for line in report["markdown"].splitlines() if line.startswith("| ")]
    shown = sum(
        len(of(kind, report["rows"])) for kind in ("primitive", "blocks", "kernelbench", "network", "error", "check")
    )
    titles = sum(line.startswith("#") for line in report["markdown"].splitlines())
    assert shown < len(lines) <= shown + titles
    for row in of("primitive", report["rows"]):
        assert any(line.startswith(f"| {row['primitive']} | {row['backend']} | ") for line in lines)


def wait_for(rows: pathlib.Path, known: Callable[[Rows], Rows]) -> dict[str, Any]:
    """The first row that ``known`` finds."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        found = known(read_rows(rows))
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"not seen: {read_rows(rows)[-3:]}")


def begun(phase: str, index: int) -> Callable[[Rows], Rows]:
    return lambda rows: [row for row in of("begun", rows) if (row["phase"], row["index"]) == (phase, index)]


def test_a_build_that_fails_and_what_is_killed_leave_the_rest(machine: Bare, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "output"
    variables = {"FUSED_DENSENET_BUILD": "required", "CXX": "missing"}
    process = machine.start(folder, "--skip", "tests", "sanitizers", "kernelbench", **variables)
    killed = wait_for(folder / "rows.jsonl", begun("primitives", 3))
    os.kill(killed["process"], signal.SIGKILL)
    wait_for(folder / "rows.jsonl", begun("networks", 1))
    time.sleep(2.5)
    between = read(folder)
    process.terminate()
    printed, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "stopped by SIGTERM; failed: build; failed: " in printed
    assert between["status"] == "in progress" and of("blocks", between["rows"])
    written = read(folder)
    assert written["status"] == "stopped by SIGTERM"
    [build] = of("check", written["rows"])
    assert build["outcome"] == "failed" and "'missing', which is not a program" in build["output"]
    [failed] = of("failed", written["rows"])
    assert failed["what"] == killed["what"] and "killed by SIGKILL" in failed["error"]
    problems = [f"{p}, bfloat16" for p in gpu_primitives.measured_problems(Run(tmp_path, 1.0, smoke=True))]
    measured = {f"{row['primitive']}, {row['arithmetic']}" for row in of("primitive", written["rows"])}
    assert set(problems) - measured <= {killed["what"]} and problems.index(killed["what"]) == 1
    [errors] = {row["network"] for row in of("error", written["rows"])}
    assert errors == "tiny"
    for said in (failed["error"], "| build | failed |", "begun and not ended: networks: tiny", "stopped by SIGTERM"):
        assert said in written["markdown"]


def test_killed_itself_it_leaves_a_report_and_no_process(machine: Bare, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "output"
    process = machine.start(folder, "--skip", "build", "tests", "sanitizers")
    worker = wait_for(folder / "rows.jsonl", begun("warm kernels", 0))["process"]
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(worker)
    written = read(folder)
    assert written["status"] == "in progress" and "What a CPU said" in written["markdown"]
    assert {file.name for file in folder.glob("[!.]*")} == {"rows.jsonl", "report.json", "report.md", "logs.txt"}


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_beside_torchvision_on_the_cpus_kernels(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "rows", 60.0, smoke=True)
    for case in gpu_networks.SMOKE:
        gpu_networks.measure_case(case, run, 0.1)
    gpu_networks.measure_errors(run)
    for problem in gpu_primitives.measured_problems(run):
        gpu_primitives.measure_problem(problem, "bfloat16", run, 0.1)
    rows = latest(read_rows(run.rows))
    assert of("failed", rows) == []
    assert [row["name"] for row in of("peer", rows)] == ["torchvision"]
    assert {"fused cpu", "fused cpu, memory_efficient", "fused cpu, torch.compile"} <= {
        row["variant"] for row in of("network", rows)
    }
    assert all(row["gradient_error"] < 1e-5 for row in of("error", rows) if row["precision"] == "float32")
    assert all(row["error"] < 1e-2 for row in of("primitive", rows) if row["backend"] == "cpu")


def test_what_one_backend_measured_is_written_before_the_next_is_tried(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "rows", 60.0, smoke=True)

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt  # a signal may be ignored where the tests run in the background

    dies = types.SimpleNamespace(**dict.fromkeys((gpu_primitives.FORWARD, "place"), die))
    monkeypatch.setattr(gpu_primitives, "backends", lambda *_: {"cpu": BACKENDS["cpu"], "dies": dies})
    monkeypatch.setattr(gpu_primitives.Block, "step", lambda _, name: name == "cpu" or die())
    run.add("rates", copy=1e9, products=dict.fromkeys(("bfloat16", "tf32"), 1e9))
    with pytest.raises(KeyboardInterrupt):
        gpu_primitives.measure_problem(gpu_small.SMALL[1], "bfloat16", run, 0.1)
    with pytest.raises(KeyboardInterrupt):
        gpu_primitives.measure_blocks(1, 32, run)
    monkeypatch.setattr(gpu_networks.Subject, "step", lambda self: self.variant.channels_last or die())
    with pytest.raises(KeyboardInterrupt):
        gpu_networks.measure_case(gpu_networks.SMOKE[0], run, 0.1)
    rows = read_rows(run.rows)
    assert [row["backend"] for row in (*of("primitive", rows), *of("blocks", rows))] == ["cpu", "cpu"]
    assert [row["variant"] for row in of("network", rows)] == [gpu_text.EAGER]


def test_the_items_for_a_gpu(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed without one; a problem goes the way that is a GPU's on the CPU."""
    run = Run(tmp_path / "rows", 60.0, smoke=False)
    run.add("ended", phase="networks", what=str(gpu_networks.CASES[0]), seconds=20.0)
    networks = {item.name: item.need for item in gpu_networks.items(run)}
    assert [needed for name, needed in networks.items() if "torch.compile" in name] == [gpu_networks.COMPILING] * 2
    assert networks[str(gpu_networks.CASES[0])] == pytest.approx(24.0)
    assert len(gpu_primitives.items(run)) == 2 + 2 * len(chosen_problems(64, 224))
    run.device = torch.device("cpu")
    run.add("rates", copy=1e9, products=dict.fromkeys(("bfloat16", "tf32"), 1e9))
    monkeypatch.setattr(gpu_primitives, "cache_bytes", lambda _: 1 << 20)
    problem = gpu_small.SMALL[1]
    gpu_primitives.measure_problem(problem, "tf32", run, 0.01)
    primitives = {row["backend"]: row for row in of("primitive", latest(read_rows(run.rows)))}
    assert {"cpu", "eager"} <= primitives.keys() and of("failed", read_rows(run.rows)) == []
    moved = 2 * 7 * 5 * (48 + 128) * 4 + 48 * 128 * 4
    for row in primitives.values():
        assert row["floor_microseconds"] == pytest.approx(max(moved, problem.flops()) / 1e3)
        assert row["gigabytes_per_second"] * row["microseconds"] == pytest.approx(moved / 1e3)


def test_floor_of_the_dense_blocks() -> None:
    """Of DenseNet-121 at 224×224: forward 2.4 billion multiply-adds (arXiv 1608.06993, table 1: 2.9 with the rest)."""
    problems = [p for layers, c, scale in BLOCKS for p in block_problems(1, 224 // scale, layers, c)]
    assert sum(p.flops() for p in problems) == pytest.approx(3 * 2 * 2.4e9, rel=0.01)
    first = [p for p in problems if p.pixels == (1, 1, 56, 56)]
    assert first[1].moved(2, 4) == 56 * 56 * (64 + 128) * 2 + 64 * 128 * 4
    assert first[3].moved(2, 4) == 56 * 56 * (2 * 128 + 2 * 32) * 2 + 2 * 128 * 32 * 9 * 4
    assert first[4].moved(2, 4) == 56 * 56 * (3 * 64 + 2 * 128) * 2 + 2 * 64 * 128 * 4
    assert len(problems) == 4 * 58 + 3 * 4
    assert {p.primitive for p in chosen_problems(64, 224)} == {p.primitive for p in problems} - {COPY}


def test_a_floor_is_the_longer_of_bytes_and_multiplications() -> None:
    rates = Rates(copy=1e12, products={"bfloat16": 1e14})
    assert rates.floor(2e9, 1e11, "bfloat16") == pytest.approx(2.0)
    assert rates.floor(2e9, 1e12, "bfloat16") == pytest.approx(10.0)


def test_between_two_uses_of_a_tensor_the_cache_sees_twice_its_size_of_others() -> None:
    cache = 50 << 20
    for moved in (6 << 20, 40 << 20, 99 << 20):
        assert (copies(moved, cache) - 1) * moved >= 2 * cache > (copies(moved, cache) - 2) * moved
    assert copies(1 << 30, cache) == 2
    assert copies(1 << 10, cache) == gpu_primitives.MOST_COPIES


def test_a_phase_that_takes_too_long_is_stopped_with_its_children(tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "mark"
    process = Process(["sh", "-c", f"(sleep 2; touch {mark}) & sleep 30"], tmp_path / "log")
    assert process.wait(0.2) is None
    process.stop()
    time.sleep(2.2)
    assert not mark.exists() and process.seconds() < 10


def test_an_item_that_takes_too_long_ends_its_process_and_says_where_it_was(tmp_path: pathlib.Path) -> None:
    script = (
        "import sys, pathlib, time; from gpu_phase import Item, work_through; from gpu_run import Run\n"
        "def hang(): time.sleep(60)\n"
        "run = Run(pathlib.Path(sys.argv[1]), 60, smoke=True)\n"
        "work_through('primitives', [Item('short', lambda: None), Item('long', hang, 0.5), Item('last', hang)], 0, run)"
    )
    process = Process([sys.executable, "-c", script, str(tmp_path / "rows")], tmp_path / "log")
    assert process.wait(60) == 1
    assert "in hang" in process.last_lines(10)
    kinds = [(row["kind"], row["what"]) for row in read_rows(tmp_path / "rows")]
    assert kinds == [("begun", "short"), ("ended", "short"), ("begun", "long")]
    assert gpu_text._unfinished(read_rows(tmp_path / "rows"))[0]["what"] == "long"


def test_what_fails_is_a_row(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / "rows", 1.0, smoke=True)

    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    with run.rows.open("w") as file:
        file.write('{"kind": "half a\n')
    assert run.attempt("a big batch", out_of_memory) is None
    assert run.attempt("a sum", lambda: 1 + 1) == 2
    assert read_rows(run.rows) == [{"kind": "failed", "what": "a big batch", "error": "out of memory"}]


def test_a_device_that_answers_no_more_ends_the_process(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "rows", 1.0, smoke=False)

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert run.attempt("an argument", fails) is None
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(SystemExit, match=str(POISONED)):
        run.attempt("a kernel", fails)
    assert [row["what"] for row in read_rows(run.rows)] == ["an argument", "a kernel"]


def test_a_later_row_about_the_same_replaces_an_earlier_one() -> None:
    network = dict.fromkeys(("network", "mode", "precision", "batch", "compiled"), "one")
    rows = [
        {"kind": "network", **network, "variant": v, "milliseconds": ms} for v, ms in (("a", 3), ("b", 2), ("a", 1))
    ]
    failed = {"kind": "failed", "what": "one", "error": "so"}
    assert latest([*rows, failed, failed]) == [rows[2], rows[1], failed, failed]


def run_checks(folder: pathlib.Path, *lanes: list[gpu_checks.Check], seconds: float = 60.0) -> Rows:
    made = gpu_report.Report(folder, seconds + gpu_report.CLOSING, True, None)
    gpu_report.check(made, list(lanes))
    return made.rows()


def test_checks_report_what_came_of_them(tmp_path: pathlib.Path) -> None:
    def shell(name: str, script: str, seconds: float = 5.0) -> gpu_checks.Check:
        return gpu_checks.Check(name, ["sh", "-c", script], {}, seconds)

    slow, clean = shell("build", "echo half; sleep 9", 1.5), shell("memcheck", "echo '== ERROR SUMMARY: 0 errors'")
    began = time.monotonic()
    rows = run_checks(tmp_path, [slow, shell("after", "exit 4")], [clean, shell("racecheck", "sleep 1; kill -9 $$")])
    assert time.monotonic() - began < 6, "the lanes did not run side by side"
    by_name = {row["check"]: row for row in of("check", rows)}
    assert by_name["memcheck"]["outcome"] == "passed" and by_name["memcheck"]["closing"] == "ERROR SUMMARY: 0 errors"
    assert by_name["build"]["outcome"] == "stopped" and by_name["build"]["output"] == "half"
    assert by_name["after"]["closing"] == "ended with status 4" and by_name["after"]["outcome"] == "failed"
    assert by_name["racecheck"]["closing"] == "killed by SIGKILL"
    order = [row["check"] for row in of("check", rows)]
    assert order.index("build") < order.index("after") and order.index("memcheck") < order.index("racecheck")


def test_a_check_without_time_is_dropped(tmp_path: pathlib.Path) -> None:
    rows = run_checks(tmp_path, [gpu_checks.Check("build", ["false"], {}, 9.0)], seconds=1.0)
    assert rows == [{"kind": "dropped", "what": "build"}]


TESTS = """
import time
import pytest

def test_good(): pass
@pytest.mark.skip
def test_skipped(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_long(): time.sleep({seconds})
def test_after(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-p", "xdist.plugin", "-n", "1"]], ids=["", "xdist"])
def test_tests_that_are_stopped_have_told_what_they_found(tmp_path: pathlib.Path, workers: list[str]) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS.format(seconds=60))
    run = Run(tmp_path / "rows.jsonl", 60.0, smoke=True)
    written = gpu_checks.tests(run, "CUDA", 60.0)
    options = [
        option for option in written.command if option not in (gpu_checks.GPU_TESTS, "-k", "not triton", "-m", "gpu")
    ]
    command = [*options[:1], "-m", *options[1:], *workers, str(file)]
    check = written._replace(command=command)
    process = gpu_checks.start(check, tmp_path)
    wait_for(run.rows, lambda rows: [row for row in rows if row.get("outcome") == "failed"])
    process.stop()
    row = gpu_checks.result(check, process, None, read_rows(run.rows))
    assert row["outcome"] == "stopped" and "1 passed, 1 failed, 1 skipped, 2 not run" in row["closing"]
    assert "one is not two" in row["output"]
    [failed] = [row for row in read_rows(run.rows) if row.get("outcome") == "failed"]
    assert failed["test"].endswith("test_bad") and "one is not two" in failed["error"]
    assert "one is not two" in "\n".join(gpu_text._tests([failed]))


def test_the_sanitizers_run_the_cuda_kernels_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "rows", 9.0, smoke=True)
    for item in gpu_small.items(run):
        run.attempt(item.name, item.work)
    assert {(row["backend"], row["dtype"]) for row in read_rows(run.rows)} == {
        ("cpu", "torch.float32"),
        ("cpu", "torch.bfloat16"),
    }
    assert {p.primitive for p in gpu_small.SMALL} == {p.primitive for p in block_problems(1, 4, 1, 8)} - {COPY}
    with pytest.raises(SystemExit, match="backend 'cuda' cannot run"):
        gpu_small.items(Run(tmp_path / "rows", 9.0, smoke=False))
    monkeypatch.setattr(gpu_checks, "sanitizer", lambda: "/bin/compute-sanitizer")
    made = gpu_report.Report(tmp_path, 500.0, False, None)
    memory, races = gpu_report.sanitizers(made)
    assert (memory.name, memory.seconds, races.name) == ("memcheck", 60, "racecheck")
    assert " ".join(memory.command).startswith("/bin/compute-sanitizer --tool memcheck")
    assert "--report-api-errors no" in " ".join(memory.command)


def test_kernels_are_required_and_what_an_earlier_build_left_is_not_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fused_densenet").mkdir()
    old = tmp_path / "fused_densenet/_cuda.so"
    old.touch()
    monkeypatch.delenv("FUSED_DENSENET_BUILD", raising=False)
    monkeypatch.setattr(gpu_checks, "REPOSITORY", tmp_path)
    gpu_checks.build(Run(tmp_path / "rows", 9.0, smoke=True), 1.0)
    assert old.exists()
    variables = gpu_checks.build(Run(tmp_path / "rows", 9.0, smoke=False), 1.0).variables
    assert variables["FUSED_DENSENET_CUDA"] == variables["FUSED_DENSENET_BUILD"] == "required"
    assert not old.exists()


def test_the_limits_leave_the_networks_time() -> None:
    """In the worst case the stages before them take: the sanitizers run beside Triton's tests."""
    limits = gpu_report.LIMITS
    beside = max(limits["Triton"], limits["memcheck"] + limits["racecheck"])
    before = limits["build"] + limits["CUDA"] + beside + limits["primitives"] + limits["kernelbench"]
    assert before + 50 < 8.5 * 60 - gpu_report.CLOSING


def test_without_time_it_says_what_it_left_out(machine: Bare, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "output"
    process = machine.start(folder, "--minutes", "0.1")
    printed, _ = process.communicate()
    assert process.returncode == 1
    written = read(folder)
    assert written["status"] == "incomplete"
    dropped = ["build", "where: all of it", "tests, CUDA", "tests, Triton"]
    dropped += [f"{stage}: all of it" for stage in gpu_report.MEASURING]
    left_out = [row["what"] for row in of("dropped", written["rows"])]
    assert [what for what in left_out if what not in gpu_checks.SANITIZERS] == dropped
    assert all(f"dropped: {what}" in printed.splitlines()[-1] for what in left_out)
    assert all(f"- dropped, no time was left: {what}\n" in written["markdown"] for what in left_out)


def test_what_was_not_done_is_named(tmp_path: pathlib.Path) -> None:
    for smoke in (True, False):
        made = gpu_report.Report(tmp_path, 60.0, smoke, None)
        for outcome in ("passed", "failed", "stopped", "ran nothing", "not installed"):
            made.run.add("check", check="build", outcome=outcome)
        made.run.add("failed", what="place", error="so")
        expected = ["failed: build", "stopped: build", "ran nothing: build", "failed: place"]
        assert made.undone() == [what for what in expected if not smoke or not what.startswith("ran")]


def test_stopped_before_there_is_a_report(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        gpu_report.stop(signal.SIGTERM, None)

    monkeypatch.setattr(gpu_report, "Report", stopped)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--smoke", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"gpu_report\.py: stopped by SIGTERM"):
        gpu_report.main()


def test_the_commit_and_the_command_are_known_from_the_first_second(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "commit", lambda: "abc")
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "gpu_report.py"), "--smoke", "--output", str(tmp_path)])
    gpu_report.Report(tmp_path, 60.0, True, None)
    written = read(tmp_path)
    assert (written["status"], written["commit"]) == ("in progress", "abc")
    assert written["command"] == f"python benchmarks/gpu_report.py --smoke --output {tmp_path.name}"


def test_a_report_that_cannot_be_laid_out_is_its_rows(tmp_path: pathlib.Path) -> None:
    made = gpu_report.Report(tmp_path, 60.0, True, "abc")
    made.run.add("primitive", primitive="place", arithmetic="bfloat16", backend="cuda")
    made.close("complete")
    written = read(tmp_path)
    assert written["commit"] == "abc"
    assert "the tables cannot be made: KeyError" in written["markdown"] and '"place"' in written["markdown"]


def test_without_a_gpu_it_says_so(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "--smoke" in done.stderr
    assert not any(tmp_path.iterdir())
