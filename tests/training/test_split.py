import torch

from kronsearch.training.split import stratified_split

LABELS = torch.tensor([0] * 40 + [1] * 25 + [2] * 10 + [3] * 2 + [4])


def test_every_class_gives_its_fraction():
    kept, held = stratified_split(LABELS, 0.2, 0)
    assert torch.bincount(LABELS[held], minlength=5).tolist() == [
        round(0.2 * 40),
        round(0.2 * 25),
        round(0.2 * 10),
        1,
        0,
    ]
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(LABELS)))
    assert kept.tolist() == sorted(kept.tolist())
    assert held.tolist() == sorted(held.tolist())


def test_something_is_kept_of_every_class():
    kept, _ = stratified_split(LABELS, 0.99, 0)
    assert set(LABELS[kept].tolist()) == {0, 1, 2, 3, 4}


def test_the_seed_decides():
    first, again, other = (stratified_split(LABELS, 0.2, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
