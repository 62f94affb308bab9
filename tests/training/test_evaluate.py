import math

import pytest
import torch

from kronsearch.errors import DataError
from kronsearch.training.evaluate import evaluate, outputs, within_error


@pytest.mark.parametrize("batch_size", [1, 5, 500])
def test_evaluation_is_the_mean_over_examples_whatever_the_batches(make_data, make_network, batch_size):
    data, network, teacher = make_data(), make_network(0).double(), make_network(1).double()
    data._normalise = lambda images: images.double() / 255  # float64, so that the batches' rounding can't matter
    images, labels = data._splits["val"]
    with torch.no_grad():
        logits, teacher_logits = network(images.double() / 255), teacher(images.double() / 255)
    probabilities, teacher_probabilities = logits.softmax(1).tolist(), teacher_logits.softmax(1).tolist()
    n = len(labels)
    result = evaluate(network, data, "val", teacher_outputs=teacher_logits, batch_size=batch_size)
    assert result.n == n
    hits = [row.index(max(row)) == label for row, label in zip(probabilities, labels.tolist(), strict=True)]
    assert result.metric == pytest.approx(sum(hits) / n)
    losses = [-math.log(row[label]) for row, label in zip(probabilities, labels.tolist(), strict=True)]
    assert result.loss == pytest.approx(sum(losses) / n)
    divergences = [
        sum(t * math.log(t / s) for t, s in zip(*rows, strict=True))
        for rows in zip(teacher_probabilities, probabilities, strict=True)
    ]
    assert result.divergence == pytest.approx(sum(divergences) / n)


def test_a_network_does_not_diverge_from_its_own_outputs(make_data, make_network):
    data, network = make_data(), make_network()
    for limit in (None, 7):
        result = evaluate(
            network, data, "train", limit=limit, teacher_outputs=outputs(network, data, "train", limit=limit)
        )
        assert result.divergence == pytest.approx(0, abs=1e-6)
        assert result.n == (limit or 30)
    assert evaluate(network, data, "test").divergence is None


def test_outputs_are_in_the_order_of_the_split_on_the_cpu(make_data, make_network):
    data, network = make_data(), make_network()
    with torch.no_grad():
        expected = torch.cat([network(images) for images, _ in data.batches("test", 1)])
    result = outputs(network, data, "test", batch_size=4)
    assert result.dtype == torch.float32
    # Convolutions of other batch sizes may add in another order.
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_off_and_the_modes_come_back(make_data, make_network):
    data, network = make_data(), make_network(dropout=0.9)
    network.train()
    network.norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert evaluate(network, data, "val") == evaluate(network, data, "val")
    assert network.training
    assert network.drop.training
    assert not network.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_teacher_outputs_of_another_subset_are_an_error(make_data, make_network):
    data, network = make_data(), make_network()
    with pytest.raises(ValueError, match="12 teacher outputs for 5 examples"):
        evaluate(network, data, "val", limit=5, teacher_outputs=outputs(network, data, "val"))


@pytest.mark.parametrize(("gap", "alike"), [(0.5, True), (-0.5, True), (0.500001, False), (-0.500001, False)])
def test_scores_are_alike_within_the_error_of_their_difference(gap, alike):
    assert within_error(gap, 0.3, 0.4) is alike
    assert within_error(0.0, 0.0, 0.0)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_divergence_at_a_temperature_is_that_of_the_softened_outputs(make_data, make_network, temperature):
    data, network, teacher = make_data(), make_network(0), make_network(1)
    logits, wanted = (outputs(each, data, "val").double() for each in (network, teacher))
    student, taught = ((each / temperature).softmax(1) for each in (logits, wanted))
    expected = temperature**2 * (taught * (taught / student).log()).sum(1).mean()
    found = evaluate(network, data, "val", teacher_outputs=wanted.float(), temperature=temperature)
    assert found.divergence == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("judge", [evaluate, outputs])
@pytest.mark.parametrize(
    ("limit", "given", "told"), [(None, 0, "0 .* where 12"), (None, 11, "11 .* 12"), (4, 5, "5 .* 4")]
)
def test_a_split_of_other_examples_than_it_says_is_an_error(make_data, make_network, judge, limit, given, told):
    data = make_data()
    images, labels = next(data.batches("val", 12))
    data.batches = lambda *told, **named: iter([(images[:given], labels[:given])] if given else [])
    with pytest.raises(DataError, match=f"the val split of data 'tiny' gave {told} were asked for"):
        judge(make_network(), data, "val", limit=limit)


def test_outputs_of_other_sizes_from_batch_to_batch_are_an_error(make_data, make_network):
    data, network = make_data(), make_network()
    images, labels = next(data.batches("val", 12))
    data.batches = lambda *told, **named: iter([(images[:6], labels[:6]), (images[6:, ..., 1:], labels[6:])])
    with pytest.raises(DataError, match=r"of shape \(4, 6, 4\) and of shape \(4, 6, 5\), and .*pad the data"):
        outputs(network.conv, data, "val")
