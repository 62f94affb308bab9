import pytest
import torch

from kronsearch.errors import DataError, ModelError, TrainingError
from kronsearch.training.team import ALONE, Team, join, joined


@pytest.mark.parametrize(("examples", "size"), [(8, 2), (13, 2), (7, 3), (3, 3)])
def test_the_shares_make_up_the_batch_and_their_weighed_means_its_mean(examples, size):
    inputs = torch.randn(examples, 4, generator=torch.Generator().manual_seed(0))
    shares = [Team(rank, size).share(examples) for rank in range(size)]
    assert torch.equal(torch.cat([inputs[own] for own, _ in shares]), inputs)
    mean = sum(part * inputs[own].mean() for own, part in shares) / size
    torch.testing.assert_close(mean, inputs.mean())


def test_a_batch_that_is_too_small_for_all_is_an_error():
    with pytest.raises(DataError, match="a batch of 2 has nothing for each of 3 processes"):
        Team(0, 3).share(2)


def test_alone_nothing_is_shared():
    model, value = torch.nn.Linear(2, 2), torch.ones(())
    assert ALONE.share(2) == (slice(0, 2), 1.0)
    assert ALONE.wrapped(model, torch.device("cpu")) is model
    assert ALONE.average(value) is value
    assert ALONE.from_leader("word") == "word"
    assert join("cpu") == (ALONE, torch.device("cpu"))


def test_the_team_is_told_by_the_environment(monkeypatch):
    assert joined() == ALONE
    monkeypatch.setenv("RANK", "1")
    assert joined() == ALONE  # of nobody else
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert joined() == Team(1, 2)
    assert not joined().leads


def test_several_can_not_train_compiled_networks():
    ALONE.refuse_compiling()
    with pytest.raises(TrainingError, match=r"2 processes can't train compiled networks together: leave --compile out"):
        Team(0, 2).refuse_compiling()


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("nothing", "there is no device 'nothing': pass cpu"),
        (None, "there is no device None: pass cpu"),
        ("cuda", "there is no CUDA device 'cuda' that this torch can use: pass another, or cpu"),
        (torch.device("cuda", 1), "there is no CUDA device 'cuda:1'"),
    ],
)
def test_a_device_that_there_is_not_is_refused(device, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if device == "cuda" else 1)
    with pytest.raises(ModelError, match=told) as caught:
        join(device)
    assert "\n" not in str(caught.value)


def test_each_process_needs_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, told in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, told)
    with pytest.raises(ModelError, match="no CUDA device 'cuda:1' that this torch can use"):
        join("cuda")
