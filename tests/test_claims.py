"""benchmarks/claims.py: what it measures, on cases with known answers, and that a quick run shows every claim."""

import copy
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_densenet import reference

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import claims_measure as measure  # noqa: E402
from claims_networks import Chain, digits_network, plain_twin  # noqa: E402
from claims_training import load_digits, train  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder that ``claims.py --quick`` leaves."""
    folder = tmp_path_factory.mktemp("claims")
    command = [sys.executable, str(BENCHMARKS / "claims.py"), "--quick", "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def results(quick: pathlib.Path) -> dict[str, Any]:
    return json.loads((quick / "claims.json").read_text())


def test_every_claim_has_a_table_and_a_picture(quick: pathlib.Path, results: dict[str, Any]) -> None:
    printed = (quick / "printed").read_text()
    for title in ("Parameters and multiply-adds", "Gradient flow", "Feature reuse", "Diverse features", "Duplicate"):
        assert title in printed
    assert "benchmarks/memory.py" in printed
    for claim in results["claims"]:
        assert (quick / f"{claim}.png").read_bytes().startswith(b"\x89PNG")
    assert {"machine", "versions", "commit", "settings", "seconds"} <= results.keys()


def test_counts_are_the_published_ones(results: dict[str, Any]) -> None:
    rows = {row["network"]: row for row in results["claims"]["efficiency"]["networks"]}
    assert len(rows) == 16
    for name, row in rows.items():
        assert row["parameters_agree"] in (True, None), name
        assert row["macs_ratio"] is None or abs(row["macs_ratio"] - 1) < 0.01, name
    assert {name for name, row in rows.items() if row["parameters_agree"] is None} == {"DenseNet-264"}
    assert rows["ResNet-152"]["parameters"] == 60_192_808


def test_one_more_layer(results: dict[str, Any]) -> None:
    cost = results["claims"]["efficiency"]["layer_cost"]
    for key in ("dense_slope", "residual_constant"):
        assert cost[key] == pytest.approx(1)
    for key in ("exponent_k", "exponent_c"):
        assert cost[key] == pytest.approx(2)
    assert cost["residual_slope"] == pytest.approx(0, abs=1e-6)


def test_three_seeds_of_everything_trained(results: dict[str, Any]) -> None:
    claims = results["claims"]
    for claim in ("gradient_flow", "feature_reuse", "diverse_features", "duplicate_gradients"):
        assert {row["seed"] for row in claims[claim]["rows"]} == {0, 1, 2}, claim
    assert {(r["depth"], r["when"], r["network"]) for r in claims["gradient_flow"]["rows"]} == {
        (depth, when, network)
        for depth in results["settings"]["flow_depths"]
        for when in ("initialisation", "training")
        for network in ("plain", "ResNet", "DenseNet")
    }


def test_csp_draws_on_fewer_gradients_at_less_cost(results: dict[str, Any]) -> None:
    found = results["claims"]["duplicate_gradients"]
    terms = {row["network"]: row["terms"] for row in found["rows"]}
    assert terms["CSPDenseNet"] < terms["DenseNet"]
    assert found["costs"]["CSPDenseNet"]["macs"] < found["costs"]["DenseNet"]["macs"]
    kept = {row["fusion"]: row["kept"] for row in found["imagenet"] if row["layers"] == "121"}
    for fusion in ("first", "last", "both"):  # where both concatenate; a fused DenseNet keeps as little as CSP's
        assert kept[fusion]["reference"] < kept[None]["reference"]


@pytest.mark.parametrize(("values", "rank"), [((1, 1, 1, 1), 4), ((5, 0, 0), 1), ((2, 2, 0), 2)])
def test_effective_rank(values: tuple[float, ...], rank: float) -> None:
    assert measure.effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(rank)


def test_effective_rank_weighs_directions_by_entropy() -> None:
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert measure.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected)


def test_feature_rank_ignores_scale_and_copies() -> None:
    x = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64) - 0.5)[0]
    x = torch.linalg.qr(x - x.mean(0))[0]
    features = torch.cat([x * torch.tensor([1.0, 10.0, 1e3, 1e-3]), 7 * x + 3], dim=1).reshape(4, 4, 4, 8)
    assert measure.feature_rank(features.movedim(-1, 1)) == pytest.approx(4, rel=1e-6)


def test_decades() -> None:
    assert measure.decades([0.1, 10, 1]) == pytest.approx(2)


def test_layer_gradients() -> None:
    torch.manual_seed(0)
    network = Chain(10, 4, residual=False)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    found = measure.layer_gradients(network, images, labels)
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == len(convs) == 9
    for gradient, conv in zip(found, convs, strict=True):
        assert conv.weight.grad is not None
        assert gradient.weight == pytest.approx(conv.weight.grad.norm().item(), rel=1e-5)
    stem = network.features.conv0(images).detach().requires_grad_()
    F.cross_entropy(network.classifier(F.relu(network.features[1:](stem)).mean((2, 3))), labels).backward()
    assert stem.grad is not None
    assert found[0].output == pytest.approx(stem.grad.norm().item(), rel=1e-5)


@torch.no_grad()
def test_feature_reuse_finds_planted_weights() -> None:
    network = reference.DenseNet(3, (2, 2), 4, None, 1.0, 1, 5, small_inputs=True)
    for i, block in enumerate((network.features.denseblock1, network.features.denseblock2)):
        for t, layer in enumerate(block.children()):
            inputs = 4 + 6 * i
            layer.conv1.weight.copy_(torch.randn_like(layer.conv1.weight).sign())
            layer.conv1.weight[:, :inputs] *= 10
            layer.conv1.weight[:, inputs:] *= 20 + t
    network.features.transition1.conv.weight.fill_(-3)
    network.classifier.weight.fill_(0.5)
    first, second = measure.feature_reuse(network)
    nan = math.nan
    expected = torch.tensor([[10, 10, 3], [nan, 21, 3], [nan, nan, 3]])
    torch.testing.assert_close(first, expected, equal_nan=True)
    expected = torch.tensor([[10, 10, 0.5], [nan, 21, 0.5], [nan, nan, 0.5]])
    torch.testing.assert_close(second, expected, equal_nan=True)
    start = copy.deepcopy(network)
    list(network.features.denseblock1.children())[1].conv1.weight[:, 4:] += 2
    first, second = measure.feature_reuse(network, start)
    torch.testing.assert_close(first, torch.tensor([[0, 0, 0], [nan, 2, 0], [nan, nan, 0]]), equal_nan=True)
    assert not second.nan_to_num().any()


def duplicating_network() -> reference.DenseNet:
    """Two layers that read the input with the same weights and are read by the classifier alike."""
    torch.manual_seed(0)
    network = reference.DenseNet(3, (2,), 4, None, 1.0, 1, 5, small_inputs=True).double()
    first, second = network.features.denseblock1.children()
    with torch.no_grad():
        second.conv1.weight.zero_()
        second.conv1.weight[:, :4] = first.conv1.weight
        network.classifier.weight[:, 7:] = network.classifier.weight[:, 4:7]
    return network


def test_duplicate_gradients_finds_planted_duplicates() -> None:
    network = duplicating_network()
    images, labels = torch.randn(8, 1, 6, 6, dtype=torch.float64), torch.arange(8) % 5
    found = measure.duplicate_gradients(network, images, labels)
    # Input channels: two layers and the norm read them; the first layer's maps: the norm alone, as its weights are zero.
    assert found.terms == pytest.approx((4 * 3 + 3 * 1 + 3 * 1) / 10)
    assert found.per_layer[0][0, 1].item() == pytest.approx(1)
    assert found.duplicates > 0.4
    with torch.no_grad():
        list(network.features.denseblock1.children())[1].conv1.weight.normal_()
    other = measure.duplicate_gradients(network, images, labels)
    assert other.terms == pytest.approx((4 * 3 + 3 * 2 + 3 * 1) / 10)
    assert other.per_layer[0][0, 1] < 0.5
    assert other.duplicates < found.duplicates


def test_duplicate_gradients_follows_the_split() -> None:
    network = reference.CSPDenseNet(3, (2,), 4, None, 1.0, 1, 5, small_inputs=True).double()
    images, labels = torch.randn(8, 1, 6, 6, dtype=torch.float64), torch.arange(8) % 5
    found = measure.duplicate_gradients(network, images, labels)
    # Two channels through the block, read by two layers and T; its layers' 3 + 3; U's 5 + 2; the last norm's 10.
    assert found.terms == pytest.approx((2 * 3 + 3 * 2 + 3 * 1 + 7 + 10) / 25)


@pytest.mark.parametrize("name", ["plain", "ResNet", "DenseNet", "CSPDenseNet"])
def test_networks_learn_the_digits_and_match_their_twins(name: str) -> None:
    torch.manual_seed(0)
    network, digits = digits_network(name, 10, 6), load_digits()
    losses = train(network, digits, 40, seed=0)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    network.eval()
    twin = plain_twin(name, network, 10, 6)
    torch.testing.assert_close(twin(digits.test_images), network(digits.test_images), rtol=1e-3, atol=1e-3)


def test_digits_are_split_once() -> None:
    digits = load_digits()
    assert len(digits.images) + len(digits.test_images) == 1797
    assert len({d.numpy().tobytes() for d in torch.cat([digits.images, digits.test_images])}) > 1790
    assert torch.equal(digits.images, load_digits().images)
