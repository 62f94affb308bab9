import pytest

from kronsearch.training.schedule import TrainSettings, default_rate, total_steps


@pytest.mark.parametrize(
    ("steps", "rate"),
    [(1, 2.5e-6), (63, 157.5e-6), (200, 5e-4), (351, 5e-4), (1000, 5e-4), (2000, 1.5e-3), (3500, 3e-3), (10**6, 3e-3)],
)
def test_the_rate_of_a_run_grows_with_its_steps_but_not_beyond(steps, rate):
    assert default_rate(steps) == default_rate(steps, 128) == pytest.approx(rate)


@pytest.mark.parametrize(("batch_size", "times"), [(512, 2), (256, 2**0.5), (32, 0.5)])
def test_the_rate_grows_with_the_root_of_the_batch(batch_size, times):
    assert default_rate(500, batch_size) == pytest.approx(times * default_rate(500))


@pytest.mark.parametrize(("epochs", "steps"), [(0.07, 7), (0.071, 8), (0.29, 29), (1e-9, 1), (2.0, 200)])
def test_steps_are_those_of_the_epochs_as_they_are_written(epochs, steps):
    assert total_steps(TrainSettings(epochs=epochs, batch_size=10), 1000) == steps
