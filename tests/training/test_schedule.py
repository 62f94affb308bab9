import pytest

from kronsearch.training.schedule import default_rate


@pytest.mark.parametrize(
    ("steps", "rate"),
    [(1, 1e-6), (63, 63e-6), (200, 2e-4), (351, 2e-4), (1000, 2e-4), (2000, 4e-4), (5000, 1e-3), (10**6, 1e-3)],
)
def test_the_rate_of_a_run_grows_with_its_steps_but_not_beyond(steps, rate):
    assert default_rate(steps) == pytest.approx(rate)
