"""The table of docs/packages.md is what its script prints."""

from pathlib import Path

import pytest
from packages_table import PACKAGES, rebuilt_row
from rebuilt_networks import NETWORKS
from residual_networks import NETWORKS as RESIDUAL

PAGE = (Path(__file__).parents[1] / "docs" / "packages.md").read_text().splitlines()


@pytest.mark.parametrize("name", [*NETWORKS, *RESIDUAL])
def test_rebuilt(name: str) -> None:
    assert rebuilt_row(name) in PAGE


def test_every_package_has_a_row() -> None:
    for network in PACKAGES:
        name = network.arguments[0] if network.function.endswith("create_model") else network.function.split(".")[-1]
        assert any(line.startswith(f"| {network.package} ") and f" | {name} | " in line for line in PAGE), network
