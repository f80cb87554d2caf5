"""The network of ``fastmargin train``, and loading one."""

from __future__ import annotations

import pytest
import torch

from fastmargin.train.backbones import load_pretrained
from fastmargin.train.iresnet import DEPTHS, IResNet
from fastmargin.train.settings import TrainError


@pytest.mark.parametrize(
    "name, millions", [("iresnet18", 24.03), ("iresnet50", 43.59), ("iresnet100", 65.16)]
)
def test_iresnet_is_that_of_insightface(name, millions):
    with torch.device("meta"):
        network = IResNet(DEPTHS[name])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer1.1.bn1.running_mean"] == (64,)
    assert shapes["layer4.0.prelu.weight"] == (512,)
    assert shapes["fc.weight"] == (512, 25088) and shapes["features.bias"] == (512,)
    assert not network.features.weight.requires_grad


def test_iresnet_of_other_sizes():
    network = IResNet((1, 1, 1, 1), 24, (40, 36)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(torch.randn(2, 3, 40, 36))
    assert found.shape == (2, 24) and found.dtype == torch.float32


def test_pretrained_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"weight": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(TrainError, match="does not fit"):
        load_pretrained(torch.nn.Linear(2, 2), tmp_path / "harmful.pt")
