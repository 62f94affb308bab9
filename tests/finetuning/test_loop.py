import pytest

from kronsearch.finetuning.loop import supersedes
from kronsearch.training.evaluate import Evaluation


def scored(metric, divergence=None, error=0.0):
    return Evaluation(metric, 0.0, divergence, 100, error)


@pytest.mark.parametrize(
    ("new", "kept", "wanted"),
    [
        (scored(0.9), None, True),
        (scored(0.91), scored(0.90), True),
        (scored(0.89), scored(0.90), False),
        (scored(0.90), scored(0.90), True),  # of equals the later one
        (scored(0.89, 0.1, 0.01), scored(0.90, 0.2, 0.01), True),  # alike: less divergence
        (scored(0.91, 0.2, 0.01), scored(0.90, 0.1, 0.01), False),
        (scored(0.93, 0.2, 0.03), scored(0.90, 0.1, 0.02), False),  # 0.03 < √(0.03² + 0.02²)
        (scored(0.92, 0.2, 0.012), scored(0.90, 0.1, 0.012), True),  # 0.02 > √2 · 0.012
        (scored(0.89, 0.1, 0.01), scored(0.90, 0.1, 0.01), True),
    ],
)
def test_the_better_one_is_kept_and_among_the_alike_the_nearer(new, kept, wanted):
    assert supersedes(new, kept, higher_is_better=True) is wanted


def test_an_error_that_shall_be_low_is_better_when_it_is_lower():
    assert supersedes(scored(0.1), scored(0.2), higher_is_better=False)
    assert not supersedes(scored(0.3), scored(0.2), higher_is_better=False)
