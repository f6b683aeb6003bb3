"""Every Python sample of README, docs and docstrings runs; every reason that the package gives is in docs/troubleshooting.md."""

import ast
import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from packages import segmentation_models_pytorch, timm, torchxrayvision

import fused_densenet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SAMPLES = {
    f"{page.relative_to(ROOT)}, {number}": sample
    for page in PAGES
    for number, sample in enumerate(
        re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL), 1
    )
}


def _published(*_: Any, **__: Any) -> dict[str, torch.Tensor]:
    """A state dict as torchvision's published files have it."""
    names = r"(denselayer\d+\.(?:norm|conv))([12])"
    state = peers.densenet121().state_dict()
    return {re.sub(names, r"\1.\2", key): value for key, value in state.items() if "num_batches" not in key}


@pytest.fixture
def _no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What would be fetched is random, and of the form in which it is published."""

    def pickled(*_: Any) -> Path:
        torch.save(torchxrayvision.models.DenseNet(), tmp_path / "weights.pt")
        return tmp_path / "weights.pt"

    monkeypatch.setattr(peers.WeightsEnum, "get_state_dict", _published)
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(torchxrayvision.models, "get_weights", pickled)
    monkeypatch.setattr(segmentation_models_pytorch.encoders, "hf_hub_download", lambda *_, **__: "")
    monkeypatch.setattr(segmentation_models_pytorch.encoders, "load_file", _published)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.usefixtures("_no_downloads")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_sample(name: str) -> None:
    """Each by itself, in an empty namespace and folder."""
    exec(compile(SAMPLES[name], name, "exec"), {"__name__": "sample"})


_GIVING_REASONS = "reason|obstacle|trial|intercept|tried|input_shape|failed|take_apart|patches|find|read|foreign|described|left_over|trace|differs|follow$|_report|_graph|network"


def _reasons(file: Path) -> Iterator[str]:
    """The phrases of the reasons that a file's functions give, whatever they do besides."""
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef) and re.search(_GIVING_REASONS, function.name):
            docstring = ast.get_docstring(function, clean=False)
            for node in ast.walk(function):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != docstring:
                    phrase = node.value.strip().lstrip(".")
                    if " " in phrase:
                        yield phrase


def test_every_reason_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    files = [
        *("fallback/reasons", "fallback/anatomy", "fallback/description", "nn/transition", "nn/residual"),
        *("adopt/recognition", "adopt/trace", "adopt/interpretation", "adopt/trial"),
        *("adopt/following", "adopt/serving", "adopt/drafts"),
    ]
    phrases = {phrase for name in files for phrase in _reasons(ROOT / "fused_densenet" / f"{name}.py")}
    assert len(phrases) > 30
    assert not [phrase for phrase in phrases if phrase not in page]


@pytest.mark.parametrize("name", fused_densenet.__all__)
def test_public_name(name: str) -> None:
    """It is described, a module with its shapes, its dtypes, its errors and the paper that it is from; examples run."""
    public = getattr(fused_densenet, name)
    said = inspect.getdoc(public) or ""
    assert said
    if isinstance(public, type) and issubclass(public, torch.nn.Module):
        expected = ("Shape:", "Raises:", "arXiv", r"float32|dtypes of its parameters")
        assert not [pattern for pattern in expected if not re.search(pattern, said)]
    module = inspect.getmodule(public)
    assert module is not None
    for example in doctest.DocTestFinder(recurse=False).find(public, name, module, vars(module) | {"torch": torch}):
        assert doctest.DocTestRunner().run(example).failed == 0


def test_links_and_variables() -> None:
    """Files that a page links to are there, and every variable that the package reads is in README."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    sources = [ROOT / "setup.py", *(ROOT / "fused_densenet").rglob("*.py")]
    variables = {name for file in sources for name in re.findall(r"FUSED_DENSENET_[A-Z]+", file.read_text())}
    readme = (ROOT / "README.md").read_text()
    assert variables and not [name for name in variables if f"`{name}`" not in readme]


def test_no_architecture_is_named_that_is_not_compiled_for() -> None:
    """AMD's: the tests compile Triton's kernels for those of triton_offline.TARGETS."""
    targets = re.findall(
        r'^    "(gfx\w+)": ', (ROOT / "tests/triton_backend/triton_offline.py").read_text(), re.MULTILINE
    )
    named = {name for page in PAGES for name in re.findall(r"\bgfx\w+", page.read_text())}
    assert named and named <= set(targets)
