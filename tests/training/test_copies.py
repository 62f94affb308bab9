import threading

import pytest
import torch
from torch import nn

from kronsearch.errors import ModelError
from kronsearch.training.copies import copied


class Keeps(nn.Module):
    """A network that leaves what its layer put out for others to look at."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        self.seen = self.layer(x)
        return self.seen


def test_what_a_forward_pass_left_is_copied_by_its_values():
    network = Keeps()
    network(torch.ones(1, 3)).sum().backward()
    twin = copied(network)
    assert torch.equal(twin.seen, network.seen)
    assert twin.seen is not network.seen
    assert network.seen.grad_fn is not None
    assert twin.layer.weight is not network.layer.weight
    assert torch.equal(twin.layer.weight, network.layer.weight)


def test_other_objects_stand_where_they_were_asked_for():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    network.again, other = [network[0]], nn.Identity()
    twin = copied(network, {id(network[0]): other})
    assert twin[0] is twin.again[0] is other
    assert isinstance(network[0], nn.Linear)


def test_what_can_not_be_copied_is_told_in_one_line():
    network = Keeps()
    network.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"^Keeps can't be copied \(TypeError: cannot pickle '_thread.lock'") as caught:
        copied(network)
    assert "\n" not in str(caught.value)
