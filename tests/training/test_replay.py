"""On CUDA only, but for what is refused: a graph that is recorded does what the work did."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from kronsearch.sekron import SeKronConv2d, SeKronSpec
from kronsearch.training.finetune import Trainer
from kronsearch.training.randomness import host_randomness
from kronsearch.training.replay import Replay
from kronsearch.training.schedule import TrainSettings

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SETTINGS = TrainSettings(epochs=7, batch_size=10, lr=0.01, label_weight=0.3, mixing=True, averaging=0.9)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def factorised(network):
    """The network with its convolution factorised, on CUDA."""
    spec = SeKronSpec(((4, 1, 1, 1), (1, 1, 3, 3), (1, 2, 1, 1)), (3, 1))
    with torch.random.fork_rng(devices=[]):
        network.conv = SeKronConv2d.from_conv(network.conv, spec)
    return network.cuda()


def trainer_of(network, teacher, data, settings=SETTINGS, *, blocks=("conv",)):
    return Trainer(network, data, settings, teacher=teacher, blocks=blocks, generator=seeded(), device="cuda")


class Recording:
    """In the place of a CUDA graph, one that can be recorded on the CPU, or not."""

    error: Exception | None = None

    def __init__(self, graph=None, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.error is not None:
            raise self.error


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return Recording


@pytest.mark.usefixtures("recording")
def test_work_is_recorded_after_a_few_calls_and_forgotten():
    calls = []
    replay = Replay(lambda x: calls.append(x) or x + 1, lambda: None)
    for _ in range(3):
        assert replay(torch.ones(2)).tolist() == [2, 2]
        assert not replay.is_recorded
    replay._record([torch.ones(2)])
    assert replay.is_recorded
    assert len(calls) == 4
    assert replay(torch.ones(3)).tolist() == [2, 2, 2], "other shapes run as they are"
    replay.forget()
    assert not replay.is_recorded
    assert replay(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(())])
@pytest.mark.usefixtures("recording")
def test_work_that_draws_random_numbers_on_the_host_runs_as_it_is(draw):
    undone = []
    with torch.random.fork_rng(devices=[]):
        replay = Replay(lambda x: x * float(draw() < 2), lambda: undone.append(1))
        for _ in range(6):
            assert replay(torch.ones(2)).tolist() == [1, 1]
    assert not replay.is_recorded
    assert undone == [1], "it is tried once"


def test_what_can_not_be_recorded_runs_as_it_is(recording, monkeypatch):
    monkeypatch.setattr(recording, "error", RuntimeError("operation not permitted when stream is capturing"))
    undone = []
    replay = Replay(lambda x: x + 1, lambda: undone.append(1))
    for _ in range(6):
        assert replay(torch.ones(2)).tolist() == [2, 2]
    assert not replay.is_recorded
    assert undone == [1]


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(())])
def test_where_the_hosts_generators_stand(draw):
    with torch.random.fork_rng(devices=[]):
        before = host_randomness()
        assert host_randomness() == before
        draw()
        assert host_randomness() != before


@on_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_training_ends_as_one_of_single_kernels(compiled, make_data, make_network, monkeypatch):
    """Dropout, batch norm, blocks, mixing, renewed coordinates and a state that is restored among it."""
    monkeypatch.setattr("kronsearch.training.optimizer._RENEWAL", 5)
    settings = TrainSettings(**{**vars(SETTINGS), "compiled": compiled})
    data, states = make_data(), []
    for recorded in (True, False):
        network = factorised(make_network(0, dropout=0.2))
        with trainer_of(network, make_network(1).cuda(), data, settings) as trainer:
            if not recorded:
                trainer._replay = None
            losses = [trainer.advance(7).loss for _ in range(3)]
            if recorded:
                assert trainer._replay.is_recorded
            assert trainer.step == trainer.total_steps == 21
            states.append({name: tensor.clone().cpu() for name, tensor in trainer.state().items()} | {"": losses})
    for name, tensor in states[1].items():
        torch.testing.assert_close(
            states[0][name], tensor, atol=2e-3, rtol=2e-2, msg=lambda told, n=name: f"{n}: {told}"
        )


@on_cuda
def test_a_recorded_training_is_resumed(make_data, make_network):
    data, teacher = make_data(), make_network(1).cuda()
    with trainer_of(factorised(make_network(0, dropout=0.2)), teacher, data) as whole:
        whole.advance(8)
        middle = {name: tensor.clone() for name, tensor in whole.state().items()}
        whole.advance(13)
        wanted = {name: tensor.clone() for name, tensor in whole.state().items()}
    with trainer_of(factorised(make_network(0, dropout=0.2)), teacher, data) as resumed:
        resumed.advance(6)  # recorded by then
        resumed.restore(middle)
        resumed.advance(13)
        assert resumed._replay.is_recorded
        for name, tensor in resumed.state().items():
            torch.testing.assert_close(tensor, wanted[name], atol=1e-3, rtol=1e-2, msg=name)


class Waiting(nn.Module):
    """Waits for the device in each forward pass."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        outputs = self.network(x)
        return outputs if bool((outputs < 1e9).all()) else outputs * 0


@on_cuda
def test_a_network_that_waits_for_the_device_is_trained_as_it_is(make_data, make_network):
    data, results = make_data(), []
    for wrap in (Waiting, nn.Sequential):
        network = wrap(factorised(make_network(0)))
        with trainer_of(network, None, data, blocks=()) as trainer:
            trainer.advance(21)
            assert trainer._replay.is_recorded == (wrap is nn.Sequential)
            results.append([parameter.detach().clone() for parameter in network.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


@on_cuda
def test_evaluation_between_steps_sees_the_weights_of_then(make_data, make_network):
    network = factorised(make_network(0))
    with trainer_of(network, make_network(1).cuda(), make_data()) as trainer:
        trainer.advance(6)
        images, seen = torch.ones(1, 2, 6, 5, device="cuda"), []
        for _ in range(3):
            network.eval()
            with torch.no_grad():
                seen.append(network(images).clone())
            trainer.advance(3)
        assert trainer._replay.is_recorded
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
