import math

import pytest
import torch

from kronsearch.errors import DataError
from kronsearch.training.data import (
    Normalisation,
    TensorData,
    check_splits,
    endless_train_batches,
    epoch_order,
    fixed_subset,
    train_batch_count,
)
from kronsearch.training.task import Classification


def normalised(images, mean=(0.4, 0.5), std=(0.2, 0.3)):
    """The textbook formula, one channel after the other, in float64."""
    result = images.double() / 255
    for channel in range(images.shape[1]):
        result[:, channel] = (result[:, channel] - mean[channel]) / std[channel]
    return result


def test_normalisation_is_the_textbook_formula():
    images = torch.arange(256).to(torch.uint8).view(2, 2, 8, 8)
    result = Normalisation((0.4, 0.5), (0.2, 0.3))(images)
    assert result.dtype == torch.float32
    # The multiply-add of float32 loses a few ulp of values up to 3.
    torch.testing.assert_close(result.double(), normalised(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (1, False), (0, True), (2, True)])
def test_each_training_image_is_a_window_of_its_black_padded_original(make_data, pad, flip):
    data = make_data(pad=pad, flip=flip)
    images, _ = data._splits["train"]
    height, width = images.shape[2:]
    padded = torch.zeros(len(images), 2, height + 2 * pad, width + 2 * pad, dtype=torch.uint8)
    padded[:, :, pad : pad + height, pad : pad + width] = images
    possible = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, :, top : top + height, left : left + width]
            possible[top, left, False] = normalised(window)
            if flip:
                possible[top, left, True] = normalised(torch.flip(window, [3]))
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for _ in range(20):
        order = next(epoch_order(len(images), len(images), torch.Generator().set_state(generator.get_state())))
        ((batch, labels),) = data.train_batches(len(images), generator=generator)
        assert torch.equal(labels, data._splits["train"][1][order])
        for image, original in zip(batch, order.tolist(), strict=True):
            matches = [key for key, all_images in possible.items() if (all_images[original] - image).abs().max() < 1e-5]
            assert len(matches) == 1
            seen.update(matches)
    assert seen == set(possible)  # 600 draws of at most 50


def test_an_epoch_takes_every_image_at_most_once_and_drops_the_short_batch(make_data):
    data = make_data(pad=0, flip=False)
    batches = list(data.train_batches(8, generator=torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [8] * (30 // 8)
    taken = torch.cat([images for images, _ in batches])
    assert len(torch.unique(taken, dim=0)) == 8 * (30 // 8)
    assert len(batches) == train_batch_count(30, 8)


def test_the_short_batch_stays_if_it_is_the_only_one(make_data):
    ((_, labels),) = make_data().train_batches(100, generator=torch.Generator().manual_seed(0))
    assert len(labels) == 30
    assert train_batch_count(30, 100) == 1


def test_the_generator_decides_the_epoch(make_data):
    data = make_data()

    def epoch(seed):
        return torch.cat(
            [images for images, _ in data.train_batches(10, generator=torch.Generator().manual_seed(seed))]
        )

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))


def test_endless_batches_are_epoch_after_epoch(make_data):
    data = make_data()
    generator = torch.Generator().manual_seed(0)
    epochs = [batch for _ in range(2) for batch in data.train_batches(10, generator=generator)]
    endless = endless_train_batches(data, 10, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(images, next(endless)[0]) for images, _ in epochs)


def test_epochs_without_a_batch_are_an_error_instead_of_a_hang(make_data, monkeypatch):
    data = make_data()
    monkeypatch.setattr(data, "train_batches", lambda batch_size, **_: iter(()))
    with pytest.raises(DataError, match="data 'tiny' gave no training batch of 10"):
        next(endless_train_batches(data, 10, generator=torch.Generator()))


def test_batches_are_the_split_in_order_to_the_last_image(make_data):
    data = make_data()
    batches = list(data.batches("val", 5))
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    images, labels = data._splits["val"]
    torch.testing.assert_close(torch.cat([b for b, _ in batches]).double(), normalised(images), atol=1e-6, rtol=0)
    assert torch.equal(torch.cat([b for _, b in batches]), labels)


def test_a_limit_takes_a_fixed_random_subset(make_data):
    small, large = fixed_subset(1000, 50, 0), fixed_subset(1000, 200, 0)
    assert torch.equal(small, fixed_subset(1000, 50, 0))
    assert not torch.equal(small, fixed_subset(1000, 50, 1))
    assert len(set(small.tolist())) == 50
    assert set(small.tolist()) < set(large.tolist())
    assert small[-1] > 500
    assert torch.equal(fixed_subset(10, 10, 0), torch.arange(10))
    assert sum(len(labels) for _, labels in make_data().batches("train", 4, limit=7)) == 7


def test_fingerprint_is_of_the_contents(make_data):
    data = make_data()
    assert data.fingerprint == make_data().fingerprint
    assert data.fingerprint != make_data(flip=False).fingerprint
    relabelled = make_data()
    relabelled._splits["test"][1][-1] = 0
    repainted = make_data()
    repainted._splits["val"][0][0, 0, 0, 0] += 1
    assert len({data.fingerprint, relabelled.fingerprint, repainted.fingerprint}) == 3


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), r"val split has images of torch\.float32"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(3).long(), r"labels of torch\.int64 and shape \(3,\)"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4).int(), r"labels of torch\.int32"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, 1).long(), r"shape \(4, 1\)"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0).long(), "has 0 images"),
        (torch.zeros(4, 1, 2, 3, dtype=torch.uint8), torch.zeros(4).long(), r"shape \(1, 2, 3\)"),
    ],
)
def test_malformed_splits_are_errors(images, labels, message):
    good = (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2).long())
    with pytest.raises(DataError, match=message):
        TensorData(
            {"train": good, "val": (images, labels), "test": good},
            spec="bad",
            seed=0,
            task=Classification(1),
            mean=(0.5,),
            std=(0.5,),
            pad=0,
            flip=False,
        )


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,) * 3, (0.5,) * 3),
        ((0.5,), (0.5, 0.5)),
        ((), ()),
        ((0.5,), (0.0,)),
        ((0.5,), (math.nan,)),
        ((math.inf,), (1.0,)),
    ],
)
def test_a_normalisation_that_the_images_can_not_have_is_an_error(mean, std):
    split = (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2).long())
    splits = {"train": split, "val": split, "test": split}
    with pytest.raises(DataError, match=r"images of shape \(1, 2, 2\) are .* one number per channel is needed of each"):
        TensorData(splits, spec="bad", seed=0, task=Classification(1), mean=mean, std=std, pad=0, flip=False)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_without_an_example_is_an_error(make_data, split):
    data = make_data()
    check_splits(data)
    size = data.size
    data.size = lambda asked: 0 if asked == split else size(asked)
    with pytest.raises(DataError, match=f"data 'tiny' have no example in the {split} split"):
        check_splits(data)
