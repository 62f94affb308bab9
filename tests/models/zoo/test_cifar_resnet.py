"""The CIFAR networks: published sizes, names of the published checkpoints, shortcut against a plain loop."""

import pytest
import torch

from kronsearch.models.zoo import cifar_resnet
from kronsearch.models.zoo.cifar_resnet import BasicBlock, PaddedShortcut


@pytest.mark.parametrize(("depth", "params"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)])
def test_depths_have_the_published_sizes(depth, params):
    model = getattr(cifar_resnet, f"cifar_resnet{depth}")()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.02)  # published to two digits
    assert model.default_input_shape == (3, 32, 32)


def test_names_are_those_of_the_published_checkpoints():
    names = ["conv1.weight", *(f"bn1.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
    for stage in (1, 2, 3):
        for block in range(3):
            for i in (1, 2):
                prefix = f"layer{stage}.{block}"
                names.append(f"{prefix}.conv{i}.weight")
                names += [f"{prefix}.bn{i}.{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    names += ["linear.weight", "linear.bias"]
    state = cifar_resnet.cifar_resnet20().state_dict()
    assert [name for name in state if not name.endswith("num_batches_tracked")] == names


def test_shortcut_takes_every_second_pixel_and_pads_both_sides():
    x = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    out = PaddedShortcut(5, 2)(x)
    assert out.shape == (2, 4 + 5, 3, 3)
    for n, c, i, j in torch.cartesian_prod(*(torch.arange(s) for s in out.shape)).tolist():
        inside = 2 <= c < 2 + 4
        assert out[n, c, i, j] == (x[n, c - 2, 2 * i, 2 * j] if inside else 0)


def test_a_block_without_weights_is_its_shortcut():
    block = BasicBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x), PaddedShortcut(2, 2)(x), rtol=0, atol=0)
