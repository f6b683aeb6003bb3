"""Feature maps of a snapshot have the layout that the model gives to them: a head may take a view of them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from snapshots import assert_served, randomised, small
from torch import Tensor, nn

from fused_densenet import optimize_for_inference

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
SIZES = {1: (72,), 2: (40, 33), 3: (33, 36, 40)}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("of_weights", [True, False])
@pytest.mark.parametrize("of_image", [True, False])
@torch.no_grad()
def test_of_a_feature_map(dims: int, of_weights: bool, of_image: bool) -> None:
    features = small(dims).features
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64)
    if dims > 1:
        features = features.to(memory_format=LAYOUTS[dims]) if of_weights else features
        x = x.contiguous(memory_format=LAYOUTS[dims]) if of_image else x
    found, expected = optimize_for_inference(features)(x), features(x)
    assert found.shape == expected.shape and found.shape[2] > 1
    assert found.stride() == expected.stride()


class Viewing(nn.Module):
    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.features = copy.deepcopy(small().features)
        self.width = pixels * self.features(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape[1]
        self.fc = nn.Linear(self.width, 3).double()
        randomised(self)


class ByWidth(Viewing):
    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.features(x)).view(-1, self.width))


class ByBatch(Viewing):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x).view(x.size(0), -1))


@pytest.mark.parametrize("kind", [ByWidth, ByBatch])
def test_a_view_in_the_head(kind: type[Viewing], capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    served = assert_served(kind(small().features(x).shape[2:].numel()), x)
    assert served(x).shape == (2, 3)
    assert capfd.readouterr().err == ""
