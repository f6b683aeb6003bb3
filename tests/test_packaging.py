"""Building, and doing without what was not built: setup.py's decisions and messages, and the libraries' loading."""

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
from setuptools import Distribution

from fused_densenet.backends import extension

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; ``setup.calls`` collects the arguments that setuptools would get."""
    own = ("BUILD", "CUDA", "SANITIZE", "TORCH")
    built_with = ("CXX", "MAX_JOBS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", *(f"FUSED_DENSENET_{name}" for name in own))
    for name in built_with:
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
    assert "there is no torch in the build environment" in done.stderr
    assert "pip install torch==2.13.0 'setuptools>=77' ninja && pip install --no-build-isolation -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_build_off_needs_no_torch() -> None:
    done = run_setup("import sys; sys.modules['torch'] = None", FUSED_DENSENET_BUILD="off")
    assert done.returncode == 0, done.stderr


def fake_torch(folder: Path, version: str) -> Path:
    folder.mkdir()
    (folder / "version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{version}'\n")
    return folder


@pytest.mark.parametrize(
    ("version", "serves"), [("2.10.1", False), ("2.11.0", True), ("2.13.9+cpu", True), ("2.99.0.dev1", True)]
)
def test_torch_versions(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, serves: bool
) -> None:
    """A torch of tomorrow is built against as far as its headers let it."""
    folders = [fake_torch(tmp_path / "one", "2.12.1"), fake_torch(tmp_path / "two", version)]
    monkeypatch.setenv("FUSED_DENSENET_TORCH", os.pathsep.join(map(str, folders)))
    problem = setup.torch_problem()
    assert (problem is None) == serves
    assert problem is None or ("torch 2.10 was found" in problem and setup.INSTALL in problem)


@pytest.mark.parametrize(
    ("machine", "kernels"),
    [
        ("__x86_64__", {"avx2", "avx512", "avx512_amx", "avx512_bf16", "portable"}),
        ("__aarch64__", {"neon", "neon_bf16"}),
        ("__riscv", {"portable"}),
    ],
)
def test_kernels_of_a_machine(setup: ModuleType, tmp_path: Path, machine: str, kernels: set[str]) -> None:
    files = setup.kernel_files(fake_compiler(tmp_path, {"__GNUC__": 12, machine: 1}))
    assert {file.stem for file in files} == {"dispatch", *kernels}


def test_every_kernel_is_some_machine_s(setup: ModuleType) -> None:
    files = {name for names in setup.INSTRUCTION_SETS.values() for name in names}
    found = {file for name in ("dispatch", *files) for file in ROOT.glob(f"csrc/cpu/{name}.cpp")}
    assert found == set(ROOT.glob("csrc/cpu/*.cpp"))


def test_the_torch_that_is_installed(setup: ModuleType) -> None:
    (folder,) = setup.torch_folders()
    assert torch.__version__.startswith(setup.dotted(setup.torch_version(folder)) + ".")


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


def test_without_ninja(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, {"__GNUC__": 12, "__GNUC_MINOR__": 0}))
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name == "ninja" else name)
    assert setup.compiler_problem() == "ninja was not found: pip install ninja"


@pytest.mark.parametrize("name", ["FUSED_DENSENET_BUILD", "FUSED_DENSENET_SANITIZE", "FUSED_DENSENET_CUDA"])
def test_an_unknown_value_of_a_variable(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(SystemExit, match=rf"{name}: expected .* got 'perhaps'"):
        setup.main()
    assert setup.calls == []


def build_script(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, cuda: bool = False) -> str:
    """What ninja would build for two versions of torch."""
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **_: None)
    monkeypatch.setattr(setup, "predefined_macros", lambda _: {"__x86_64__": "1"})
    monkeypatch.setenv("CXX", "g++")
    torches = {folder / f"_cpu_torch_{name}.so": fake_torch(folder / name, "2.11.0") for name in ("2_11", "2_12")}
    setup.build(torches, folder / "_cuda.so" if cuda else None, folder / "objects")
    return (folder / "objects/build.ninja").read_text()


def statements(script: str) -> dict[str, tuple[str, list[str]]]:
    """By what is made: what of, and the flags."""
    found = re.findall(r"^build (\S+): \w+ (.*)\n  flags = (.*)$", script, re.MULTILINE)
    assert len(found) == script.count("\nbuild ")
    return {Path(made).name: (sources, flags.split()) for made, sources, flags in found}


def test_what_is_compiled(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library for each torch, of the same kernels."""
    builds = statements(build_script(setup, monkeypatch, tmp_path))
    kernels = [*(f"{path.stem}.o" for path in setup.kernel_files("g++")), "watch.o"]
    bindings = [f"_cpu_torch_{name}.o" for name in ("2_11", "2_12")]
    assert set(builds) == {*kernels, *bindings, *(name.replace(".o", ".so") for name in bindings)}
    for torch_name, binding in zip(("2_11", "2_12"), bindings, strict=True):
        sources, flags = builds[binding]
        assert sources == str(ROOT / "csrc/binding.cpp") and str(tmp_path / torch_name / "include") in flags
        assert builds[binding.replace(".o", ".so")][0].split() == [binding, *kernels]
    for name in (*kernels, *bindings):
        assert {"-O3", "-fPIC", "-fvisibility=hidden"} < set(builds[name][1])
        # What is installed must run on every processor of its architecture, with torch's threads.
        banned = ("-march", "-mcpu", "-mtune", "-mavx", "-ffast-math", "-fopenmp")
        assert not [flag for flag in builds[name][1] if flag.startswith(banned)]


def test_names_with_spaces(setup: ModuleType) -> None:
    assert setup.statement("a b:$.o", "cxx", ["c d"], ["-I", "e f"]) == (
        "build a$ b$:$$.o: cxx c$ d\n  flags = -I 'e f'"
    )


def test_libraries_and_wheels_name_no_python(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [fake_torch(tmp_path / name, name) for name in ("2.11.0", "2.15.1")]
    monkeypatch.setenv("FUSED_DENSENET_TORCH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("FUSED_DENSENET_CUDA", "off")
    arguments = setup.libraries()
    names = [module.name for module in arguments["ext_modules"]]
    assert names == ["fused_densenet._cpu_torch_2_11", "fused_densenet._cpu_torch_2_15"]
    distribution = Distribution(arguments)
    build = distribution.get_command_obj("build_ext")
    assert build.get_ext_filename(names[1]) == f"fused_densenet/{extension.library_name('2.15.0+cpu')}"
    wheel = distribution.get_command_obj("bdist_wheel")
    wheel.ensure_finalized()
    assert wheel.get_tag()[:2] == ("py3", "none") and wheel.get_tag()[2] != "any"


def test_sanitizer_build(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSED_DENSENET_SANITIZE", "address")
    builds = statements(build_script(setup, monkeypatch, tmp_path))
    assert {"-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O1"} < set(builds["avx2.o"][1])
    assert "-fsanitize=address" in builds["_cpu_torch_2_11.so"][1]


def fake_nvcc(home: Path, release: str, *architectures: str) -> None:
    """It says of itself what it is asked: its version, or the architectures that it knows."""
    (home / "bin").mkdir()
    version = f"Cuda compilation tools, release {release}, V{release}.88"
    answers = f"--version) echo '{version}' ;; --list-gpu-arch) echo '{' '.join(architectures)}' ;;"
    (home / "bin/nvcc").write_text(f'#!/bin/sh\ncase "$1" in {answers} esac\n')
    (home / "bin/nvcc").chmod(0o755)


@pytest.mark.parametrize(
    ("variable", "torch_cuda", "release", "expected"),
    [
        ("auto", True, "13.0", True),
        ("off", True, "13.0", False),
        ("auto", False, "13.0", False),
        ("required", False, "12.8", True),
        ("auto", True, None, "nvcc was not found: install the CUDA toolkit, 12.8 or newer"),
        ("auto", True, "12.4", "nvcc is release 12.4: install the CUDA toolkit, 12.8 or newer"),
    ],
)
def test_cuda_kernels_are_for_torch_with_cuda_or_on_demand(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    torch_cuda: bool,
    release: str | None,
    expected: bool | str,
) -> None:
    if release is not None:
        fake_nvcc(tmp_path, release)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_DENSENET_CUDA", variable)
    folder = fake_torch(tmp_path / "torch", "2.13.0")
    (folder / "lib").mkdir()
    (folder / "lib" / ("libtorch_cuda.so" if torch_cuda else "libtorch_hip.so")).touch()
    monkeypatch.setenv("FUSED_DENSENET_TORCH", str(folder))
    names = [module.name for module in setup.libraries()["ext_modules"]]
    assert ("fused_densenet._cuda" in names) == (expected is True)
    assert (expected if isinstance(expected, str) else "") in capsys.readouterr().err


def test_cuda_kernels_that_are_required_and_cannot_be(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_DENSENET_CUDA", "required")
    with pytest.raises(SystemExit, match="CUDA kernels cannot be compiled: nvcc was not found: install the CUDA"):
        setup.libraries()


def test_where_nvcc_is_looked_for(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "13.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup.find_nvcc() == str(tmp_path / "bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert setup.find_nvcc() is None


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("8.0", ["arch=compute_80,code=sm_80"]),
        ("8.0;9.0a+PTX", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=[sm_90a,compute_90a]"]),
        ("5.2 7.0 12.0", ["arch=compute_120,code=sm_120"]),
    ],
)
def test_architectures(setup: ModuleType, wanted: str, flags: list[str]) -> None:
    assert list(setup.architectures(wanted).values()) == [f"-gencode={flag}" for flag in flags]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([], "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ([(9, 0), (8, 0), (9, 0)], "8.0;9.0+PTX"),
        ([(7, 0), (8, 6)], "8.6+PTX"),
        ([(7, 0)], "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ([(9, 0), (99, 0)], "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
    ],
)
def test_architectures_of_this_machine(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capabilities: list[tuple[int, int]],
    expected: str,
) -> None:
    fake_nvcc(tmp_path, "13.0", "compute_80", "compute_86", "compute_90")
    fake_gpus(monkeypatch, tmp_path, capabilities)
    assert setup.default_architectures() == expected


def fake_gpus(monkeypatch: pytest.MonkeyPatch, home: Path, capabilities: list[tuple[int, int]]) -> None:
    """With the CUDA toolkit in ``home``."""
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])


def test_architectures_of_gpus_that_cannot_be_asked(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are compiled for: an nvcc that lists nothing, a GPU that answers with an error, one of AMD's."""
    fake_nvcc(tmp_path, "13.0", "compute_90")
    fake_gpus(monkeypatch, tmp_path, [(9, 0)])
    assert setup.default_architectures() == "9.0+PTX"

    def broken(device: int) -> tuple[int, int]:
        raise RuntimeError("an error of CUDA")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", broken)
        assert setup.default_architectures() == setup.ARCHITECTURES
        assert "an error of CUDA" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        assert setup.default_architectures() == setup.ARCHITECTURES
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\nexit 1\n")
    assert setup.default_architectures() == setup.ARCHITECTURES


@pytest.mark.parametrize(("wanted", "said"), [("Hopper", "entries like 9.0"), ("7.0", "7.5 or newer, got '7.0'")])
def test_architectures_that_cannot_be(setup: ModuleType, wanted: str, said: str) -> None:
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST: expected .*{said}"):
        setup.architectures(wanted)


def test_what_is_compiled_by_nvcc(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every kernel for every default architecture, against the oldest torch's stable ABI, the runtime linked in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    builds = statements(build_script(setup, monkeypatch, tmp_path, cuda=True))
    kernels = {f"{path.stem}.cuda.o": str(path) for path in ROOT.glob("csrc/cuda/*.cu")}
    for made, source in kernels.items():
        sources, flags = builds[made]
        assert sources == source
        for capability in (75, 80, 86, 89, 90, 100):
            assert f"-gencode=arch=compute_{capability},code=sm_{capability}" in flags
        assert "'-gencode=arch=compute_120,code=[sm_120,compute_120]'" in flags
    assert {"-DTORCH_TARGET_VERSION=0x020B000000000000", "-DTORCH_STABLE_ONLY"} < set(builds["cuda_binding.o"][1])
    sources, flags = builds["_cuda.so"]
    assert set(sources.split()) == {"cuda_binding.o", *kernels}
    assert {"-cudart=static", f"-Xlinker=--build-id=0x{setup.fingerprint(ROOT, '_cuda.so')}"} < set(flags)


def test_what_is_left_out_is_not_called_compiled(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.0 7.0+PTX;8.0 9.0+PTX")
    builds = statements(build_script(setup, monkeypatch, tmp_path, cuda=True))
    assert "-DFD_ARCHITECTURES=8.0:9.0+PTX" in builds["cuda_binding.o"][1]


CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("wanted", "jobs", "said"),
    [(None, CORES, False), ("", CORES, False), ("1", 1, False), ("0", CORES, True), ("abc", CORES, True)],
)
def test_jobs(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wanted: str | None,
    jobs: int,
    said: bool,
) -> None:
    """ninja would take 0 for no limit at all."""
    commands: list[list[str]] = []
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setenv("CXX", "g++")
    if wanted is not None:
        monkeypatch.setenv("MAX_JOBS", wanted)
    setup.build({}, None, tmp_path)
    assert commands == [["ninja", "-C", str(tmp_path), "-j", str(jobs)]]
    assert (f"MAX_JOBS: expected a number from 1 on, got {wanted!r}" in capsys.readouterr().err) == said


def test_what_does_not_compile(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    broken = setup.statement("a.o", "cxx", ["csrc/watch.cpp"], [])
    monkeypatch.setattr(setup, "cpu_statements", lambda libraries: [broken])
    with pytest.raises(SystemExit, match="compiling failed, the compiler's message is above"):
        setup.build({tmp_path / "a.so": tmp_path}, None, tmp_path)


def test_the_readme_has_every_variable() -> None:
    files = [ROOT / "setup.py", *ROOT.glob("fused_densenet/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    used = {name for file in files for name in re.findall(r"\bFUSED_DENSENET_[A-Z]+\b", file.read_text())}
    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"^\| `(FUSED_DENSENET_[A-Z]+)` \|", readme, re.MULTILINE))
    assert {"FUSED_DENSENET_BUILD", "FUSED_DENSENET_BACKEND"} <= used
    assert documented == used


def test_one_minimum_compiler(setup: ModuleType) -> None:
    oldest = f"g++ {setup.dotted(setup.MINIMUM_GCC)} or newer"
    assert oldest == extension.COMPILER
    assert oldest in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["_cpu_torch_2_12.so"], None),
        (["_cpu_torch_2_11.so", "_cpu_torch_2_12.so"], None),
        ([], "was not compiled when fused_densenet was installed; install g++ 11.3 or newer and run `pip install"),
        (
            ["_cpu_torch_2_9.so", "_cpu_torch_2_11.so", "_cpu_torch_2_13.so"],
            "was compiled for torch 2.9, 2.11, 2.13 and torch 2.12.1 is running; run `pip install",
        ),
    ],
)
def test_why_there_is_no_extension(tmp_path: Path, files: list[str], reason: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    said = extension.absent(tmp_path, "2.12.1")
    assert said is None if reason is None else said is not None and reason in said


def test_no_library_is_loaded_from_an_archive(tmp_path: Path) -> None:
    said = extension.absent(tmp_path / "a.whl/fused_densenet", "2.12.1")
    assert said is not None and "is part of an archive" in said


def test_the_import_leaves_the_compiler_alone() -> None:
    """It takes several times as long to import as the package."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import fused_densenet\n"
    code += "print(before or 'torch._dynamo' not in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (None, "was not compiled when fused_densenet was installed"),
        (extension.library_name(torch.__version__), "does not load"),
        ("_cpu_torch_2_1.so", f"was compiled for torch 2.1 and torch {torch.__version__} is running"),
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
        "from fused_densenet.backends import extension\n"
        "block = fused_densenet.FusedDenseBlock(2, 4, 2, 4)\n"
        "block(torch.randn(2, 4, 5, 5)).sum().backward()\n"
        "print(fused_densenet.__file__, extension.cpu_missing)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert reason in done.stdout
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1
    assert reason in warned[0]


def test_a_newer_torch_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the import, with what it means for the CPU, and no torch is turned away."""
    major, minor = extension.NEWEST_TORCH
    assert extension.untried(f"{major}.{minor}.3+cpu") is None
    monkeypatch.setattr(extension, "cpu_missing", None)
    said = extension.untried(f"{major}.{minor + 1}.0a0")
    assert (
        said
        == f"torch {major}.{minor + 1}.0a0 is newer than {major}.{minor}, the newest that fused_densenet was tried with"
    )
    code = (
        "import torch\n"
        "torch.__version__ = '9.1.0'\n"
        "import fused_densenet\n"
        "block = fused_densenet.FusedDenseBlock(2, 4, 2, 4)\n"
        "block(torch.randn(2, 4, 5, 5)).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (warned,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert (
        "torch 9.1.0 is newer than" in warned and "run slower on the CPU than they could: the C++ extension" in warned
    )


def test_a_missing_extension_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cpu_missing", "it was lost")
    extension.warn_if_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="slower on the CPU.*it was lost"):
        extension.warn_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extension.warn_if_missing()


def test_a_loaded_extension_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "cpu_missing", None)
    extension.warn_if_missing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extension.warn_if_missing()


def test_the_extension_shares_torchs_threads() -> None:
    """One OpenMP runtime, in a process that has nothing but the package (scikit-learn, say, brings another)."""
    assert extension.cpu is not None, extension.cpu_missing
    program = "import pathlib, fused_densenet; print(pathlib.Path('/proc/self/maps').read_text())"
    maps = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    mapped = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    assert any(Path(path).name.startswith("_cpu_torch_") for path in mapped)
    assert len({path for path in mapped if Path(path).name.startswith("libgomp")}) == 1
