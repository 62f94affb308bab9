import pytest

from kronsearch.training.schedule import default_rate


@pytest.mark.parametrize(
    ("steps", "rate"),
    [(1, 2.5e-6), (63, 157.5e-6), (200, 5e-4), (351, 5e-4), (1000, 5e-4), (2000, 1e-3), (4000, 2e-3), (10**6, 2e-3)],
)
def test_the_rate_of_a_run_grows_with_its_steps_but_not_beyond(steps, rate):
    assert default_rate(steps) == pytest.approx(rate)
