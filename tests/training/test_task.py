import math

import pytest
import torch

from kronsearch.errors import DataError
from kronsearch.training.task import Classification

LOGITS = [[2.0, -1.0, 0.5], [0.0, 0.0, 3.0], [1.0, 1.5, -2.0]]
TEACHER = [[1.0, 0.0, 0.0], [0.5, -0.5, 1.0], [-1.0, 1.0, 0.0]]
LABELS = [0, 1, 1]


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_loss_is_the_mean_negative_log_probability_of_the_label():
    expected = -sum(math.log(softmax(row)[label]) for row, label in zip(LOGITS, LABELS, strict=True)) / len(LABELS)
    loss = Classification().loss(torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(LABELS))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_metric_counts_the_correct_examples():
    expected = sum(row.index(max(row)) == label for row, label in zip(LOGITS, LABELS, strict=True))
    assert Classification(3).metric_sum(torch.tensor(LOGITS), torch.tensor(LABELS)) == expected


def test_divergence_is_the_mean_kl_from_teacher_to_student():
    expected = 0.0
    for student_row, teacher_row in zip(LOGITS, TEACHER, strict=True):
        pairs = zip(softmax(teacher_row), softmax(student_row), strict=True)
        expected += sum(t * math.log(t / s) for t, s in pairs) / len(LOGITS)
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in (LOGITS, TEACHER))
    assert Classification().divergence(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_divergence_is_zero_for_equal_distributions_and_never_negative():
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 5
    task = Classification()
    assert task.divergence(logits, logits).item() == 0
    for row in logits + 3:  # another constant, the same distribution
        assert 0 <= task.divergence(row[None], row[None] - 3).item() < 1e-6


def test_divergence_pulls_the_student_towards_the_teacher():
    student = torch.tensor(LOGITS, requires_grad=True)
    teacher = torch.tensor(TEACHER)
    before = Classification().divergence(student, teacher)
    before.backward()
    after = Classification().divergence(student - 0.5 * student.grad, teacher)
    assert 0 < after.item() < before.item()


def test_half_precision_outputs_are_judged_in_float32():
    outputs = torch.tensor(LOGITS, dtype=torch.bfloat16)
    assert Classification().loss(outputs, torch.tensor(LABELS)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 1)])
def test_outputs_of_other_classes_are_an_error(shape):
    with pytest.raises(DataError, match=r"shape \(3, .*classification needs \(examples, 3 classes\)"):
        Classification(3).metric_sum(torch.zeros(shape), torch.tensor(LABELS))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.tensor(LABELS, dtype=torch.int32), r"labels of 3 examples are torch.int32 of shape \(3,\).* needs"),
        (torch.tensor([True, False, True]), "torch.bool"),
        (torch.tensor(LABELS, dtype=torch.float32), "torch.float32"),
        (torch.tensor(LABELS)[:, None], r"shape \(3, 1\)"),
        (torch.eye(3), r"shape \(3, 3\)"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.tensor([1, 2, 3]), "labels from 1 to 3, the network tells 3 classes apart: number them from 0 to 2"),
        (torch.tensor([0, -100, 1]), "labels from -100 to 1"),
    ],
)
@pytest.mark.parametrize("judge", [Classification().loss, Classification().metric_sum])
def test_labels_that_are_none_are_an_error(labels, told, judge):
    with pytest.raises(DataError, match=told) as caught:
        judge(torch.tensor(LOGITS), labels)
    assert "\n" not in str(caught.value)
