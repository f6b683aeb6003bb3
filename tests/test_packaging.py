"""Building, and doing without what was not built: setup.py's decisions and messages, and the extension's loading."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_densenet import _extension

ROOT = Path(__file__).parent.parent
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; ``setup.calls`` collects the arguments that setuptools would get."""
    for name in ("CXX", "MAX_JOBS", "FUSED_DENSENET_BUILD", "FUSED_DENSENET_CUDA", "FUSED_DENSENET_SANITIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls: list[dict[str, Any]] = []
    vars(module).update(calls=calls, setup=lambda **arguments: calls.append(arguments))
    return module


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def fake_compiler(folder: Path, macros: dict[str, int], status: int = 0) -> str:
    script = folder / "compiler"
    lines = "\n".join(f"#define {name} {value}" for name, value in macros.items())
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {status}\n")
    script.chmod(0o755)
    return str(script)


def run_setup(*before: str, **variables: str) -> subprocess.CompletedProcess[str]:
    statements = [*before, "import runpy, sys", "sys.argv = ['setup.py', '--version']"]
    code = "; ".join([*statements, "runpy.run_path('setup.py', run_name='__main__')"])
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_torch_it_says_what_to_run() -> None:
    done = run_setup("import sys; sys.modules['torch'] = None")
    assert done.returncode != 0
    assert "torch cannot be imported in the build environment" in done.stderr
    assert "pip install torch==2.13.0 'setuptools>=77' ninja && pip install --no-build-isolation -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_build_off_needs_no_torch() -> None:
    done = run_setup("import sys; sys.modules['torch'] = None", FUSED_DENSENET_BUILD="off")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "serves"), [("2.10.1", False), ("2.11.0", True), ("2.13.9+cpu", True), ("2.14.0", False)]
)
def test_torch_versions(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, serves: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    problem = setup.torch_problem()
    assert (problem is None) == serves
    assert problem is None or (version in problem and setup.INSTALL in problem)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_installs_pure_python_and_says_so(
    setup: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.main()
    assert setup.calls == [{}]
    said = capsys.readouterr().err
    assert "installing without the C++ extension: it works, slower" in said
    assert "there is no g++ on PATH" in said
    assert "install g++ 11.3 or newer (Debian, Ubuntu: apt install g++)" in said


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_build_required_fails(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DENSENET_BUILD", "required")
    with pytest.raises(SystemExit, match=r"cannot be compiled.*no C\+\+ compiler was found.*install g\+\+"):
        setup.main()
    assert setup.calls == []


def test_build_off_asks_for_no_compiler(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DENSENET_BUILD", "off")
    monkeypatch.setenv("CXX", "there-is-no-such-program")
    setup.main()
    assert setup.calls == [{}]


@pytest.mark.parametrize(
    ("macros", "status", "said"),
    [
        ({"__GNUC__": 10, "__GNUC_MINOR__": 4}, 0, "is GCC 10.4, too old"),
        ({"__GNUC__": 11, "__GNUC_MINOR__": 2}, 0, "is GCC 11.2, too old"),
        ({"__GNUC__": 4, "__GNUC_MINOR__": 2, "__clang__": 1}, 0, "is not GCC"),
        ({}, 0, "is not GCC"),
        ({}, 1, "does not run"),
    ],
)
def test_a_compiler_that_does_not_do(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    macros: dict[str, int],
    status: int,
    said: str,
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, macros, status))
    problem = setup.compiler_problem()
    assert problem is not None
    assert said in problem
    assert "install g++ 11.3 or newer" in problem


def test_cxx_that_does_not_exist(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "there-is-no-such-program")
    assert "CXX is 'there-is-no-such-program'" in setup.compiler_problem()


@pytest.mark.parametrize(("major", "minor"), [(11, 3), (12, 0), (15, 2)])
def test_a_compiler_that_does(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, major: int, minor: int
) -> None:
    compiler = fake_compiler(tmp_path, {"__GNUC__": major, "__GNUC_MINOR__": minor})
    monkeypatch.setenv("CXX", compiler)
    assert setup.compiler_problem() is None
    assert os.environ["CXX"] == compiler


def test_without_pythons_headers(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, {"__GNUC__": 12, "__GNUC_MINOR__": 0}))
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "apt install python3-dev" in setup.compiler_problem()


@pytest.mark.parametrize("name", ["FUSED_DENSENET_BUILD", "FUSED_DENSENET_SANITIZE", "FUSED_DENSENET_CUDA"])
def test_an_unknown_value_of_a_variable(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(SystemExit, match=rf"{name}: expected .* got 'perhaps'"):
        setup.main()
    assert setup.calls == []


def test_what_is_compiled(setup: ModuleType) -> None:
    module = setup.extension()["ext_modules"][0]
    assert module.name == f"fused_densenet.{_extension.extension_name(torch.__version__)}"
    assert "csrc/binding.cpp" in module.sources
    assert set(module.sources) == {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")}
    flags = module.extra_compile_args["cxx"]
    assert {"-O3", "-fopenmp"} < set(flags)
    # What is installed must run on every processor of its architecture.
    assert not [flag for flag in flags if flag.startswith(("-march", "-mcpu", "-mtune", "-mavx", "-ffast-math"))]


def test_sanitizer_build(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_DENSENET_SANITIZE", "address")
    module = setup.extension()["ext_modules"][0]
    assert {"-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1"} < set(module.extra_compile_args["cxx"])
    assert "-fsanitize=address" in module.extra_link_args


@pytest.mark.parametrize(
    ("variable", "torch_cuda", "nvcc", "expected"),
    [
        ("auto", "13.0", "/nvcc", True),
        ("off", "13.0", "/nvcc", False),
        ("auto", None, "/nvcc", False),
        ("auto", "13.0", None, False),
    ],
)
def test_cuda_sources_need_torch_with_cuda_and_nvcc(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str,
    torch_cuda: str | None,
    nvcc: str | None,
    expected: bool,
) -> None:
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernel.cu").touch()
    monkeypatch.setattr(setup, "__file__", str(tmp_path / "setup.py"))
    monkeypatch.setenv("FUSED_DENSENET_CUDA", variable)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", nvcc)
    module = setup.extension()["ext_modules"][0]
    assert ("csrc/cuda/kernel.cu" in module.sources) == expected
    assert (("WITH_CUDA", None) in module.define_macros) == expected


def test_jobs(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.extension()
    assert os.environ["MAX_JOBS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("MAX_JOBS", "1")
    setup.extension()
    assert os.environ["MAX_JOBS"] == "1"


def test_the_readme_has_every_variable() -> None:
    files = [ROOT / "setup.py", *ROOT.glob("fused_densenet/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    used = {name for file in files for name in re.findall(r"\bFUSED_DENSENET_[A-Z]+\b", file.read_text())}
    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"^\| `(FUSED_DENSENET_[A-Z]+)` \|", readme, re.MULTILINE))
    assert {"FUSED_DENSENET_BUILD", "FUSED_DENSENET_BACKEND"} <= used
    assert documented == used


def test_one_minimum_compiler(setup: ModuleType) -> None:
    oldest = f"g++ {setup.dotted(setup.MINIMUM_GCC)} or newer"
    assert oldest == _extension.COMPILER
    assert oldest in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([f"_C_torch_2_12{SUFFIX}"], None),
        ([f"_C_torch_2_11{SUFFIX}", f"_C_torch_2_12{SUFFIX}"], None),
        ([], "was not compiled when fused_densenet was installed; install g++ 11.3 or newer and run `pip install"),
        (
            [f"_C_torch_2_11{SUFFIX}", f"_C_torch_2_13{SUFFIX}"],
            "was compiled for torch 2.11, 2.13 and torch 2.12.1 is running; run `pip install",
        ),
        (["_C_torch_2_12.cpython-39-pdp11.so"], "was compiled for another Python (_C_torch_2_12.cpython-39-pdp11.so)"),
    ],
)
def test_why_there_is_no_extension(tmp_path: Path, files: list[str], reason: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    said = _extension.absent(tmp_path, "2.12.1")
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (None, "was not compiled when fused_densenet was installed"),
        (f"{_extension.extension_name(torch.__version__)}{SUFFIX}", "does not load"),
        (f"_C_torch_1_13{SUFFIX}", f"was compiled for torch 1.13 and torch {torch.__version__} is running"),
    ],
)
def test_the_package_works_without_its_extension(tmp_path: Path, file: str | None, reason: str) -> None:
    shutil.copytree(
        ROOT / "fused_densenet", tmp_path / "fused_densenet", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if file is not None:
        (tmp_path / "fused_densenet" / file).write_text("not a library")
    code = (
        "import torch, fused_densenet\n"
        "from fused_densenet import _extension\n"
        "block = fused_densenet.FusedDenseBlock(2, 4, 2, 4)\n"
        "block(torch.randn(2, 4, 5, 5)).sum().backward()\n"
        "print(fused_densenet.__file__, _extension.missing)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert reason in done.stdout
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1
    assert reason in warned[0]


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "missing", "it was lost")
    _extension.warn_if_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="slower on the CPU.*it was lost"):
        _extension.warn_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _extension.warn_if_missing()


def test_a_loaded_extension_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "missing", None)
    _extension.warn_if_missing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _extension.warn_if_missing()


def test_the_extension_shares_torchs_threads() -> None:
    """One OpenMP runtime, in a process that has nothing but the package (scikit-learn, say, brings another)."""
    assert _extension.module is not None, _extension.missing
    program = "import pathlib, fused_densenet; print(pathlib.Path('/proc/self/maps').read_text())"
    maps = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    mapped = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    assert any(Path(path).name.startswith("_C_torch_") for path in mapped)
    assert len({path for path in mapped if Path(path).name.startswith("libgomp")}) == 1
