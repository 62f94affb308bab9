import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronsearch.models.structure import fingerprint_structure


class Net(nn.Module):
    def __init__(self, act=F.relu, sizes=(4, 4), bias=False, p=0.0, **more):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(*sizes, bias=bias), nn.Dropout(p))
        self.act, self.more = act, more

    def forward(self, x):
        return self.act(self.layer(x))


def test_networks_alike_are_told_alike_whatever_they_hold_and_have_done():
    first, second = Net(deep={"a": [1, {2}]}), Net(deep={"a": [1, {2}]})
    first.train()
    first.more["kept"] = torch.ones(2)
    second.more["kept"] = torch.zeros(2)
    with torch.no_grad():
        second.eval()(torch.ones(1, 4))
        second.layer[0].weight.zero_()
    assert fingerprint_structure(first) == fingerprint_structure(second)


@pytest.mark.parametrize(
    "other",
    [
        Net(F.tanh),
        Net(sizes=(4, 5)),
        Net(bias=True),
        Net(p=0.5),
        Net(deep={"a": [1, {3}]}),
        Net(mask=True),
        Net(scale=math.inf),
        nn.Sequential(Net()),
    ],
    ids=range(8),
)
def test_other_arguments_make_another_network(other):
    assert fingerprint_structure(other) != fingerprint_structure(Net(deep={"a": [1, {2}]}))


def test_what_holds_itself_has_an_end():
    net = Net()
    net.more["itself"] = net.more
    assert len(fingerprint_structure(net)) == 64
