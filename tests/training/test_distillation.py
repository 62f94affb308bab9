import pytest
import torch

from kronsearch.training.distillation import softened_divergence, training_loss
from kronsearch.training.schedule import TrainSettings
from kronsearch.training.task import Classification

TASK = Classification()


@pytest.fixture
def outputs():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def wanted():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def of(outputs, wanted, weight):
    labels = [(1.0, torch.arange(6) % 4)]
    return training_loss(outputs, labels, wanted, TASK, TrainSettings(epochs=1, label_weight=weight))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_labels_and_teacher_have_their_parts(outputs, wanted, weight):
    settings = TrainSettings(epochs=1)
    divergence = softened_divergence(outputs, wanted, TASK, settings.temperature)
    own = torch.nn.functional.cross_entropy(outputs, torch.arange(6) % 4)
    torch.testing.assert_close(of(outputs, wanted, weight), (1 - weight) * divergence + weight * own)


def test_what_has_no_part_is_not_looked_at(outputs, wanted):
    assert of(outputs, torch.full_like(wanted, torch.inf), 1.0) == of(outputs, None, 0.0)


def test_parts_of_mixed_examples_add_up(outputs):
    first, second = torch.arange(6) % 4, (torch.arange(6) + 1) % 4
    mixed = training_loss(outputs, [(0.75, first), (torch.tensor(0.25), second)], None, TASK, TrainSettings(epochs=1))
    torch.testing.assert_close(mixed, 0.75 * TASK.loss(outputs, first) + 0.25 * TASK.loss(outputs, second))
