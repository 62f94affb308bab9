"""On CUDA only, but for what is refused: a graph that is recorded does what the work did."""

import random
import warnings

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
    """In the place of a CUDA graph, one that runs on the CPU what it should record, and then does nothing."""

    error: Exception | None = None
    replayed = 0

    def __init__(self, graph=None, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.error is not None:
            raise self.error

    def replay(self):
        Recording.replayed += 1


@pytest.fixture
def recording(monkeypatch):
    """Let works be recorded without a GPU."""
    modes = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(Recording, "replayed", 0)
    yield modes
    assert modes in ([], ["warn", 0])


def replay_of(work, network=None, undo=lambda: None):
    return Replay(work, network or nn.Identity(), undo)


@pytest.mark.usefixtures("recording")
def test_work_is_recorded_after_a_few_calls_and_forgotten():
    calls = []
    replay = replay_of(lambda x: calls.append(len(x)) or x + 1)
    for k in range(6):
        assert replay(torch.ones(2)).shape == (2,)
        assert replay.is_recorded == (k >= 3)
    assert calls == [2, 2, 2, 2], "the fourth is recorded"
    assert Recording.replayed == 3
    assert replay(torch.ones(3)).tolist() == [2, 2, 2], "other shapes run as they are"
    assert Recording.replayed == 3
    assert replay(torch.full((2,), 5.0)).shape == (2,)
    assert replay._inputs[0].tolist() == [5, 5], "it is played back on what is handed over"
    replay.forget()
    assert not replay.is_recorded
    assert replay(torch.ones(2)).tolist() == [2, 2]
    assert Recording.replayed == 4


class Counting(nn.Module):
    """Counts its calls on the host."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 1


class Rebinding(nn.Module):
    """Puts another tensor in a buffer's place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return x + 1


def drawing(draw):
    return lambda x: x + float(draw() < 9)


HOST = "draws random numbers on the host"


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (drawing(random.random), HOST),
        (drawing(np.random.random), HOST),
        (drawing(np.random.normal), HOST),  # every other call takes what the one before has left
        (drawing(lambda: torch.rand(())), HOST),
        (Counting(), "changes on the host"),
        (Rebinding(), "changes on the host"),
    ],
)
@pytest.mark.usefixtures("recording")
def test_what_can_be_seen_not_to_be_alike_at_every_call_is_not_recorded(work, reason):
    with torch.random.fork_rng(devices=[]):
        replay = replay_of(work, work if isinstance(work, nn.Module) else None)
        for _ in range(6):
            assert replay(torch.ones(2)).tolist() == [2, 2]
    assert not replay.is_recorded
    assert reason in replay.refusal
    assert Recording.replayed == 0


def test_what_waits_for_the_device_is_not_recorded_and_warns_of_what_else_it_does(recording):
    def work(x):
        if recording == ["warn"]:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
        warnings.warn("careful", UserWarning, stacklevel=1)
        return x + 1

    replay = replay_of(work)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(6):
            assert replay(torch.ones(2)).tolist() == [2, 2]
    assert [str(warning.message) for warning in told] == ["careful"] * 6
    assert replay.refusal == "it waits for the device"
    assert Recording.replayed == 0


class Remembering(nn.Module):
    """Puts a new tensor in an attribute's place, as weight norm does: it is made anew at each call."""

    def forward(self, x):
        self.last = x + 1
        return self.last


def test_a_tensor_that_is_an_attribute_may_be_another_one_each_time(recording):
    replay = replay_of(network := Remembering(), network)
    for _ in range(4):
        replay(torch.ones(2))
    assert replay.is_recorded
    assert recording == ["warn", 0]


@pytest.mark.usefixtures("recording")
def test_a_recording_that_fails_is_undone_and_the_work_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(Recording, "error", RuntimeError("out of memory\nand more"))
    undone = []
    replay = replay_of(lambda x: x + 1, undo=lambda: undone.append(1))
    for _ in range(6):
        assert replay(torch.ones(2)).tolist() == [2, 2]
    assert not replay.is_recorded
    assert replay.refusal == "out of memory"
    assert undone == [1], "it is tried once"


@pytest.mark.parametrize("draw", [random.random, np.random.random, np.random.normal, lambda: torch.rand(())])
@pytest.mark.parametrize("before", [0, 1])
def test_where_the_hosts_generators_stand(draw, before):
    with torch.random.fork_rng(devices=[]):
        for _ in range(before):
            draw()
        stood = host_randomness()
        assert host_randomness() == stood
        draw()
        assert host_randomness() != stood


@on_cuda
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own look at kernels
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_training_ends_as_one_of_single_kernels(compiled, make_data, make_network, monkeypatch):
    """Dropout, batch norm, mixing and renewed coordinates among it, and blocks, up to where the step is another."""
    monkeypatch.setattr("kronsearch.training.optimizer._RENEWAL", 5)
    settings = TrainSettings(**{**vars(SETTINGS), "compiled": compiled, "hints": 0.5})
    data, states = make_data(), []
    for recorded in (True, False):
        network = factorised(make_network(0, dropout=0.2))
        with trainer_of(network, make_network(1).cuda(), data, settings) as trainer:
            if not recorded:
                trainer._replay = None
            losses = [trainer.advance(7).loss for _ in range(3)]
            if recorded:
                assert trainer._replay.is_recorded, trainer.refusal
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
    assert resumed._replay is None, "what is closed holds no memory"


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
        network = wrap(factorised(make_network(0, dropout=0.2)))
        with trainer_of(network, None, data, blocks=()) as trainer:
            trainer.advance(21)
            assert trainer.refusal == ("it waits for the device" if wrap is Waiting else None)
            assert trainer._replay.is_recorded == (wrap is nn.Sequential)
            results.append([parameter.detach().clone() for parameter in network.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


@on_cuda
def test_evaluation_between_steps_sees_the_weights_of_then(make_data, make_network):
    """A factorised layer keeps what it forms of its factors, which a graph changes without torch knowing."""
    network = factorised(make_network(0))
    with trainer_of(network, make_network(1).cuda(), make_data()) as trainer:
        trainer.advance(6)
        images, seen = torch.ones(1, 2, 6, 5, device="cuda"), []
        for _ in range(3):
            network.eval()
            with torch.no_grad():
                seen.append(network.conv(images).clone())
            trainer.advance(3)
        assert trainer._replay.is_recorded
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
