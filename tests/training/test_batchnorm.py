import pytest
import torch
from torch import nn

from kronsearch.errors import ModelError
from kronsearch.training import batchnorm
from kronsearch.training.batchnorm import reestimate_batchnorm


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(batchnorm, "precision_for", lambda device: "float32")


def test_statistics_are_the_plain_average_over_augmented_batches(make_data):
    data = make_data()
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Flatten())
    model[0].running_mean.fill_(100)
    reestimate_batchnorm(model, data, images=20, batch_size=10, generator=torch.Generator().manual_seed(3))
    batches = [images.double() for images, _ in data.train_batches(10, generator=torch.Generator().manual_seed(3))][:2]
    means = sum(batch.mean(dim=(0, 2, 3)) for batch in batches) / 2
    variances = sum(batch.var(dim=(0, 2, 3), unbiased=True) for batch in batches) / 2
    torch.testing.assert_close(model[0].running_mean.double(), means, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), variances, atol=1e-6, rtol=1e-5)
    assert model[0].momentum == 0.3


def test_more_images_than_there_are_take_further_epochs(make_data):
    model = nn.Sequential(nn.BatchNorm2d(2))
    reestimate_batchnorm(model, make_data(), images=70, batch_size=10, generator=torch.Generator().manual_seed(0))
    assert model[0].num_batches_tracked == 70 / 10


def test_only_statistics_change_and_the_modes_come_back(make_data, make_network):
    network = make_network(dropout=0.9).train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    reestimate_batchnorm(network, make_data(), generator=torch.Generator().manual_seed(0))
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert network.training
    assert network.drop.training
    assert not network.norm.training


def test_dropout_does_not_disturb_the_statistics(make_data):
    def statistics(dropout):
        model = nn.Sequential(nn.Dropout(dropout), nn.BatchNorm2d(2))
        reestimate_batchnorm(model, make_data(), generator=torch.Generator().manual_seed(0))
        return model[1].running_var

    assert torch.equal(statistics(0.0), statistics(0.9))


def test_without_tracking_batch_norms_nothing_is_run(make_data):
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    reestimate_batchnorm(model, make_data(), generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_the_momentum_comes_back_after_an_error(make_data):
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Linear(100, 1))
    with pytest.raises(ModelError, match=r"can't run on inputs of shape .* shapes cannot be multiplied"):
        reestimate_batchnorm(model, make_data(), generator=torch.Generator().manual_seed(0))
    assert model[0].momentum == 0.3
