import pytest
import torch

from kronsearch.errors import DataError
from kronsearch.training.batches import Batches


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def taken_from(batches, count):
    return [(inputs, labels, seed) for (inputs, labels), seed in (batches.take() for _ in range(count))]


def alike(first, second):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_they_are_the_epochs_of_the_data_with_a_seed_drawn_after_each(make_data):
    data, generator = make_data(), seeded()
    wanted = []
    for _ in range(2):
        for inputs, labels in data.train_batches(10, generator=generator):
            wanted.append((inputs, labels, int(torch.randint(2**62, (), generator=generator))))
    assert alike(taken_from(Batches(data, 10, generator=seeded()), 6), wanted)


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("asked", [False, True])
def test_from_a_place_they_go_on_as_they_would_have(make_data, before, asked):
    data, left = make_data(), Batches(make_data(), 10, generator=seeded())
    whole = taken_from(Batches(data, 10, generator=seeded()), 12)
    for _ in range(before):
        left.take()
        if asked:
            left.place()  # which changes nothing
    start, taken = left.place()
    assert taken == before % 3  # of an epoch that has ended, nothing is made again
    again = Batches(data, 10, generator=seeded(9))
    again.take()
    again.go_to(start, taken)
    assert alike(taken_from(again, 12 - before), whole[before:])
    assert alike(taken_from(left, 12 - before), whole[before:])


def test_an_epoch_without_batches_is_an_error(make_data):
    data = make_data()
    data.train_batches = lambda *args, **options: iter(())
    with pytest.raises(DataError, match="'tiny' gave no training batch of 10"):
        Batches(data, 10, generator=seeded()).take()
